// The program tailor-compute: the verbs that need LibTorch. People start it through `tailor`.

#include <csignal>
#include <iostream>

#include "base/error.h"
#include "tools/cli.h"
#include "tools/program.h"

namespace tailor {
namespace {

int run(const Command& command) {
  return std::visit(
      Overloaded{
          [](const ShowText& show) {
            std::cout << show.text;
            return 0;
          },
          [](const TrainArguments& arguments) { return run_train(arguments); },
          [](const EvalArguments& arguments) { return run_eval(arguments); },
          [](const GenerateArguments& arguments) { return run_generate(arguments); },
          [](const ExpertsScanArguments& arguments) { return run_experts_scan(arguments); },
          [](const CalibrateArguments& arguments) { return run_calibrate(arguments); },
          [](const auto&) -> int {
            throw Error(Fault::usage, {"tailor-compute does not have this verb", "",
                                       "Start it with the same arguments as: tailor"});
          },
      },
      command);
}

}  // namespace
}  // namespace tailor

int main(int argc, char** argv) {
  // A run goes on when the reader of its output goes away.
  std::signal(SIGPIPE, SIG_IGN);
  return tailor::run_program([&] { return tailor::run(tailor::parse_command_line(argc, argv)); });
}
