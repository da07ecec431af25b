#include "tools/compute/served_model.h"

#include <cmath>
#include <utility>

#include "base/error.h"
#include "base/text.h"

namespace tailor {
namespace {

constexpr std::size_t kAnswerBytesMax = std::size_t{64} << 20U;

[[noreturn]] void fail(Fault fault, const std::string& what, const std::string& where,
                       const std::string& mend) {
  throw Error(fault, {what, where, mend});
}

/// The beginning of what a server said, on one line.
std::string excerpt(const std::string& text) {
  constexpr std::size_t kLongest = 200;
  std::string out;
  for (const char c : text.substr(0, kLongest)) {
    out += static_cast<unsigned char>(c) < 0x20 || c == 0x7F ? ' ' : c;
  }
  if (!is_utf8(out)) return "(not text)";
  return text.size() > kLongest ? out + "..." : out;
}

/// "message" of OpenAI's error objects, else the answer itself.
std::string message_of(const std::string& body) {
  try {
    const Json json = parse_json(body, "answer");
    const Json* error = json.is_object() && json.contains("error") ? &json.at("error") : &json;
    for (const char* key : {"message", "detail"}) {
      if (error->is_object() && error->contains(key) && error->at(key).is_string())
        return excerpt(error->at(key).get<std::string>());
    }
    if (error->is_string()) return excerpt(error->get<std::string>());
  } catch (const Error&) {
    return excerpt(body);
  }
  return excerpt(body);
}

double number_at(const Json& value, const std::string& where) {
  if (value.is_number() && std::isfinite(value.get<double>()) && value.get<double>() <= 0)
    return value.get<double>();
  fail(Fault::io, "a log-probability of the server is " + excerpt(value.dump()), where,
       "The server computes no numbers: look at its log.");
}

}  // namespace

ServedModel::ServedModel(const std::string& url, const std::string& key, double timeout_s)
    : url_(url), timeout_s_(timeout_s) {
  if (!url_.starts_with("http://") && !url_.starts_with("https://")) {
    fail(Fault::usage, "'" + url + "' is no address of a server", "--url",
         "Write it as http://localhost:8000.");
  }
  while (url_.ends_with('/')) url_.pop_back();
  if (!url_.ends_with("/v1")) url_ += "/v1";
  HttpClient::Options options;
  if (!key.empty()) options.headers.push_back("Authorization: Bearer " + key);
  options.timeout_s = timeout_s;
  options.answer_bytes_max = kAnswerBytesMax;
  http_ = std::make_unique<HttpClient>(std::move(options));
}

HttpAnswer ServedModel::send(const std::string& url, const std::optional<std::string>& body) const {
  HttpAnswer answer = http_->send(url, body);
  switch (answer.kind) {
    case HttpAnswer::Kind::answered:
      break;
    case HttpAnswer::Kind::late:
      fail(Fault::io, "the server did not answer within " + seconds_text(timeout_s_), url,
           "Wait until it has loaded its model, or give it longer with --timeout SECONDS.");
    case HttpAnswer::Kind::too_large:
      fail(Fault::io, "the server's answer is larger than " + bytes_text(kAnswerBytesMax), url,
           "See that --url is a server of a language model.");
    case HttpAnswer::Kind::failed:
      fail(Fault::io, "cannot talk to the server: " + answer.problem, url,
           "Start the server, or correct --url.");
  }
  return answer;
}

Json ServedModel::ask(const std::string& path, const std::optional<Json>& body) const {
  const std::string where = url_ + path;
  const HttpAnswer answer = send(where, body ? std::optional(body->dump()) : std::nullopt);
  const std::string status = std::to_string(answer.status);
  if (answer.status == 401 || answer.status == 403) {
    fail(Fault::usage, "the server wants a key (" + status + ")", where,
         "Put it into the environment variable TAILOR_API_KEY.");
  }
  if (answer.status >= 500) {
    fail(Fault::io, "the server failed (" + status + "): " + message_of(answer.body), where,
         "Look at the server's log.");
  }
  if (answer.status != 200) {
    fail(Fault::usage, "the server refuses (" + status + "): " + message_of(answer.body), where,
         "Correct what it names; --served-model and --base-served are names of its models, and "
         "--sequence-len may not be longer than it takes.");
  }
  try {
    return parse_json(answer.body, where);
  } catch (const Error&) {
    fail(Fault::io, "the server's answer is no JSON: " + excerpt(answer.body), where,
         "See that --url is an OpenAI-compatible server.");
  }
}

std::vector<ServedModel::Name> ServedModel::names() const {
  const Json answer = ask("/models", std::nullopt);
  std::vector<Name> out;
  if (answer.is_object() && answer.contains("data") && answer.at("data").is_array()) {
    for (const Json& model : answer.at("data")) {
      if (!model.is_object() || !model.contains("id") || !model.at("id").is_string()) continue;
      Name name{model.at("id").get<std::string>(), ""};
      if (model.contains("parent") && model.at("parent").is_string())
        name.parent = model.at("parent").get<std::string>();
      out.push_back(name);
    }
  }
  if (out.empty()) {
    fail(Fault::io, "the server names no model", url_ + "/models",
         "See that --url is an OpenAI-compatible server.");
  }
  return out;
}

std::vector<double> ServedModel::log_probabilities(const std::string& model,
                                                   std::span<const std::int32_t> ids) const {
  TAILOR_CHECK(ids.size() >= 2);
  const std::string where = url_ + "/completions, model " + model;
  Json request = {{"model", model},  {"prompt", std::vector<std::int32_t>(ids.begin(), ids.end())},
                  {"max_tokens", 1}, {"temperature", 0},
                  {"logprobs", 1},   {"echo", true}};
  const auto choice_of = [&](const Json& answer) -> const Json& {
    if (answer.is_object() && answer.contains("choices") && answer.at("choices").is_array() &&
        !answer.at("choices").empty() && answer.at("choices").front().is_object())
      return answer.at("choices").front();
    fail(Fault::io, "the server's answer has no choices: " + excerpt(answer.dump()), where,
         "See that --url is an OpenAI-compatible server.");
  };
  std::vector<double> out;
  const Json echoed = ask("/completions", request);
  const Json& choice = choice_of(echoed);
  if (choice.contains("logprobs") && choice.at("logprobs").is_object() &&
      choice.at("logprobs").contains("token_logprobs") &&
      choice.at("logprobs").at("token_logprobs").is_array() &&
      choice.at("logprobs").at("token_logprobs").size() >= ids.size()) {
    const Json& values = choice.at("logprobs").at("token_logprobs");
    for (std::size_t i = 1; i < ids.size(); ++i) out.push_back(number_at(values.at(i), where));
    return out;
  }
  // No echo there: vLLM's own way of asking.
  request.erase("echo");
  request["prompt_logprobs"] = 0;
  const Json answer = ask("/completions", request);
  const Json& other = choice_of(answer);
  if (!other.contains("prompt_logprobs") || !other.at("prompt_logprobs").is_array() ||
      other.at("prompt_logprobs").size() != ids.size()) {
    fail(Fault::io, "the server gives no log-probabilities of the prompt", where,
         "Neither echo with logprobs nor prompt_logprobs does: it cannot be checked this way.");
  }
  for (std::size_t i = 1; i < ids.size(); ++i) {
    const Json& of_token = other.at("prompt_logprobs").at(i);
    const std::string id = std::to_string(ids[i]);
    if (!of_token.is_object() || !of_token.contains(id) || !of_token.at(id).is_object() ||
        !of_token.at(id).contains("logprob")) {
      fail(Fault::io, "the server's answer has no log-probability of token " + id, where,
           "Its tokens are not those it was sent.");
    }
    out.push_back(number_at(of_token.at(id).at("logprob"), where));
  }
  return out;
}

}  // namespace tailor
