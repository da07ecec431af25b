#include "base/log.h"

#include <spdlog/sinks/stdout_color_sinks.h>
#include <spdlog/spdlog.h>

#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <utility>

namespace tailor {
namespace {

spdlog::level::level_enum to_spdlog(LogLevel level) {
  switch (level) {
    case LogLevel::debug:
      return spdlog::level::debug;
    case LogLevel::info:
      return spdlog::level::info;
    case LogLevel::warning:
      return spdlog::level::warn;
    case LogLevel::error:
      return spdlog::level::err;
  }
  return spdlog::level::info;
}

std::shared_ptr<spdlog::logger>& logger() {
  static std::shared_ptr<spdlog::logger> instance = [] {
    auto made = std::make_shared<spdlog::logger>(
        "tailor", std::make_shared<spdlog::sinks::stderr_color_sink_mt>());
    made->set_pattern("%H:%M:%S %^%l%$ %v");
    return made;
  }();
  return instance;
}

std::mutex& before_mutex() {
  static std::mutex instance;
  return instance;
}

std::function<void()>& before() {
  static std::function<void()> instance;
  return instance;
}

}  // namespace

void start_log(LogLevel level) { logger()->set_level(to_spdlog(level)); }

void before_log(std::function<void()> call) {
  const std::scoped_lock lock(before_mutex());
  before() = std::move(call);
}

void log(LogLevel level, std::string_view message) {
  const std::scoped_lock lock(before_mutex());
  if (before() && logger()->should_log(to_spdlog(level))) before()();
  logger()->log(to_spdlog(level), spdlog::string_view_t(message.data(), message.size()));
}

}  // namespace tailor
