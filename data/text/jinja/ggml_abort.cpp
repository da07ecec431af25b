// The one symbol of ggml that the Jinja engine's JSON bridge asks for. In ggml it ends the process;
// here it throws, and chat_template.cpp makes it an Error like every exception of the engine.
#include <cstdarg>
#include <cstdio>
#include <stdexcept>

extern "C" [[noreturn]] void ggml_abort(const char* file, int line, const char* format, ...) {
  char message[512] = {};
  std::va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(message, sizeof message, format, arguments);
  va_end(arguments);
  (void)file;
  (void)line;
  throw std::logic_error(message);
}
