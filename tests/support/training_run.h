#pragma once
// A few training steps of a tiny model, with what there is to compare afterwards.

#include <gtest/gtest.h>

#include <set>
#include <string>
#include <vector>

#include "base/random.h"
#include "trainer/run_state.h"
#include "trainer/trainer.h"

namespace tailor::testing_support {

/// A batch as it is, not filled up (see FilledBatch).
inline TokenInput token_input(const Batch& batch) {
  return {
      batch.ids,     batch.position, batch.target, batch.document_start, batch.micro_batch_start,
      batch.token_id};
}

/// Random documents, the same micro-batches in every step, every few tokens one without loss.
class RandomSource final : public TokenSource {
 public:
  struct Shape {
    std::vector<int> lengths;
    std::set<int> begin_micro_batch;  ///< lengths of the documents that do
    int untrained_of = 4;             ///< the last of so many tokens carries no loss
    std::uint64_t seed = 3;
  };
  RandomSource(std::int64_t vocab, Shape shape) : vocab_(vocab), shape_(std::move(shape)) {}

  /// A document is a row: each rank has a block of them, which may be empty.
  Batch batch_at(std::int64_t step, int rank, int ranks) const override {
    Batch batch;
    std::uint64_t at = 0;
    const auto documents = static_cast<int>(shape_.lengths.size());
    for (int d = 0; d < documents; ++d) {
      const int length = shape_.lengths[static_cast<std::size_t>(d)];
      if (d < documents * rank / ranks || d >= documents * (rank + 1) / ranks) {
        at += static_cast<std::uint64_t>(length);
        continue;
      }
      const auto begin = static_cast<std::int32_t>(batch.ids.size());
      batch.document_start.push_back(begin);
      if (begin == 0 || shape_.begin_micro_batch.contains(length)) {
        batch.micro_batch_start.push_back(begin);
      }
      ++batch.rows;
      for (int i = 0; i < length; ++i, ++at) {
        batch.ids.push_back(id(step, at));
        batch.position.push_back(i);
        const bool trains = i + 1 < length && i % shape_.untrained_of != shape_.untrained_of - 1;
        batch.target.push_back(trains ? id(step, at + 1) : -1);
        batch.trained_tokens += trains ? 1 : 0;
        batch.token_id.push_back(at);
      }
    }
    batch.document_start.push_back(static_cast<std::int32_t>(batch.ids.size()));
    batch.micro_batch_start.push_back(static_cast<std::int32_t>(batch.ids.size()));
    return batch;
  }
  std::int64_t rows() const override { return 1000; }
  std::int64_t rows_per_step() const override {
    return static_cast<std::int64_t>(shape_.lengths.size());
  }
  std::int64_t sequence_len() const override {
    return *std::max_element(shape_.lengths.begin(), shape_.lengths.end());
  }

 private:
  std::int32_t id(std::int64_t step, std::uint64_t at) const {
    return static_cast<std::int32_t>(
        random_bits(shape_.seed, RandomStream::sample, static_cast<std::uint64_t>(step), at) %
        static_cast<std::uint64_t>(vocab_));
  }
  std::int64_t vocab_;
  Shape shape_;
};

struct Trajectory {
  std::vector<double> losses, norms, eval_losses;
  std::vector<float> factors, first, second;
  bool operator==(const Trajectory&) const = default;
};

/// Runs `steps` steps of what `attempt()` makes: an owner of a trainer, adapter and optimizer by
/// those names. After step `resume_after` it is saved below `checkpoints` and another one goes on
/// from there. `after(attempt, step, record, trajectory)` is called behind every step, before that.
template <class Make, class After>
Trajectory run_steps(const Make& attempt, int steps, int resume_after, const fs::path& checkpoints,
                     const After& after) {
  Trajectory out;
  fs::remove_all(checkpoints);
  auto now = attempt();
  for (int s = 0; s < steps; ++s) {
    const StepRecord record = now->trainer->step(s);
    out.losses.push_back(record.loss);
    out.norms.push_back(record.grad_norm);
    after(*now, s, record, out);
    if (s != resume_after) continue;
    now->trainer->flush();
    save_checkpoint(checkpoints, s + 1, now->adapter, now->optimizer, {}, 1);
    now = attempt();
    const auto found =
        load_newest_checkpoint(checkpoints, now->adapter, now->optimizer, {},
                               [](const std::string& text) { ADD_FAILURE() << text; });
    EXPECT_TRUE(found && found->step == s + 1);
  }
  now->trainer->flush();
  out.factors.assign(now->adapter.factors().begin(), now->adapter.factors().end());
  out.first.assign(now->optimizer.first_moment().begin(), now->optimizer.first_moment().end());
  out.second.assign(now->optimizer.second_moment().begin(), now->optimizer.second_moment().end());
  return out;
}

}  // namespace tailor::testing_support
