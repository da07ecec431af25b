#include "base/url.h"

#include <algorithm>

#include "base/text.h"

namespace tailor {
namespace {

/// Query parameters of libpq, and of addresses in general, that are secrets.
bool is_secret(std::string_view name) {
  const std::string word = lower(name);
  return word.find("password") != std::string::npos || word == "passwd" || word == "token";
}

}  // namespace

std::string without_password(std::string_view address) {
  const std::size_t scheme = address.find("://");
  if (scheme == std::string_view::npos) return std::string(address);
  const std::size_t authority = scheme + 3;
  // A password with "/", "?" or "#" in it should have been percent-encoded; it is hidden anyhow.
  std::size_t end = std::min(address.find_first_of("/?#", authority), address.size());
  const std::size_t at = address.rfind('@');
  const std::size_t colon = address.find(':', authority);
  if (at != std::string_view::npos && at >= end && colon < end) {
    const std::string_view between = address.substr(end, at - end);
    if (between.find('=') == std::string_view::npos) {
      end = std::min(address.find_first_of("/?#", at), address.size());
    }
  }
  const std::string_view inside = address.substr(authority, end - authority);
  std::string out(address.substr(0, authority));
  const std::size_t user_end = inside.rfind('@');
  if (user_end == std::string_view::npos) {
    out += inside;
  } else {
    out += inside.substr(0, std::min(inside.find(':'), user_end));
    out += inside.substr(user_end);
  }
  const std::string_view rest = address.substr(end);
  const std::size_t query = rest.find('?');
  out += rest.substr(0, query);
  if (query == std::string_view::npos) return out;
  const std::size_t fragment = std::min(rest.find('#', query), rest.size());
  std::string kept;
  for (const std::string& part : split(rest.substr(query + 1, fragment - query - 1), '&')) {
    if (is_secret(part.substr(0, part.find('=')))) continue;
    kept += (kept.empty() ? "?" : "&") + part;
  }
  out += kept;
  out += rest.substr(fragment);
  return out;
}

bool has_scheme(std::string_view text, std::string_view scheme) {
  return text.size() > scheme.size() + 3 && lower(text.substr(0, scheme.size())) == scheme &&
         text.substr(scheme.size(), 3) == "://";
}

}  // namespace tailor
