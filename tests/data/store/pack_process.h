#pragma once

#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <thread>

#include "base/error.h"
#include "data/store/pack.h"

namespace tailor::testing_support {

/// Packing in a process of its own, which can be killed. Its exit code is the Error's, or 0.
class PackProcess {
 public:
  PackProcess(const fs::path& model, const fs::path& to, const PackOptions& options) {
    child_ = ::fork();
    if (child_ != 0) return;
    int code = 0;
    try {
      static_cast<void>(pack_store(model, to, options));
    } catch (const Error& error) {
      code = error.exit_code();
    } catch (...) {
      code = 99;
    }
    ::_exit(code);
  }
  PackProcess(const PackProcess&) = delete;
  PackProcess& operator=(const PackProcess&) = delete;
  ~PackProcess() {
    if (child_ > 0) kill();
  }

  void kill() {
    ::kill(child_, SIGKILL);
    static_cast<void>(wait());
  }
  /// The exit code; 128 + signal when it was killed.
  int wait() {
    int status = 0;
    ::waitpid(child_, &status, 0);
    child_ = -1;
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  }
  bool running() {
    int status = 0;
    if (::waitpid(child_, &status, WNOHANG) != child_) return true;
    child_ = -1;
    code_ = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
    return false;
  }
  int code() const { return code_; }  ///< after running() said no

 private:
  pid_t child_ = -1;
  int code_ = -1;
};

inline void pause_seconds(double seconds) {
  std::this_thread::sleep_for(std::chrono::duration<double>(seconds));
}

/// Waits until `done` says yes; false after `seconds`.
template <class Done>
bool within(double seconds, const Done& done) {
  const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
  while (std::chrono::steady_clock::now() < end) {
    if (done()) return true;
    pause_seconds(0.005);
  }
  return done();
}

}  // namespace tailor::testing_support
