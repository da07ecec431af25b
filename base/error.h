#pragma once

#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>

namespace tailor {

/// Why a run ended, as the process exit code a scheduler acts on (sysexits.h where one fits).
enum class Fault {
  usage = 2,          ///< recipe or command line wrong
  bad_file = 65,      ///< a data, model or adapter file is unusable
  does_not_fit = 66,  ///< memory or disk too small for what was asked
  device = 69,        ///< a device or a rank failed
  internal = 70,      ///< diverged, or a mistake of ours
  io = 74,            ///< reading or writing failed, or the disk is full
  stopped = 75,       ///< interrupted or preempted; resumable
  budget = 76,        ///< stopped by the budget
};

/// A failure that ends the run, in three parts a person can act on without our source.
///
///   error: <what>        one lower-case line: what was found, what was needed, with units
///     where: <where>     file:line:col and key; or tensor, shard, offset; may hold several lines
///     mend:  <mend>      sentences that name the very setting and value, or the command to run
class Error : public std::runtime_error {
 public:
  struct Parts {
    std::string what, where, mend;
  };

  Error(Fault fault, Parts parts);

  Fault fault() const noexcept { return fault_; }
  const Parts& parts() const noexcept { return parts_; }
  int exit_code() const noexcept { return static_cast<int>(fault_); }

 private:
  Fault fault_;
  Parts parts_;
};

/// The text that goes to stderr: the three parts, one trailing newline. Empty parts are left out.
std::string to_text(const Error& error);

/// "<doing>: <strerror(errno)>" as an Error{io}, a full disk with advice of its own.
/// `error_number` is an errno value; `where` names the path.
Error io_error(int error_number, std::string_view doing, std::string_view where);

namespace detail {
[[noreturn]] void check_failed(const char* expression, const char* file, int line,
                               const std::string& note);
}  // namespace detail

}  // namespace tailor

/// For our own mistakes only, never for user input. On in every build; throws Error{internal}.
#define TAILOR_CHECK(expression, ...)                                                            \
  do {                                                                                           \
    if (!(expression)) [[unlikely]] {                                                            \
      ::tailor::detail::check_failed(#expression, __FILE__, __LINE__, std::string{__VA_ARGS__}); \
    }                                                                                            \
  } while (false)
