#pragma once

#include <functional>
#include <optional>
#include <string>

#include "base/error.h"

namespace tailor {

/// Reads one environment variable; nullptr when it is not set.
using EnvLookup = std::function<const char*(const char* name)>;
/// getenv().
EnvLookup process_env();
/// The user this process runs as, by name; by number where it has none.
std::string user_name();

/// Variables with their values checked. Unset and empty are the same: launchers' templates leave
/// empty ones behind.
class Environment {
 public:
  /// `env` must outlive it.
  explicit Environment(const EnvLookup& env) : env_(env) {}

  std::optional<std::string> text(const char* name) const;
  bool has(const char* name) const { return text(name).has_value(); }
  std::string text_or(const char* name, const std::string& fallback) const {
    return text(name).value_or(fallback);
  }
  /// A whole number of 0 or more; throws Error{usage} naming the variable, with `mend`, for what is
  /// none.
  std::optional<int> number(const char* name, const std::string& mend) const;
  /// As number(), of a number above 0 with decimals.
  std::optional<double> positive(const char* name, const std::string& mend) const;

  static Error wrong(std::string what, const std::string& names, std::string mend) {
    return {Fault::usage, {std::move(what), "environment: " + names, std::move(mend)}};
  }

 private:
  const EnvLookup& env_;
};

}  // namespace tailor
