// The program `tailor`: verbs that need no LibTorch run here, the others in tailor-compute, which
// takes over this process with the same arguments.

#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <iostream>

#include "base/error.h"
#include "tools/cli.h"
#include "tools/compute_program.h"
#include "tools/paths.h"
#include "tools/program.h"

namespace tailor {
namespace {

[[noreturn]] void hand_over(char* const* argv) {
  const fs::path program = sibling_program("tailor-compute");
  prepare_compute_environment();
  execv(program.c_str(), argv);
  throw io_error(errno, "cannot start tailor-compute", program.string());
}

[[noreturn]] void hand_over(std::vector<std::string> words) {
  words.insert(words.begin(), "tailor");
  std::vector<char*> argv;
  for (std::string& word : words) argv.push_back(word.data());
  argv.push_back(nullptr);
  hand_over(argv.data());
}

int train(const TrainArguments& arguments, char** argv) {
  std::vector<std::string> words;
  for (char** word = argv + 1; *word != nullptr; ++word) words.emplace_back(*word);
  if (const std::optional<int> code = train_in_ranks(arguments, words)) return *code;
  hand_over(argv);
}

int launch_local(const LaunchLocalArguments& arguments) {
  const TrainArguments& train = arguments.train;
  std::vector<std::string> words = {"train", train.recipe};
  words.insert(words.end(), train.overrides.begin(), train.overrides.end());
  if (train.resume) words.emplace_back("--resume");
  if (train.json) words.emplace_back("--json");
  if (const std::optional<int> code = launch_here(arguments, words)) return *code;
  hand_over(std::move(words));
}

int run(const Command& command, char** argv) {
  return std::visit(
      Overloaded{
          [](const ShowText& show) {
            std::cout << show.text;
            return 0;
          },
          [](const RecipeListArguments& arguments) { return run_recipe_list(arguments); },
          [](const RecipeShowArguments& arguments) { return run_recipe_show(arguments); },
          [](const RecipeCopyArguments& arguments) { return run_recipe_copy(arguments); },
          [](const RecipeValidateArguments& arguments) { return run_recipe_validate(arguments); },
          [](const PlanArguments& arguments) { return run_plan(arguments); },
          [](const DataPrepareArguments& arguments) { return run_data_prepare(arguments); },
          [](const DataInspectArguments& arguments) { return run_data_inspect(arguments); },
          [](const DataTokenizeArguments& arguments) { return run_data_tokenize(arguments); },
          [](const ModelInspectArguments& arguments) { return run_model_inspect(arguments); },
          [](const ModelPackArguments& arguments) { return run_model_pack(arguments); },
          [](const ModelVerifyArguments& arguments) { return run_model_verify(arguments); },
          [](const ModelSynthesiseArguments& arguments) { return run_model_synthesise(arguments); },
          [](const ModelExportArguments& arguments) { return run_model_export(arguments); },
          [](const ModelGgufArguments& arguments) { return run_model_gguf(arguments); },
          [](const AdapterInspectArguments& arguments) { return run_adapter_inspect(arguments); },
          [](const AdapterExportArguments& arguments) { return run_adapter_export(arguments); },
          [](const MergeArguments& arguments) { return run_merge(arguments); },
          [](const RunsListArguments& arguments) { return run_runs_list(arguments); },
          [](const RunsShowArguments& arguments) { return run_runs_show(arguments); },
          [](const RunsReportArguments& arguments) { return run_runs_report(arguments); },
          [](const RunsExportArguments& arguments) { return run_runs_export(arguments); },
          [](const RunsReplayArguments& arguments) { return run_runs_replay(arguments); },
          [](const RunsBudgetArguments& arguments) { return run_runs_budget(arguments); },
          [](const PricesListArguments& arguments) { return run_prices_list(arguments); },
          [](const PricesCheckArguments& arguments) { return run_prices_check(arguments); },
          [](const DoctorArguments& arguments) { return run_doctor(arguments); },
          [argv](const TrainArguments& arguments) { return train(arguments, argv); },
          [](const LaunchLocalArguments& arguments) { return launch_local(arguments); },
          [](const LaunchJobArguments& arguments) { return run_launch_job(arguments); },
          [](const LaunchStatusArguments& arguments) { return run_launch_status(arguments); },
          [argv](const auto&) -> int { hand_over(argv); },
      },
      command);
}

}  // namespace
}  // namespace tailor

int main(int argc, char** argv) {
  // A reader that goes away (`tailor runs ls | head`) ends this program without a word.
  std::signal(SIGPIPE, SIG_DFL);
  return tailor::run_program(
      [&] { return tailor::run(tailor::parse_command_line(argc, argv), argv); });
}
