#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "base/clock.h"

namespace tailor {

/// Reports a run to an MLflow tracking server over its REST interface (api/2.0/mlflow). A thread of
/// its own does the talking; a call here only puts a value into a queue of bounded length, so that
/// a server that is slow or away never holds up a step: what does not fit is dropped and counted.
/// An attempt that goes on with a run goes on with its MLflow run, which it finds by the tag
/// `tailor.run`. User and password come from the address, or from MLFLOW_TRACKING_USERNAME and
/// MLFLOW_TRACKING_PASSWORD; MLFLOW_TRACKING_TOKEN is sent as a bearer token.
class MlflowSink {
 public:
  struct Options {
    std::string address{};     ///< "http://host:5000"
    std::string experiment{};  ///< made where it is not there
    std::string name{};        ///< of the MLflow run
    std::string run{};         ///< our identifier
    std::map<std::string, std::string> params{};
    std::size_t queue_max = 20'000;  ///< metrics that wait
    int patience_ms = 10'000;        ///< for an answer, and for the queue at the end
  };
  /// Throws Error{usage} for an address that is not http:// or https://. Does not wait for a
  /// server.
  MlflowSink(Options options, const Clock& clock);
  MlflowSink(const MlflowSink&) = delete;
  MlflowSink& operator=(const MlflowSink&) = delete;
  ~MlflowSink();

  /// Never waits. Values that are not finite are left out: MLflow's JSON has none.
  void metric(const std::string& key, double value, std::int64_t step);
  /// Sends what waits and closes the MLflow run: FINISHED, FAILED or KILLED. Waits up to the
  /// patience, then gives up; says once what was dropped.
  void finish(const std::string& status);
  std::int64_t dropped() const { return dropped_; }
  std::int64_t sent() const { return sent_; }

 private:
  struct Metric {
    std::string key;
    double value = 0;
    std::int64_t step = 0, unix_ms = 0;
  };
  class Client;

  void work();
  bool begin_run();
  bool send(const std::vector<Metric>& metrics);
  void say_away(const std::string& why);

  const Options options_;
  const Clock& clock_;
  std::unique_ptr<Client> client_;  ///< the thread's
  std::string mlflow_run_;          ///< the thread's

  std::mutex mutex_;
  std::condition_variable wake_, done_wake_;
  std::deque<Metric> queue_;
  std::string end_status_;
  bool ending_ = false, done_ = false, said_ = false;
  std::int64_t deadline_ms_ = 0;
  std::atomic<std::int64_t> dropped_{0}, sent_{0};
  std::atomic<bool> give_up_{false};
  std::thread thread_;
};

}  // namespace tailor
