#pragma once

#include <atomic>
#include <cstddef>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace tailor {

/// What became of a request.
struct HttpAnswer {
  enum class Kind { answered, late, too_large, failed };
  Kind kind = Kind::failed;
  long status = 0;        ///< 0 unless answered
  std::string body{};     ///< of an answer
  std::string problem{};  ///< why there is none, in libcurl's words
};

/// Speaks JSON with HTTP servers, one request at a time, over connections that it keeps. Follows no
/// redirect, so that a key goes to the host of the address alone. For one thread.
class HttpClient {
 public:
  struct Options {
    std::vector<std::string> headers{};  ///< "Authorization: Bearer ..."
    std::string user{}, password{};      ///< where the address has none
    double timeout_s = 10;               ///< for a whole answer
    std::size_t answer_bytes_max = 8U << 20U;
    const std::atomic<bool>* give_up = nullptr;  ///< true: ends a request that is under way
  };
  /// Throws Error{internal} where libcurl cannot be set up.
  explicit HttpClient(Options options);
  HttpClient(const HttpClient&) = delete;
  HttpClient& operator=(const HttpClient&) = delete;
  ~HttpClient();

  /// GET, or POST of `body`.
  HttpAnswer send(const std::string& url, const std::optional<std::string>& body = {});

  /// `text` as a part of an address: "a b" as "a%20b".
  std::string escape(const std::string& text) const;

 private:
  struct Curl;
  const Options options_;
  std::unique_ptr<Curl> curl_;
};

}  // namespace tailor
