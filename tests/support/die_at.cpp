// Preloaded into a program under test: ends or stops it at a chosen instant, as a machine would.
//   DIE_AT    "open TEXT N": it opens, for the Nth time, a file whose path contains TEXT
//             "fsync TEXT N": it syncs one
//             "send N": it sends for the Nth time over a socket
//             "ms N": so many milliseconds later
//   DIE_AFTER counts from the moment on that this file exists; empty: from the beginning
//   DIE_HOW   KILL or STOP
//   DIE_ONCE  nothing happens where this file exists, and it is made when it happens
//   DIE_NOTE  file that gets the seconds of CLOCK_MONOTONIC at which it happened

#include <dlfcn.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <string>
#include <thread>

namespace {

std::string text_of(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? "" : value;
}

struct Plan {
  std::string what, text, after = text_of("DIE_AFTER"), note = text_of("DIE_NOTE");
  std::string once = text_of("DIE_ONCE");
  long count = 1;
  int signal = text_of("DIE_HOW") == "STOP" ? SIGSTOP : SIGKILL;
  std::atomic<long> seen = 0;
  std::atomic<bool> begun = false;

  Plan() {
    const std::string at = text_of("DIE_AT");
    char kind[16] = "", word[256] = "";
    if (std::sscanf(at.c_str(), "%15s %255s %ld", kind, word, &count) == 3) {
      text = word;
    } else if (std::sscanf(at.c_str(), "%15s %ld", kind, &count) != 2) {
      return;
    }
    what = kind;
  }
  bool has_begun() {
    struct stat file {};
    if (!begun && (after.empty() || stat(after.c_str(), &file) == 0)) begun = true;
    return begun;
  }
  void die() {
    if (!once.empty()) {
      const int made = ::open(once.c_str(), O_CREAT | O_EXCL | O_WRONLY | O_CLOEXEC, 0600);
      if (made < 0) return;
      ::close(made);
    }
    timespec now{};
    clock_gettime(CLOCK_MONOTONIC, &now);
    if (FILE* file = std::fopen(note.c_str(), "w"); file != nullptr) {
      std::fprintf(file, "%.6f",
                   static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec));
      std::fclose(file);
    }
    kill(getpid(), signal);
  }
  void saw(const char* kind, const char* path) {
    if (what != kind || (!text.empty() && std::strstr(path, text.c_str()) == nullptr)) return;
    if (has_begun() && ++seen == count) die();
  }
};

Plan& plan() {
  static Plan* const one = new Plan;  // outlives those who call at the very end
  return *one;
}

/// "ms N": a thread waits for the moment.
[[gnu::constructor]] void wait_for_the_moment() {
  if (plan().what != "ms") return;
  std::thread([] {
    while (!plan().has_begun()) usleep(500);
    usleep(static_cast<useconds_t>(plan().count * 1000));
    plan().die();
  }).detach();
}

template <class Function>
Function* real(const char* name) {
  return reinterpret_cast<Function*>(dlsym(RTLD_NEXT, name));
}

int open_with(const char* name, const char* path, int flags, unsigned mode) {
  plan().saw("open", path);
  return real<int(const char*, int, ...)>(name)(path, flags, mode);
}
int openat_with(const char* name, int folder, const char* path, int flags, unsigned mode) {
  plan().saw("open", path);
  return real<int(int, const char*, int, ...)>(name)(folder, path, flags, mode);
}

}  // namespace

#define WITH_MODE(call)                                                      \
  va_list rest;                                                              \
  va_start(rest, flags);                                                     \
  const unsigned mode = (flags & O_CREAT) != 0 ? va_arg(rest, unsigned) : 0; \
  va_end(rest);                                                              \
  return call

extern "C" {

int open(const char* path, int flags, ...) { WITH_MODE(open_with("open", path, flags, mode)); }
int open64(const char* path, int flags, ...) { WITH_MODE(open_with("open64", path, flags, mode)); }
int openat(int folder, const char* path, int flags, ...) {
  WITH_MODE(openat_with("openat", folder, path, flags, mode));
}
int openat64(int folder, const char* path, int flags, ...) {
  WITH_MODE(openat_with("openat64", folder, path, flags, mode));
}

int fsync(int descriptor) {
  char link[64], path[4096];
  std::snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
  const ssize_t length = readlink(link, path, sizeof path - 1);
  path[length < 0 ? 0 : length] = '\0';
  plan().saw("fsync", path);
  return real<int(int)>("fsync")(descriptor);
}

ssize_t writev(int descriptor, const iovec* parts, int count) {
  plan().saw("send", "");
  return real<ssize_t(int, const iovec*, int)>("writev")(descriptor, parts, count);
}
ssize_t sendmsg(int socket, const msghdr* message, int flags) {
  plan().saw("send", "");
  return real<ssize_t(int, const msghdr*, int)>("sendmsg")(socket, message, flags);
}

}  // extern "C"
