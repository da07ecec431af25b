#include "data/runs/mlflow.h"

#include <gmock/gmock.h>

#include <cmath>
#include <limits>

#include "base/error.h"
#include "base/json.h"
#include "tests/support/http_server.h"

namespace tailor {
namespace {

using testing::HasSubstr;
using testing::Not;

/// What of MLflow's server the sink needs, with what it was told.
class FakeMlflow {
 public:
  HttpServer::Answer answer(const HttpServer::Request& request) {
    if (delay_ms > 0) ::usleep(static_cast<useconds_t>(delay_ms * 1000));
    const std::string call = request.path.substr(std::string("/api/2.0/mlflow/").size());
    const Json body = request.body.empty() ? Json() : Json::parse(request.body);
    if (call.starts_with("experiments/get-by-name")) {
      if (experiments == 0) return {404, R"({"error_code": "RESOURCE_DOES_NOT_EXIST"})"};
      return {200, R"({"experiment": {"experiment_id": "7"}})"};
    }
    if (call == "experiments/create") {
      ++experiments;
      return {200, R"({"experiment_id": "7"})"};
    }
    if (call == "runs/search") {
      if (runs == 0) return {200, "{}"};
      return {200, R"({"runs": [{"info": {"run_id": "abc"}}]})"};
    }
    if (call == "runs/create") {
      ++runs;
      return {200, R"({"run": {"info": {"run_id": "abc"}}})"};
    }
    if (call == "runs/log-batch") {
      if (body.contains("metrics")) {
        for (const Json& metric : body["metrics"]) metrics.push_back(metric);
      }
      if (body.contains("params")) {
        for (const Json& param : body["params"]) params.push_back(param);
      }
      return {200, "{}"};
    }
    if (call == "runs/update") {
      status = body["status"];
      return {200, "{}"};
    }
    return {404, "{}"};
  }
  int delay_ms = 0, experiments = 0, runs = 0;
  std::vector<Json> metrics, params;
  std::string status;
};

MlflowSink::Options options(const std::string& address) {
  MlflowSink::Options out;
  out.address = address;
  out.experiment = "team a/2026";
  out.name = "demo";
  out.run = "01JDRUN";
  out.params = {{"lora.rank", "16"}};
  out.patience_ms = 3'000;
  return out;
}

TEST(Mlflow, reports_metrics_and_params_and_goes_on_with_the_run_of_an_earlier_attempt) {
  const RealClock clock;
  FakeMlflow fake;
  const HttpServer server([&](const auto& request) { return fake.answer(request); });
  for (const bool second : {false, true}) {
    MlflowSink sink(options(server.address()), clock);
    for (int step = 1; step <= 2'500; ++step) sink.metric("train/loss", 1.0 / step, step);
    sink.metric("train/loss", std::numeric_limits<double>::quiet_NaN(), 9);
    sink.finish(second ? "FINISHED" : "KILLED");
    EXPECT_EQ(sink.dropped(), 0);
    EXPECT_EQ(sink.sent(), 2'500);
    EXPECT_EQ(fake.status, second ? "FINISHED" : "KILLED");
  }
  EXPECT_EQ(fake.experiments, 1);
  EXPECT_EQ(fake.runs, 1);
  ASSERT_EQ(fake.metrics.size(), 5'000U);
  EXPECT_EQ(fake.metrics[2'499]["step"], 2'500);
  EXPECT_EQ(fake.metrics[3]["value"], 0.25);
  ASSERT_EQ(fake.params.size(), 1U);
  EXPECT_EQ(fake.params[0]["value"], "16");
  EXPECT_THAT(server.requests()[0].path, HasSubstr("experiment_name=team%20a%2F2026"));
}

TEST(Mlflow, a_slow_server_never_holds_up_a_step) {
  const RealClock clock;
  FakeMlflow fake;
  fake.delay_ms = 400;
  const HttpServer server([&](const auto& request) { return fake.answer(request); });
  MlflowSink::Options small = options(server.address());
  small.queue_max = 100;
  MlflowSink sink(small, clock);
  double longest = 0;
  for (int step = 1; step <= 5'000; ++step) {
    const double began = seconds_now();
    sink.metric("train/loss", 1, step);
    longest = std::max(longest, seconds_now() - began);
  }
  EXPECT_LT(longest, 0.1);
  testing::internal::CaptureStderr();
  sink.finish("FINISHED");
  EXPECT_GE(sink.dropped(), 4'000);
  EXPECT_EQ(sink.dropped() + sink.sent(), 5'000);
  EXPECT_THAT(testing::internal::GetCapturedStderr(), HasSubstr("MLflow did not get"));
}

TEST(Mlflow, a_server_that_is_away_or_never_answers_is_given_up_in_time) {
  const RealClock clock;
  const HttpServer hanging([](const auto&) {
    ::sleep(2);
    return HttpServer::Answer{};
  });
  for (const std::string& address :
       {std::string("http://u:hunter2@127.0.0.1:9"), hanging.address()}) {
    MlflowSink::Options hasty = options(address);
    hasty.patience_ms = 700;
    testing::internal::CaptureStderr();
    const double began = seconds_now();
    {
      MlflowSink sink(hasty, clock);
      for (int step = 1; step <= 50; ++step) sink.metric("train/loss", 1, step);
      sink.finish("FINISHED");
      EXPECT_EQ(sink.dropped(), 50);
    }
    EXPECT_LT(seconds_now() - began, 3);
    const std::string said = testing::internal::GetCapturedStderr();
    EXPECT_THAT(said, HasSubstr("MLflow did not get 50 of 50 values"));
    EXPECT_THAT(said, Not(HasSubstr("hunter2")));
  }
}

TEST(Mlflow, an_address_of_another_kind_is_refused_without_its_password) {
  const RealClock clock;
  try {
    MlflowSink(options("sqlite://u:hunter2@x/mlflow.db"), clock);
    FAIL();
  } catch (const Error& error) {
    EXPECT_EQ(error.fault(), Fault::usage);
    EXPECT_THAT(to_text(error), Not(HasSubstr("hunter2")));
  }
}

}  // namespace
}  // namespace tailor
