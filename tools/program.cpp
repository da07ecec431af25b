#include "tools/program.h"

#include <cerrno>
#include <cstdio>
#include <exception>
#include <iostream>
#include <new>
#include <string>

#include "base/error.h"
#include "base/log.h"

namespace tailor {
namespace {

int fail(const Error& error) {
  std::cout.flush();
  std::cerr << to_text(error) << std::flush;
  return error.exit_code();
}

}  // namespace

int run_program(const std::function<int()>& work) {
  try {
    start_log(LogLevel::info);
    const int code = work();
    errno = 0;
    if (!std::cout.flush() || std::ferror(stdout) != 0) {
      throw io_error(errno != 0 ? errno : EIO, "cannot write the result", "standard output");
    }
    return code;
  } catch (const Error& error) {
    return fail(error);
  } catch (const std::bad_alloc&) {
    return fail(Error(Fault::does_not_fit, {"out of memory", "", "Free memory and try again."}));
  } catch (const std::exception& error) {
    return fail(Error(Fault::internal,
                      {std::string("unexpected failure: ") + error.what(), "",
                       "This is a mistake in Tailor. Please report it with this text and the "
                       "command that led to it."}));
  }
}

}  // namespace tailor
