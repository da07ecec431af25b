#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "tools/compute_verbs.h"

namespace tailor {

/// The verbs that need no LibTorch: what each was given on the command line, and the function that
/// does it. Like those of compute_verbs.h they return the exit code and throw Error; with `json`
/// stdout gets exactly one document.

struct RecipeListArguments {
  bool json = false;
};
struct RecipeShowArguments {
  std::string recipe;
  std::vector<std::string> overrides;
  bool resolved = false;  ///< every key with its value and origin
  bool json = false;
};
struct RecipeCopyArguments {
  std::string recipe, destination;
  bool json = false;
};
struct RecipeValidateArguments {
  std::string recipe;
  std::vector<std::string> overrides;
  bool json = false;
};
int run_recipe_list(const RecipeListArguments& arguments);
int run_recipe_show(const RecipeShowArguments& arguments);
int run_recipe_copy(const RecipeCopyArguments& arguments);
int run_recipe_validate(const RecipeValidateArguments& arguments);

struct PlanArguments {
  std::string recipe;
  std::vector<std::string> overrides;  ///< words without '=' are further recipes
  bool explain = false;                ///< the working of every figure
  bool probe = false;                  ///< measure the recipe's own steps first
  bool data = false;                   ///< tokenise the data if need be, whatever its size
  bool oracle_assumptions = false;     ///< leave out where our step departs from the oracle
  std::string on;                      ///< machine profiles to compare, by commas
  bool json = false;
};
int run_plan(const PlanArguments& arguments);

struct DataPrepareArguments {
  std::string recipe;
  std::vector<std::string> overrides;
  bool json = false;
};
struct DataInspectArguments {
  std::string recipe;  ///< or a token store (.h5)
  std::vector<std::string> overrides;
  std::string tokenizer;  ///< model folder; empty: the recipe's model, or ids for a store
  bool validation = false;
  std::int64_t first = 0, rows = 3;
  bool json = false;
};
struct DataTokenizeArguments {
  std::string tokenizer, data;
  bool json = false;
};
int run_data_prepare(const DataPrepareArguments& arguments);
int run_data_inspect(const DataInspectArguments& arguments);
int run_data_tokenize(const DataTokenizeArguments& arguments);

struct ModelInspectArguments {
  std::string model;
  bool json = false;
};
struct ModelPackArguments {
  std::string model;            ///< folder or repository; empty with follow
  std::string to;               ///< the store's folder
  std::string format = "int4";  ///< of routed experts
  std::string non_expert_format = "as_is";
  std::int64_t group = 0;  ///< of int4; 0: what divides the width
  std::string follow;      ///< a folder that a download is filling
  bool delete_source = false;
  std::string max_ram = "1GiB";
  int threads = 0;  ///< 0: all cores
  bool json = false;
};
struct ModelVerifyArguments {
  std::string store;
  std::string against;  ///< a model to compare with; empty: hashes only
  int threads = 0;
  bool json = false;
};
struct ModelSynthesiseArguments {
  std::string config;           ///< folder, config.json, repository, or a shipped config's name
  std::string to;               ///< the store's folder
  std::string layers;           ///< a count, or a list such as 0,1 or 0-3,7
  std::string format = "int4";  ///< of routed experts
  std::string non_expert_format = "bf16";
  std::int64_t group = 0;  ///< of int4; 0: what divides the width
  std::uint64_t seed = 0;
  int threads = 0;  ///< 0: all cores
  bool json = false;
};
struct ModelExportArguments {
  std::string store;
  std::string to;                   ///< the checkpoint's folder, which may not be there
  std::string dtype = "as_stored";  ///< or bfloat16: every matrix decoded
  std::string towers_from;  ///< a multimodal model whose other towers are added; empty: none
  std::string max_shard_size = "5GB";
  bool json = false;
};
struct ModelGgufArguments {
  std::string model;
  std::string to;             ///< the file, which may not be there
  std::string dtype = "f16";  ///< of matrices: f32, f16, bf16, q8_0
  int threads = 0;            ///< 0: all cores
  bool json = false;
};
int run_model_inspect(const ModelInspectArguments& arguments);
int run_model_pack(const ModelPackArguments& arguments);
int run_model_verify(const ModelVerifyArguments& arguments);
int run_model_synthesise(const ModelSynthesiseArguments& arguments);
int run_model_export(const ModelExportArguments& arguments);
int run_model_gguf(const ModelGgufArguments& arguments);

struct AdapterInspectArguments {
  std::string adapter;
  std::string base;     ///< a model it should fit; empty: none
  std::string against;  ///< another adapter; empty: none
  bool json = false;
};
int run_adapter_inspect(const AdapterInspectArguments& arguments);

struct AdapterExportArguments {
  std::string adapter;
  std::string to;                 ///< the folder, which may not be there
  std::string target;             ///< vllm, sglang, peft or peft@VERSION
  std::string base;               ///< the model; empty: the one the adapter names
  std::string dtype = "float32";  ///< or bfloat16
  bool uniform_rank = false;      ///< for PEFT
  bool json = false;
};
int run_adapter_export(const AdapterExportArguments& arguments);
struct MergeArguments {
  std::string base;                   ///< folder or repository, or a store
  std::vector<std::string> adapters;  ///< PEFT folders
  std::vector<double> weights;        ///< one an adapter; empty: 1 each
  std::string out;                    ///< the merged model's folder
  std::string dtype = "as_base";      ///< or bfloat16, float32: not quantised
  std::string onto;                   ///< original, trained; empty: where both are the same
  std::string max_ram = "1GiB";
  int threads = 0;     ///< 0: twice the cores
  std::string verify;  ///< a merged folder to compare with its receipt; instead of all that
  bool json = false;
};
int run_merge(const MergeArguments& arguments);

struct RunsListArguments {
  std::string by;      ///< day, model, user, project; empty: a row for each run
  std::string ledger;  ///< empty: the default one
  bool json = false;
};
struct RunsShowArguments {
  std::string run, ledger;
  bool json = false;
};
struct RunsReportArguments {
  std::string run;  ///< empty: the newest
  std::string ledger;
  std::string html;  ///< the page goes into this file, and nothing is printed
  bool json = false;
};
struct RunsExportArguments {
  std::string format = "csv";  ///< csv, focus, json
  std::string output;          ///< empty: stdout
  std::string ledger;
  bool json = false;  ///< as format json
};
struct RunsReplayArguments {
  std::string folder, ledger;
  bool json = false;
};
struct RunsBudgetArguments {
  std::string project;
  std::string usd, gpu_hours;  ///< decimals; empty: stays as it is
  bool none = false;
  std::string ledger;
  bool json = false;
};
int run_runs_replay(const RunsReplayArguments& arguments);
int run_runs_budget(const RunsBudgetArguments& arguments);
int run_runs_list(const RunsListArguments& arguments);
int run_runs_show(const RunsShowArguments& arguments);
int run_runs_report(const RunsReportArguments& arguments);
int run_runs_export(const RunsExportArguments& arguments);

struct PricesListArguments {
  std::string sku;   ///< empty: all
  bool all = false;  ///< also those not in force today
  bool json = false;
};
struct PricesCheckArguments {
  std::string file;  ///< empty: the shipped book
  bool json = false;
};
int run_prices_list(const PricesListArguments& arguments);
int run_prices_check(const PricesCheckArguments& arguments);

/// Before `tailor train` trains in this process: where the recipe has several ranks and nobody
/// started them, starts them here, each as `tailor COMMAND...`, and gives their exit code. Nothing
/// where this process is a rank, or the only one; a task of a bare `srun` is told its place then.
std::optional<int> train_in_ranks(const TrainArguments& arguments,
                                  std::vector<std::string> command);

/// `tailor launch local`: `tailor train` by another name.
struct LaunchLocalArguments {
  TrainArguments train;
  /// Where other machines start ranks of the same run: how many, which this is, and where rank 0
  /// is.
  int nodes = 0, node_rank = 0;  ///< 0 nodes: what PET_NNODES says, else 1
  std::string master_addr;
  int master_port = 0;
};
/// The ranks of this machine, each as `tailor COMMAND...`. Without flags for several machines the
/// PET_* variables of Kubeflow's Trainer count. Nothing where the recipe has one rank and one
/// machine: this process is to train.
std::optional<int> launch_here(const LaunchLocalArguments& arguments,
                               std::vector<std::string> command);

/// `tailor launch slurm|kubernetes|skypilot`. A flag that a cluster does not have is not set for
/// it.
struct LaunchJobArguments {
  enum class Cluster { slurm, kubernetes, skypilot };
  Cluster cluster = Cluster::slurm;
  std::string recipe;
  std::vector<std::string> overrides;
  bool dry_run = false;    ///< write the file, submit nothing
  bool force = false;      ///< also where the plan says it does not fit
  bool follow = false;     ///< show the job's log until it ends
  std::string out;         ///< the file; empty: NAME.sh or NAME.yaml here, stdout with dry_run
  std::string program;     ///< empty: this one (slurm), `tailor` (elsewhere)
  int nodes = 0;           ///< 0: as many as the machine profile needs
  int gpus_per_node = -1;  ///< -1: one a rank on a machine with GPUs
  std::string gpu_type;
  int cpus_per_rank = 0;  ///< 0: compute.threads, or as the cluster gives
  std::string memory;     ///< host memory a node; empty: what the plan says; "0": unsaid
  std::string time;
  int restarts_max = 3;
  std::string partition, account;                              // slurm
  std::string image, volume, name_space, queue, kind = "Job";  // kubernetes; image also skypilot
  std::string bucket;                                          // skypilot
  bool spot = false;
  bool json = false;
};
int run_launch_job(const LaunchJobArguments& arguments);

struct LaunchStatusArguments {
  std::string job;
  std::string on;          ///< slurm, kubernetes, skypilot; empty: slurm for a number
  std::string name_space;  ///< kubernetes
  std::string ledger;
  bool follow = false;
  bool json = false;
};
int run_launch_status(const LaunchStatusArguments& arguments);

struct DoctorArguments {
  bool json = false;
};
int run_doctor(const DoctorArguments& arguments);

}  // namespace tailor
