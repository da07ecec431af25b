#pragma once

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <map>
#include <memory>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

#include "base/block_reader.h"
#include "base/error.h"
#include "base/random.h"

namespace tailor::testing_support {

/// What goes wrong, and where. Extents are counted from 0 in the order they are submitted in.
struct Faults {
  std::uint64_t seed = 0;     ///< for every choice not fixed below
  std::size_t held_back = 0;  ///< up to so many ended extents wait, and any of them is told next
  int delay_us_max = 0;       ///< each is told late by up to this
  std::optional<std::uint64_t> fail;  ///< this one fails with fail_error somewhere in its bytes
  int fail_error = EIO;
  std::optional<std::uint64_t> cut_off;  ///< its file ends somewhere in its needed bytes
  std::optional<std::uint64_t> damage;   ///< one bit of its needed bytes is wrong, and it says good
};

/// A reader for tests that does what a disk may do at its worst. All extents are truly read by the
/// reader within; the bytes an extent did not get are overwritten, so that using them shows.
class FaultyReader final : public BlockReader {
 public:
  static constexpr std::byte kNotRead{0xFF};

  FaultyReader(std::unique_ptr<BlockReader> within, Faults faults)
      : within_(std::move(within)), faults_(faults) {}

  using BlockReader::submit;
  int add_file(const fs::path& path) override { return within_->add_file(path); }
  void register_memory(std::span<std::byte> memory) override { within_->register_memory(memory); }
  std::size_t in_flight() const override { return within_->in_flight() + ended_.size(); }
  Facts facts() const override { return within_->facts(); }
  std::int64_t bytes_read() const override { return within_->bytes_read(); }

  void submit(std::span<const BlockRead> reads) override {
    std::vector<BlockRead> counted(reads.begin(), reads.end());
    std::uint64_t number = submitted_;
    for (BlockRead& read : counted) read.tag = number++;
    within_->submit(counted);
    for (const BlockRead& read : reads) reads_[submitted_++] = read;
  }

  BlockDone wait() override {
    TAILOR_CHECK(in_flight() > 0);
    while (within_->in_flight() > 0 && ended_.size() <= faults_.held_back) {
      ended_.push_back(within_->wait());
    }
    const std::size_t which = random(told_, 0) % ended_.size();
    BlockDone done = ended_[which];
    ended_.erase(ended_.begin() + static_cast<std::ptrdiff_t>(which));
    if (faults_.delay_us_max > 0) {
      const auto limit = static_cast<std::uint64_t>(faults_.delay_us_max) + 1;
      std::this_thread::sleep_for(std::chrono::microseconds(random(told_, 1) % limit));
    }
    ++told_;
    const auto read = reads_.find(done.tag);
    spoil(done.tag, read->second, done);
    done.tag = read->second.tag;
    reads_.erase(read);
    return done;
  }

 private:
  std::uint64_t random(std::uint64_t a, std::uint64_t b) const {
    return random_bits(faults_.seed, RandomStream::sample, a, b);
  }

  void spoil(std::uint64_t number, const BlockRead& read, BlockDone& done) const {
    if (!done.good() || read.bytes_needed == 0) return;
    const auto at = static_cast<std::int64_t>(random(number, 2) %
                                              static_cast<std::uint64_t>(read.bytes_needed));
    const bool fails = faults_.fail == number, ends = faults_.cut_off == number;
    if (fails || ends) {
      const std::int64_t arrived = fails ? at / kBlockBytes * kBlockBytes : at;
      done = {done.tag, fails ? faults_.fail_error : 0, arrived, !fails, read.offset + arrived};
      std::fill(read.to + arrived, read.to + read.bytes, kNotRead);
    } else if (faults_.damage == number) {
      read.to[at] ^= static_cast<std::byte>(1U << (random(number, 3) % 8));
    }
  }

  std::unique_ptr<BlockReader> within_;
  Faults faults_;
  std::uint64_t submitted_ = 0, told_ = 0;
  std::map<std::uint64_t, BlockRead> reads_;  ///< not told yet, by number
  std::vector<BlockDone> ended_;
};

}  // namespace tailor::testing_support
