#include "trainer/trainer.h"

#include <cmath>

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
      options_(options),
      gradients_(at::empty({adapter.parameter_count()}, at::kFloat)) {}

StepRecord Trainer::step(std::int64_t index, bool another_follows) {
  const double began = seconds_now();
  const Batch batch = source_.batch_at(index, 0, 1);
  StepRecord record;
  record.step = index + 1;
  record.tokens = batch.tokens();
  record.trained_tokens = batch.trained_tokens;
  record.learning_rate = options_.schedule.at(index);

  decoder_.set_adapter(&adapter_);
  gradients_.zero_();
  TrainPass pass;
  pass.gradient_scale = 1 / static_cast<double>(std::max<std::int64_t>(1, batch.trained_tokens));
  pass.keep = options_.keep;
  pass.dropout = options_.dropout;
  pass.seed = options_.seed;
  pass.step = static_cast<std::uint64_t>(index);
  pass.another_follows = another_follows;
  const RingCounters before = decoder_.weights().counters();
  const LossResult result = decoder_.forward_backward(token_input(batch), pass, gradients_);
  record.loss = result.loss_sum * pass.gradient_scale;
  const RingCounters after = decoder_.weights().counters();
  record.stream_bytes = after.streamed_bytes - before.streamed_bytes;
  record.stall_seconds = after.stall_seconds - before.stall_seconds;

  const std::span<const float> gradients(gradients_.data_ptr<float>(),
                                         static_cast<std::size_t>(gradients_.numel()));
  record.grad_norm = gradient_norm(gradients);
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
  optimizer_.step(adapter_.factors(), gradients, record.learning_rate,
                  clip_factor(record.grad_norm, options_.max_grad_norm));
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
