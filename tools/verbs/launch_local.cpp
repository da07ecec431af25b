#include "base/error.h"
#include "base/rank_env.h"
#include "tools/launch/local_launch.h"
#include "tools/launch/rank_environment.h"
#include "tools/paths.h"
#include "tools/recipe_inputs.h"
#include "tools/verbs.h"

namespace tailor {
namespace {

LocalLaunch launch_of(const Recipe& recipe, std::vector<std::string> command) {
  LocalLaunch launch;
  launch.command = std::move(command);
  launch.command.insert(launch.command.begin(), own_program().string());
  launch.ranks = recipe.machine.ranks;
  launch.threads = recipe.compute.threads.value_or(0);
  return launch;
}

}  // namespace

std::optional<int> train_in_ranks(const TrainArguments& arguments,
                                  std::vector<std::string> command) {
  // Somebody started the ranks, of which this is one.
  if (read_rank_env()) return std::nullopt;
  const Recipe recipe = open_recipe(arguments.recipe, arguments.overrides).recipe;
  if (recipe.machine.ranks < 2) return std::nullopt;
  return launch_local(launch_of(recipe, std::move(command)));
}

std::optional<int> launch_here(const LaunchLocalArguments& arguments,
                               std::vector<std::string> command) {
  const Recipe recipe = open_recipe(arguments.train.recipe, arguments.train.overrides).recipe;
  LocalLaunch launch = launch_of(recipe, std::move(command));
  launch.nodes = arguments.nodes;
  launch.node_rank = arguments.node_rank;
  launch.master_addr = arguments.master_addr;
  launch.master_port = arguments.master_port;
  if (launch.nodes == 0) {
    // Kubeflow's Trainer sets these.
    const EnvLookup lookup = process_env();
    const Environment env(lookup);
    const std::string mend = "Give --nodes, --node-rank, --master-addr and --master-port instead.";
    launch.nodes = env.number("PET_NNODES", mend).value_or(1);
    launch.node_rank = env.number("PET_NODE_RANK", mend).value_or(0);
    launch.master_addr = env.text_or("PET_MASTER_ADDR", "");
    launch.master_port = env.number("PET_MASTER_PORT", mend).value_or(0);
  }
  const auto refuse = [](const std::string& what, const std::string& mend) {
    throw Error(Fault::usage, {what, "the command line of tailor launch local", mend});
  };
  if (launch.nodes < 2) {
    launch.nodes = 1;
    launch.node_rank = 0;
    launch.master_addr = "127.0.0.1";
    launch.master_port = 0;
    if (launch.ranks < 2) return std::nullopt;
    return launch_local(launch);
  }
  if (launch.ranks % launch.nodes != 0) {
    refuse(std::to_string(launch.ranks) + " ranks do not spread evenly over " +
               std::to_string(launch.nodes) + " nodes",
           "Change machine.ranks or --nodes.");
  }
  if (launch.node_rank >= launch.nodes) {
    refuse("--node-rank is " + std::to_string(launch.node_rank) + " of " +
               std::to_string(launch.nodes) + " nodes",
           "Count from 0.");
  }
  if (launch.master_addr.empty() || launch.master_port == 0) {
    refuse("several nodes need --master-addr and --master-port",
           "Give the address of node 0 and a port that is free there, the same on every node.");
  }
  launch.ranks /= launch.nodes;
  return launch_local(launch);
}

}  // namespace tailor
