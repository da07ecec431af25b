#include "tools/launch/kubernetes.h"

#include <string_view>

#include "base/error.h"
#include "tools/launch/yaml_out.h"

namespace tailor {
namespace {

constexpr int kPort = 29500;
constexpr int kGraceSeconds = 120;  // from SIGTERM to SIGKILL: a checkpoint is written meanwhile
constexpr const char* kWork = "/work";

/// Kubernetes replaces $(NAME) in a command and takes $$ as one $.
std::string literal(const std::string& word) {
  std::string out;
  for (const char letter : word) out += letter == '$' ? "$$" : std::string(1, letter);
  return out;
}

std::string recipe_file(const KubernetesJob& kubernetes) { return kubernetes.job.name + ".yaml"; }

/// `tailor launch local` of the mounted recipe.
Json command(const KubernetesJob& kubernetes) {
  Json out = Json::array(
      {literal(kubernetes.job.program), "launch", "local", "/recipe/" + recipe_file(kubernetes)});
  for (const std::string& one : kubernetes.job.overrides) out.push_back(literal(one));
  out.push_back("--resume");
  return out;
}

Json metadata(const KubernetesJob& kubernetes, const std::string& suffix = "") {
  Json out = {{"name", kubernetes.job.name + suffix}};
  if (!kubernetes.name_space.empty()) out["namespace"] = kubernetes.name_space;
  out["labels"] = {{"app.kubernetes.io/name", "tailor"},
                   {"app.kubernetes.io/instance", kubernetes.job.name}};
  return out;
}

Json with_queue(Json metadata, const KubernetesJob& kubernetes) {
  if (!kubernetes.queue.empty()) {
    metadata["labels"]["kueue.x-k8s.io/queue-name"] = kubernetes.queue;
  }
  return metadata;
}

Json resources(const LaunchJob& job) {
  Json out = Json::object();
  if (job.cpus_per_rank > 0) {
    out["requests"]["cpu"] = std::to_string(job.cpus_per_rank * job.ranks_per_node());
  }
  if (job.memory_bytes > 0) {
    out["requests"]["memory"] = std::to_string((job.memory_bytes + (1 << 20) - 1) >> 20) + "Mi";
  }
  if (job.gpus_per_node > 0) {
    out["limits"]["nvidia.com/gpu"] = std::to_string(job.gpus_per_node);
  }
  return out;
}

Json environment(const KubernetesJob& kubernetes) {
  const auto variable = [](const char* name, const std::string& value) {
    return Json{{"name", name}, {"value", value}};
  };
  return Json::array({variable("TAILOR_LAUNCHER", "kubernetes"),
                      variable("TAILOR_LAUNCHER_JOB", kubernetes.job.name),
                      variable("TAILOR_DATA", std::string(kWork) + "/.tailor"),
                      variable("TAILOR_CACHE", std::string(kWork) + "/.cache/tailor")});
}

Json volumes(const KubernetesJob& kubernetes) {
  return Json::array(
      {{{"name", "recipe"}, {"configMap", {{"name", kubernetes.job.name + "-recipe"}}}},
       {{"name", "work"}, {"persistentVolumeClaim", {{"claimName", kubernetes.volume}}}},
       {{"name", "shm"}, {"emptyDir", {{"medium", "Memory"}}}}});
}

/// NCCL's transport between GPUs of a pod lives in /dev/shm, which is 64 MB without this.
Json mounts() {
  return Json::array({{{"name", "recipe"}, {"mountPath", "/recipe"}, {"readOnly", true}},
                      {{"name", "work"}, {"mountPath", kWork}},
                      {{"name", "shm"}, {"mountPath", "/dev/shm"}}});
}

std::string recipe_map(const KubernetesJob& kubernetes) {
  return yaml_document({{"apiVersion", "v1"},
                        {"kind", "ConfigMap"},
                        {"metadata", metadata(kubernetes, "-recipe")},
                        {"data", {{recipe_file(kubernetes), kubernetes.recipe_text}}}});
}

void check(const KubernetesJob& kubernetes) {
  check_places(kubernetes.job);
  const auto need = [](const std::string& value, const std::string& flag, const std::string& what) {
    if (!value.empty()) return;
    throw Error(Fault::usage,
                {"no " + flag + " given", "the command line of tailor launch kubernetes",
                 "Add " + flag + ": " + what + "."});
  };
  need(kubernetes.image, "--image", "the container image that has tailor in it");
  need(kubernetes.volume, "--volume",
       "the claim of a volume that all pods can write; it becomes /work, where the recipe's "
       "relative paths start");
}

}  // namespace

std::string kubernetes_job(const KubernetesJob& kubernetes) {
  check(kubernetes);
  const LaunchJob& job = kubernetes.job;
  const Json service = {{"apiVersion", "v1"},
                        {"kind", "Service"},
                        {"metadata", metadata(kubernetes)},
                        {"spec",
                         {{"clusterIP", "None"},
                          {"publishNotReadyAddresses", true},  // ranks look for each other at once
                          {"selector", {{"job-name", job.name}}},
                          {"ports", Json::array({{{"name", "store"}, {"port", kPort}}})}}}};
  Json container = {{"name", "tailor"}, {"image", kubernetes.image}, {"workingDir", kWork}};
  container["command"] = command(kubernetes);
  if (job.nodes > 1) {
    for (const std::string& word :
         {std::string("--nodes"), std::to_string(job.nodes), std::string("--node-rank"),
          std::string("$(JOB_COMPLETION_INDEX)"), std::string("--master-addr"),
          job.name + "-0." + job.name, std::string("--master-port"), std::to_string(kPort)}) {
      container["command"].push_back(word);
    }
  }
  container["env"] =
      Json::array({{{"name", "JOB_COMPLETION_INDEX"},
                    {"valueFrom",
                     {{"fieldRef",
                       {{"fieldPath",
                         "metadata.annotations['batch.kubernetes.io/job-completion-index']"}}}}}}});
  for (const Json& variable : environment(kubernetes)) container["env"].push_back(variable);
  if (const Json asked = resources(job); !asked.empty()) container["resources"] = asked;
  container["volumeMounts"] = mounts();

  Json pod = {{"restartPolicy", "Never"},
              {"subdomain", job.name},
              {"terminationGracePeriodSeconds", kGraceSeconds}};
  if (!job.gpu_type.empty()) pod["nodeSelector"] = {{"nvidia.com/gpu.product", job.gpu_type}};
  pod["containers"] = Json::array({container});
  pod["volumes"] = volumes(kubernetes);

  const Json rules = Json::array(
      {{{"action", "Ignore"},
        {"onPodConditions", Json::array({{{"type", "DisruptionTarget"}, {"status", "True"}}})}},
       {{"action", "Ignore"},
        {"onExitCodes", {{"containerName", "tailor"}, {"operator", "In"}, {"values", {75}}}}},
       {{"action", "FailJob"},
        {"onExitCodes",
         {{"containerName", "tailor"}, {"operator", "In"}, {"values", {2, 65, 66, 70, 76}}}}}});
  Json spec = {{"completionMode", "Indexed"},      {"completions", job.nodes},
               {"parallelism", job.nodes},         {"backoffLimitPerIndex", job.restarts_max},
               {"podReplacementPolicy", "Failed"}, {"podFailurePolicy", {{"rules", rules}}}};
  if (job.seconds_max > 0) spec["activeDeadlineSeconds"] = job.seconds_max;
  spec["template"] = {{"metadata", {{"labels", metadata(kubernetes)["labels"]}}}, {"spec", pod}};
  const Json object = {{"apiVersion", "batch/v1"},
                       {"kind", "Job"},
                       {"metadata", with_queue(metadata(kubernetes), kubernetes)},
                       {"spec", spec}};
  return "# Written by tailor launch kubernetes; kubectl apply -f FILE starts it.\n" +
         recipe_map(kubernetes) + "---\n" + yaml_document(service) + "---\n" +
         yaml_document(object);
}

std::string kubernetes_train_job(const KubernetesJob& kubernetes) {
  check(kubernetes);
  const LaunchJob& job = kubernetes.job;
  // A trainer has no working directory of its own to set.
  Json words = Json::array({"sh", "-c", "cd /work && exec \"$$@\"", "sh"});
  for (const Json& word : command(kubernetes)) words.push_back(word);
  Json trainer = {{"image", kubernetes.image},
                  {"command", words},
                  {"numNodes", job.nodes},
                  {"numProcPerNode", job.ranks_per_node()},
                  {"env", environment(kubernetes)}};
  if (const Json asked = resources(job); !asked.empty()) trainer["resourcesPerNode"] = asked;
  Json pod = {{"terminationGracePeriodSeconds", kGraceSeconds}};
  if (!job.gpu_type.empty()) pod["nodeSelector"] = {{"nvidia.com/gpu.product", job.gpu_type}};
  pod["containers"] = Json::array({{{"name", "node"}, {"volumeMounts", mounts()}}});
  pod["volumes"] = volumes(kubernetes);
  const Json patch = {
      {"manager", "tailor"},
      {"trainingRuntimeSpec",
       {{"template",
         {{"spec",
           {{"replicatedJobs",
             Json::array({{{"name", "node"},
                           {"template", {{"spec", {{"template", {{"spec", pod}}}}}}}}})}}}}}}}};
  Json spec = {{"runtimeRef", {{"name", "torch-distributed"}}}};
  if (job.seconds_max > 0) spec["activeDeadlineSeconds"] = job.seconds_max;
  spec["trainer"] = trainer;
  spec["runtimePatches"] = Json::array({patch});
  const Json object = {{"apiVersion", "trainer.kubeflow.org/v1alpha1"},
                       {"kind", "TrainJob"},
                       {"metadata", with_queue(metadata(kubernetes), kubernetes)},
                       {"spec", spec}};
  return "# Written by tailor launch kubernetes --kind TrainJob; kubectl apply -f FILE starts "
         "it.\n" +
         recipe_map(kubernetes) + "---\n" + yaml_document(object);
}

KubernetesState read_kubernetes_state(const Json& object) {
  KubernetesState out;
  const Json status = object.value("status", Json::object());
  out.active = status.value("active", std::int64_t{0});
  out.succeeded = status.value("succeeded", std::int64_t{0});
  out.failed = status.value("failed", std::int64_t{0});
  out.state = out.active > 0 ? "running" : "pending";
  for (const Json& condition : status.value("conditions", Json::array())) {
    if (condition.value("status", "") != "True") continue;
    const std::string type = condition.value("type", "");
    if (type == "Complete") {
      out.state = "succeeded";
    } else if (type == "Failed") {
      out.state = "failed";
    } else if (type == "Suspended") {
      out.state = "suspended";
    } else {
      continue;
    }
    out.reason = condition.value("message", condition.value("reason", ""));
  }
  return out;
}

}  // namespace tailor
