#include <cstdlib>

#include "tools/launch/local_launch.h"
#include "tools/launch/rank_environment.h"
#include "tools/paths.h"
#include "tools/recipe_inputs.h"
#include "tools/verbs.h"

namespace tailor {
namespace {

std::string value_of(const std::string& name) {
  const char* value = std::getenv(name.c_str());
  return value == nullptr ? "" : value;
}

}  // namespace

std::optional<int> train_in_ranks(const TrainArguments& arguments,
                                  std::vector<std::string> command) {
  // Somebody started the ranks, of which this is one.
  if (!value_of("WORLD_SIZE").empty() || !value_of("RANK").empty()) return std::nullopt;
  if (const auto place = slurm_place(value_of)) {
    for (const std::string& entry : rank_environment(*place, {})) {
      const std::size_t equals = entry.find('=');
      ::setenv(entry.substr(0, equals).c_str(), entry.substr(equals + 1).c_str(), 1);
    }
    return std::nullopt;
  }
  const Recipe recipe = open_recipe(arguments.recipe, arguments.overrides).recipe;
  if (recipe.machine.ranks < 2) return std::nullopt;
  LocalLaunch launch;
  launch.command = std::move(command);
  launch.command.insert(launch.command.begin(), own_program().string());
  launch.ranks = recipe.machine.ranks;
  launch.threads = recipe.compute.threads.value_or(0);
  return launch_local(launch);
}

}  // namespace tailor
