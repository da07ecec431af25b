#include "trainer/trainer.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "base/clock.h"
#include "base/error.h"
#include "base/text.h"

namespace tailor {

TokenInput token_input(const Batch& batch) {
  return {
      batch.ids,     batch.position, batch.target, batch.document_start, batch.micro_batch_start,
      batch.token_id};
}

Trainer::Trainer(Decoder& decoder, Adapter& adapter, AdamW& optimizer, const TokenSource& source,
                 TrainerOptions options)
    : decoder_(decoder),
      adapter_(adapter),
      optimizer_(optimizer),
      source_(source),
      options_(std::move(options)),
      gradients_(options_.paged_experts.value_or(ArenaHome{}).make(adapter.arena().size())) {
  if (!options_.paged_experts) return;
  pager_ = std::make_unique<ExpertPager>(adapter_, optimizer_, decoder_.cast_factors(), gradients_);
  decoder_.set_pager(pager_.get(), *options_.paged_experts);
}

Trainer::~Trainer() {
  if (!pager_) return;
  pager_.reset();
  decoder_.set_pager(nullptr, {});
}

void Trainer::flush() {
  if (pager_) pager_->flush();
}

StepRecord Trainer::step(std::int64_t index, bool another_follows) {
  const double began = seconds_now();
  const Batch batch = source_.batch_at(index, 0, 1);
  StepRecord record;
  record.step = index + 1;
  record.tokens = batch.tokens();
  record.trained_tokens = batch.trained_tokens;
  record.learning_rate = options_.schedule.at(index);

  // A pager keeps the cast factors up to date, and a call would wait for all of them.
  if (!pager_ || decoder_.adapter() != &adapter_) decoder_.set_adapter(&adapter_);
  if (pager_) {
    pager_->clear_gradients();
  } else {
    gradients_.zero(0, gradients_.size());
  }
  TrainPass pass;
  pass.gradient_scale = 1 / static_cast<double>(std::max<std::int64_t>(1, batch.trained_tokens));
  pass.keep = options_.keep;
  pass.dropout = options_.dropout;
  pass.seed = options_.seed;
  pass.step = static_cast<std::uint64_t>(index);
  pass.another_follows = another_follows;
  const RingCounters before = decoder_.weights().counters();
  const std::span<const float> gradients = gradients_.as<float>();
  const LossResult result = decoder_.forward_backward(
      token_input(batch), pass,
      at::from_blob(gradients_.data(), {adapter_.parameter_count()}, at::kFloat));
  record.loss = result.loss_sum * pass.gradient_scale;
  const RingCounters after = decoder_.weights().counters();
  record.stream_bytes = after.streamed_bytes - before.streamed_bytes;
  record.stall_seconds = after.stall_seconds - before.stall_seconds;

  record.grad_norm = gradient_norm(gradients, pager_ ? &gradients_ : nullptr);
  if (!std::isfinite(record.loss) || !std::isfinite(record.grad_norm)) {
    const bool loss_bad = !std::isfinite(record.loss);
    throw Error(Fault::internal,
                {std::string("the run diverged: ") + (loss_bad ? "loss" : "gradient norm") +
                     " is " + number_text(loss_bad ? record.loss : record.grad_norm),
                 "step " + std::to_string(record.step) + ", learning rate " +
                     exact_text(record.learning_rate),
                 "Lower training.learning_rate (a third is a good try) or raise "
                 "training.warmup_ratio; the last checkpoint is from before this step."});
  }
  const double factor = clip_factor(record.grad_norm, options_.max_grad_norm);
  if (pager_) {
    pager_->update(record.learning_rate, factor);
  } else {
    optimizer_.step(adapter_.factors(), gradients, record.learning_rate, factor);
  }
  record.seconds = seconds_now() - began;
  return record;
}

std::optional<Evaluation> evaluate(Decoder& decoder, const EvaluationSource& source,
                                   const std::function<bool()>& stop) {
  const double began = seconds_now();
  Evaluation out;
  double sum = 0;
  for (std::int64_t s = 0; s < source.steps(); ++s) {
    if (stop()) return std::nullopt;
    const Batch batch = source.batch_at(s, 0, 1);
    const LossResult result = decoder.evaluate(token_input(batch), s + 1 < source.steps());
    sum += result.loss_sum;
    out.tokens += result.tokens;
    out.correct += result.correct;
  }
  const double tokens = static_cast<double>(std::max<std::int64_t>(1, out.tokens));
  out.loss = sum / tokens;
  out.token_accuracy = static_cast<double>(out.correct) / tokens;
  out.seconds = seconds_now() - began;
  return out;
}

}  // namespace tailor
