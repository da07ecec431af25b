#include "tools/cli.h"

#include <CLI/CLI.hpp>
#include <functional>
#include <memory>
#include <string_view>

#include "base/error.h"
#include "base/text.h"

namespace tailor {
namespace {

constexpr const char* kJson = "One JSON document on stdout, everything else on stderr";
constexpr const char* kRecipe = "Recipe file, or the name of a shipped one (tailor recipe ls)";
constexpr const char* kOverBudget =
    "Start although the plan exceeds the budget; stopped in time all the same";
constexpr const char* kOverrides = "key=value with dotted keys, as training.max_steps=20";
constexpr const char* kLedger = "Ledger file instead of the default one (tailor doctor names it)";

/// "recipe ls" of the app for `tailor recipe ls`; empty for `tailor` itself.
std::string verb_of(const CLI::App& app) {
  if (app.get_parent() == nullptr) return "";
  const std::string before = verb_of(*app.get_parent());
  return before.empty() ? app.get_name() : before + " " + app.get_name();
}

std::string help_command(const CLI::App& app) {
  const std::string verb = verb_of(app);
  return "`tailor " + (verb.empty() ? "" : verb + " ") + "--help`";
}

/// Refuses words that are not in `words`, naming the nearest.
std::function<std::string(const std::string&)> one_of(const std::string& flag,
                                                      std::vector<std::string> words) {
  return [flag, words = std::move(words)](const std::string& given) -> std::string {
    if (std::find(words.begin(), words.end(), given) != words.end()) return "";
    const std::string near = nearest_name(given, words);
    throw Error(Fault::usage, {"'" + given + "' is no value of " + flag, "the command line",
                               (near.empty() ? "" : "Did you mean " + near + "? ") +
                                   "Use one of: " + join(words, ", ") + "."});
  };
}

std::function<std::string(const std::string&)> not_below(const std::string& flag, double least) {
  return [flag, least](const std::string& given) -> std::string {
    double value = 0;
    if (!CLI::detail::lexical_cast(given, value) || !(value < least)) return "";
    throw Error(Fault::usage,
                {flag + " is " + given + ", needed: " + exact_text(least) + " or more",
                 "the command line", "Give " + flag + " a larger number."});
  };
}

/// The tree of verbs; each leaf sets `command` when it was the one asked for.
class CommandLine {
 public:
  CommandLine() {
    app_.name("tailor");
    app_.description("Tailor: LoRA fine-tuning of mixture-of-experts models, from a recipe.");
    app_.set_version_flag("--version", "tailor " TAILOR_VERSION, "Show the version and stop");
    app_.footer(
        "Exit codes: 0 done; 2 recipe or command line wrong; 65 a file is unusable; 66 it does "
        "not\n"
        "fit; 69 a device failed; 70 diverged or internal; 74 reading or writing failed;\n"
        "75 interrupted, resumable; 76 stopped by the budget.\n\n"
        "Example:\n  tailor plan demo-maverick training.max_steps=20");
    format(app_);
    add_recipe();
    add_plan();
    add_train();
    add_eval();
    add_generate();
    add_launch();
    add_experts();
    add_data();
    add_model();
    add_adapter();
    add_merge();
    add_runs();
    add_prices();
    add_doctor();
    add_calibrate();
  }

  Command parse(int argc, const char* const* argv) {
    try {
      app_.parse(argc, argv);
    } catch (const CLI::CallForVersion& version) {
      return ShowText{std::string(version.what()) + "\n"};
    } catch (const CLI::CallForHelp&) {
      const CLI::App& app = deepest();
      return ShowText{app.help(app.get_parent() == nullptr ? "" : command_text(*app.get_parent()))};
    } catch (const CLI::ParseError& error) {
      refuse(error);
    }
    if (!command_) refuse_missing_verb(deepest());
    return *command_;
  }

 private:
  static void format(CLI::App& app) {
    app.get_formatter()->column_width(32);
    app.get_formatter()->label("REQUIRED", "(required)");
    app.get_formatter()->label("SUBCOMMAND", "VERB");
    if (app.get_parent() != nullptr) app.group("Verbs");
  }

  CLI::App& group(const std::string& name, const std::string& description,
                  const std::string& example) {
    CLI::App* app = app_.add_subcommand(name, description);
    app->footer("Example:\n  " + example);
    format(*app);
    return *app;
  }

  /// A verb whose arguments are an A; `own` is where its flags store their values.
  template <class A>
  struct Verb {
    CLI::App& app;
    A& own;
  };
  template <class A>
  Verb<A> verb(CLI::App& parent, const std::string& name, const std::string& description,
               const std::string& example) {
    CLI::App* app = parent.add_subcommand(name, description);
    app->footer("Example:\n  " + example);
    format(*app);
    auto own = std::make_shared<A>();
    app->callback([this, own] { command_ = Command(*own); });
    return {*app, *own};
  }
  template <class A>
  static void with_json(const Verb<A>& verb) {
    verb.app.add_flag("--json", verb.own.json, kJson);
  }
  template <class A>
  static void with_recipe(const Verb<A>& verb) {
    verb.app.add_option("RECIPE", verb.own.recipe, kRecipe)->required();
    verb.app.add_option("key=value", verb.own.overrides, kOverrides)->type_name("");
  }
  template <class A>
  static void with_ledger(const Verb<A>& verb) {
    verb.app.add_option("--ledger", verb.own.ledger, kLedger)->type_name("PATH");
  }

  void add_recipe() {
    CLI::App& recipe = group("recipe", "List, show, copy and check recipes", "tailor recipe ls");
    with_json(verb<RecipeListArguments>(recipe, "ls", "List the recipes that come with Tailor",
                                        "tailor recipe ls"));
    auto show = verb<RecipeShowArguments>(recipe, "show", "Print a recipe",
                                          "tailor recipe show demo-maverick --resolved");
    with_recipe(show);
    show.app.add_flag("--resolved", show.own.resolved, "Every key with its value and its origin");
    with_json(show);
    auto copy = verb<RecipeCopyArguments>(recipe, "cp", "Copy a recipe, to change it",
                                          "tailor recipe cp demo-maverick mine.yaml");
    copy.app.add_option("RECIPE", copy.own.recipe, kRecipe)->required();
    copy.app.add_option("TO", copy.own.destination, "File to write, or a folder")->required();
    with_json(copy);
    auto validate = verb<RecipeValidateArguments>(
        recipe, "validate", "Check a recipe: every problem at once, nothing is loaded",
        "tailor recipe validate mine.yaml lora.rank=16");
    with_recipe(validate);
    with_json(validate);
  }

  void add_plan() {
    auto plan =
        verb<PlanArguments>(app_, "plan", "What a run needs and costs: memory, time, dollars",
                            "tailor plan demo-maverick training.max_steps=20 --explain");
    plan.app.add_option("RECIPE", plan.own.recipe, kRecipe)->required();
    plan.app
        .add_option(
            "key=value", plan.own.overrides,
            "key=value with dotted keys, as training.max_steps=20; more recipes are planned "
            "side by side")
        ->type_name("");
    plan.app
        .add_option(
            "--on", plan.own.on,
            "Machine profiles to compare, by commas: a100-40gb,4xh100; auto is this machine")
        ->type_name("NAMES");
    plan.app.add_flag("--probe", plan.own.probe,
                      "Measure steps of the recipe's own layers and the disk on this machine "
                      "first, for some seconds, and plan with that");
    plan.app.add_flag("--explain", plan.own.explain, "Show the working of every figure");
    plan.app.add_flag(
        "--data", plan.own.data,
        "Count the data's rows, tokenising it once where that was not done yet "
        "(files of 64 MB or less are counted anyway where the steps follow from them)");
    plan.app.add_flag("--oracle-assumptions", plan.own.oracle_assumptions,
                      "The analytic streaming model's figures, without the terms in which our "
                      "step departs from it (GPUs only)");
    with_json(plan);
  }

  void add_train() {
    auto train = verb<TrainArguments>(app_, "train", "Train a recipe's adapter",
                                      "tailor train demo-maverick training.max_steps=20");
    with_recipe(train);
    train.app.add_flag("--resume", train.own.resume,
                       "Go on from the newest good checkpoint; afresh where there is none");
    train.app.add_flag("--over-budget", train.own.over_budget, kOverBudget);
    with_json(train);
  }

  void add_launch() {
    CLI::App& launch = group("launch", "Start a recipe's ranks: here, or as a job of a cluster",
                             "tailor launch slurm r1-4xh100 --partition gpu");
    add_launch_local(launch);
    add_launch_slurm(launch);
    add_launch_kubernetes(launch);
    add_launch_skypilot(launch);
    add_launch_status(launch);
  }

  void add_launch_local(CLI::App& launch) {
    auto local = verb<LaunchLocalArguments>(
        launch, "local", "Train with the recipe's ranks on this machine, as `tailor train` does",
        "tailor launch local demo-maverick machine.ranks=2");
    TrainArguments& train = local.own.train;
    local.app.add_option("RECIPE", train.recipe, kRecipe)->required();
    local.app.add_option("key=value", train.overrides, kOverrides)->type_name("");
    local.app.add_flag("--resume", train.resume,
                       "Go on from the newest good checkpoint; afresh where there is none");
    local.app.add_flag("--over-budget", train.over_budget, kOverBudget);
    local.app
        .add_option("--nodes", local.own.nodes,
                    "Machines that share the ranks, each of which runs this; PET_NNODES, else 1")
        ->check(not_below("--nodes", 1))
        ->type_name("N");
    local.app.add_option("--node-rank", local.own.node_rank, "Which of them this is, from 0")
        ->check(not_below("--node-rank", 0))
        ->type_name("N");
    local.app.add_option("--master-addr", local.own.master_addr, "Address of node 0")
        ->type_name("HOST");
    local.app.add_option("--master-port", local.own.master_port, "A port that is free there")
        ->check(not_below("--master-port", 1))
        ->type_name("N");
    local.app.add_flag("--json", train.json, kJson);
  }

  /// What every cluster is told.
  static void with_job(const Verb<LaunchJobArguments>& verb) {
    with_recipe(verb);
    CLI::App& app = verb.app;
    LaunchJobArguments& own = verb.own;
    const auto number = [&](const char* flag, int& to, const char* what, double least) {
      app.add_option(flag, to, what)->check(not_below(flag, least))->type_name("N");
    };
    app.add_flag("--dry-run", own.dry_run, "Write the job file, or print it; submit nothing");
    app.add_option("--out", own.out, "The job file")->type_name("FILE");
    app.add_flag("--follow", own.follow, "Show the job's log until it ends");
    app.add_flag("--force", own.force, "Also where the plan says that it does not fit");
    number("--nodes", own.nodes, "Nodes; as many as machine.profile needs without it", 1);
    number("--gpus-per-node", own.gpus_per_node, "One a rank without it; 0: train on the CPU", 0);
    app.add_option("--gpu-type", own.gpu_type, "The GPU's name in the cluster")->type_name("NAME");
    number("--cpus-per-rank", own.cpus_per_rank, "compute.threads without it", 1);
    app.add_option(
           "--memory", own.memory,
           "Host memory of a node; what the plan says without it, 0: what the cluster gives")
        ->type_name("BYTES");
    app.add_option("--max-restarts", own.restarts_max,
                   "After a device, a rank or a disk failed; an interrupted job always goes on")
        ->check(not_below("--max-restarts", 0))
        ->type_name("N")
        ->capture_default_str();
    app.add_option("--program", own.program, "The tailor that the job runs")->type_name("PATH");
    with_json(verb);
  }
  static void with_time(const Verb<LaunchJobArguments>& verb) {
    verb.app
        .add_option("--time", verb.own.time,
                    "Longest time: minutes, hours:minutes:seconds, or days-hours")
        ->type_name("TIME");
  }

  void add_launch_slurm(CLI::App& launch) {
    auto slurm = verb<LaunchJobArguments>(
        launch, "slurm", "Write a batch script for the recipe and submit it",
        "tailor launch slurm r1-4xh100 --partition gpu --time 2-00 --follow");
    slurm.own.cluster = LaunchJobArguments::Cluster::slurm;
    with_job(slurm);
    with_time(slurm);
    slurm.app.add_option("--partition", slurm.own.partition, "The cluster's default without it")
        ->type_name("NAME");
    slurm.app.add_option("--account", slurm.own.account, "Who pays; yours without it")
        ->type_name("NAME");
  }

  void add_launch_kubernetes(CLI::App& launch) {
    auto kubernetes = verb<LaunchJobArguments>(
        launch, "kubernetes", "Write a Job or TrainJob for the recipe and apply it",
        "tailor launch kubernetes r1-4xh100 --image registry.example/tailor:0.1 \\\n"
        "      --volume tailor --dry-run");
    kubernetes.own.cluster = LaunchJobArguments::Cluster::kubernetes;
    with_job(kubernetes);
    with_time(kubernetes);
    const auto text = [&](const char* flag, std::string& to, const char* what, const char* type) {
      return kubernetes.app.add_option(flag, to, what)->type_name(type);
    };
    text("--image", kubernetes.own.image, "Container image with tailor in it", "IMAGE");
    text("--volume", kubernetes.own.volume,
         "Claim of a volume all pods can write: /work, where relative paths start", "NAME");
    text("--namespace", kubernetes.own.name_space, "kubectl's without it", "NAME");
    text("--queue", kubernetes.own.queue, "Kueue's queue", "NAME");
    text("--kind", kubernetes.own.kind, "Job, or TrainJob of Kubeflow's Trainer", "KIND")
        ->check(one_of("--kind", {"Job", "TrainJob"}))
        ->capture_default_str();
  }

  void add_launch_skypilot(CLI::App& launch) {
    auto sky = verb<LaunchJobArguments>(
        launch, "skypilot", "Write a managed job for the recipe and launch it",
        "tailor launch skypilot r1-4xh100 --bucket s3://mine/tailor --spot");
    sky.own.cluster = LaunchJobArguments::Cluster::skypilot;
    with_job(sky);
    sky.app.add_option("--image", sky.own.image, "Docker image with tailor in it")
        ->type_name("IMAGE");
    sky.app
        .add_option("--bucket", sky.own.bucket,
                    "Bucket mounted at /work, where relative paths start and checkpoints go")
        ->type_name("URL");
    sky.app.add_flag("--spot", sky.own.spot, "Spot nodes; without it as the recipe's price is");
  }

  void add_launch_status(CLI::App& launch) {
    auto status = verb<LaunchStatusArguments>(
        launch, "status", "A job's state, and what it cost so far by the ledger and by Slurm",
        "tailor launch status 4711");
    status.app.add_option("JOB", status.own.job, "Slurm's number, or the job's name")->required();
    status.app
        .add_option("--on", status.own.on, "slurm, kubernetes or skypilot; a number is Slurm's")
        ->check(one_of("--on", {"slurm", "kubernetes", "skypilot"}))
        ->type_name("NAME");
    status.app
        .add_option("--namespace", status.own.name_space, "Of Kubernetes; kubectl's without it")
        ->type_name("NAME");
    status.app.add_flag("--follow", status.own.follow, "First show the job's log until it ends");
    with_ledger(status);
    with_json(status);
  }

  template <class A>
  static void with_model(const Verb<A>& verb) {
    verb.app
        .add_option("--model", verb.own.model,
                    "Model folder, or a Hugging Face repository in the local cache")
        ->type_name("DIR")
        ->required();
    verb.app.add_option("--adapter", verb.own.adapter, "PEFT adapter folder")->type_name("DIR");
  }
  template <class A>
  static void with_compute(const Verb<A>& verb) {
    verb.app.add_option("--dtype", verb.own.dtype, "float32 or bfloat16")
        ->check(one_of("--dtype", {"float32", "bfloat16"}))
        ->type_name("TYPE")
        ->capture_default_str();
    verb.app.add_option("--device", verb.own.device, "auto, cpu or cuda")
        ->check(one_of("--device", {"auto", "cpu", "cuda"}))
        ->type_name("DEVICE")
        ->capture_default_str();
    verb.app.add_option("--threads", verb.own.threads, "CPU threads; 0: all cores")
        ->check(not_below("--threads", 0))
        ->type_name("N")
        ->capture_default_str();
    verb.app
        .add_option("--chat-template", verb.own.chat_template,
                    "model, chatml, a name of the model's, or a .jinja file")
        ->type_name("NAME")
        ->capture_default_str();
  }

  void add_eval() {
    auto eval = verb<EvalArguments>(
        app_, "eval", "Loss, perplexity and token accuracy on data",
        "tailor eval --model models/smollm2-maverick --adapter runs/demo-maverick/adapter \\\n"
        "      --data data/wordnet.held.jsonl --limit 200");
    with_model(eval);
    eval.app.add_option("--data", eval.own.data, "JSON lines file or glob; several are fine")
        ->type_name("FILE")
        ->required();
    with_compute(eval);
    eval.app.add_option("--format", eval.own.format, "Shape of the rows, as data.format")
        ->check(one_of("--format", {"auto", "messages", "sharegpt", "prompt_completion", "alpaca",
                                    "text", "tokenized"}))
        ->type_name("NAME")
        ->capture_default_str();
    eval.app
        .add_option("--train-on", eval.own.train_on,
                    "What counts: assistant, last_assistant, all, or a role")
        ->type_name("NAME")
        ->capture_default_str();
    eval.app.add_option("--sequence-len", eval.own.sequence_len, "Tokens a row")
        ->check(not_below("--sequence-len", 2))
        ->type_name("N")
        ->capture_default_str();
    eval.app.add_option("--batch-tokens", eval.own.batch_tokens, "Tokens that pass together")
        ->check(not_below("--batch-tokens", 1))
        ->type_name("N")
        ->capture_default_str();
    eval.app.add_option("--limit", eval.own.limit, "Only the first N rows")
        ->check(not_below("--limit", 1))
        ->type_name("N");
    eval.app.add_flag("--per-row", eval.own.per_row, "The loss of every row too");
    with_json(eval);
  }

  void add_generate() {
    auto generate = verb<GenerateArguments>(
        app_, "generate", "Answers of a model, for a quick look at what was learnt",
        "tailor generate --model models/smollm2-maverick --adapter runs/demo-maverick/adapter \\\n"
        "      --prompt 'Classify the noun \"oak\": a deciduous tree'");
    with_model(generate);
    generate.app.add_option("--prompt", generate.own.prompts, "A user's message; may be repeated")
        ->type_name("TEXT");
    generate.app
        .add_option("--data", generate.own.data,
                    "Or rows of a messages file, their last answer left out")
        ->type_name("FILE");
    generate.app.add_option("--limit", generate.own.limit, "Rows of --data")
        ->check(not_below("--limit", 1))
        ->type_name("N")
        ->capture_default_str();
    with_compute(generate);
    generate.app.add_option("--tokens-max", generate.own.tokens_max, "Longest answer, in tokens")
        ->check(not_below("--tokens-max", 1))
        ->type_name("N")
        ->capture_default_str();
    generate.app
        .add_option("--temperature", generate.own.temperature, "0: always the likeliest token")
        ->check(not_below("--temperature", 0))
        ->type_name("X")
        ->capture_default_str();
    generate.app.add_option("--seed", generate.own.seed, "Start of the random numbers")
        ->type_name("N")
        ->capture_default_str();
    with_json(generate);
  }

  void add_experts() {
    CLI::App& experts = group(
        "experts", "Which routed experts data goes to, and which get factors",
        "tailor experts scan --model models/smollm2-maverick --data data/wordnet.train.jsonl");
    auto scan = verb<ExpertsScanArguments>(
        experts, "scan",
        "Count how tokens and gate weight fall on experts, and choose those to train",
        "tailor experts scan --model models/smollm2-maverick --data data/wordnet.train.jsonl \\\n"
        "      --top-p 0.5 --out experts.yaml --report experts.html\n"
        "  tailor train demo-maverick lora.experts=experts.yaml");
    CLI::App& app = scan.app;
    ExpertsScanArguments& own = scan.own;
    const auto text = [&](const char* flag, auto& to, const char* what, const char* type) {
      return app.add_option(flag, to, what)->type_name(type);
    };
    const auto number = [&](const char* flag, auto& to, const char* what, double least) {
      return app.add_option(flag, to, what)->check(not_below(flag, least))->type_name("N");
    };
    text("--model", own.model, "Model folder, store, or repository; the recipe's without it",
         "DIR");
    text("--data", own.data, "JSON lines file or glob; several are fine; the recipe's without it",
         "FILE");
    text("--recipe", own.recipe, "Recipe whose model, data and ranks are meant", "RECIPE");
    app.add_option("key=value", own.overrides, kOverrides)->type_name("");
    text("--by", own.by, "Score: gate (weight) or token (share of choices)", "NAME")
        ->check(one_of("--by", {"gate", "token"}))
        ->capture_default_str();
    text("--top-p", own.top_p, "A layer's fewest experts that hold this share of its score; 0.2",
         "P");
    number("--count", own.count, "The best N experts of each layer", 1);
    text("--max-bytes", own.max_bytes, "The best experts whose factors fit, float32, all layers",
         "BYTES");
    text("--max-usd", own.max_usd, "The best experts with which the recipe's plan costs no more",
         "USD");
    number("--expert-rank", own.expert_rank, "Rank of their factors; the recipe's without it", 1);
    text("--out", own.out, "Selection file to write, for lora.experts", "FILE");
    text("--report", own.report, "Page with a heat map to write", "FILE");
    app.add_flag("--force", own.force, "Replace the two files");
    text("--count-tokens", own.count_tokens, "all, or trained: those that the loss is taken of",
         "NAME")
        ->check(one_of("--count-tokens", {"all", "trained"}))
        ->capture_default_str();
    text("--dtype", own.dtype, "float32 or bfloat16", "TYPE")
        ->check(one_of("--dtype", {"float32", "bfloat16"}))
        ->capture_default_str();
    text("--device", own.device, "auto, cpu or cuda", "DEVICE")
        ->check(one_of("--device", {"auto", "cpu", "cuda"}))
        ->capture_default_str();
    number("--threads", own.threads, "CPU threads; 0: all cores", 0)->capture_default_str();
    text("--format", own.format, "Shape of the rows, as data.format", "NAME")
        ->check(one_of("--format", {"auto", "messages", "sharegpt", "prompt_completion", "alpaca",
                                    "text", "tokenized"}));
    text("--train-on", own.train_on, "Whose tokens carry loss, as data.train_on", "NAME");
    text("--chat-template", own.chat_template, "As data.chat_template", "NAME");
    number("--sequence-len", own.sequence_len, "Tokens a row; 2048 without a recipe", 2);
    number("--batch-tokens", own.batch_tokens, "Tokens that pass together", 1)
        ->capture_default_str();
    number("--limit", own.limit, "Only the first N rows", 1);
    with_json(scan);
  }

  void add_data() {
    CLI::App& data =
        group("data", "Tokenise, pack and look at data", "tailor data prepare demo-maverick");
    auto prepare = verb<DataPrepareArguments>(
        data, "prepare", "Tokenise and pack a recipe's data into its token store",
        "tailor data prepare demo-maverick data.sequence_len=512");
    with_recipe(prepare);
    with_json(prepare);
    auto inspect =
        verb<DataInspectArguments>(data, "inspect", "Show packed rows, the trained tokens marked",
                                   "tailor data inspect demo-maverick --rows 2");
    inspect.app.add_option("RECIPE", inspect.own.recipe, "Recipe, or a token store (.h5)")
        ->required();
    inspect.app.add_option("key=value", inspect.own.overrides, kOverrides)->type_name("");
    inspect.app
        .add_option("--tokenizer", inspect.own.tokenizer, "Model folder to read a store's ids with")
        ->type_name("DIR");
    inspect.app.add_flag("--validation", inspect.own.validation, "The recipe's validation rows");
    inspect.app.add_option("--first", inspect.own.first, "First row, from 0")
        ->check(not_below("--first", 0))
        ->type_name("N")
        ->capture_default_str();
    inspect.app.add_option("--rows", inspect.own.rows, "How many rows")
        ->check(not_below("--rows", 1))
        ->type_name("N")
        ->capture_default_str();
    with_json(inspect);
    auto tokenize = verb<DataTokenizeArguments>(
        data, "tokenize", "One {\"input_ids\"} line for each {\"text\"} line",
        "tailor data tokenize --tokenizer models/smollm2-maverick --data texts.jsonl");
    tokenize.app
        .add_option("--tokenizer", tokenize.own.tokenizer, "Folder that holds tokenizer.json")
        ->type_name("DIR")
        ->required();
    tokenize.app.add_option("--data", tokenize.own.data, "JSON lines file of {\"text\"} rows")
        ->type_name("FILE")
        ->required();
    tokenize.app.add_flag("--json", tokenize.own.json,
                          "One JSON document, a list of those lines, instead of lines");
  }

  void add_model() {
    CLI::App& model =
        group("model", "Look at models, pack them into stores, verify and export those",
              "tailor model inspect models/smollm2-maverick");
    auto inspect = verb<ModelInspectArguments>(
        model, "inspect", "A model's shape, and whether its files are whole; reads no weights",
        "tailor model inspect models/smollm2-maverick");
    inspect.app
        .add_option("MODEL", inspect.own.model,
                    "Model folder, store, config.json, or repository: local or as Tailor knows it")
        ->required();
    with_json(inspect);
    const std::vector<std::string> formats = {"int4", "nf4", "fp8", "bf16", "as_is"};
    auto pack = verb<ModelPackArguments>(
        model, "pack", "Pack a model into a store that training streams from",
        "tailor model pack models/smollm2-maverick --to stores/smollm2-maverick-int4");
    pack.app.add_option("MODEL", pack.own.model,
                        "Model folder, or a Hugging Face repository in the local cache");
    pack.app.add_option("--to", pack.own.to, "Folder of the store; a begun one is gone on with")
        ->type_name("DIR")
        ->required();
    pack.app
        .add_option("--format", pack.own.format, "Of routed experts: int4, nf4, fp8, bf16, as_is")
        ->check(one_of("--format", formats))
        ->type_name("NAME")
        ->capture_default_str();
    pack.app
        .add_option("--non-expert-format", pack.own.non_expert_format,
                    "Of attention, dense MLPs and shared experts")
        ->check(one_of("--non-expert-format", formats))
        ->type_name("NAME")
        ->capture_default_str();
    pack.app
        .add_option("--group", pack.own.group,
                    "Weights a scale of int4 covers; 128, or 64 or 32, what divides, without it")
        ->check(not_below("--group", 1))
        ->type_name("N");
    pack.app
        .add_option("--follow", pack.own.follow,
                    "Instead of MODEL: a folder that a download is filling; waits for its shards")
        ->type_name("DIR");
    pack.app.add_flag("--delete-source", pack.own.delete_source,
                      "With --follow: remove a shard once all of it is in the store");
    pack.app.add_option("--max-ram", pack.own.max_ram, "Memory it may use")
        ->type_name("BYTES")
        ->capture_default_str();
    pack.app.add_option("--threads", pack.own.threads, "Threads; all cores without it")
        ->check(not_below("--threads", 1))
        ->type_name("N");
    with_json(pack);
    auto verify = verb<ModelVerifyArguments>(
        model, "verify", "Check every tile of a store against its hash",
        "tailor model verify stores/smollm2-maverick-int4 --against models/smollm2-maverick");
    verify.app.add_option("STORE", verify.own.store, "Folder of a store")->required();
    verify.app
        .add_option("--against", verify.own.against,
                    "Also compare every matrix with this model, within what its format can lose")
        ->type_name("MODEL");
    verify.app.add_option("--threads", verify.own.threads, "Threads; all cores without it")
        ->check(not_below("--threads", 1))
        ->type_name("N");
    with_json(verify);
    auto out = verb<ModelExportArguments>(
        model, "export", "Write a store as a Hugging Face checkpoint, for vLLM and others",
        "tailor model export stores/smollm2-maverick-int4 --to models/smollm2-maverick-w4a16");
    out.app.add_option("STORE", out.own.store, "Folder of a store")->required();
    out.app.add_option("--to", out.own.to, "Folder of the checkpoint, a new one")
        ->type_name("DIR")
        ->required();
    out.app
        .add_option("--dtype", out.own.dtype,
                    "as_stored: codes and scales as they are; bfloat16: every matrix decoded")
        ->check(one_of("--dtype", {"as_stored", "bfloat16"}))
        ->type_name("NAME")
        ->capture_default_str();
    out.app
        .add_option("--towers-from", out.own.towers_from,
                    "Add the vision tower and projector of this model, the store's original")
        ->type_name("MODEL");
    out.app.add_option("--max-shard-size", out.own.max_shard_size, "Of a safetensors file")
        ->type_name("BYTES")
        ->capture_default_str();
    with_json(out);
    add_model_gguf(model);
    add_model_synthesise(model);
  }

  void add_model_gguf(CLI::App& model) {
    auto gguf = verb<ModelGgufArguments>(
        model, "gguf", "Write a model as a GGUF file for llama.cpp",
        "tailor model gguf models/smollm2-135m --to smollm2-135m.gguf --dtype q8_0");
    gguf.app
        .add_option("MODEL", gguf.own.model,
                    "Model folder or Hugging Face repository in the local cache; adapters are "
                    "merged first")
        ->required();
    gguf.app.add_option("--to", gguf.own.to, "The file, a new one")->type_name("FILE")->required();
    gguf.app
        .add_option("--dtype", gguf.own.dtype,
                    "Of matrices: f32, f16, bf16, q8_0; norms, biases and routers are f32")
        ->check(one_of("--dtype", {"f32", "f16", "bf16", "q8_0"}))
        ->type_name("NAME")
        ->capture_default_str();
    gguf.app.add_option("--threads", gguf.own.threads, "Threads; all cores without it")
        ->check(not_below("--threads", 1))
        ->type_name("N");
    with_json(gguf);
  }

  void add_model_synthesise(CLI::App& model) {
    const std::vector<std::string> formats = {"int4", "nf4", "fp8", "bf16"};
    auto synthesise = verb<ModelSynthesiseArguments>(
        model, "synthesise",
        "Write a store of random weights with a model's true sizes, to measure with",
        "tailor model synthesise Llama-4-Maverick --layers 2 --to stores/maverick-2");
    synthesise.app
        .add_option("CONFIG", synthesise.own.config,
                    "Model folder, config.json, Hugging Face repository in the local cache, or a "
                    "config that comes with Tailor, by the beginning of its name")
        ->required();
    synthesise.app
        .add_option("--to", synthesise.own.to, "Folder of the store; a begun one is gone on with")
        ->type_name("DIR")
        ->required();
    synthesise.app
        .add_option("--layers", synthesise.own.layers,
                    "How many, the first of each kind before others; or which: 0,1 or 0-3,7")
        ->type_name("LIST")
        ->required();
    synthesise.app
        .add_option("--format", synthesise.own.format, "Of routed experts: int4, nf4, fp8, bf16")
        ->check(one_of("--format", formats))
        ->type_name("NAME")
        ->capture_default_str();
    synthesise.app
        .add_option("--non-expert-format", synthesise.own.non_expert_format,
                    "Of attention, dense MLPs and shared experts")
        ->check(one_of("--non-expert-format", formats))
        ->type_name("NAME")
        ->capture_default_str();
    synthesise.app
        .add_option("--group", synthesise.own.group,
                    "Weights a scale of int4 covers; 128, or 64 or 32, what divides, without it")
        ->check(not_below("--group", 1))
        ->type_name("N");
    synthesise.app.add_option("--seed", synthesise.own.seed, "Start of the random numbers")
        ->type_name("N")
        ->capture_default_str();
    synthesise.app.add_option("--threads", synthesise.own.threads, "Threads; all cores without it")
        ->check(not_below("--threads", 1))
        ->type_name("N");
    with_json(synthesise);
  }

  void add_check_served(CLI::App& adapter) {
    auto check = verb<CheckServedArguments>(
        adapter, "check-served", "Ask a server for log-probabilities: is the adapter really there?",
        "tailor adapter check-served --url http://localhost:8000 --model models/smollm2-maverick "
        "\\\n"
        "      --adapter runs/demo-maverick/adapter --data data/wordnet.held.jsonl");
    CLI::App& app = check.app;
    CheckServedArguments& own = check.own;
    const auto text = [&](const char* flag, auto& to, const char* what, const char* type) {
      return app.add_option(flag, to, what)->type_name(type);
    };
    text("--url", own.url, "OpenAI-compatible server; its key, if any, is $TAILOR_API_KEY", "URL")
        ->required();
    with_model(check);
    text("--base", own.base, "Instead of --adapter: --model is merged, and this is its base",
         "DIR");
    text("--data", own.data, "JSON lines file or glob of held-out rows", "FILE")->required();
    text("--served-model", own.served_model, "The adapter's name at the server", "NAME");
    text("--base-served", own.base_served, "The base's name at the server", "NAME");
    text("--rows", own.rows, "How many rows are sent", "N")
        ->check(not_below("--rows", 1))
        ->capture_default_str();
    text("--sequence-len", own.sequence_len, "Tokens a row", "N")
        ->check(not_below("--sequence-len", 2))
        ->capture_default_str();
    text("--timeout", own.timeout_s, "Longest wait for an answer", "SECONDS")
        ->check(not_below("--timeout", 0.001))
        ->capture_default_str();
    with_compute(check);
    text("--format", own.format, "Shape of the rows, as data.format", "NAME")
        ->check(one_of("--format", {"auto", "messages", "sharegpt", "prompt_completion", "alpaca",
                                    "text", "tokenized"}))
        ->capture_default_str();
    with_json(check);
  }

  void add_adapter() {
    CLI::App& adapter =
        group("adapter", "Look at adapters, export them for servers, check that they are served",
              "tailor adapter inspect runs/demo-maverick/adapter");
    auto inspect = verb<AdapterInspectArguments>(
        adapter, "inspect", "What an adapter changes, by target and layer; whether it fits a model",
        "tailor adapter inspect runs/demo-maverick/adapter --base models/smollm2-maverick");
    inspect.app.add_option("ADAPTER", inspect.own.adapter, "PEFT adapter folder")->required();
    inspect.app
        .add_option("--base", inspect.own.base,
                    "Model folder, store, config.json or repository that it should fit")
        ->type_name("MODEL");
    inspect.app.add_option("--against", inspect.own.against, "Another adapter to compare it with")
        ->type_name("ADAPTER");
    with_json(inspect);
    auto out = verb<AdapterExportArguments>(
        adapter, "export", "Write an adapter as a server really accepts it, or say why it cannot",
        "tailor adapter export runs/demo-maverick/adapter --for vllm --to adapters/demo-vllm");
    out.app.add_option("ADAPTER", out.own.adapter, "PEFT adapter folder")->required();
    out.app.add_option("--for", out.own.target, "vllm, sglang, peft, or a version: peft@0.18.1")
        ->type_name("SERVER")
        ->required();
    out.app.add_option("--to", out.own.to, "Folder of the exported adapter, a new one")
        ->type_name("DIR")
        ->required();
    out.app
        .add_option("--base", out.own.base,
                    "The model: folder, store, config.json or repository; the one the adapter "
                    "names without it")
        ->type_name("MODEL");
    out.app.add_option("--dtype", out.own.dtype, "Of the factors: float32 or bfloat16")
        ->check(one_of("--dtype", {"float32", "bfloat16"}))
        ->type_name("TYPE")
        ->capture_default_str();
    out.app.add_flag("--uniform-rank", out.own.uniform_rank,
                     "For PEFT: one rank for all, scales in B, as servers always get it");
    with_json(out);
    add_check_served(adapter);
  }

  void add_merge() {
    auto out = verb<MergeArguments>(
        app_, "merge", "Add adapters to their base: a model that any server can serve",
        "tailor merge --base models/smollm2-maverick --adapter runs/demo-maverick/adapter --out "
        "merged");
    out.app.add_option("--base", out.own.base, "The model's folder, or a repository in the cache")
        ->type_name("MODEL");
    out.app.add_option("--adapter", out.own.adapters, "PEFT folder; several are added up")
        ->type_name("DIR");
    out.app
        .add_option("--weight", out.own.weights,
                    "What each adapter's change is multiplied by, in their order; 1 without it")
        ->type_name("X");
    out.app.add_option("--out", out.own.out, "Folder of the merged model, a new one")
        ->type_name("DIR");
    out.app
        .add_option("--dtype", out.own.dtype,
                    "as_base: the base's own format, quantised again where it is; else all "
                    "weights as bfloat16 or float32")
        ->check(one_of("--dtype", {"as_base", "bfloat16", "float32"}))
        ->type_name("NAME")
        ->capture_default_str();
    out.app
        .add_option("--onto", out.own.onto,
                    "For adapters trained on a quantised base: original, the weights of --base; "
                    "trained, the dequantised ones, --base being the store")
        ->check(one_of("--onto", {"original", "trained"}))
        ->type_name("NAME");
    out.app.add_option("--max-ram", out.own.max_ram, "Memory it may use")
        ->type_name("BYTES")
        ->capture_default_str();
    out.app.add_option("--threads", out.own.threads, "Pieces in flight; 0: twice the cores")
        ->check(not_below("--threads", 0))
        ->type_name("N");
    out.app
        .add_option("--verify", out.own.verify,
                    "Compare a merged folder with its receipt, and with --base and --adapter "
                    "where they are given")
        ->type_name("DIR");
    with_json(out);
  }

  void add_runs() {
    CLI::App& runs = group("runs", "What ran, how it ended and what it cost", "tailor runs ls");
    auto list = verb<RunsListArguments>(runs, "ls", "All runs, newest first", "tailor runs ls");
    list.app.add_option("--by", list.own.by, "Costs added up by day (UTC), model, user or project")
        ->check(one_of("--by", {"day", "model", "user", "project"}))
        ->type_name("WHAT");
    with_ledger(list);
    with_json(list);
    auto show = verb<RunsShowArguments>(runs, "show", "One run with its attempts, files and events",
                                        "tailor runs show demo-maverick");
    show.app
        .add_option("RUN", show.own.run, "Identifier or its beginning, name, or folder of a run")
        ->required();
    with_ledger(show);
    with_json(show);
    auto report =
        verb<RunsReportArguments>(runs, "report", "A run's cost by cause, planned beside measured",
                                  "tailor runs report runs/demo-maverick");
    report.app.add_option("RUN", report.own.run,
                          "Identifier or its beginning, name, or folder; the newest without one");
    report.app.add_option("--html", report.own.html, "Write the page, report.html, into this file")
        ->type_name("FILE");
    with_ledger(report);
    with_json(report);
    auto out = verb<RunsExportArguments>(runs, "export", "All runs for spreadsheets and billing",
                                         "tailor runs export --format focus --output costs.csv");
    out.app.add_option("--format", out.own.format, "csv, focus (FinOps FOCUS 1.0) or json")
        ->check(one_of("--format", {"csv", "focus", "json"}))
        ->type_name("NAME")
        ->capture_default_str();
    out.app.add_option("--output", out.own.output, "File to write instead of stdout")
        ->type_name("FILE");
    with_ledger(out);
    out.app.add_flag("--json", out.own.json, "The same as --format json");
    auto replay = verb<RunsReplayArguments>(
        runs, "replay", "Give the ledger what a run's journal kept while it was away",
        "tailor runs replay runs/demo-maverick");
    replay.app.add_option("FOLDER", replay.own.folder, "The run's folder")->required();
    with_ledger(replay);
    with_json(replay);
    auto budget = verb<RunsBudgetArguments>(
        runs, "budget", "The budget that a project's runs share: show it, or set it",
        "tailor runs budget team-a --usd 150 --gpu-hours 60");
    budget.app.add_option("PROJECT", budget.own.project, "cost.project of the recipes")->required();
    budget.app.add_option("--usd", budget.own.usd, "Dollars all runs of the project may cost")
        ->type_name("AMOUNT");
    budget.app.add_option("--gpu-hours", budget.own.gpu_hours, "Device hours that they may hold")
        ->type_name("N");
    budget.app.add_flag("--none", budget.own.none, "No budget any more");
    with_ledger(budget);
    with_json(budget);
  }

  void add_prices() {
    CLI::App& prices = group("prices", "The price book", "tailor prices ls");
    auto list = verb<PricesListArguments>(prices, "ls", "Prices in force today",
                                          "tailor prices ls --sku a100-40gb-pcie");
    list.app.add_option("--sku", list.own.sku, "Only this product")->type_name("NAME");
    list.app.add_flag("--all", list.own.all, "Also closed and coming prices");
    with_json(list);
    auto check = verb<PricesCheckArguments>(
        prices, "check", "Check a price book, and that the shipped recipes find their price",
        "tailor prices check");
    check.app.add_option("FILE", check.own.file,
                         "Price book; the shipped one with yours without it");
    with_json(check);
  }

  void add_doctor() {
    with_json(verb<DoctorArguments>(
        app_, "doctor", "What this machine can do, what is missing, and the command that mends it",
        "tailor doctor"));
  }

  void add_calibrate() {
    auto calibrate = verb<CalibrateArguments>(
        app_, "calibrate",
        "Measure what a training step reaches on this machine, for `tailor plan`",
        "tailor calibrate");
    calibrate.app.add_option("RECIPE", calibrate.own.recipe,
                             "Measure steps of this recipe's own layers");
    calibrate.app.add_option("key=value", calibrate.own.overrides, kOverrides)->type_name("");
    with_json(calibrate);
  }

  CLI::App& deepest() {
    CLI::App* app = &app_;
    while (!app->get_subcommands().empty()) app = app->get_subcommands().front();
    return *app;
  }

  static std::vector<std::string> verbs_of(const CLI::App& app) {
    std::vector<std::string> names;
    for (const CLI::App* sub : app.get_subcommands([](const CLI::App*) { return true; })) {
      names.push_back(sub->get_name());
    }
    return names;
  }

  static std::string command_text(const CLI::App& app) {
    const std::string verb = verb_of(app);
    return verb.empty() ? "tailor" : "tailor " + verb;
  }

  [[noreturn]] static void refuse_missing_verb(const CLI::App& app) {
    throw Error(Fault::usage, {command_text(app) + " needs a verb", "the command line",
                               "Add one of: " + join(verbs_of(app), ", ") + ". " +
                                   help_command(app) + " explains them."});
  }

  [[noreturn]] static void refuse_extra(const CLI::App& app, const std::string& extra) {
    const std::string where = "the command line of " + command_text(app);
    if (extra.starts_with('-')) {
      std::vector<std::string> flags;
      for (const CLI::Option* option : app.get_options()) {
        for (const std::string& name : option->get_lnames()) flags.push_back("--" + name);
      }
      const std::string name = extra.substr(0, extra.find('='));
      const std::size_t letter = name.find_first_not_of('-');
      std::string mend;
      if (name.find('.') != std::string::npos && letter != std::string::npos) {
        mend = "Keys of the recipe are written without dashes: " + name.substr(letter) + "=VALUE. ";
      } else if (const std::string near = nearest_name(name, flags); !near.empty()) {
        mend = "Did you mean " + near + "? ";
      }
      throw Error(Fault::usage,
                  {"unknown flag " + name, where, mend + help_command(app) + " lists the flags."});
    }
    const std::vector<std::string> verbs = verbs_of(app);
    if (verbs.empty()) {
      throw Error(Fault::usage, {"unexpected argument '" + extra + "'", where,
                                 help_command(app) + " shows what it takes."});
    }
    const std::string near = nearest_name(extra, verbs);
    throw Error(Fault::usage, {"unknown verb '" + extra + "'", where,
                               (near.empty() ? "Verbs: " + join(verbs, ", ") + "."
                                             : "Did you mean " + near + "?") +
                                   " " + help_command(app) + " explains them."});
  }

  [[noreturn]] void refuse(const CLI::ParseError& error) {
    const CLI::App& app = deepest();
    // A misspelt word explains whatever else is missing, so it comes first.
    for (const CLI::App* at = &app; at != nullptr; at = at->get_parent()) {
      const std::vector<std::string> extras = at->remaining(false);
      if (!extras.empty()) refuse_extra(app, extras.front());
    }
    std::string what = error.what();
    if (const auto end = what.find('\n'); end != std::string::npos) what.resize(end);
    constexpr std::string_view kNoNumber = "Could not convert: ";
    const std::size_t equals = what.find(" = ");
    if (what.starts_with(kNoNumber) && equals != std::string::npos) {
      const std::string flag = what.substr(kNoNumber.size(), equals - kNoNumber.size());
      what = flag + " is '" + what.substr(equals + 3) + "', a number is needed";
    } else if (dynamic_cast<const CLI::ArgumentMismatch*>(&error) != nullptr &&
               what.ends_with(" missing")) {
      what = what.substr(0, what.find(':')) + " needs a value";
    }
    throw Error(Fault::usage, {what, "the command line of " + command_text(app),
                               help_command(app) + " shows what it takes."});
  }

  CLI::App app_;
  std::optional<Command> command_;
};

}  // namespace

Command parse_command_line(int argc, const char* const* argv) {
  return CommandLine().parse(argc, argv);
}

}  // namespace tailor
