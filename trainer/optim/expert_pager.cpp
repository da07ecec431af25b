#include "trainer/optim/expert_pager.h"

#include <algorithm>
#include <array>
#include <string>

#include "base/error.h"
#include "base/log.h"

namespace tailor {
namespace {

constexpr auto kFloatBytes = static_cast<std::int64_t>(sizeof(float));
/// Elements the update works on between reading ahead and letting go: 4 MiB of each arena.
constexpr std::int64_t kWindow = std::int64_t{1} << 20;
constexpr std::int64_t kAhead = 2;  ///< windows that are being read

void release(const Arena& arena, FactorRange range) {
  arena.release(range.begin * kFloatBytes, range.size() * kFloatBytes);
}
void prefetch(const Arena& arena, FactorRange range) {
  arena.prefetch(range.begin * kFloatBytes, range.size() * kFloatBytes);
}

}  // namespace

ExpertPager::ExpertPager(Adapter& adapter, AdamW& optimizer, CastFactors& cast,
                         const Arena& gradients)
    : adapter_(adapter), optimizer_(optimizer), cast_(cast), gradients_(gradients) {
  TAILOR_CHECK(gradients.size() == adapter.arena().size());
  std::int64_t at = 0;
  for (const int layer : adapter.expert_layers()) {
    const FactorRange range = adapter.experts_of(layer);
    if (range.begin > at) rest_.push_back({at, range.begin});
    at = range.end;
    index_.resize(static_cast<std::size_t>(layer) + 1, -1);
    index_.back() = static_cast<std::int64_t>(experts_.size());
    experts_.push_back(range);
  }
  if (at < adapter.parameter_count()) rest_.push_back({at, adapter.parameter_count()});
  done_ = static_cast<std::int64_t>(experts_.size());
  thread_ = std::thread([this] { work(); });
}

ExpertPager::~ExpertPager() {
  try {
    flush();
  } catch (const std::exception& error) {
    log_warning(std::string("the last update of the adapter failed: ") + error.what());
  }
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  changed_.notify_all();
  thread_.join();
}

std::int64_t ExpertPager::index_of(int layer) const {
  const auto at = static_cast<std::size_t>(layer);
  return at < index_.size() ? index_[at] : -1;
}

void ExpertPager::clear_gradients() {
  const auto gradients = gradients_.as<float>();
  for (const FactorRange& range : rest_) {
    std::fill(gradients.begin() + range.begin, gradients.begin() + range.end, 0.0F);
  }
}

void ExpertPager::update(double learning_rate, double gradient_factor) {
  TAILOR_CHECK(cast_.adapter() == &adapter_);
  optimizer_.begin_step(learning_rate, gradient_factor);
  for (const FactorRange& range : rest_) {
    optimizer_.finish(adapter_.factors(), gradients_.as<float>(), range, true);
    cast_.cast(range);
  }
  {
    const std::lock_guard lock(mutex_);
    done_ = 0;
    reached_ = 0;
    allowed_ = std::min<std::int64_t>(1, static_cast<std::int64_t>(experts_.size()));
  }
  changed_.notify_all();
}

void ExpertPager::before_layer(int layer, Way way) {
  const std::int64_t index = index_of(layer);
  if (index < 0) return;
  const auto last = static_cast<std::int64_t>(experts_.size()) - 1;
  if (way == Way::backward) {
    const FactorRange& range = experts_[static_cast<std::size_t>(index)];
    gradients_.zero(range.begin * kFloatBytes, range.size() * kFloatBytes);
    if (index > 0) cast_.prefetch(experts_[static_cast<std::size_t>(index) - 1]);
    return;
  }
  bool next_is_cast = false;
  {
    std::unique_lock lock(mutex_);
    reached_ = index + 1;
    allowed_ = std::max(allowed_, std::min(index + 2, last + 1));
    changed_.notify_all();
    wait_for(lock, index + 1);
    next_is_cast = done_ > index + 1;
  }
  if (index < last && next_is_cast) cast_.prefetch(experts_[static_cast<std::size_t>(index) + 1]);
}

void ExpertPager::after_layer(int layer, Way way) noexcept {
  const std::int64_t index = index_of(layer);
  if (index < 0) return;
  const FactorRange& range = experts_[static_cast<std::size_t>(index)];
  if (way == Way::backward) release(gradients_, range);
  // The last layer is the first on the way back.
  const bool turns = way == Way::forward && index + 1 == static_cast<std::int64_t>(experts_.size());
  if (!turns) cast_.release(range);
}

void ExpertPager::flush() {
  std::unique_lock lock(mutex_);
  allowed_ = static_cast<std::int64_t>(experts_.size());
  changed_.notify_all();
  wait_for(lock, allowed_);
}

void ExpertPager::wait_for(std::unique_lock<std::mutex>& lock, std::int64_t layers) {
  changed_.wait(lock, [&] { return done_ >= layers || failure_; });
  if (failure_) std::rethrow_exception(failure_);
}

void ExpertPager::work() {
  std::unique_lock lock(mutex_);
  while (true) {
    changed_.wait(lock, [&] { return stop_ || (done_ < allowed_ && !failure_); });
    if (stop_) return;
    const std::int64_t index = done_;
    lock.unlock();
    std::exception_ptr failure;
    const FactorRange& range = experts_[static_cast<std::size_t>(index)];
    try {
      update_layer(range);
    } catch (...) {
      failure = std::current_exception();
    }
    lock.lock();
    failure_ = failure;
    if (!failure) {
      // Far from where the forward pass is, as when flushing, it will be read again.
      if (index > reached_) cast_.release(range);
      ++done_;
    }
    changed_.notify_all();
  }
}

void ExpertPager::update_layer(const FactorRange& experts) {
  const auto window_at = [&](std::int64_t begin) {
    return FactorRange{std::min(begin, experts.end), std::min(begin + kWindow, experts.end)};
  };
  const std::array<const Arena*, 4> arenas = {
      &adapter_.arena(), &gradients_, &optimizer_.first_arena(), &optimizer_.second_arena()};
  const auto ahead = [&](std::int64_t begin) {
    for (const Arena* arena : arenas) prefetch(*arena, window_at(begin));
  };
  cast_.discard(experts);
  for (std::int64_t i = 0; i < kAhead; ++i) ahead(experts.begin + i * kWindow);
  for (std::int64_t at = experts.begin; at < experts.end; at += kWindow) {
    ahead(at + kAhead * kWindow);
    const FactorRange window = window_at(at);
    optimizer_.finish(adapter_.factors(), gradients_.as<float>(), window, false);
    cast_.cast(window);
    for (const Arena* arena : arenas) release(*arena, window);
  }
}

}  // namespace tailor
