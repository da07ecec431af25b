#include "base/environment.h"

#include <pwd.h>
#include <unistd.h>

#include <charconv>
#include <cstdlib>

namespace tailor {

EnvLookup process_env() {
  return [](const char* name) -> const char* { return std::getenv(name); };
}

std::string user_name() {
  const passwd* user = ::getpwuid(::geteuid());
  return user != nullptr ? user->pw_name : std::to_string(::geteuid());
}

std::optional<std::string> Environment::text(const char* name) const {
  const char* value = env_(name);
  if (value == nullptr || *value == '\0') return std::nullopt;
  return value;
}

namespace {

template <class Number>
std::optional<Number> whole_text(const std::string& text) {
  Number value{};
  const auto [end, fault] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (fault != std::errc() || end != text.data() + text.size()) return std::nullopt;
  return value;
}

}  // namespace

std::optional<int> Environment::number(const char* name, const std::string& mend) const {
  const auto found = text(name);
  if (!found) return std::nullopt;
  const auto value = whole_text<int>(*found);
  if (value && *value >= 0) return value;
  throw wrong(std::string(name) + "='" + *found + "' is not a whole number of 0 or more", name,
              mend);
}

std::optional<double> Environment::positive(const char* name, const std::string& mend) const {
  const auto found = text(name);
  if (!found) return std::nullopt;
  const auto value = whole_text<double>(*found);
  if (value && *value > 0 && *value < 1e9) return value;
  throw wrong(std::string(name) + "='" + *found + "' is not a number above 0", name, mend);
}

}  // namespace tailor
