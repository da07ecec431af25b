#include "tools/probe.h"

#include <fcntl.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cmath>

#include "base/log.h"
#include "base/text.h"
#include "recipes/write.h"
#include "tools/machine_facts.h"
#include "tools/paths.h"

namespace tailor {
namespace {

/// A folder of this process's own, removed at the end.
struct Scratch {
  fs::path path = cache_folder() / ("probe." + std::to_string(::getpid()));
  Scratch() { make_folders(path); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() {
    std::error_code error;
    fs::remove_all(path, error);
  }
};

/// Runs a program with stdout in a file; its exit status, -1 when it did not start.
int run_into(const std::vector<std::string>& words, const fs::path& out) {
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_addopen(&actions, STDOUT_FILENO, out.c_str(),
                                   O_WRONLY | O_CREAT | O_TRUNC, 0600);
  std::vector<std::string> copies = words;
  std::vector<char*> argv;
  for (std::string& word : copies) argv.push_back(word.data());
  argv.push_back(nullptr);
  pid_t child = 0;
  const int failed = posix_spawn(&child, argv[0], &actions, nullptr, argv.data(), environ);
  posix_spawn_file_actions_destroy(&actions);
  if (failed != 0) return -1;
  int status = 0;
  while (waitpid(child, &status, 0) < 0) {
    if (errno != EINTR) return -1;
  }
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

}  // namespace

MachineProbe probe(const ResolvedRecipe& resolved, const std::optional<DataStats>& data) {
  const Recipe& recipe = resolved.file.recipe;
  if (recipe.machine.profile) {
    throw Error(
        Fault::usage,
        {"--probe measures this machine, the recipe is planned for " + *recipe.machine.profile,
         "machine.profile", "Set machine.profile=auto, or leave --probe out."});
  }
  const Scratch scratch;
  log_info("measuring the disk, and steps of layers like the recipe's (some seconds)");
  MachineProbe out;
  const std::optional<DiskSpeed> disk = measure_disk(scratch.path);
  if (!disk) {
    throw Error(Fault::io, {"cannot measure the disk", scratch.path.string(),
                            "Set TAILOR_CACHE to a folder on the disk that the base is read from; "
                            "64 MiB must be free."});
  }
  out.disk_bytes_per_second = disk->read_bytes_per_second;
  const fs::path given = scratch.path / "recipe.yaml", answer = scratch.path / "answer.json";
  write_atomically(given, resolved_text(resolved.file));
  std::vector<std::string> words = {sibling_program("tailor-compute").string(), "calibrate",
                                    given.string(), "--json"};
  if (data && data->rows > 0) {
    const double rows = static_cast<double>(data->rows);
    const double tokens =
        static_cast<double>(data->tokens) / rows * static_cast<double>(recipe.global_batch_rows());
    const auto add = [&](const char* flag, double value) {
      words.insert(words.end(), {flag, std::to_string(std::llround(value))});
    };
    if (data->tokens > 0) add("--tokens", tokens);
    if (data->documents > 0) {
      add("--document-tokens",
          static_cast<double>(data->tokens) / static_cast<double>(data->documents));
    }
  }
  if (run_into(words, answer) != 0) {
    throw Error(Fault::device, {"measuring steps failed", join(words, " "),
                                "Its own message stands above; plan without --probe."});
  }
  const Json json = read_json(answer);
  const JsonReader reader(json, answer.string());
  out.gflops = reader.number("gflops");
  out.disturbed = reader.number("busy_share") > kBusyShare;
  out.source = reader.text("source") + ", disk " +
               bytes_text(std::llround(out.disk_bytes_per_second)) + "/s";
  return out;
}

}  // namespace tailor
