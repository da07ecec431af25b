#include "tools/launch/skypilot.h"

#include <array>
#include <string_view>
#include <utility>

#include "base/error.h"
#include "base/text.h"
#include "tools/launch/yaml_out.h"

namespace tailor {
namespace {

constexpr int kPort = 29500;

std::string run_script(const SkyPilotJob& sky, const std::string& recipe) {
  const LaunchJob& job = sky.job;
  std::vector<std::string> words = {job.program, "launch", "local", recipe};
  words.insert(words.end(), job.overrides.begin(), job.overrides.end());
  words.emplace_back("--resume");
  std::string out = "cd /work || exit 74\n";
  out += "export TAILOR_LAUNCHER=skypilot TAILOR_LAUNCHER_JOB=\"$SKYPILOT_TASK_ID\"\n";
  out += shell_words(words);
  if (job.nodes > 1) {
    out += " \\\n  --nodes \"$SKYPILOT_NUM_NODES\" --node-rank \"$SKYPILOT_NODE_RANK\"";
    out += " \\\n  --master-addr \"$(head -n 1 <<<\"$SKYPILOT_NODE_IPS\")\" --master-port " +
           std::to_string(kPort);
  }
  out += "\ncode=$?\n";
  out += "case $code in\n";
  out += "  0 | 2 | 65 | 66 | 70 | 75 | 76) ;;\n";
  out += "  *)\n";
  out += "    # A device, a rank or a disk failed: 75 has the job start anew, a few times.\n";
  out += "    count=/work/.tailor-restarts-" + job.name + "-$SKYPILOT_NODE_RANK\n";
  out += "    restarts=$(cat \"$count\" 2>/dev/null || echo 0)\n";
  out += "    if [ \"$restarts\" -lt " + std::to_string(job.restarts_max) + " ]; then\n";
  out += "      echo $((restarts + 1)) >\"$count\"\n";
  out += "      code=75\n";
  out += "    fi ;;\n";
  out += "esac\n";
  return out + "exit $code\n";
}

}  // namespace

std::string skypilot_accelerator(const std::string& sku) {
  constexpr std::array<std::pair<std::string_view, std::string_view>, 8> kNames = {{
      {"a100-80gb", "A100-80GB"},
      {"a100-40gb", "A100"},
      {"h100", "H100"},
      {"h200", "H200"},
      {"b200", "B200"},
      {"l40s", "L40S"},
      {"l4", "L4"},
      {"a10g", "A10G"},
  }};
  for (const auto& [beginning, name] : kNames) {
    if (sku.starts_with(beginning)) return std::string(name);
  }
  return "";
}

std::string skypilot_task(const SkyPilotJob& sky) {
  const LaunchJob& job = sky.job;
  check_places(job);
  if (sky.bucket.empty()) {
    throw Error(Fault::usage,
                {"no --bucket given", "the command line of tailor launch skypilot",
                 "Add --bucket s3://NAME/PATH: it is mounted at /work, where the recipe's relative "
                 "paths start, and keeps checkpoints when a node is taken away."});
  }
  if (job.gpus_per_node > 0 && job.gpu_type.empty()) {
    throw Error(Fault::usage,
                {"which GPU is not known", "the command line of tailor launch skypilot",
                 "Add --gpu-type with SkyPilot's name, such as H100 (sky show-gpus "
                 "lists them)."});
  }
  Json resources = Json::object();
  if (job.gpus_per_node > 0) {
    resources["accelerators"] = job.gpu_type + ":" + std::to_string(job.gpus_per_node);
  }
  if (job.cpus_per_rank > 0) {
    resources["cpus"] = std::to_string(job.cpus_per_rank * job.ranks_per_node()) + "+";
  }
  if (job.memory_bytes > 0) {
    constexpr std::int64_t kGib = 1LL << 30;
    resources["memory"] = std::to_string((job.memory_bytes + kGib - 1) / kGib) + "+";
  }
  if (!sky.image.empty()) resources["image_id"] = "docker:" + sky.image;
  resources["use_spot"] = sky.spot;
  resources["job_recovery"] = {{"strategy", "EAGER_NEXT_REGION"},
                               {"max_restarts_on_errors", 0},
                               {"recover_on_exit_codes", {75}}};
  const std::string recipe = "/tmp/tailor/" + job.name + ".yaml";
  const Json task = {
      {"name", job.name},
      {"resources", resources},
      {"num_nodes", job.nodes},
      {"file_mounts",
       {{recipe, sky.recipe_file.string()},
        {"/work", {{"source", sky.bucket}, {"mode", "MOUNT_CACHED"}}}}},
      {"envs", {{"TAILOR_DATA", "/work/.tailor"}, {"TAILOR_CACHE", "/tmp/tailor/cache"}}},
      {"run", run_script(sky, recipe)}};
  return "# Written by tailor launch skypilot; sky jobs launch FILE starts it.\n" +
         yaml_document(task);
}

std::optional<SkyPilotState> read_skypilot_state(const Json& queue, const std::string& name) {
  std::optional<SkyPilotState> out;
  if (!queue.is_array()) return out;
  const auto text = [](const Json& record, const char* key) {
    const auto found = record.find(key);
    return found != record.end() && found->is_string() ? found->get<std::string>() : std::string();
  };
  const auto number = [](const Json& record, const char* key) {
    const auto found = record.find(key);
    return found != record.end() && found->is_number() ? found->get<double>() : 0.0;
  };
  for (const Json& record : queue) {
    if (!record.is_object() || text(record, "job_name") != name) continue;
    const auto id = static_cast<std::int64_t>(number(record, "job_id"));
    if (out && out->number > id) continue;
    out = SkyPilotState{id, lower(text(record, "status")), text(record, "failure_reason"),
                        static_cast<std::int64_t>(number(record, "recovery_count")),
                        number(record, "job_duration")};
  }
  return out;
}

}  // namespace tailor
