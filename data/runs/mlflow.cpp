#include "data/runs/mlflow.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <optional>
#include <utility>

#include "base/environment.h"
#include "base/error.h"
#include "base/http/http_client.h"
#include "base/json.h"
#include "base/log.h"
#include "base/text.h"
#include "base/url.h"

namespace tailor {
namespace {

constexpr std::size_t kMetricsPerCall = 1000;  // the server's limit
constexpr std::size_t kParamsPerCall = 100;
constexpr std::size_t kParamBytesMax = 500;       // of older servers
constexpr auto kPause = std::chrono::seconds(5);  // after a failure

}  // namespace

/// One server, spoken to from one thread.
class MlflowSink::Client {
 public:
  Client(std::string address, int patience_ms, const std::atomic<bool>& give_up)
      : address_(std::move(address)), http_(options(patience_ms, give_up)) {
    while (address_.ends_with('/')) address_.pop_back();
  }

  std::string escape(const std::string& text) const { return http_.escape(text); }

  /// Without a body a GET. The answer, or nothing with `problem()` saying why.
  std::optional<Json> call(const std::string& path, const Json* body = nullptr) {
    const HttpAnswer answer =
        http_.send(address_ + "/api/2.0/mlflow/" + path,
                   body != nullptr ? std::optional(body->dump()) : std::nullopt);
    status_ = answer.status;
    if (answer.kind != HttpAnswer::Kind::answered) {
      problem_ = answer.problem;
      return std::nullopt;
    }
    try {
      Json json = answer.body.empty() ? Json::object() : parse_json(answer.body, path);
      if (status_ >= 200 && status_ < 300) return json;
      problem_ = "HTTP " + std::to_string(status_);
      if (json.is_object() && json.contains("message") && json["message"].is_string()) {
        problem_ += ": " + json["message"].get<std::string>().substr(0, 200);
      }
    } catch (const Error&) {
      problem_ = "HTTP " + std::to_string(status_) + " without a JSON answer";
    }
    return std::nullopt;
  }
  const std::string& problem() const { return problem_; }
  /// Of the last answer; 0: there was none.
  long status() const { return status_; }

 private:
  static HttpClient::Options options(int patience_ms, const std::atomic<bool>& give_up) {
    const EnvLookup lookup = process_env();
    const Environment environment(lookup);
    HttpClient::Options out;
    out.timeout_s = patience_ms / 1000.0;
    out.give_up = &give_up;
    if (const auto token = environment.text("MLFLOW_TRACKING_TOKEN")) {
      out.headers.push_back("Authorization: Bearer " + *token);
    } else {
      out.user = environment.text_or("MLFLOW_TRACKING_USERNAME", "");
      out.password = environment.text_or("MLFLOW_TRACKING_PASSWORD", "");
    }
    return out;
  }

  std::string address_, problem_;
  HttpClient http_;
  long status_ = 0;
};

MlflowSink::MlflowSink(Options options, const Clock& clock)
    : options_(std::move(options)), clock_(clock) {
  if (!has_scheme(options_.address, "http") && !has_scheme(options_.address, "https")) {
    throw Error(Fault::usage,
                {"not the address of an MLflow server: " + without_password(options_.address),
                 "logging.mlflow", "Write http://HOST:PORT or https://HOST."});
  }
  thread_ = std::thread([this] { work(); });
}

MlflowSink::~MlflowSink() { finish("KILLED"); }

void MlflowSink::metric(const std::string& key, double value, std::int64_t step) {
  if (!std::isfinite(value)) return;
  {
    const std::lock_guard guard(mutex_);
    if (ending_ || queue_.size() >= options_.queue_max) {
      ++dropped_;
      return;
    }
    queue_.push_back({key, value, step, clock_.unix_ms()});
  }
  wake_.notify_one();
}

void MlflowSink::finish(const std::string& status) {
  if (!thread_.joinable()) return;
  {
    std::unique_lock lock(mutex_);
    ending_ = true;
    end_status_ = status;
    wake_.notify_one();
    if (!done_wake_.wait_for(lock, std::chrono::milliseconds(options_.patience_ms),
                             [this] { return done_; })) {
      give_up_ = true;  // also ends a call that is under way
    }
  }
  wake_.notify_one();
  thread_.join();
  dropped_ += static_cast<std::int64_t>(queue_.size());
  if (dropped_ > 0) {
    log_warning("MLflow did not get " + count_text(dropped_) + " of " +
                count_text(dropped_ + sent_) +
                " values (server slow or away); metrics.jsonl has them all");
  }
}

void MlflowSink::say_away(const std::string& why) {
  if (std::exchange(said_, true)) return;
  log_warning("MLflow cannot be reached, the run goes on without it for now: " + why + " (" +
              without_password(options_.address) + ")");
}

void MlflowSink::work() {
  try {
    client_ = std::make_unique<Client>(options_.address, options_.patience_ms, give_up_);
  } catch (const Error& error) {
    say_away(error.parts().what);
    give_up_ = true;
  }
  std::vector<Metric> batch;
  while (!give_up_) {
    {
      std::unique_lock lock(mutex_);
      wake_.wait(lock, [this] { return ending_ || !queue_.empty() || give_up_; });
      const std::size_t count = std::min(kMetricsPerCall, queue_.size());
      batch.assign(queue_.begin(), queue_.begin() + static_cast<std::ptrdiff_t>(count));
      if (batch.empty() && mlflow_run_.empty() && ending_) break;  // it was never reached
    }
    const bool good = (!mlflow_run_.empty() || begin_run()) && (batch.empty() || send(batch));
    std::unique_lock lock(mutex_);
    if (good) {
      said_ = false;
      queue_.erase(queue_.begin(), queue_.begin() + static_cast<std::ptrdiff_t>(batch.size()));
      sent_ += static_cast<std::int64_t>(batch.size());
      if (!ending_ || !queue_.empty()) continue;
      lock.unlock();
      const Json end = {
          {"run_id", mlflow_run_}, {"status", end_status_}, {"end_time", clock_.unix_ms()}};
      if (!client_->call("runs/update", &end)) say_away(client_->problem());
      break;
    }
    if (ending_) break;  // what is left counts as dropped
    wake_.wait_for(lock, kPause, [this] { return ending_ || give_up_; });
  }
  const std::lock_guard guard(mutex_);
  done_ = true;
  done_wake_.notify_all();
}

/// Finds or makes the experiment and the run in it.
bool MlflowSink::begin_run() {
  const auto text_at = [](const Json& json, const char* outer, const char* inner) {
    const auto object = json.find(outer);
    if (object == json.end() || !object->is_object() || !object->contains(inner))
      return std::string();
    const Json& value = (*object)[inner];
    return value.is_string() ? value.get<std::string>() : std::string();
  };
  std::string experiment;
  if (const auto found = client_->call("experiments/get-by-name?experiment_name=" +
                                       client_->escape(options_.experiment))) {
    experiment = text_at(*found, "experiment", "experiment_id");
  } else if (client_->status() == 404) {
    const Json make = {{"name", options_.experiment}};
    if (const auto made = client_->call("experiments/create", &make)) {
      const auto id = made->find("experiment_id");
      if (id != made->end() && id->is_string()) experiment = id->get<std::string>();
    }
  }
  if (experiment.empty()) {
    say_away(client_->problem());
    return false;
  }
  const Json search = {{"experiment_ids", {experiment}},
                       {"filter", "tags.`tailor.run` = '" + options_.run + "'"},
                       {"max_results", 1}};
  std::string run;
  if (const auto found = client_->call("runs/search", &search)) {
    const auto runs = found->find("runs");
    if (runs != found->end() && runs->is_array() && !runs->empty()) {
      run = text_at((*runs)[0], "info", "run_id");
    }
  } else {
    say_away(client_->problem());
    return false;
  }
  if (!run.empty()) {
    const Json again = {{"run_id", run}, {"status", "RUNNING"}};
    client_->call("runs/update", &again);
  } else {
    const Json make = {{"experiment_id", experiment},
                       {"run_name", options_.name},
                       {"start_time", clock_.unix_ms()},
                       {"tags",
                        {{{"key", "tailor.run"}, {"value", options_.run}},
                         {{"key", "mlflow.runName"}, {"value", options_.name}}}}};
    if (const auto made = client_->call("runs/create", &make)) {
      const auto object = made->find("run");
      if (object != made->end() && object->is_object()) run = text_at(*object, "info", "run_id");
    }
    if (run.empty()) {
      say_away(client_->problem());
      return false;
    }
    Json params = Json::array();
    const auto log_params = [&] {
      const Json batch = {{"run_id", run}, {"params", std::exchange(params, Json::array())}};
      if (!client_->call("runs/log-batch", &batch)) say_away(client_->problem());
    };
    for (const auto& [key, value] : options_.params) {
      params.push_back({{"key", key}, {"value", value.substr(0, kParamBytesMax)}});
      if (params.size() == kParamsPerCall) log_params();
    }
    if (!params.empty()) log_params();
  }
  mlflow_run_ = run;
  return true;
}

/// True also where the server refuses the values themselves: offering them again would not help.
bool MlflowSink::send(const std::vector<Metric>& metrics) {
  Json rows = Json::array();
  for (const Metric& metric : metrics) {
    rows.push_back({{"key", metric.key},
                    {"value", metric.value},
                    {"timestamp", metric.unix_ms},
                    {"step", metric.step}});
  }
  const Json batch = {{"run_id", mlflow_run_}, {"metrics", rows}};
  if (client_->call("runs/log-batch", &batch)) return true;
  say_away(client_->problem());
  if (client_->status() != 400) return false;
  dropped_ += static_cast<std::int64_t>(metrics.size());
  sent_ -= static_cast<std::int64_t>(metrics.size());
  return true;
}

}  // namespace tailor
