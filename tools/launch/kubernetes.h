#pragma once

#include <string>

#include "base/json.h"
#include "tools/launch/job.h"

namespace tailor {

struct KubernetesJob {
  LaunchJob job;            ///< job.program is a name or path inside the image
  std::string recipe_text;  ///< goes along in a ConfigMap
  std::string image;
  std::string volume;      ///< claim of a volume that all pods can write: /work, where the recipe's
                           ///< relative paths start, and which holds ledger and caches
  std::string name_space;  ///< empty: kubectl's
  std::string queue;       ///< of Kueue; empty: none
};

/// A ConfigMap with the recipe, a headless Service by which pods find each other, and an Indexed
/// Job of one pod a node, in which `tailor launch local` starts the node's ranks. Evictions and 75
/// (interrupted) do not count as failures; 2, 65, 66, 70 and 76 fail the job at once; others
/// restart a pod at most restarts_max times.
std::string kubernetes_job(const KubernetesJob& job);

/// The same for Kubeflow's Trainer v2: a ConfigMap and a TrainJob for its runtime
/// `torch-distributed`, whose PET_* variables `tailor launch local` reads.
std::string kubernetes_train_job(const KubernetesJob& job);

/// What `kubectl get job NAME -o json` says: "running", "succeeded", "failed", "suspended" or
/// "pending", with the reason where there is one.
struct KubernetesState {
  std::string state, reason;
  std::int64_t active = 0, succeeded = 0, failed = 0;
  bool ended() const { return state == "succeeded" || state == "failed"; }
};
KubernetesState read_kubernetes_state(const Json& object);

}  // namespace tailor
