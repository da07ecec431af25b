#pragma once

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <map>
#include <sstream>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "base/clock.h"

namespace tailor {

/// A port of 127.0.0.1 that nobody has at the moment.
inline int free_port() {
  const int socket = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t length = sizeof address;
  if (bind(socket, reinterpret_cast<sockaddr*>(&address), length) != 0 ||
      getsockname(socket, reinterpret_cast<sockaddr*>(&address), &length) != 0) {
    throw std::runtime_error("no free port");
  }
  close(socket);
  return ntohs(address.sin_port);
}

/// Processes that are the ranks of one run; those that still live are killed at the end.
class RankProcesses {
 public:
  using Variables = std::map<std::string, std::string>;
  struct Process {
    pid_t pid = -1;
    int exit_code = -1;  ///< -1: alive; 128 + signal
    double ended_at = 0;
    std::filesystem::path out;
  };

  RankProcesses() {
    char name[] = "/tmp/tailor-ranks-XXXXXX";
    if (mkdtemp(name) == nullptr) throw std::runtime_error("no temporary folder");
    folder_ = name;
  }
  RankProcesses(const RankProcesses&) = delete;
  RankProcesses& operator=(const RankProcesses&) = delete;
  ~RankProcesses() {
    for (Process& process : processes_) {
      if (process.exit_code >= 0) continue;
      kill(process.pid, SIGKILL);
      waitpid(process.pid, nullptr, 0);
    }
    std::filesystem::remove_all(folder_);
  }

  /// torchrun's variables for ranks 0 to N - 1 on this machine; `more` is added for each.
  void start_all(int count, const std::vector<std::string>& command, const Variables& more = {}) {
    const int port = free_port();
    for (int r = 0; r < count; ++r) {
      Variables variables = {{"RANK", std::to_string(r)},
                             {"LOCAL_RANK", std::to_string(r)},
                             {"WORLD_SIZE", std::to_string(count)},
                             {"MASTER_ADDR", "127.0.0.1"},
                             {"MASTER_PORT", std::to_string(port)}};
      for (const auto& [name, value] : more) variables[name] = value;
      start(command, variables);
    }
  }

  /// Variables with an empty value are taken away.
  int start(const std::vector<std::string>& command, const Variables& variables) {
    Process process;
    process.out = folder_ / std::to_string(processes_.size());
    const std::string out = process.out.string();
    std::vector<char*> arguments;
    for (const std::string& part : command) arguments.push_back(const_cast<char*>(part.c_str()));
    arguments.push_back(nullptr);
    process.pid = fork();
    if (process.pid == 0) {
      const int descriptor = open(out.c_str(), O_CREAT | O_WRONLY | O_APPEND | O_CLOEXEC, 0600);
      dup2(descriptor, 1);
      dup2(descriptor, 2);
      for (const auto& [name, value] : variables) {
        if (value.empty()) {
          unsetenv(name.c_str());
        } else {
          setenv(name.c_str(), value.c_str(), 1);
        }
      }
      execv(arguments[0], arguments.data());
      _exit(127);
    }
    processes_.push_back(process);
    return static_cast<int>(processes_.size()) - 1;
  }

  /// Waits until all but `except` have ended, no longer than `seconds`. Whether they have.
  bool wait(double seconds, int except = -1) {
    const double until = seconds_now() + seconds;
    while (true) {
      bool all = true;
      for (std::size_t i = 0; i < processes_.size(); ++i) {
        Process& process = processes_[i];
        int status = 0;
        if (process.exit_code < 0 && waitpid(process.pid, &status, WNOHANG) == process.pid) {
          process.exit_code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
          process.ended_at = seconds_now();
        }
        all = all && (process.exit_code >= 0 || static_cast<int>(i) == except);
      }
      if (all) return true;
      if (seconds_now() > until) return false;
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
  }

  /// Waits until the process has printed `text`.
  bool wait_for_text(int which, const std::string& text, double seconds) const {
    const double until = seconds_now() + seconds;
    while (output(which).find(text) == std::string::npos) {
      if (seconds_now() > until) return false;
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
    return true;
  }

  const Process& of(int which) const { return processes_[static_cast<std::size_t>(which)]; }
  int exit_code(int which) const { return of(which).exit_code; }
  int size() const { return static_cast<int>(processes_.size()); }
  const std::filesystem::path& folder() const { return folder_; }
  /// stdout and stderr.
  std::string output(int which) const {
    std::ifstream file(of(which).out);
    std::stringstream text;
    text << file.rdbuf();
    return text.str();
  }
  std::string outputs() const {
    std::string all;
    for (int r = 0; r < size(); ++r) {
      all += "--- rank " + std::to_string(r) + ", exit code " + std::to_string(exit_code(r)) +
             "\n" + output(r);
    }
    return all;
  }

 private:
  std::filesystem::path folder_;
  std::vector<Process> processes_;
};

}  // namespace tailor
