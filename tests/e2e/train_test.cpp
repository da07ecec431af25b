// The built program as a user runs it: a tiny model, tokenised data, a recipe.

#include <gtest/gtest.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <thread>

#include "tests/e2e/train_program.h"
#include "tests/support/postgres_server.h"

namespace tailor {
namespace {

using namespace testing_support;

TEST_F(TrainProgram, a_run_learns_writes_its_folder_and_its_books) {
  const Finished done = run({"train", recipe(), "--json", "training.max_steps=60"});
  ASSERT_EQ(done.code, 0) << done.err;
  const Json summary = parse_json(done.out, "stdout");
  EXPECT_EQ(summary.at("status"), "succeeded");
  EXPECT_EQ(summary.at("steps"), 60);
  EXPECT_GT(summary.at("gpu_hours").get<double>(), 0);
  EXPECT_GT(summary.at("usd").get<double>(), 0);
  for (const char* name :
       {"recipe.resolved.yaml", "plan.json", "metrics.jsonl", "summary.json", "report.html",
        "adapter/adapter_config.json", "adapter/adapter_model.safetensors", "checkpoints"}) {
    EXPECT_TRUE(fs::exists(work_ / "run" / name)) << name;
  }
  const std::vector<std::string> steps = losses(work_ / "run");
  ASSERT_EQ(steps.size(), 60U);
  EXPECT_LT(std::stod(split(steps.back(), ' ')[1]), 0.7 * std::stod(split(steps.front(), ' ')[1]));

  // eval and the run agree that the adapter is better than the base model.
  const std::string model = TAILOR_SOURCE_DIR "/tests/golden/llama4_maverick_tiny/model";
  const std::string data = (work_ / "rows.jsonl").string();
  const Finished before =
      run({"eval", "--model", model, "--data", data, "--json", "--dtype", "float32"});
  ASSERT_EQ(before.code, 0) << before.err;
  const Finished after = run({"eval", "--model", model, "--data", data, "--json", "--dtype",
                              "float32", "--adapter", (work_ / "run/adapter").string()});
  ASSERT_EQ(after.code, 0) << after.err;
  EXPECT_LT(parse_json(after.out, "stdout").at("loss").get<double>(),
            parse_json(before.out, "stdout").at("loss").get<double>() - 0.5);
}

TEST_F(TrainProgram, an_interrupted_run_resumes_to_the_same_bits) {
  const Finished whole = run({"train", recipe(), "output_dir=" + (work_ / "whole").string()});
  ASSERT_EQ(whole.code, 0) << whole.err;
  int interruptions = 0;
  for (int attempt = 0; attempt < 12; ++attempt) {
    const pid_t child = start({"train", recipe(), "--resume"});
    // SIGTERM once a new step is on record; SIGKILL at every third attempt, wherever it is then.
    const std::size_t had =
        fs::exists(work_ / "run/metrics.jsonl") ? losses(work_ / "run").size() : 0;
    for (int tick = 0; tick < 600; ++tick) {
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
      if (fs::exists(work_ / "run/metrics.jsonl") && losses(work_ / "run").size() > had) break;
      if (::waitpid(child, nullptr, WNOHANG | WNOWAIT) == 0 && ::kill(child, 0) != 0) break;
    }
    ::kill(child, attempt % 3 == 2 ? SIGKILL : SIGTERM);
    const Finished done = wait(child);
    if (done.code == 0) break;
    EXPECT_TRUE(done.code == 75 || done.code == 128 + SIGKILL) << done.code << done.err;
    ++interruptions;
  }
  const Finished last = run({"train", recipe(), "--resume"});
  ASSERT_EQ(last.code, 0) << last.err;
  EXPECT_GT(interruptions, 0);
  EXPECT_EQ(losses(work_ / "run"), losses(work_ / "whole"));
  EXPECT_EQ(sha256_file(work_ / "run/adapter/adapter_model.safetensors"),
            sha256_file(work_ / "whole/adapter/adapter_model.safetensors"));
  // Every attempt is on the books.
  const Finished listed = run({"runs", "ls", "--json", "--ledger", (work_ / "ledger.db").string()});
  ASSERT_EQ(listed.code, 0) << listed.err;
  for (const Json& row : parse_json(listed.out, "stdout")) {
    if (row.at("output_dir") == (work_ / "run").string()) {
      EXPECT_GE(row.at("attempts").get<int>(), interruptions + 1);
    }
  }
}

TEST_F(TrainProgram, a_finished_or_foreign_folder_is_left_alone) {
  ASSERT_EQ(run({"train", recipe(), "training.max_steps=1"}).code, 0);
  const std::string adapter = sha256_file(work_ / "run/adapter/adapter_model.safetensors");
  EXPECT_EQ(run({"train", recipe(), "training.max_steps=1"}).code, 2);
  const Finished again = run({"train", recipe(), "training.max_steps=1", "--resume"});
  EXPECT_EQ(again.code, 0) << again.err;
  EXPECT_NE(again.err.find("this run is finished"), std::string::npos) << again.err;
  EXPECT_EQ(sha256_file(work_ / "run/adapter/adapter_model.safetensors"), adapter);
  make_folders(work_ / "other");
  write_atomically(work_ / "other/thesis.txt", "mine");
  EXPECT_EQ(run({"train", recipe(), "output_dir=" + (work_ / "other").string(), "--resume"}).code,
            2);
  EXPECT_EQ(read_text(work_ / "other/thesis.txt"), "mine");
}

TEST_F(TrainProgram, what_is_not_there_yet_is_refused_by_name) {
  const auto text = [](const Finished& done) { return done.err.substr(done.err.find("error:")); };
  const Finished cuda = run({"train", recipe(), "compute.device=cuda"});
  EXPECT_EQ(cuda.code, 69);
  EXPECT_NE(text(cuda).find("computes on the CPU only"), std::string::npos) << cuda.err;
  EXPECT_EQ(run({"train", "maverick-a100"}).code, 69);
  EXPECT_FALSE(fs::exists(work_ / "run"));
}

TEST_F(TrainProgram, weights_from_disk_give_the_adapter_of_weights_in_memory) {
  const std::string store = (work_ / "store").string();
  const Finished packed = run({"model", "pack", kModel, "--to", store, "--format", "int4"});
  ASSERT_EQ(packed.code, 0) << packed.err;
  const auto adapter_of = [&](const std::string& name, std::vector<std::string> more) {
    std::vector<std::string> arguments = {"train", recipe(),
                                          "output_dir=" + (work_ / name).string()};
    arguments.insert(arguments.end(), more.begin(), more.end());
    const Finished done = run(arguments);
    EXPECT_EQ(done.code, 0) << done.err;
    return sha256_file(work_ / name / "adapter/adapter_model.safetensors");
  };
  const std::string resident = adapter_of("resident", {"base.store=" + store});
  EXPECT_EQ(
      adapter_of("streamed", {"base.store=" + store, "base.device_memory=0", "base.host_memory=0"}),
      resident);
  // The store stands for the model; and one packed into the cache is the same.
  EXPECT_EQ(adapter_of("itself",
                       {"base_model=" + store, "base.host_memory=200KB", "base.device_memory=0"}),
            resident);
  EXPECT_EQ(adapter_of("cached", {"base.format=int4", "base.host_memory=0"}), resident);
  // Nothing but what is computed with right now in memory.
  EXPECT_EQ(
      adapter_of("everything", {"base.store=" + store, "base.device_memory=0", "base.host_memory=0",
                                "base.activations=disk", "lora.expert_state=disk"}),
      resident);
  EXPECT_FALSE(fs::exists(work_ / "everything/scratch"));
  const Json summary = read_json(work_ / "streamed/summary.json");
  EXPECT_GT(summary.at("stream_bytes").get<std::int64_t>(), 0);
  EXPECT_EQ(read_json(work_ / "resident/summary.json").at("stream_bytes"), 0);
  // What contradicts the store is refused before anything is written.
  const auto refused = [&](std::vector<std::string> more, int code, const std::string& word) {
    std::vector<std::string> arguments = {"train", recipe(),
                                          "output_dir=" + (work_ / "no").string()};
    arguments.insert(arguments.end(), more.begin(), more.end());
    const Finished done = run(arguments);
    EXPECT_EQ(done.code, code) << done.err;
    EXPECT_NE(done.err.find(word), std::string::npos) << done.err;
    EXPECT_FALSE(fs::exists(work_ / "no/metrics.jsonl"));
  };
  refused({"base.store=" + store, "base.format=nf4"}, 2, "the store holds int4");
  refused({"base.store=" + (work_ / "nowhere").string()}, 65, "not a store");
  refused({"base.store=" + store, "base.device_memory=1KB", "base.host_memory=0"}, 66,
          "base.device_memory");
}

TEST_F(TrainProgram, a_base_that_changed_is_packed_again) {
  const fs::path model = work_ / "model";
  fs::copy(kModel, model, fs::copy_options::recursive);
  const auto stores = [&] {
    const fs::directory_iterator all(work_ / "cache/stores");
    return std::count_if(begin(all), end(all),
                         [](const auto& entry) { return fs::exists(entry.path() / "store.json"); });
  };
  int runs = 0;
  const auto expect_stores_after_training = [&](std::ptrdiff_t want) {
    const Finished done =
        run({"train", recipe(), "base_model=" + model.string(), "base.format=int4",
             "training.max_steps=1", "output_dir=" + (work_ / std::to_string(++runs)).string()});
    ASSERT_EQ(done.code, 0) << done.err;
    EXPECT_EQ(stores(), want) << done.err;
  };
  expect_stores_after_training(1);
  expect_stores_after_training(1);
  // Nothing of attention, of which alone the fingerprint has samples.
  flip_bit(model, "model.layers.1.feed_forward.experts.gate_up_proj", 5000);
  expect_stores_after_training(2);
  Json config = read_json(model / "config.json");
  config["rms_norm_eps"] = 1e-4;
  write_atomically(model / "config.json", config.dump(2));
  expect_stores_after_training(3);
}

TEST_F(TrainProgram, a_store_that_was_damaged_ends_the_run_with_65_and_names_the_tile) {
  const fs::path store = work_ / "store";
  ASSERT_EQ(run({"model", "pack", kModel, "--to", store.string()}).code, 0);
  const fs::path tiles = store / "layers/00001.tiles";
  std::string bytes = read_text(tiles);
  bytes[bytes.size() / 2] ^= 1;
  write_atomically(tiles, bytes);
  const Finished done = run({"train", recipe(), "base.store=" + store.string(),
                             "base.device_memory=0", "base.host_memory=0"});
  EXPECT_EQ(done.code, 65) << done.err;
  EXPECT_NE(done.err.find("00001.tiles, offset "), std::string::npos) << done.err;
  EXPECT_EQ(run({"model", "verify", store.string()}).code, 65);
}

TEST_F(TrainProgram, a_target_that_matches_nothing_is_refused) {
  const Finished done = run({"train", recipe(), "lora.targets=[q_projj]"});
  EXPECT_EQ(done.code, 2);
  EXPECT_EQ(
      done.err.substr(done.err.find("error:")),
      "error: LoRA target 'q_projj' matches no matrix of this model\n"
      "  where: lora.targets, for architecture Llama4ForCausalLM\n"
      "  mend:  Did you mean 'q_proj'? This model has: attention, dense_mlp, down_proj, experts, "
      "experts.down_proj, experts.gate_up_proj, gate_proj, k_proj, o_proj, q_proj, router, "
      "shared_expert, "
      "up_proj, v_proj.\n");
}

TEST_F(TrainProgram, a_diverging_run_ends_with_70_and_keeps_its_books) {
  const Finished done =
      run({"train", recipe(), "training.learning_rate=1e30", "training.max_grad_norm=null",
           "training.warmup_ratio=null", "training.warmup_steps=0"});
  EXPECT_EQ(done.code, 70) << done.err;
  EXPECT_NE(done.err.find("error: the run diverged: "), std::string::npos) << done.err;
  EXPECT_NE(done.err.find("Lower training.learning_rate"), std::string::npos);
  EXPECT_EQ(read_json(work_ / "run/summary.json").at("status"), "failed");
}

TEST_F(TrainProgram, the_budget_stops_a_run_at_a_checkpoint) {
  const Finished refused = run({"train", recipe(), "budget.gpu_hours=0.0000001"});
  EXPECT_EQ(refused.code, 76) << refused.err;
  EXPECT_NE(refused.err.find("error: the plan exceeds the run's budget: "), std::string::npos)
      << refused.err;
  EXPECT_FALSE(fs::exists(work_ / "run"));
  const Finished done = run({"train", recipe(), "budget.gpu_hours=0.0000001", "--over-budget"});
  EXPECT_EQ(done.code, 76) << done.err;
  EXPECT_TRUE(fs::exists(work_ / "run/checkpoints/step-00000001/manifest.json"));
  // Going on with the same budget is refused, and says what it would take; nothing is lost by it.
  const Finished again = run({"train", recipe(), "--resume", "budget.gpu_hours=0.0000001"});
  EXPECT_EQ(again.code, 76) << again.err;
  EXPECT_NE(again.err.find(" for the 11 steps left, as planned, are more than is left of the run's "
                           "budget: 0 GPU-hours of "),
            std::string::npos)
      << again.err;
  EXPECT_NE(again.err.find("It must be "), std::string::npos) << again.err;
  EXPECT_NE(again.err.find("With --resume --over-budget it goes on"), std::string::npos);
  const Finished more = run({"train", recipe(), "--resume"});
  EXPECT_EQ(more.code, 0) << more.err;
}

TEST_F(TrainProgram, a_run_on_postgresql_leaves_no_password_anywhere_and_outlives_its_server) {
  if (const std::string missing = PostgresServer::missing(); !missing.empty()) {
    GTEST_SKIP() << missing;
  }
  PostgresServer server;
  server.make_database("team");
  const std::string place = server.address("team", "tailor:hunter2");
  const std::string ledger = "cost.ledger=" + place;
  Finished done = run({"train", recipe(), ledger, "cost.project=p"});
  ASSERT_EQ(done.code, 0) << done.err;
  for (const auto& entry : fs::recursive_directory_iterator(work_)) {
    if (!entry.is_regular_file() || entry.path().extension() == ".db") continue;
    EXPECT_EQ(read_text(entry.path()).find("hunter2"), std::string::npos) << entry.path();
  }
  const Finished listed = run({"runs", "ls", "--json", "--ledger", place});
  ASSERT_EQ(listed.code, 0) << listed.err;
  ASSERT_EQ(parse_json(listed.out, "stdout").size(), 1U);

  // A run that goes on finds the server gone, and the ledger learns of it later.
  done = run({"train", recipe(), ledger, "output_dir=" + (work_ / "other").string(),
              "budget.gpu_hours=0.0000001", "--over-budget"});
  ASSERT_EQ(done.code, 76) << done.err;
  EXPECT_EQ((done.out + done.err).find("hunter2"), std::string::npos) << done.err;
  server.stop();
  const std::vector<std::string> go_on = {"train", recipe(), ledger,
                                          "output_dir=" + (work_ / "other").string(), "--resume"};
  done = run(go_on);
  EXPECT_EQ(done.code, 0) << done.err;
  EXPECT_NE(done.err.find("the ledger cannot be written, the run goes on"), std::string::npos);
  EXPECT_EQ((done.out + done.err).find("hunter2"), std::string::npos) << done.err;
  EXPECT_EQ(losses(work_ / "other").size(), 12U);
  EXPECT_EQ(run({"train", recipe(), ledger, "output_dir=" + (work_ / "new").string()}).code, 74);
  server.start();
  const Finished replayed =
      run({"runs", "replay", (work_ / "other").string(), "--ledger", place, "--json"});
  ASSERT_EQ(replayed.code, 0) << replayed.err;
  EXPECT_EQ(parse_json(replayed.out, "stdout").at("journals"), 1);
  const Finished shown =
      run({"runs", "show", (work_ / "other").string(), "--json", "--ledger", place});
  ASSERT_EQ(shown.code, 0) << shown.err;
  const Json record = parse_json(shown.out, "stdout");
  EXPECT_EQ(record.at("attempts"), 2);
  EXPECT_EQ(record.at("status"), "succeeded");
  EXPECT_EQ(record.at("steps"), 12);
}

}  // namespace
}  // namespace tailor
