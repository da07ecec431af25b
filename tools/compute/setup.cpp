#include "tools/compute/setup.h"

#include <ATen/Parallel.h>
#include <sched.h>

#include <algorithm>

#include "base/clock.h"
#include "base/error.h"
#include "base/log.h"
#include "base/text.h"
#include "data/tokens/token_store.h"
#include "recipes/machine.h"

namespace tailor {

void refuse_unsupported(const Recipe& recipe) {
  const BaseRecipe& base = recipe.base;
  if (base.format != BaseFormat::as_is || base.non_expert_format != BaseFormat::as_is ||
      base.store || base.device_memory || base.host_memory ||
      base.activations == ActivationHome::disk) {
    throw Error(
        Fault::does_not_fit,
        {"this recipe streams the base model, which this version cannot do yet",
         recipe.name +
             ": base.format, base.store, base.device_memory, base.host_memory or base.activations",
         "`tailor plan` answers for it. To train now, use a model whose weights fit into memory as "
         "they "
         "are: base.format=as_is, and leave the other base keys at their defaults."});
  }
  if (recipe.compute.device == DeviceChoice::cuda)
    require_cpu("cuda", recipe.name + ": compute.device");
  const auto refuse = [&](const std::string& what, const std::string& key,
                          const std::string& mend) {
    throw Error(Fault::usage, {what, recipe.name + ": " + key, mend});
  };
  if (recipe.machine.ranks != 1) {
    refuse("training on " + std::to_string(recipe.machine.ranks) + " ranks is not possible yet",
           "machine.ranks", "Set machine.ranks: 1; `tailor plan` answers for more.");
  }
  if (recipe.lora.experts) {
    refuse("expert selections are not possible yet", "lora.experts", "Set lora.experts: all.");
  }
  if (recipe.logging.mlflow) {
    refuse("logging to MLflow is not possible yet", "logging.mlflow",
           "Set logging.mlflow: null; metrics.jsonl and TensorBoard files are written.");
  }
}

void require_cpu(const std::string& device, const std::string& where) {
  if (device == "auto" || device == "cpu") return;
  if (device != "cuda") {
    throw Error(Fault::usage, {"device '" + device + "' is not known", where, "Use auto or cpu."});
  }
  throw Error(Fault::device, {"this version computes on the CPU only", where,
                              "Use device auto or cpu. `tailor plan` answers for GPUs."});
}

at::ScalarType compute_type(const std::string& name) {
  if (name == "float32") return at::kFloat;
  if (name == "bfloat16") return at::kBFloat16;
  throw Error(Fault::usage,
              {"dtype '" + name + "' is not known", "--dtype", "Use float32 or bfloat16."});
}

int set_threads(int threads) {
  if (threads <= 0) {
    cpu_set_t cores;
    threads = sched_getaffinity(0, sizeof cores, &cores) == 0 ? CPU_COUNT(&cores) : 1;
  }
  at::set_num_threads(threads);
  return threads;
}

OpenedModel open_model(const fs::path& folder, at::ScalarType dtype) {
  const double began = seconds_now();
  OpenedModel out;
  out.folder = folder;
  out.spec = read_model_spec(folder);
  const Checkpoint checkpoint = Checkpoint::open(folder);
  out.prefix = checkpoint.prefix();
  const std::int64_t needed =
      out.spec.parameters() * static_cast<std::int64_t>(c10::elementSize(dtype));
  const double free_bytes = this_machine(folder).host_bytes;
  if (static_cast<double>(needed) > free_bytes) {
    throw Error(Fault::does_not_fit,
                {"the model's weights need " + bytes_text(needed) + " of memory, " +
                     bytes_text(static_cast<std::int64_t>(free_bytes)) + " are free",
                 folder.string(),
                 "Use a machine with more memory, or a smaller model. Streaming weights from "
                 "disk is not possible yet."});
  }
  out.decoder = Decoder::create(out.spec, load_weights(checkpoint, out.spec, dtype), dtype);
  out.weight_bytes = out.decoder->weights().bytes();
  out.load_seconds = seconds_now() - began;
  return out;
}

}  // namespace tailor
