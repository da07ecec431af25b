#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "base/json.h"
#include "tools/launch/job.h"

namespace tailor {

struct SkyPilotJob {
  LaunchJob job;         ///< gpu_type as SkyPilot names accelerators: H100, A100-80GB
  fs::path recipe_file;  ///< absolute, on this machine; it is copied to the nodes
  std::string image;   ///< docker image with tailor in it; empty: the nodes' own, with tailor on it
  std::string bucket;  ///< s3://..., gs://...: mounted at /work, where relative paths start
  bool spot = false;
};

/// The task of a managed job: one node's ranks by `tailor launch local`. A lost node and 75
/// (interrupted) start it anew, elsewhere where need be; others than 2, 65, 66, 70 and 76 at most
/// restarts_max times, counted in the bucket. Throws Error{usage} without a bucket: without one
/// there is no checkpoint to go on from.
std::string skypilot_task(const SkyPilotJob& job);

/// The accelerator's name for a SKU of the price book ("h100-80gb-sxm" -> "H100"); empty where that
/// is not known.
std::string skypilot_accelerator(const std::string& sku);

/// The newest managed job named `name` in what `sky jobs queue --output json` prints; nothing where
/// there is none.
struct SkyPilotState {
  std::int64_t number = 0;
  std::string state;   ///< running, recovering, succeeded, failed, ...
  std::string reason;  ///< of a failure
  std::int64_t recoveries = 0;
  double seconds = 0;
};
std::optional<SkyPilotState> read_skypilot_state(const Json& queue, const std::string& name);

}  // namespace tailor
