// What other trainers call our keys, so that a recipe carried over is mended in one reading.
// Names: axolotl 0.18, LLaMA-Factory, torchtune, Hugging Face TrainingArguments.

#include <algorithm>
#include <array>
#include <string>

#include "base/text.h"
#include "recipes/schema.h"

namespace tailor {
namespace {

struct Alias {
  std::string_view theirs;  ///< last part of the name, or the whole dotted name
  std::string_view ours;    ///< a key of ours; with a space in it a whole sentence
};

constexpr std::array kAliases = {
    Alias{"model_name_or_path", "base_model"},
    Alias{"model", "base_model"},
    Alias{"pretrained_model_name_or_path", "base_model"},
    Alias{"checkpointer.checkpoint_dir", "base_model"},
    Alias{"checkpoint_dir", "base_model"},
    Alias{"output", "output_dir"},
    Alias{"output_path", "output_dir"},
    Alias{"checkpointer.output_dir", "output_dir"},
    Alias{"run_name", "name"},
    Alias{"lora_r", "lora.rank"},
    Alias{"lora_rank", "lora.rank"},
    Alias{"r", "lora.rank"},
    Alias{"lora_alpha", "lora.alpha"},
    Alias{"lora_dropout", "lora.dropout"},
    Alias{"use_rslora", "lora.rslora"},
    Alias{"peft_use_rslora", "lora.rslora"},
    Alias{"lora_target", "lora.targets"},
    Alias{"lora_target_modules", "lora.targets"},
    Alias{"lora_target_parameters", "lora.targets"},
    Alias{"lora_target_linear", "lora.targets"},
    Alias{"target_modules", "lora.targets"},
    Alias{"target_parameters", "lora.targets"},
    Alias{"lora_attn_modules", "lora.targets"},
    Alias{"apply_lora_to_mlp", "lora.targets"},
    Alias{"lora_modules", "lora.targets"},
    Alias{"loraplus_lr_ratio", "lora.learning_rate_ratio_b"},
    Alias{"lora_model_dir", "lora.init_from"},
    Alias{"adapter_name_or_path", "lora.init_from"},
    Alias{"datasets", "data.train"},
    Alias{"dataset", "data.train"},
    Alias{"train_file", "data.train"},
    Alias{"test_datasets", "data.validation"},
    Alias{"eval_dataset", "data.validation"},
    Alias{"val_set_size",
          "Did you mean data.validation? Write {split: 0.01} there for a share of data.train."},
    Alias{"val_size",
          "Did you mean data.validation? Write {split: 0.01} there for a share of data.train."},
    Alias{"template", "data.chat_template"},
    Alias{"roles_to_train", "data.train_on"},
    Alias{"train_on_inputs",
          "Did you mean data.train_on? Write all there to put loss on every message."},
    Alias{"train_on_prompt",
          "Did you mean data.train_on? Write all there to put loss on every message."},
    Alias{"mask_history", "Did you mean data.train_on? Write last_assistant there."},
    Alias{"cutoff_len", "data.sequence_len"},
    Alias{"max_seq_len", "data.sequence_len"},
    Alias{"max_seq_length", "data.sequence_len"},
    Alias{"max_length", "data.sequence_len"},
    Alias{"seq_length", "data.sequence_len"},
    Alias{"sample_packing", "data.packing"},
    Alias{"neat_packing", "data.packing"},
    Alias{"packed", "data.packing"},
    Alias{"excess_length_strategy", "data.too_long"},
    Alias{"dataset_prepared_path", "data.store"},
    Alias{"per_device_train_batch_size", "training.micro_batch_size"},
    Alias{"batch_size", "training.micro_batch_size"},
    Alias{"gradient_accumulation", "training.gradient_accumulation_steps"},
    Alias{"global_batch_size", "training.global_batch_rows"},
    Alias{"num_train_epochs", "training.num_epochs"},
    Alias{"epochs", "training.num_epochs"},
    Alias{"max_steps_per_epoch", "training.max_steps"},
    Alias{"optim", "training.optimizer"},
    Alias{"lr", "training.learning_rate"},
    Alias{"adam_beta_1", "training.adam_beta1"},
    Alias{"adam_beta_2", "training.adam_beta2"},
    Alias{"betas", "Did you mean training.adam_beta1 and training.adam_beta2?"},
    Alias{"eps", "training.adam_epsilon"},
    Alias{"lr_scheduler_type", "training.lr_scheduler"},
    Alias{"num_warmup_steps", "training.warmup_steps"},
    Alias{"clip_grad_norm", "training.max_grad_norm"},
    Alias{"gradient_clipping", "training.max_grad_norm"},
    Alias{"eval_steps", "training.eval_every_steps"},
    Alias{"evals_per_epoch", "training.eval_every_steps"},
    Alias{"run_val_every_n_steps", "training.eval_every_steps"},
    Alias{"bf16", "Did you mean compute.dtype? Write bfloat16 there."},
    Alias{"fp16", "Did you mean compute.dtype? Write bfloat16 there."},
    Alias{"tf32", "Did you mean compute.dtype? Write float32 or bfloat16 there."},
    Alias{"gradient_checkpointing", "Did you mean compute.keep_activations? Write none there."},
    Alias{"enable_activation_checkpointing",
          "Did you mean compute.keep_activations? Write none there."},
    Alias{"enable_activation_offloading", "Did you mean base.activations? Write host there."},
    Alias{"activation_offloading", "Did you mean base.activations? Write host there."},
    Alias{"load_in_4bit", "Did you mean base.format? Write nf4 or int4 there."},
    Alias{"load_in_8bit", "Did you mean base.format? Write fp8 there."},
    Alias{"quantization_bit", "Did you mean base.format? Write nf4 or int4 there."},
    Alias{"layer_offloading",
          "Did you mean base.host_memory? Frozen weights are streamed by themselves."},
    Alias{"world_size", "machine.ranks"},
    Alias{"nproc_per_node", "machine.ranks"},
    Alias{"save_steps", "checkpoint.every_steps"},
    Alias{"saves_per_epoch", "checkpoint.every_steps"},
    Alias{"save_every_n_steps", "checkpoint.every_steps"},
    Alias{"save_total_limit", "checkpoint.keep"},
    Alias{"keep_last_n_checkpoints", "checkpoint.keep"},
    Alias{"logging_steps", "logging.metrics_every_steps"},
    Alias{"log_every_n_steps", "logging.metrics_every_steps"},
    Alias{"use_tensorboard", "logging.tensorboard"},
    Alias{"report_to", "logging.tensorboard"},
    Alias{"use_mlflow", "logging.mlflow"},
    Alias{"mlflow_tracking_uri", "logging.mlflow"},
    Alias{"resume_from_checkpoint", "Leave it out and resume with `tailor train RECIPE --resume`."},
    Alias{"auto_resume_from_checkpoints",
          "Leave it out and resume with `tailor train RECIPE --resume`."},
    Alias{"adapter",
          "Leave it out: every recipe trains LoRA; lora.init_from names an adapter to go on from."},
    Alias{"finetuning_type", "Leave it out: every recipe trains LoRA."},
    Alias{"stage", "Leave it out: every recipe is supervised fine-tuning."},
    Alias{"do_train", "Leave it out: `tailor train` trains."},
    Alias{"flash_attention", "Leave it out: the attention kernel is chosen by itself."},
    Alias{"flash_attn", "Leave it out: the attention kernel is chosen by itself."},
    Alias{"deepspeed", "Leave it out: weights are split over ranks by themselves."},
    Alias{"fsdp", "Leave it out: weights are split over ranks by themselves."},
    Alias{"fsdp_config", "Leave it out: weights are split over ranks by themselves."},
    Alias{"pad_to_sequence_len",
          "Leave it out: rows are packed, or padded with data.packing: false."},
    Alias{"overwrite_output_dir",
          "Leave it out: name another output_dir, or resume with --resume."},
};

std::string section_of(std::string_view path) {
  const std::size_t dot = path.rfind('.');
  return dot == std::string_view::npos ? std::string() : std::string(path.substr(0, dot));
}

std::string leaf(std::string_view path) {
  const std::size_t dot = path.rfind('.');
  return std::string(dot == std::string_view::npos ? path : path.substr(dot + 1));
}

/// "Did you mean lora.rank?", and where it stands if that is another section.
std::string did_you_mean(std::string_view known, std::string_view asked) {
  std::string out = "Did you mean " + std::string(known) + "?";
  const std::string section = section_of(known);
  if (section == section_of(asked)) return out;
  return out + (section.empty() ? " It stands at the top, in no section."
                                : " It stands in the section `" + section + ":`.");
}

}  // namespace

std::string unknown_key_hint(std::string_view path) {
  const std::string name = leaf(path);
  for (const std::string_view wanted : {path, std::string_view(name)}) {
    const std::string low = lower(wanted);
    const auto found = std::find_if(kAliases.begin(), kAliases.end(),
                                    [&](const Alias& alias) { return alias.theirs == low; });
    if (found == kAliases.end()) continue;
    if (found->ours.find(' ') != std::string_view::npos) return std::string(found->ours);
    return did_you_mean(found->ours, path);
  }
  const std::string section = section_of(path);
  std::vector<std::string> beside, leaves, all;
  for (const RecipeKey& key : recipe_keys()) {
    if (section_of(key.path) == section) beside.push_back(leaf(key.path));
    leaves.push_back(leaf(key.path));
    all.push_back(key.path);
  }
  if (section.empty())
    beside.insert(beside.end(), recipe_sections().begin(), recipe_sections().end());
  // Right name in the wrong section; then a slip of spelling beside; then anywhere.
  for (const std::string& key : all) {
    if (leaf(key) == name) return did_you_mean(key, path);
  }
  if (const std::string near = nearest_name(name, beside); !near.empty()) {
    return "Did you mean " + (section.empty() ? near : section + "." + near) + "?";
  }
  if (const std::string near = nearest_name(name, leaves); !near.empty()) {
    for (const std::string& key : all) {
      if (leaf(key) == near) return did_you_mean(key, path);
    }
  }
  if (const std::string near = nearest_name(path, all); !near.empty())
    return did_you_mean(near, path);
  return "Known here: " + join(beside, ", ") + ".";
}

}  // namespace tailor
