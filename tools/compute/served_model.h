#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "base/http/http_client.h"
#include "base/json.h"

namespace tailor {

/// A model behind an OpenAI-compatible server. Only what is asked for is sent: token ids and names
/// of models; no redirect is followed, so a key goes to the host of `url` alone.
class ServedModel {
 public:
  struct Name {
    std::string id, parent;  ///< parent: the base of an adapter, where the server says so
  };

  /// `url` with or without /v1. `key`: sent as a bearer token; empty: none. Throws Error{usage} for
  /// what is no http or https address.
  ServedModel(const std::string& url, const std::string& key, double timeout_s);

  /// GET models. Throws as log_probabilities().
  std::vector<Name> names() const;

  /// Natural logarithms of the probabilities of ids[1..] given what stands before each, by POST
  /// completions: with echo, else with vLLM's prompt_logprobs. Throws Error{io}: not reachable, no
  /// answer in time, a failure of the server, an answer that is none; Error{usage}: a request that
  /// it refuses, by what it says.
  std::vector<double> log_probabilities(const std::string& model,
                                        std::span<const std::int32_t> ids) const;

  const std::string& url() const noexcept { return url_; }

 private:
  HttpAnswer send(const std::string& url, const std::optional<std::string>& body) const;
  Json ask(const std::string& path, const std::optional<Json>& body) const;

  std::string url_;
  double timeout_s_;
  std::unique_ptr<HttpClient> http_;
};

}  // namespace tailor
