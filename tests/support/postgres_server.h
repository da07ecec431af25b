#pragma once

#include <grp.h>
#include <pwd.h>
#include <signal.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <string>
#include <vector>

#include "base/file.h"

namespace tailor {

/// A PostgreSQL of the test's own in a temporary folder: on a unix socket, with fsync on. Not the
/// machine's: nothing of that is touched. As root it runs as another user, as PostgreSQL demands.
class PostgresServer {
 public:
  /// Empty: it can be started here. Else why not.
  static std::string missing() {
    if (programs().empty()) return "PostgreSQL is not installed (apt-get install postgresql)";
    if (::geteuid() == 0 && user() == nullptr) return "there is no user postgres or nobody";
    return "";
  }

  PostgresServer() {
    std::string name = "/tmp/tailor_pg_XXXXXX";  // short: a socket's path has 107 characters
    folder_ = ::mkdtemp(name.data());
    ::chmod(folder_.c_str(), 0711);
    if (::geteuid() == 0) {
      if (::chown(folder_.c_str(), user()->pw_uid, user()->pw_gid) != 0) ::abort();
    }
    run({(programs() / "initdb").string(), "-D", data(), "-U", "tailor", "--auth=trust", "-E",
         "UTF8", "--locale=C", "--no-sync"});
    start();
  }
  PostgresServer(const PostgresServer&) = delete;
  PostgresServer& operator=(const PostgresServer&) = delete;
  ~PostgresServer() {
    stop();
    fs::remove_all(folder_);
  }

  void start() {
    server_ = spawn({(programs() / "postgres").string(), "-D", data(), "-k", folder_, "-c",
                     "listen_addresses=", "-c", "max_connections=60", "-c", "shared_buffers=16MB"});
    // After a crash it syncs all its files first: on a disk in use that may take a minute.
    for (int i = 0; i < 1500; ++i) {
      if (run({(programs() / "pg_isready").string(), "-q", "-h", folder_, "-U", "tailor"}) == 0) {
        return;
      }
      ::usleep(100'000);
    }
    std::fprintf(stderr, "the test's PostgreSQL does not start; its log is %s\n", log().c_str());
  }
  void stop() { end(SIGINT); }    ///< ends its clients
  void crash() { end(SIGQUIT); }  ///< as a power cut: nothing is written any more
  void suspend() { signal_all(SIGSTOP); }
  void resume() { signal_all(SIGCONT); }

  std::string make_database(const std::string& name) const {
    run({(programs() / "createdb").string(), "-h", folder_, "-U", "tailor", name});
    return address(name);
  }
  std::string address(const std::string& name, const std::string& user = "tailor") const {
    return "postgresql://" + user + "@/" + name + "?host=" + folder_;
  }
  /// Runs SQL as its owner.
  void execute(const std::string& database, const std::string& sql) const {
    run({(programs() / "psql").string(), "-q", "-h", folder_, "-U", "tailor", "-d", database, "-c",
         sql});
  }

 private:
  static fs::path programs() {
    std::vector<fs::path> found;
    std::error_code error;
    for (fs::directory_iterator it("/usr/lib/postgresql", error), end; !error && it != end; ++it) {
      if (fs::exists(it->path() / "bin/initdb")) found.push_back(it->path() / "bin");
    }
    std::sort(found.begin(), found.end());
    return found.empty() ? fs::path() : found.back();
  }
  static const passwd* user() {
    static const passwd* const entry = [] {
      const passwd* postgres = ::getpwnam("postgres");
      return postgres != nullptr ? postgres : ::getpwnam("nobody");
    }();
    return entry;
  }
  std::string data() const { return folder_ + "/data"; }
  std::string log() const { return folder_ + "/log"; }

  pid_t spawn(const std::vector<std::string>& command) const {
    const passwd* as = ::geteuid() == 0 ? user() : nullptr;
    const pid_t child = ::fork();
    if (child != 0) return child;
    ::setpgid(0, 0);
    if (as != nullptr &&
        (::setgroups(0, nullptr) != 0 || ::setgid(as->pw_gid) != 0 || ::setuid(as->pw_uid) != 0)) {
      ::_exit(126);
    }
    if (::chdir("/") != 0) ::_exit(126);
    if (::freopen(log().c_str(), "a", stdout) == nullptr) ::_exit(126);
    ::dup2(1, 2);
    std::vector<char*> arguments;
    for (const std::string& word : command) arguments.push_back(const_cast<char*>(word.c_str()));
    arguments.push_back(nullptr);
    ::execv(arguments[0], arguments.data());
    ::_exit(127);
  }
  int run(const std::vector<std::string>& command) const {
    int status = 0;
    ::waitpid(spawn(command), &status, 0);
    return status;
  }
  /// The server and its children, which are groups of their own.
  void signal_all(int signal) const {
    const std::string pid = std::to_string(server_);
    std::ifstream children("/proc/" + pid + "/task/" + pid + "/children");
    ::kill(server_, signal);
    for (pid_t child = 0; children >> child;) ::kill(child, signal);
  }
  void end(int signal) {
    if (server_ <= 0) return;
    ::kill(server_, signal);
    ::waitpid(server_, nullptr, 0);
    server_ = -1;
  }

  std::string folder_;
  pid_t server_ = -1;
};

}  // namespace tailor
