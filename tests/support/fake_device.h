#pragma once

// A device of RAM that is as late and as unordered as a GPU may be, for tests of what is built on
// trainer/cuda/device.h.
//
// A thread of its own makes the copies some time after they were submitted; of the streams' first
// pieces of work it takes one at random, by seed, so only what streams and events order is ordered.
// The source is read when the copy is made, not before. The destination is filled with kPoison as
// soon as everything ahead of the copy has ended (at submission, where nothing is) and written when
// the copy is made: who looks too early sees no data. Memory holds kPoison when it is allocated and
// after it was freed, and as 0xFF is a NaN in every float format, what was computed from it shows.
//
// Beside that the fake knows which work is ordered before which (a vector clock over the streams
// and the host, which is ordered after what it synchronised with or polled). Two accesses to the
// same bytes, one a write, that nothing orders are a violation, whatever the timing of this run.
// Work that is not a copy (a kernel's stand-in) says what it touches: run_async(); so does the
// host: expect_readable(), expect_writable(). Ask violations() at the end of a test.

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <list>
#include <map>
#include <mutex>
#include <random>
#include <thread>
#include <vector>

#include "base/error.h"
#include "base/units.h"
#include "trainer/cuda/device.h"

namespace tailor {

class FakeDevice final : public Device {
 public:
  static constexpr unsigned char kPoison = 0xFF;

  struct Range {
    const void* data;
    std::int64_t bytes;
  };

  explicit FakeDevice(std::uint32_t seed = 1)
      : random_(seed), worker_([this] { work_until_closed(); }) {}
  FakeDevice(const FakeDevice&) = delete;
  FakeDevice& operator=(const FakeDevice&) = delete;
  /// Ends all work first, held or not.
  ~FakeDevice() override {
    {
      const std::lock_guard lock(mutex_);
      closed_ = true;
      held_ = false;
    }
    changed_.notify_all();
    worker_.join();
  }

  std::string name() const override { return "fake"; }
  void use_on_this_thread() override {}
  void* allocate(std::int64_t bytes) override { return allocate(bytes, true); }
  void free(void* memory) noexcept override { give_back(memory, true); }
  void* allocate_pinned(std::int64_t bytes) override { return allocate(bytes, false); }
  void free_pinned(void* memory) noexcept override { give_back(memory, false); }

  StreamHandle create_stream() override {
    const std::lock_guard lock(mutex_);
    const std::size_t index = streams_.size();
    streams_.emplace_back().index = index;
    for (Queue& stream : streams_) stream.clock.resize(streams_.size(), 0);
    host_clock_.resize(streams_.size(), 0);
    return {&streams_.back()};
  }
  void destroy(StreamHandle) noexcept override {}  // its number stays taken
  EventHandle create_event() override {
    const std::lock_guard lock(mutex_);
    return {&events_.emplace_back()};
  }
  void destroy(EventHandle) noexcept override {}

  void copy_async(void* to, const void* from, std::int64_t bytes, CopyKind kind,
                  StreamHandle stream) override {
    TAILOR_CHECK(bytes >= 0);
    const std::lock_guard lock(mutex_);
    const bool to_device = kind == CopyKind::host_to_device || kind == CopyKind::device_to_device;
    const bool from_device = kind == CopyKind::device_to_host || kind == CopyKind::device_to_device;
    const Range source{from, bytes}, destination{to, bytes};
    if (inside_allocation(source) != from_device) violate("a copy's source is on the wrong side");
    if (inside_allocation(destination) != to_device) {
      violate("a copy's destination is on the wrong side");
      return;  // where its bytes would land nobody knows
    }
    Operation copy;
    copy.text = "a copy of " + std::to_string(bytes) + " bytes";
    copy.reads = {source};
    copy.writes = {destination};
    copy.is_copy = true;
    copy.work = [to, from, bytes] { std::memmove(to, from, static_cast<std::size_t>(bytes)); };
    submit(std::move(copy), stream);
  }

  /// Runs `work` late, on the fake's thread, in the stream's order: what a kernel would be.
  void run_async(std::vector<Range> reads, std::vector<Range> writes, std::function<void()> work,
                 StreamHandle stream) {
    const std::lock_guard lock(mutex_);
    Operation run;
    run.text = "a kernel";
    run.reads = std::move(reads);
    run.writes = std::move(writes);
    run.work = std::move(work);
    submit(std::move(run), stream);
  }

  void record(EventHandle event, StreamHandle stream) override {
    const std::lock_guard lock(mutex_);
    Note& note = of(event);
    note.stream = &of(stream);
    note.sequence = note.stream->submitted;
    note.clock = joined(note.stream->clock, {});
  }
  void wait(StreamHandle stream, EventHandle event) override {
    const std::lock_guard lock(mutex_);
    const Note& note = of(event);
    if (note.stream == nullptr) return;
    of(stream).clock = joined(of(stream).clock, note.clock);
    Operation hold_back;
    hold_back.awaits = note;
    submit(std::move(hold_back), stream);
  }
  void synchronise(EventHandle event) override {
    std::unique_lock lock(mutex_);
    synchronise(Note(of(event)), lock);
  }
  void synchronise(StreamHandle stream) override {
    std::unique_lock lock(mutex_);
    Queue& queue = of(stream);
    synchronise({&queue, queue.submitted, joined(queue.clock, {})}, lock);
  }
  bool poll(EventHandle event) override {
    const std::lock_guard lock(mutex_);
    const Note& note = of(event);
    if (!past(note)) return false;
    seen_by_host(note);
    return true;
  }

  /// The host is about to read, or write, these bytes.
  void expect_readable(const void* data, std::int64_t bytes) { host_access({data, bytes}, false); }
  void expect_writable(const void* data, std::int64_t bytes) { host_access({data, bytes}, true); }

  /// Nothing is begun until release().
  void hold() {
    const std::lock_guard lock(mutex_);
    held_ = true;
  }
  void release() {
    {
      const std::lock_guard lock(mutex_);
      held_ = false;
    }
    changed_.notify_all();
  }

  /// All so far, each told once; looks for writes to freed memory too.
  std::vector<std::string> violations() {
    const std::lock_guard lock(mutex_);
    for (auto& [begin, block] : blocks_) {
      if (!block.freed || block.told) continue;
      const auto* bytes = reinterpret_cast<const unsigned char*>(begin);
      block.told = !std::all_of(bytes, bytes + block.bytes,
                                [](unsigned char byte) { return byte == kPoison; });
      if (block.told) violate("freed memory was written");
    }
    return std::exchange(violations_, {});
  }

 private:
  using Clock = std::vector<std::int64_t>;  // of each stream, the last work that is ordered before
  struct Queue;
  struct Note {
    Queue* stream = nullptr;
    std::int64_t sequence = 0;
    Clock clock;
  };
  struct Operation {
    std::string text;
    std::vector<Range> reads, writes;
    std::function<void()> work;
    Note awaits;  // of a wait, which has nothing else
    bool is_copy = false, begun = false;
  };
  struct Queue {
    std::size_t index = 0;
    std::deque<Operation> work;
    Clock clock;
    std::int64_t submitted = 0, done = 0;
  };
  struct Access {  // of work the host has not seen the end of
    std::size_t stream;
    std::int64_t sequence;
    std::string text;
    std::vector<Range> reads, writes;
  };
  struct Block {
    std::int64_t bytes;
    bool on_device, freed = false, told = false;
    std::unique_ptr<void, decltype(&std::free)> memory;
  };

  static Queue& of(StreamHandle stream) {
    TAILOR_CHECK(stream.native != nullptr, "the fake has no default stream");
    return *static_cast<Queue*>(stream.native);
  }
  static Note& of(EventHandle event) { return *static_cast<Note*>(event.native); }
  static bool past(const Note& note) {
    return note.stream == nullptr || note.stream->done >= note.sequence;
  }
  static Clock joined(Clock a, const Clock& b) {
    a.resize(std::max(a.size(), b.size()), 0);
    for (std::size_t i = 0; i < b.size(); ++i) a[i] = std::max(a[i], b[i]);
    return a;
  }
  static bool overlap(const std::vector<Range>& some, const std::vector<Range>& others) {
    for (const Range& a : some) {
      for (const Range& b : others) {
        const auto* first = static_cast<const char*>(a.data);
        const auto* second = static_cast<const char*>(b.data);
        if (first < second + b.bytes && second < first + a.bytes) return true;
      }
    }
    return false;
  }
  void violate(std::string text) { violations_.push_back(std::move(text)); }

  void* allocate(std::int64_t bytes, bool on_device) {
    TAILOR_CHECK(bytes >= 0);
    const std::lock_guard lock(mutex_);
    constexpr std::int64_t kPage = 4096;
    const std::int64_t whole = align_up(bytes == 0 ? 1 : bytes, kPage);
    void* memory = std::aligned_alloc(kPage, static_cast<std::size_t>(whole));
    TAILOR_CHECK(memory != nullptr);
    std::memset(memory, kPoison, static_cast<std::size_t>(whole));
    blocks_.emplace(static_cast<char*>(memory),
                    Block{bytes, on_device, false, false, {memory, &std::free}});
    return memory;
  }
  void give_back(void* memory, bool on_device) noexcept {
    if (memory == nullptr) return;
    const std::lock_guard lock(mutex_);
    const auto found = blocks_.find(static_cast<char*>(memory));
    if (found == blocks_.end() || found->second.freed || found->second.on_device != on_device) {
      return violate("what was freed was not allocated");
    }
    const Range all{memory, found->second.bytes};
    for (const Access& access : unseen_) {
      if (overlap(access.reads, {all}) || overlap(access.writes, {all})) {
        violate("memory was freed before the end of " + access.text + " was waited for");
      }
    }
    std::memset(memory, kPoison, static_cast<std::size_t>(all.bytes));
    found->second.freed = true;  // kept until the end: nobody else gets the address
  }
  bool inside_allocation(Range range) const {  // of device memory
    for (const auto& [begin, block] : blocks_) {
      const auto* first = static_cast<const char*>(range.data);
      if (block.on_device && !block.freed && first >= begin &&
          first + range.bytes <= begin + block.bytes) {
        return true;
      }
    }
    return false;
  }

  void submit(Operation operation, StreamHandle handle) {
    Queue& stream = of(handle);
    ++stream.submitted;
    stream.clock = joined(stream.clock, host_clock_);
    if (operation.awaits.stream == nullptr) {
      for (const Access& earlier : unseen_) {
        if (stream.clock[earlier.stream] >= earlier.sequence) continue;
        if (overlap(operation.writes, earlier.writes) || overlap(operation.writes, earlier.reads) ||
            overlap(operation.reads, earlier.writes)) {
          violate(operation.text + " in stream " + std::to_string(stream.index) + " and " +
                  earlier.text + " in stream " + std::to_string(earlier.stream) +
                  " touch the same bytes, and nothing orders them");
        }
      }
      unseen_.push_back(
          {stream.index, stream.submitted, operation.text, operation.reads, operation.writes});
    }
    stream.clock[stream.index] = stream.submitted;
    stream.work.push_back(std::move(operation));
    advance();
    changed_.notify_all();
  }
  /// Passes waits whose time has come, and poisons the destinations of copies nothing is ahead of.
  void advance() {
    for (bool moved = true; moved;) {
      moved = false;
      for (Queue& stream : streams_) {
        if (stream.work.empty()) continue;
        Operation& first = stream.work.front();
        if (first.awaits.stream != nullptr && past(first.awaits)) {
          stream.work.pop_front();
          ++stream.done;
          moved = true;
        } else if (first.is_copy && !first.begun) {
          first.begun = true;
          for (const Range& range : first.writes) {
            std::memset(const_cast<void*>(range.data), kPoison,
                        static_cast<std::size_t>(range.bytes));
          }
        }
      }
    }
  }
  void work_until_closed() {
    std::unique_lock lock(mutex_);
    for (;;) {
      std::vector<Queue*> ready;
      for (Queue& stream : streams_) {
        if (!stream.work.empty() && stream.work.front().awaits.stream == nullptr) {
          ready.push_back(&stream);
        }
      }
      if (ready.empty() && closed_) return;
      if (ready.empty() || held_) {
        changed_.wait(lock);
        continue;
      }
      // Late, so that other streams' work may come in between and be taken first.
      if (!closed_ && random_() % 2 == 0) {
        const std::chrono::microseconds delay(random_() % 100);
        lock.unlock();
        std::this_thread::sleep_for(delay);
        lock.lock();
        if (random_() % 2 == 0) continue;
      }
      Queue& stream = *ready[random_() % ready.size()];
      const std::function<void()> work = std::move(stream.work.front().work);
      lock.unlock();
      work();
      lock.lock();
      stream.work.pop_front();
      ++stream.done;
      advance();
      changed_.notify_all();
    }
  }

  void synchronise(const Note& note, std::unique_lock<std::mutex>& lock) {
    changed_.wait(lock, [&] { return past(note); });
    seen_by_host(note);
  }
  void seen_by_host(const Note& note) {
    host_clock_ = joined(host_clock_, note.clock);
    unseen_.remove_if(
        [&](const Access& access) { return host_clock_[access.stream] >= access.sequence; });
  }
  void host_access(Range range, bool write) {
    const std::lock_guard lock(mutex_);
    for (const Access& access : unseen_) {
      if (overlap(access.writes, {range}) || (write && overlap(access.reads, {range}))) {
        violate(std::string("the host ") + (write ? "writes" : "reads") + " what " + access.text +
                " in stream " + std::to_string(access.stream) + " touches, before waiting for it");
      }
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::mt19937 random_;
  std::list<Queue> streams_;  // handles are addresses
  std::list<Note> events_;
  std::map<char*, Block> blocks_;
  std::list<Access> unseen_;
  Clock host_clock_;
  std::vector<std::string> violations_;
  bool held_ = false, closed_ = false;
  std::thread worker_;  // last: it uses all the others
};

}  // namespace tailor
