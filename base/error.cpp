#include "base/error.h"

#include <cerrno>
#include <cstring>
#include <utility>

namespace tailor {
namespace {

void append_part(std::string& out, std::string_view label, std::string_view text) {
  if (text.empty()) return;
  out += label;
  constexpr std::string_view kIndent = "         ";  // continuation lines align with the text
  for (const char c : text) {
    out += c;
    if (c == '\n') out += kIndent;
  }
  out += '\n';
}

}  // namespace

Error::Error(Fault fault, Parts parts)
    : std::runtime_error(parts.what), fault_(fault), parts_(std::move(parts)) {}

std::string to_text(const Error& error) {
  std::string out;
  append_part(out, "error: ", error.parts().what);
  append_part(out, "  where: ", error.parts().where);
  append_part(out, "  mend:  ", error.parts().mend);
  return out;
}

Error io_error(int error_number, std::string_view doing, std::string_view where) {
  const bool full = error_number == ENOSPC || error_number == EDQUOT;
  Error::Parts parts{std::string(doing) + ": " + std::strerror(error_number), std::string(where),
                     ""};
  if (full) {
    parts.mend = "Free space on that disk, or name a folder on another one.";
  } else if (error_number == EACCES || error_number == EPERM || error_number == EROFS) {
    parts.mend = "Choose a folder this user may write to, or change its permissions.";
  } else if (error_number == ENOENT) {
    parts.mend = "Check the path; relative paths start at the working directory.";
  } else {
    parts.mend = "Check the disk and its mount, then run the command again.";
  }
  return {Fault::io, std::move(parts)};
}

namespace detail {
void check_failed(const char* expression, const char* file, int line, const std::string& note) {
  throw Error(Fault::internal, {"internal check failed: " + std::string(expression) +
                                    (note.empty() ? "" : " (" + note + ")"),
                                std::string(file) + ":" + std::to_string(line),
                                "This is a mistake in Tailor. Please report it with this text."});
}
}  // namespace detail

}  // namespace tailor
