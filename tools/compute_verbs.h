#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace tailor {

/// The verbs that compute. They live in the program tailor-compute, which loads LibTorch; `tailor`
/// hands over to it (exec: same process, same terminal), so that the other verbs start at once.
/// Each returns the exit code; failures are thrown as Error. With `json`, exactly one document goes
/// to stdout; everything for people goes to stderr.

struct TrainArguments {
  std::string recipe;                  ///< path, or the name of a shipped recipe
  std::vector<std::string> overrides;  ///< key=value
  bool resume = false;
  bool over_budget = false;  ///< start although the plan exceeds the budget
  bool json = false;
};
int run_train(const TrainArguments& arguments);

struct EvalArguments {
  std::string model;
  std::string adapter;             ///< empty: the base model alone
  std::vector<std::string> data;   ///< JSONL files
  std::string dtype = "bfloat16";  ///< float32 | bfloat16
  std::string device = "auto";
  std::string format = "auto";
  std::string train_on = "assistant";
  std::string chat_template = "model";
  std::int64_t sequence_len = 2048;
  std::int64_t batch_tokens = 4096;   ///< about as many tokens pass together
  std::optional<std::int64_t> limit;  ///< rows
  int threads = 0;                    ///< 0: all cores
  bool per_row = false;               ///< losses of every row
  bool json = false;
};
int run_eval(const EvalArguments& arguments);

struct GenerateArguments {
  std::string model;
  std::string adapter;
  std::vector<std::string> prompts;  ///< one user message each
  std::string data;  ///< or: the first `limit` rows of a messages JSONL, last answer left out
  std::int64_t limit = 3;
  std::string chat_template = "model";
  std::string dtype = "bfloat16";
  std::string device = "auto";
  std::int64_t tokens_max = 128;
  double temperature = 0;  ///< 0: greedy
  std::uint64_t seed = 0;
  int threads = 0;
  bool json = false;
};
int run_generate(const GenerateArguments& arguments);

struct CheckServedArguments {
  std::string url;
  std::string model;                      ///< the base of the adapter, or the merged model
  std::string adapter;                    ///< empty: a merged model is checked
  std::string base;                       ///< of a merged model
  std::vector<std::string> data;          ///< JSONL files
  std::string served_model, base_served;  ///< names at the server; empty: from its list
  std::int64_t rows = 8;
  std::int64_t sequence_len = 128;
  double timeout_s = 60;  ///< for each answer
  std::string format = "auto";
  std::string chat_template = "model";
  std::string dtype = "bfloat16";
  std::string device = "auto";
  int threads = 0;  ///< 0: all cores
  bool json = false;
};
/// Whether a server's answers are those of the adapter. The key, where the server wants one, is
/// $TAILOR_API_KEY.
int run_check_served(const CheckServedArguments& arguments);

struct ExpertsScanArguments {
  std::string model;                   ///< empty: the recipe's
  std::vector<std::string> data;       ///< JSONL files; empty: the recipe's training data
  std::string recipe;                  ///< path or name; empty: none
  std::vector<std::string> overrides;  ///< key=value, of the recipe
  std::string by = "gate";             ///< gate | token
  // At most one of these four; none: top_p 0.2.
  std::optional<double> top_p;              ///< of each layer's score
  std::optional<std::int64_t> count;        ///< experts a layer
  std::optional<std::string> max_bytes;     ///< of all chosen experts' factors, float32
  std::optional<std::string> max_usd;       ///< of the run that the recipe describes
  std::optional<std::int64_t> expert_rank;  ///< null: the recipe's, or its default
  std::string out, report;                  ///< files to write; empty: none
  bool force = false;                       ///< replace them
  std::string count_tokens = "all";         ///< all | trained
  std::string dtype = "bfloat16";
  std::string device = "auto";
  // Null: as the recipe has it, else as `eval` does.
  std::optional<std::string> format, train_on, chat_template;
  std::optional<std::int64_t> sequence_len;
  std::int64_t batch_tokens = 4096;   ///< about as many tokens pass together
  std::optional<std::int64_t> limit;  ///< rows
  int threads = 0;                    ///< 0: all cores
  bool json = false;
};
int run_experts_scan(const ExpertsScanArguments& arguments);

struct CalibrateArguments {
  std::string recipe;                  ///< path or name; empty: none
  std::vector<std::string> overrides;  ///< key=value, of the recipe
  bool json = false;
};
/// Measures training steps and bare matrix products for a few seconds and writes
/// <cache>/machine-calibration.json, which `plan` reads; one of a quiet machine is not replaced by
/// one of a busy machine. With a recipe: its own steps (measure_recipe_step), kept likewise.
int run_calibrate(const CalibrateArguments& arguments);

}  // namespace tailor
