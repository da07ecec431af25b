#include "base/http/http_client.h"

#include <curl/curl.h>

#include <array>
#include <utility>

#include "base/error.h"

namespace tailor {
namespace {

struct Taken {
  std::string* body;
  std::size_t bytes_max;
};

std::size_t take(char* data, std::size_t size, std::size_t count, void* into) {
  const auto& taken = *static_cast<Taken*>(into);
  if (taken.body->size() + size * count > taken.bytes_max) return 0;  // stops the transfer
  taken.body->append(data, size * count);
  return size * count;
}

int stop_if(void* flag, curl_off_t, curl_off_t, curl_off_t, curl_off_t) {
  return static_cast<const std::atomic<bool>*>(flag)->load() ? 1 : 0;
}

}  // namespace

struct HttpClient::Curl {
  CURL* handle = nullptr;
  curl_slist* headers = nullptr;
  std::array<char, CURL_ERROR_SIZE> message{};

  Curl() {
    static const CURLcode once = curl_global_init(CURL_GLOBAL_DEFAULT);
    handle = once == CURLE_OK ? curl_easy_init() : nullptr;
    if (handle == nullptr) throw Error(Fault::internal, {"libcurl cannot be set up", "", ""});
  }
  Curl(const Curl&) = delete;
  Curl& operator=(const Curl&) = delete;
  ~Curl() {
    curl_easy_cleanup(handle);
    curl_slist_free_all(headers);
  }
  template <class Value>
  void set(CURLoption option, Value value) {
    curl_easy_setopt(handle, option, value);
  }
};

HttpClient::HttpClient(Options options)
    : options_(std::move(options)), curl_(std::make_unique<Curl>()) {
  // No wait for a 100 Continue either.
  for (const char* line : {"Content-Type: application/json", "Accept: application/json", "Expect:"})
    curl_->headers = curl_slist_append(curl_->headers, line);
  for (const std::string& line : options_.headers)
    curl_->headers = curl_slist_append(curl_->headers, line.c_str());
  if (!options_.user.empty()) {
    curl_->set(CURLOPT_USERNAME, options_.user.c_str());
    curl_->set(CURLOPT_PASSWORD, options_.password.c_str());
  }
  curl_->set(CURLOPT_HTTPHEADER, curl_->headers);
  curl_->set(CURLOPT_PROTOCOLS_STR, "http,https");
  curl_->set(CURLOPT_FOLLOWLOCATION, 0L);
  curl_->set(CURLOPT_NOSIGNAL, 1L);
  curl_->set(CURLOPT_TIMEOUT_MS, static_cast<long>(1000 * options_.timeout_s));
  curl_->set(CURLOPT_USERAGENT, "tailor/" TAILOR_VERSION);
  curl_->set(CURLOPT_WRITEFUNCTION, take);
  curl_->set(CURLOPT_ERRORBUFFER, curl_->message.data());
  if (options_.give_up != nullptr) {
    curl_->set(CURLOPT_NOPROGRESS, 0L);
    curl_->set(CURLOPT_XFERINFOFUNCTION, stop_if);
    curl_->set(CURLOPT_XFERINFODATA, options_.give_up);
  }
}

HttpClient::~HttpClient() = default;

HttpAnswer HttpClient::send(const std::string& url, const std::optional<std::string>& body) {
  HttpAnswer answer;
  Taken taken{&answer.body, options_.answer_bytes_max};
  curl_->message[0] = '\0';
  curl_->set(CURLOPT_URL, url.c_str());
  curl_->set(CURLOPT_WRITEDATA, &taken);
  if (body) {
    curl_->set(CURLOPT_POST, 1L);
    curl_->set(CURLOPT_POSTFIELDSIZE, static_cast<long>(body->size()));
    curl_->set(CURLOPT_POSTFIELDS, body->c_str());
  } else {
    curl_->set(CURLOPT_HTTPGET, 1L);
  }
  const CURLcode code = curl_easy_perform(curl_->handle);
  if (code != CURLE_OK) {
    answer.kind = code == CURLE_OPERATION_TIMEDOUT ? HttpAnswer::Kind::late
                  : code == CURLE_WRITE_ERROR      ? HttpAnswer::Kind::too_large
                                                   : HttpAnswer::Kind::failed;
    answer.problem = curl_->message[0] != '\0' ? curl_->message.data() : curl_easy_strerror(code);
    return answer;
  }
  answer.kind = HttpAnswer::Kind::answered;
  curl_easy_getinfo(curl_->handle, CURLINFO_RESPONSE_CODE, &answer.status);
  return answer;
}

std::string HttpClient::escape(const std::string& text) const {
  char* out = curl_easy_escape(curl_->handle, text.c_str(), static_cast<int>(text.size()));
  std::string result = out != nullptr ? out : "";
  curl_free(out);
  return result;
}

}  // namespace tailor
