#pragma once

#include <functional>
#include <string_view>

namespace tailor {

/// Messages for the person at the terminal, always on stderr (stdout carries results only).
/// A thin facade: its .cpp is the only file that sees spdlog, whose bundled fmt may not meet
/// another one in one file.
enum class LogLevel { debug, info, warning, error };

/// Once at start; `level` is the least severe that is shown. Colour only on a terminal.
void start_log(LogLevel level);
void log(LogLevel level, std::string_view message);
/// `call` is made before each message, to take a display that redraws itself out of its way; it
/// must not log. Null: nobody is called.
void before_log(std::function<void()> call);

inline void log_debug(std::string_view message) { log(LogLevel::debug, message); }
inline void log_info(std::string_view message) { log(LogLevel::info, message); }
inline void log_warning(std::string_view message) { log(LogLevel::warning, message); }

}  // namespace tailor
