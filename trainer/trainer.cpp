#include "trainer/trainer.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <utility>

#include "base/clock.h"
#include "base/error.h"
#include "base/text.h"
#include "trainer/filled_batch.h"

namespace tailor {

Trainer::Trainer(Decoder& decoder, Adapter& adapter, AdamW& optimizer, const TokenSource& source,
                 TrainerOptions options)
    : decoder_(decoder),
      adapter_(adapter),
      optimizer_(optimizer),
      source_(source),
      options_(std::move(options)),
      gradients_(options_.paged_experts.value_or(ArenaHome{}).make(adapter.arena().size())) {
  if (others() != nullptr) {
    sharded_ = std::make_unique<ShardedFactors>(adapter_, optimizer_, decoder_.cast_factors(),
                                                gradients_, *options_.ranks);
    decoder_.set_pager(sharded_.get(), options_.paged_experts.value_or(ArenaHome{}));
    return;
  }
  if (!options_.paged_experts) return;
  pager_ = std::make_unique<ExpertPager>(adapter_, optimizer_, decoder_.cast_factors(), gradients_);
  decoder_.set_pager(pager_.get(), *options_.paged_experts);
}

Trainer::~Trainer() {
  if (!pager_ && !sharded_) return;
  pager_.reset();
  sharded_.reset();
  decoder_.set_pager(nullptr, {});
}

void Trainer::flush() {
  if (pager_) pager_->flush();
  if (sharded_) sharded_->flush();
}

Ranks* Trainer::others() const {
  return options_.ranks != nullptr && !options_.ranks->alone() ? options_.ranks : nullptr;
}

void Trainer::add_over_ranks(StepRecord& record) const {
  if (others() == nullptr) return;
  std::array sums = {record.loss, static_cast<double>(record.stream_bytes),
                     static_cast<double>(record.exchange_weight_bytes),
                     static_cast<double>(record.exchange_factor_bytes),
                     static_cast<double>(record.exchange_gradient_bytes)};
  others()->all_reduce(sums, Reduce::sum);
  record.loss = sums[0];
  record.stream_bytes = static_cast<std::int64_t>(sums[1]);
  record.exchange_weight_bytes = static_cast<std::int64_t>(sums[2]);
  record.exchange_factor_bytes = static_cast<std::int64_t>(sums[3]);
  record.exchange_gradient_bytes = static_cast<std::int64_t>(sums[4]);
  std::array most = {record.stall_seconds, record.exchange_seconds,
                     record.exchange_exposed_seconds};
  others()->all_reduce(most, Reduce::max);
  record.stall_seconds = most[0];
  record.exchange_seconds = most[1];
  record.exchange_exposed_seconds = most[2];
  if (record.expert_rows.empty()) return;
  std::vector<double> rows(record.expert_rows.begin(), record.expert_rows.end());
  others()->all_reduce(rows, Reduce::sum);
  std::transform(rows.begin(), rows.end(), record.expert_rows.begin(),
                 [](double count) { return static_cast<std::int64_t>(count); });
}

StepRecord Trainer::step(std::int64_t index, bool another_follows) {
  const double began = seconds_now();
  Ranks* const ranks = others();
  const Batch batch = ranks == nullptr ? source_.batch_at(index, 0, 1)
                                       : source_.batch_at(index, ranks->rank(), ranks->size());
  StepRecord record;
  record.step = index + 1;
  record.tokens = batch.tokens();
  record.trained_tokens = batch.trained_tokens;
  if (ranks != nullptr) {
    std::array tokens = {static_cast<double>(record.tokens),
                         static_cast<double>(record.trained_tokens)};
    ranks->all_reduce(tokens, Reduce::sum);
    record.tokens = static_cast<std::int64_t>(tokens[0]);
    record.trained_tokens = static_cast<std::int64_t>(tokens[1]);
  }
  record.learning_rate = options_.schedule.at(index);

  // A pager keeps the cast factors up to date, and a call would wait for all of them.
  if (!(pager_ || sharded_) || decoder_.adapter() != &adapter_) decoder_.set_adapter(&adapter_);
  if (pager_) {
    pager_->clear_gradients();
  } else if (!sharded_) {
    gradients_.zero(0, gradients_.size());
  }
  TrainPass pass;
  pass.gradient_scale = 1 / static_cast<double>(std::max<std::int64_t>(1, record.trained_tokens));
  pass.keep = options_.keep;
  pass.dropout = options_.dropout;
  pass.seed = options_.seed;
  pass.step = static_cast<std::uint64_t>(index);
  pass.another_follows = another_follows;
  if (options_.count_experts_every > 0 && index % options_.count_experts_every == 0) {
    pass.expert_rows = &record.expert_rows;
  }
  const RingCounters before = counted_.value_or(decoder_.weights().counters());
  const ShardedFactors::Times waited = sharded_ ? sharded_->times() : ShardedFactors::Times{};
  const RankTraffic sent = sharded_ ? sharded_->traffic() : RankTraffic{};
  const std::span<const float> gradients = gradients_.as<float>();
  const FilledBatch filled(batch);
  const LossResult result = decoder_.forward_backward(
      filled.input(), pass,
      at::from_blob(gradients_.data(), {adapter_.parameter_count()}, at::kFloat));
  record.loss = result.loss_sum * pass.gradient_scale;
  const RingCounters after = decoder_.weights().counters();
  counted_ = another_follows ? std::optional(after) : std::nullopt;
  record.stream_bytes = after.streamed_bytes - before.streamed_bytes;
  record.stall_seconds = after.stall_seconds - before.stall_seconds;

  record.grad_norm = sharded_ ? sharded_->gradient_norm()
                              : gradient_norm(gradients, pager_ ? &gradients_ : nullptr);
  if (sharded_) {
    const ShardedFactors::Times times = sharded_->times();
    // A tile's other parts were sent by others what we received: N - 1 of N parts either way.
    record.exchange_weight_bytes = after.gathered_bytes - before.gathered_bytes;
    const RankTraffic all = sharded_->traffic();
    const auto of = [&](Collective which) {
      return all.of(which).payload_bytes - sent.of(which).payload_bytes;
    };
    record.exchange_factor_bytes = of(Collective::all_gather);
    record.exchange_gradient_bytes = of(Collective::reduce_scatter) + of(Collective::all_reduce);
    record.exchange_seconds = after.exchange_seconds - before.exchange_seconds +
                              times.exchange_seconds - waited.exchange_seconds;
    record.exchange_exposed_seconds = after.exchange_stall_seconds - before.exchange_stall_seconds +
                                      times.waited_seconds - waited.waited_seconds;
  }
  add_over_ranks(record);
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
  if (sharded_) {
    sharded_->update(record.learning_rate, factor);
  } else if (pager_) {
    pager_->update(record.learning_rate, factor);
  } else {
    optimizer_.step(adapter_.factors(), gradients, record.learning_rate, factor);
  }
  record.seconds = seconds_now() - began;
  return record;
}

std::optional<Evaluation> evaluate(Decoder& decoder, const EvaluationSource& source,
                                   const std::function<bool()>& stop, Ranks* ranks) {
  const double began = seconds_now();
  Evaluation out;
  double sum = 0;
  for (std::int64_t s = 0; s < source.steps(); ++s) {
    if (stop()) return std::nullopt;
    const Batch batch = ranks == nullptr ? source.batch_at(s, 0, 1)
                                         : source.batch_at(s, ranks->rank(), ranks->size());
    const FilledBatch filled(batch);
    const LossResult result = decoder.evaluate(filled.input(), s + 1 < source.steps());
    sum += result.loss_sum;
    out.tokens += result.tokens;
    out.correct += result.correct;
  }
  if (ranks != nullptr) {
    std::array sums = {sum, static_cast<double>(out.tokens), static_cast<double>(out.correct)};
    ranks->all_reduce(sums, Reduce::sum);
    sum = sums[0];
    out.tokens = static_cast<std::int64_t>(sums[1]);
    out.correct = static_cast<std::int64_t>(sums[2]);
  }
  const double tokens = static_cast<double>(std::max<std::int64_t>(1, out.tokens));
  out.loss = sum / tokens;
  out.token_accuracy = static_cast<double>(out.correct) / tokens;
  out.seconds = seconds_now() - began;
  return out;
}

}  // namespace tailor
