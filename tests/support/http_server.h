#pragma once

#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <functional>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

namespace tailor {

/// An HTTP/1.1 server for tests on a port of 127.0.0.1: one connection and one request at a time.
class HttpServer {
 public:
  struct Request {
    std::string method, path, body, head;
  };
  struct Answer {
    int status = 200;
    std::string body = "{}";
  };
  explicit HttpServer(std::function<Answer(const Request&)> answer) : answer_(std::move(answer)) {
    listener_ = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t size = sizeof address;
    auto* plain = reinterpret_cast<sockaddr*>(&address);
    if (::bind(listener_, plain, size) != 0 || ::listen(listener_, 16) != 0 ||
        ::getsockname(listener_, plain, &size) != 0) {
      ::perror("http server");
    }
    port_ = ntohs(address.sin_port);
    thread_ = std::thread([this] { serve(); });
  }
  HttpServer(const HttpServer&) = delete;
  HttpServer& operator=(const HttpServer&) = delete;
  ~HttpServer() {
    ending_ = true;
    ::shutdown(listener_, SHUT_RDWR);
    thread_.join();
    ::close(listener_);
  }
  int port() const { return port_; }
  std::string address() const { return "http://127.0.0.1:" + std::to_string(port_); }
  std::vector<Request> requests() const {
    const std::lock_guard guard(mutex_);
    return requests_;
  }

 private:
  void serve() {
    while (!ending_) {
      const int client = ::accept4(listener_, nullptr, nullptr, SOCK_CLOEXEC);
      if (client < 0) return;
      while (!ending_ && one_request(client)) {
      }
      ::close(client);
    }
  }
  bool one_request(int client) {
    std::string text;
    std::size_t head_end = std::string::npos;
    std::size_t length = 0;
    while (head_end == std::string::npos || text.size() < head_end + 4 + length) {
      char buffer[4096];
      timeval wait{0, 200'000};
      ::setsockopt(client, SOL_SOCKET, SO_RCVTIMEO, &wait, sizeof wait);
      const ssize_t n = ::recv(client, buffer, sizeof buffer, 0);
      if (n == 0 || (n < 0 && (errno != EAGAIN || ending_))) return false;
      if (n > 0) text.append(buffer, static_cast<std::size_t>(n));
      head_end = text.find("\r\n\r\n");
      if (head_end == std::string::npos) continue;
      const std::size_t at = text.find("Content-Length: ");
      if (at < head_end) length = std::stoul(text.substr(at + 16));
    }
    Request request;
    request.head = text.substr(0, head_end + 2);  // with the end of its last line
    request.method = text.substr(0, text.find(' '));
    request.path = text.substr(request.method.size() + 1);
    request.path.resize(request.path.find(' '));
    request.body = text.substr(head_end + 4);
    {
      const std::lock_guard guard(mutex_);
      requests_.push_back(request);
    }
    const Answer answer = answer_(request);
    const std::string out = "HTTP/1.1 " + std::to_string(answer.status) +
                            " X\r\nContent-Type: application/json\r\nContent-Length: " +
                            std::to_string(answer.body.size()) + "\r\n\r\n" + answer.body;
    return ::send(client, out.data(), out.size(), MSG_NOSIGNAL) == static_cast<ssize_t>(out.size());
  }

  std::function<Answer(const Request&)> answer_;
  mutable std::mutex mutex_;
  std::vector<Request> requests_;
  int listener_ = -1, port_ = 0;
  std::atomic<bool> ending_{false};
  std::thread thread_;
};

}  // namespace tailor
