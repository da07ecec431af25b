#include "trainer/optim/sharded_factors.h"

#include <algorithm>
#include <array>
#include <cmath>

#include "base/clock.h"
#include "base/error.h"
#include "base/thread_name.h"

namespace tailor {
namespace {

constexpr auto kFloatBytes = static_cast<std::int64_t>(sizeof(float));
/// Elements the update works on between reading ahead and letting go, where arenas are files.
constexpr std::int64_t kWindow = std::int64_t{1} << 20;

}  // namespace

ShardedFactors::ShardedFactors(Adapter& adapter, AdamW& optimizer, CastFactors& cast,
                               const Arena& gradients, Ranks& ranks)
    : adapter_(adapter),
      optimizer_(optimizer),
      cast_(cast),
      gradients_(gradients),
      ranks_(ranks),
      shards_(adapter, ranks.rank(), ranks.size()),
      channel_(ranks.channel("factors")),
      state_(static_cast<std::size_t>(shards_.layers()), Cast::own) {
  TAILOR_CHECK(gradients.size() == adapter.arena().size());
  for (const Arena* arena :
       {&adapter.arena(), &optimizer.first_arena(), &optimizer.second_arena()}) {
    shards_.drop_others(*arena, {0, adapter.parameter_count()}, kFloatBytes);
  }
  thread_ = std::thread([this] { work(); });
}

ShardedFactors::~ShardedFactors() {
  {
    std::unique_lock lock(mutex_);
    // The other ranks wait for our part of what was asked for, unless the run has failed.
    if (failure_ || std::uncaught_exceptions() > 0) {
      channel_->abort();
    } else {
      to_user_.wait(lock, [this] { return failure_ || (tasks_.empty() && !busy_); });
    }
    stop_ = true;
  }
  to_thread_.notify_all();
  thread_.join();
}

void ShardedFactors::first_cast(const Adapter& adapter) {
  TAILOR_CHECK(&adapter == &adapter_);
  flush();
  cast_.prepare(adapter);
  for (int l = 0; l < shards_.layers(); ++l) {
    cast_.cast(shards_.mine(l));
    cast_.cast(shards_.tail(l));
    state_[static_cast<std::size_t>(l)] = Cast::own;
  }
}

int ShardedFactors::next(int layer, Way way) const {
  const int step = way == Way::forward ? 1 : -1;
  int at = layer + step;
  while (at >= 0 && at < shards_.layers() && shards_.shared(at).empty()) at += step;
  return at >= 0 && at < shards_.layers() ? at : -1;
}

/// With the lock held.
void ShardedFactors::ask_for(int layer) {
  Cast& state = state_[static_cast<std::size_t>(layer)];
  if (state != Cast::own) return;
  state = Cast::asked;
  tasks_.push_back({Kind::gather, layer});
  to_thread_.notify_all();
}

void ShardedFactors::wait(std::unique_lock<std::mutex>& lock, int layer) {
  const auto arrived = [&] {
    return failure_ || (layer < 0 ? tasks_.empty() && !busy_
                                  : state_[static_cast<std::size_t>(layer)] == Cast::whole);
  };
  if (!arrived()) {
    const double began = seconds_now();
    to_user_.wait(lock, arrived);
    times_.waited_seconds += seconds_now() - began;
  }
  if (failure_) std::rethrow_exception(failure_);
}

void ShardedFactors::before_layer(int layer, Way way) {
  if (layer >= shards_.layers() || shards_.layer(layer).empty()) return;
  if (way == Way::backward) {
    const FactorRange range = shards_.layer(layer);
    gradients_.zero(range.begin * kFloatBytes, range.size() * kFloatBytes);
  }
  std::unique_lock lock(mutex_);
  if (shards_.shared(layer).empty()) return;
  ask_for(layer);
  if (const int ahead = next(layer, way); ahead >= 0) ask_for(ahead);
  wait(lock, layer);
}

void ShardedFactors::after_layer(int layer, Way way) noexcept {
  if (layer >= shards_.layers() || shards_.layer(layer).empty()) return;
  const std::lock_guard lock(mutex_);
  // The last layer is the first on the way back.
  if (way == Way::forward && next(layer, way) < 0) return;
  Cast& state = state_[static_cast<std::size_t>(layer)];
  if (state == Cast::whole) {
    cast_.drop_others(shards_, shards_.layer(layer));
    state = Cast::own;
  }
  if (way == Way::forward) return;
  tasks_.push_back({Kind::reduce, layer});
  to_thread_.notify_all();
}

void ShardedFactors::flush() {
  std::unique_lock lock(mutex_);
  wait(lock, -1);
}

double ShardedFactors::gradient_norm() {
  flush();
  const std::span<const float> all = gradients_.as<float>();
  const auto of = [&](FactorRange range) {
    return sum_of_squares(
        all.subspan(static_cast<std::size_t>(range.begin), static_cast<std::size_t>(range.size())));
  };
  double sum = 0;
  for (int l = 0; l < shards_.layers(); ++l) {
    sum += of(shards_.mine(l));
    if (ranks_.first()) sum += of(shards_.tail(l));
  }
  return std::sqrt(sum_over_ranks(ranks_, sum));
}

void ShardedFactors::update(double learning_rate, double gradient_factor) {
  TAILOR_CHECK(cast_.adapter() == &adapter_);
  flush();
  optimizer_.begin_step(learning_rate, gradient_factor, shards_.count());
  for (int l = 0; l < shards_.layers(); ++l) {
    update_range(shards_.mine(l));
    update_range(shards_.tail(l));
    Cast& state = state_[static_cast<std::size_t>(l)];
    if (state == Cast::whole) cast_.drop_others(shards_, shards_.layer(l));
    state = Cast::own;
  }
}

void ShardedFactors::update_range(FactorRange range) {
  const std::array<const Arena*, 4> arenas = {
      &adapter_.arena(), &gradients_, &optimizer_.first_arena(), &optimizer_.second_arena()};
  for (std::int64_t at = range.begin; at < range.end; at += kWindow) {
    const FactorRange window{at, std::min(range.end, at + kWindow)};
    const std::int64_t ahead = std::min(kWindow, range.end - window.end);
    for (const Arena* arena : arenas) {
      arena->prefetch(window.end * kFloatBytes, ahead * kFloatBytes);
    }
    optimizer_.finish(adapter_.factors(), gradients_.as<float>(), window, true);
    cast_.cast(window);
    for (const Arena* arena : arenas) {
      arena->release(window.begin * kFloatBytes, window.size() * kFloatBytes);
    }
  }
}

void ShardedFactors::gather_to_first() {
  flush();
  const auto bytes = std::as_writable_bytes(adapter_.factors());
  const auto of = [&](FactorRange range) {
    return bytes.subspan(static_cast<std::size_t>(range.begin * kFloatBytes),
                         static_cast<std::size_t>(range.size() * kFloatBytes));
  };
  for (int l = 0; l < shards_.layers(); ++l) {
    if (shards_.shared(l).empty()) continue;
    ranks_.gather(of(shards_.mine(l)),
                  ranks_.first() ? of(shards_.shared(l)) : std::span<std::byte>{}, 0);
    const FactorRange all = shards_.layer(l);
    adapter_.arena().release(all.begin * kFloatBytes, all.size() * kFloatBytes);
  }
}

void ShardedFactors::drop_gathered() {
  if (ranks_.first()) {
    shards_.drop_others(adapter_.arena(), {0, adapter_.parameter_count()}, kFloatBytes);
  }
}

ShardedFactors::Times ShardedFactors::times() const {
  const std::lock_guard lock(mutex_);
  return times_;
}

RankTraffic ShardedFactors::traffic() const {
  const std::lock_guard lock(mutex_);
  return traffic_;
}

// ------------------------------------------------------------------ the exchanging thread

void ShardedFactors::work() {
  name_this_thread("factors");
  std::unique_lock lock(mutex_);
  while (true) {
    to_thread_.wait(lock, [this] { return stop_ || !tasks_.empty(); });
    if (stop_) return;
    const Task task = tasks_.front();
    tasks_.pop_front();
    busy_ = true;
    lock.unlock();
    std::exception_ptr failure;
    const double began = seconds_now();
    try {
      if (task.kind == Kind::gather) {
        gather(task.layer);
      } else {
        reduce(task.layer);
      }
    } catch (...) {
      failure = std::current_exception();
    }
    const double seconds = seconds_now() - began;
    lock.lock();
    busy_ = false;
    times_.exchange_seconds += seconds;
    traffic_ = channel_->traffic();
    if (failure) {
      failure_ = failure;
      tasks_.clear();
    } else if (task.kind == Kind::gather) {
      state_[static_cast<std::size_t>(task.layer)] = Cast::whole;
    }
    to_user_.notify_all();
  }
}

void ShardedFactors::gather(int layer) {
  channel_->all_gather(cast_.bytes(shards_.mine(layer)), cast_.bytes(shards_.shared(layer)));
}

void ShardedFactors::reduce(int layer) {
  const std::span<float> all = gradients_.as<float>();
  const auto of = [&](FactorRange range) {
    return all.subspan(static_cast<std::size_t>(range.begin),
                       static_cast<std::size_t>(range.size()));
  };
  if (!shards_.shared(layer).empty()) {
    channel_->reduce_scatter(of(shards_.shared(layer)), of(shards_.mine(layer)));
    shards_.drop_others(gradients_, shards_.layer(layer), kFloatBytes);
  }
  const std::span<float> tail = of(shards_.tail(layer));
  if (tail.empty()) return;
  std::vector<double> sums(tail.begin(), tail.end());
  channel_->all_reduce(sums, Reduce::sum);
  std::transform(sums.begin(), sums.end(), tail.begin(),
                 [](double sum) { return static_cast<float>(sum); });
}

}  // namespace tailor
