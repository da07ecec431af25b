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

std::optional<Tokenizer> find_tokenizer(const fs::path& model_folder) {
  std::error_code error;
  if (!fs::exists(model_folder / "tokenizer.json", error)) return std::nullopt;
  return Tokenizer::load(model_folder);
}

void require_vocabulary(const Tokenizer& tokenizer, const ModelSpec& spec) {
  if (tokenizer.vocab_size() <= spec.vocab) return;
  throw Error(
      Fault::bad_file,
      {"the tokenizer has " + count_text(tokenizer.vocab_size()) + " ids, the model's embedding " +
           count_text(spec.vocab) + " rows",
       tokenizer.folder().string(),
       "tokenizer.json and the weights belong to different models: download both from one place."});
}

DataOptions data_options(const DataRecipe& recipe) {
  DataOptions out;
  const auto files = [](const std::vector<DataSource>& sources) {
    std::vector<DataFile> list;
    for (const DataSource& source : sources)
      list.push_back({source.path, source.weight, source.format});
    return list;
  };
  out.train = files(recipe.train);
  out.validation = files(recipe.validation);
  out.validation_split = recipe.validation_split.value_or(0);
  out.format = recipe.format;
  out.chat_template = recipe.chat_template.kind == ChatTemplateChoice::Kind::model
                          ? "model"
                          : recipe.chat_template.value;
  out.train_on = recipe.train_on;
  out.sequence_len = recipe.sequence_len;
  out.packing = recipe.packing;
  out.too_long = recipe.too_long;
  if (recipe.store) out.store = *recipe.store;
  out.cache = cache_folder();
  return out;
}

PrepareReport prepare_data(const DataOptions& options, const std::optional<Tokenizer>& tokenizer,
                           const ModelSpec& spec) {
  if (tokenizer) require_vocabulary(*tokenizer, spec);
  double last = seconds_now();
  const auto progress = [&](std::int64_t records, std::int64_t bytes, std::int64_t total) {
    if (seconds_now() - last < 5) return;
    last = seconds_now();
    log_info("preparing data: " + count_text(records) + " records, " + bytes_text(bytes) + " of " +
             bytes_text(total));
  };
  const PrepareReport report = prepare(options, tokenizer ? &*tokenizer : nullptr, progress);
  const auto check_ids = [&](const fs::path& path) {
    const TokenStore store = TokenStore::open(path);
    const auto ids = store.ids();
    const auto worst = std::max_element(ids.begin(), ids.end());
    if (worst == ids.end() || *worst < spec.vocab) return;
    throw Error(Fault::bad_file,
                {"token id " + std::to_string(*worst) + " is outside the model's vocabulary of " +
                     count_text(spec.vocab),
                 path.string(), "The data was tokenised for another model; tokenise it again."});
  };
  check_ids(report.train.store);
  if (report.validation) check_ids(report.validation->store);
  return report;
}

}  // namespace tailor
