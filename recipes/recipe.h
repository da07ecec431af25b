#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "data/tokens/data_options.h"  // RecordFormat, TooLong, TrainOn

namespace tailor {

/// The whole recipe: what the user asked for, after reading and before planning.
///
/// One struct per section of the YAML file and one field per key, under the same names; the field's
/// initial value is the key's default. Choices are enums here: no part behind the reader compares
/// strings. docs/recipes.md has the same keys as a table, and a test holds the two together.
/// `std::nullopt` stands for `null` or `auto`, as the comment says.

enum class Optimizer { adamw };
enum class LrScheduler { constant, linear, cosine };
enum class DeviceChoice { automatic, cuda, cpu };
enum class ComputeType { float32, bfloat16 };
enum class KeepActivations { automatic, none, all };
/// The form frozen weights are streamed in; as_is: as the checkpoint has them.
enum class BaseFormat { as_is, int4, nf4, fp8, bf16 };
enum class ActivationHome { automatic, device, host, disk };
/// Where what is trained of the routed experts lives.
enum class StateHome { automatic, memory, disk };
enum class BudgetAction { checkpoint_stop, warn };

/// What LoRA is put on. Groups by the part of the model, and modules by their PEFT name.
struct LoraTargets {
  bool attention = true;             ///< every attention projection
  bool dense_mlp = true;             ///< gate, up and down of layers without experts
  bool shared_expert = true;         ///< gate, up and down of shared experts
  bool experts = true;               ///< gate, up and down of the routed experts
  bool router = false;               ///< the router's matrix
  std::vector<std::string> modules;  ///< such as q_proj; no duplicates, in the order written
  bool operator==(const LoraTargets&) const = default;
};

/// What a plan asks of the file that lora.experts names.
struct ChosenExpertCounts {
  std::int64_t experts = 0;  ///< of all layers together
  double token_share = 1;    ///< of the routed rows that they get, mean over the layers
  bool operator==(const ChosenExpertCounts&) const = default;
};

struct LoraRecipe {
  int rank = 8;         ///< columns of A of everything but routed experts; >= 1
  double alpha = 16;    ///< scale = alpha / rank; > 0
  double dropout = 0;   ///< on the input of A; [0, 1)
  bool rslora = false;  ///< scale = alpha / sqrt(rank)
  LoraTargets targets;
  std::optional<int> expert_rank;      ///< null: max(1, rank / experts per token), set by resolve()
  std::optional<double> expert_alpha;  ///< null: alpha * expert_rank / rank, set by resolve()
  std::optional<std::string> experts;  ///< null: all; else a file of `tailor experts scan`
  /// Of that file, set by who read it; null: all.
  std::optional<ChosenExpertCounts> chosen_experts;
  StateHome expert_state = StateHome::automatic;  ///< automatic: memory where the plan fits so
  double learning_rate_ratio_b = 1;               ///< LoRA+: learning rate of B over that of A; > 0
  std::optional<std::string> init_from;  ///< adapter folder to go on from; null: fresh factors
  bool operator==(const LoraRecipe&) const = default;
};

/// One entry of data.train or data.validation.
struct DataSource {
  std::string path;                    ///< file or glob
  double weight = 1;                   ///< share of this source's rows that an epoch takes; > 0
  std::optional<RecordFormat> format;  ///< null: data.format
  bool operator==(const DataSource&) const = default;
};

/// Where the chat template comes from.
struct ChatTemplateChoice {
  enum class Kind { model, named, file };
  Kind kind = Kind::model;
  std::string value;  ///< name or path of a .jinja file; empty for Kind::model
  bool operator==(const ChatTemplateChoice&) const = default;
};

struct DataRecipe {
  std::vector<DataSource> train;           ///< required, at least one
  std::vector<DataSource> validation;      ///< empty: none, or validation_split
  std::optional<double> validation_split;  ///< (0, 1) of train's records, by content hash
  RecordFormat format = RecordFormat::automatic;
  ChatTemplateChoice chat_template;
  TrainOn train_on;
  std::int64_t sequence_len = 2048;  ///< tokens a row; >= 2
  bool packing = true;               ///< false: one document a row, right-padded
  TooLong too_long = TooLong::truncate;
  std::optional<std::string> store;  ///< null: <cache>/tokens/<digest>.h5
  bool operator==(const DataRecipe&) const = default;
};

struct TrainingRecipe {
  std::int64_t micro_batch_size = 1;              ///< rows that pass a block together, per rank
  std::int64_t gradient_accumulation_steps = 1;   ///< micro-batches a step, per rank
  std::optional<std::int64_t> global_batch_rows;  ///< null: the two above times ranks
  std::int64_t num_epochs = 1;
  std::optional<std::int64_t> max_steps;  ///< null: as many as the epochs give
  bool shuffle = true;
  Optimizer optimizer = Optimizer::adamw;
  double learning_rate = 2e-4;  ///< peak, of A; > 0
  double adam_beta1 = 0.9;      ///< [0, 1)
  double adam_beta2 = 0.95;     ///< [0, 1)
  double adam_epsilon = 1e-8;   ///< > 0
  double weight_decay = 0;      ///< decoupled, on every factor; >= 0
  LrScheduler lr_scheduler = LrScheduler::cosine;
  std::optional<double> warmup_ratio =
      0.05;                                  ///< [0, 1] of the steps; null when warmup_steps is set
  std::optional<std::int64_t> warmup_steps;  ///< >= 0; null: by warmup_ratio
  std::optional<double> max_grad_norm = 1.0;  ///< > 0; null: no clipping
  std::int64_t eval_every_steps = 50;         ///< 0: only at the end
  bool operator==(const TrainingRecipe&) const = default;
};

struct ComputeRecipe {
  DeviceChoice device = DeviceChoice::automatic;
  ComputeType dtype = ComputeType::bfloat16;  ///< arithmetic of the blocks; factors are float32
  std::optional<int> threads;                 ///< null (auto): all cores this process may use
  KeepActivations keep_activations = KeepActivations::automatic;
  bool operator==(const ComputeRecipe&) const = default;
};

struct BaseRecipe {
  BaseFormat format = BaseFormat::as_is;             ///< of the routed experts
  BaseFormat non_expert_format = BaseFormat::as_is;  ///< of everything else that is frozen
  std::optional<int> group_size;              ///< of int4; null (auto): 128, 64 or 32, what divides
  std::optional<std::string> store;           ///< null: from safetensors, or packed into the cache
  std::optional<std::int64_t> device_memory;  ///< bytes of resident tiles; null: auto
  std::optional<std::int64_t> host_memory;    ///< bytes of resident tiles; null: auto
  ActivationHome activations = ActivationHome::automatic;
  bool operator==(const BaseRecipe&) const = default;
};

struct MachineRecipe {
  std::optional<std::string>
      profile;    ///< name in recipes/machines or a .yaml file; null (auto): this machine
  int ranks = 1;  ///< >= 1
  bool operator==(const MachineRecipe&) const = default;
};

/// Which price a device hour has.
struct PriceChoice {
  enum class Kind { automatic, id, usd };
  Kind kind = Kind::automatic;
  std::string id;                            ///< of the price book, for Kind::id
  std::int64_t usd_micros_per_gpu_hour = 0;  ///< for Kind::usd
  bool operator==(const PriceChoice&) const = default;
};

struct CostRecipe {
  PriceChoice price;
  std::optional<std::string> project;  ///< tag to add costs up by
  std::optional<std::string> ledger;   ///< null: <data dir>/ledger.db; a path or postgresql://...
  bool operator==(const CostRecipe&) const = default;
};

struct BudgetRecipe {
  std::optional<std::int64_t> usd_micros;  ///< key `usd`, in dollars there; > 0
  std::optional<double> gpu_hours;         ///< allocated device hours; > 0
  double warn = 0.8;                       ///< (0, 1]: share of the budget at which a warning comes
  BudgetAction action = BudgetAction::checkpoint_stop;
  bool operator==(const BudgetRecipe&) const = default;
};

struct CheckpointRecipe {
  std::optional<std::int64_t> every_steps;   ///< >= 1; null: not by steps
  std::optional<double> every_minutes = 10;  ///< > 0; null: not by time
  std::int64_t keep = 2;                     ///< newest ones kept; >= 1
  bool operator==(const CheckpointRecipe&) const = default;
};

struct LoggingRecipe {
  bool tensorboard = true;
  std::optional<std::string> mlflow;     ///< tracking URI; null: none
  std::int64_t metrics_every_steps = 1;  ///< >= 1
  bool operator==(const LoggingRecipe&) const = default;
};

struct Recipe {
  std::string name;        ///< default: the recipe file's name without its extension
  std::string base_model;  ///< required: a folder, or a Hugging Face repository name
  std::string output_dir;  ///< required
  std::int64_t seed = 42;  ///< >= 0

  LoraRecipe lora;
  DataRecipe data;
  TrainingRecipe training;
  ComputeRecipe compute;
  BaseRecipe base;
  MachineRecipe machine;
  CostRecipe cost;
  BudgetRecipe budget;
  CheckpointRecipe checkpoint;
  LoggingRecipe logging;
  bool operator==(const Recipe&) const = default;

  /// LoRA scale of everything but routed experts.
  double lora_scale() const;
  /// LoRA scale of routed experts; needs expert_rank and expert_alpha, so resolve() first.
  double expert_lora_scale() const;
  /// Rows of sequence_len in a step over all ranks.
  std::int64_t global_batch_rows() const {
    return training.global_batch_rows.value_or(
        training.micro_batch_size * training.gradient_accumulation_steps * machine.ranks);
  }
  /// Token positions in a step over all ranks, padding included.
  std::int64_t tokens_per_step() const { return global_batch_rows() * data.sequence_len; }
};

/// What resolve() needs to know about the model.
struct ModelTraits {
  int experts = 0;            ///< routed experts a layer; 0: a dense model
  int experts_per_token = 0;  ///< top-k; 0: a dense model
};

/// Sets the values that depend on the model (lora.expert_rank, lora.expert_alpha) where the user
/// left them open. Returns the given keys that do not apply to this model, each with the reason
/// ("lora.experts: the model has no routed experts"), for the caller to list.
std::vector<std::string> resolve(Recipe& recipe, const ModelTraits& model);

}  // namespace tailor
