#pragma once

// Rows sorted by expert, by token and slot within an expert: what Router::finish() does on the CPU
// (trainer/models/router.cpp), to the bit. A counting sort in four passes:
//   count    how often each expert occurs in each chunk of kChunk slots
//   chunks   per expert, the sum over the chunks before each
//   experts  the sum over the experts before each: expert_begin
//   scatter  a slot's row = its expert's begin + its expert's slots in chunks before + in this
//   chunk
// Counts are whole numbers, so adding them atomically has no order to depend on; ranks within a
// chunk are counted, not drawn.
//
// A chunk is ranked `threads` slots at a time. A thread compares its expert with those of the
// threads before it, four a load, each load one broadcast to the warp: 32 loads on average,
// whatever the number of experts.

#include "trainer/cuda/bodies/words.h"

namespace tailor::cuda {

constexpr std::int64_t kChunk = 1024;
constexpr std::int32_t kExpertsMax = 1024;  ///< shared memory holds a count for each

/// Arrays on the device. gate and token_id may be null, then so may be what comes of them.
struct Permutation {
  std::int64_t tokens;
  std::int32_t K, E;
  const std::int32_t* expert;     ///< [tokens * K], each 0 .. E - 1
  const float* gate;              ///< [tokens * K]
  const std::uint64_t* token_id;  ///< [tokens]
  std::int64_t* expert_begin;     ///< [E + 1]
  std::int32_t* token_of_row;     ///< [tokens * K]
  std::int32_t* row_of_slot;      ///< [tokens * K]
  float* gate_of_row;             ///< [tokens * K]
  std::uint64_t* id_of_row;       ///< [tokens * K] token id with the slot in bits 56 and up
  std::int32_t* scratch;          ///< [permute_scratch(tokens, K, E)]

  TAILOR_HOST_DEVICE std::int64_t slots() const { return tokens * K; }
  TAILOR_HOST_DEVICE std::int64_t chunks() const { return (slots() + kChunk - 1) / kChunk; }
  TAILOR_HOST_DEVICE std::int32_t* total() const { return scratch + E * chunks(); }  ///< [E]
};

/// Numbers of int32 that a permutation needs as scratch: a count a chunk and expert, a total an
/// expert.
inline std::int64_t permute_scratch(std::int64_t tokens, std::int32_t K, std::int32_t E) {
  return (div_ceil(checked_multiply(tokens, K), kChunk) + 1) * E;
}

namespace detail {

constexpr std::uint32_t kPermuteThreads = 256;

/// Adds to a number in shared memory that others of the block add to as well.
TAILOR_HOST_DEVICE inline void shared_add(std::int32_t* to, std::int32_t value) {
#ifdef __CUDA_ARCH__
  atomicAdd(to, value);
#else
  *to += value;
#endif
}

struct ScanShared {
  std::int64_t sum[2][kPermuteThreads];
};

/// The sums before each of `count` numbers, in phases: every thread adds a run of them, the runs'
/// sums are scanned (Hillis and Steele, doubling the distance), every thread goes through its run
/// again. put(i, sum of numbers 0 .. i - 1), for i = count too.
struct ExclusiveScan {
  TAILOR_HOST_DEVICE static int phases(std::uint32_t threads) { return tree_levels(threads) + 2; }

  template <class Put>
  TAILOR_HOST_DEVICE static void run(int phase, Place at, ScanShared& shared,
                                     const std::int32_t* numbers, std::int64_t count, Put put) {
    const std::int64_t run = (count + at.threads - 1) / at.threads;
    const std::int64_t begin = at.thread * run < count ? at.thread * run : count;
    const std::int64_t end = begin + run < count ? begin + run : count;
    const int last = tree_levels(at.threads) + 1;
    if (phase == 0) {
      std::int64_t sum = 0;
      for (std::int64_t i = begin; i < end; ++i) sum += numbers[i];
      shared.sum[0][at.thread] = sum;
    } else if (phase < last) {
      const auto distance = 1U << static_cast<unsigned>(phase - 1);
      const std::int64_t* from = shared.sum[(phase - 1) % 2];
      shared.sum[phase % 2][at.thread] =
          from[at.thread] + (at.thread >= distance ? from[at.thread - distance] : 0);
    } else {
      const std::int64_t* sums = shared.sum[(last - 1) % 2];
      std::int64_t sum = at.thread == 0 ? 0 : sums[at.thread - 1];
      for (std::int64_t i = begin; i < end; ++i) {
        const std::int32_t number = numbers[i];  // read first: put may write where it stood
        put(i, sum);
        sum += number;
      }
      if (at.thread == at.threads - 1) put(count, sum);
    }
  }
};

}  // namespace detail

/// A block a chunk.
struct PermuteCount {
  static constexpr std::uint32_t kThreads = detail::kPermuteThreads;
  struct Shared {
    std::int32_t count[kExpertsMax];
  };
  struct State {};

  std::int64_t blocks(std::uint32_t) const { return p.chunks(); }
  TAILOR_HOST_DEVICE int phases(std::uint32_t) const { return 3; }
  TAILOR_HOST_DEVICE void run(int phase, Place at, State&, Shared& shared) const {
    if (phase == 1) {
      const std::int64_t begin = at.block * kChunk;
      const std::int64_t end = begin + kChunk < p.slots() ? begin + kChunk : p.slots();
      for (std::int64_t slot = begin + at.thread; slot < end; slot += at.threads) {
        detail::shared_add(&shared.count[p.expert[slot]], 1);
      }
      return;
    }
    for (auto e = static_cast<std::int32_t>(at.thread); e < p.E;
         e += static_cast<std::int32_t>(at.threads)) {
      if (phase == 0) {
        shared.count[e] = 0;
      } else {
        p.scratch[e * p.chunks() + at.block] = shared.count[e];
      }
    }
  }

  Permutation p;
};

/// A block an expert: its counts become the sums before them.
struct PermuteChunks {
  static constexpr std::uint32_t kThreads = detail::kPermuteThreads;
  using Shared = detail::ScanShared;
  struct State {};

  std::int64_t blocks(std::uint32_t) const { return p.E; }
  TAILOR_HOST_DEVICE int phases(std::uint32_t threads) const {
    return detail::ExclusiveScan::phases(threads);
  }
  TAILOR_HOST_DEVICE void run(int phase, Place at, State&, Shared& shared) const {
    const std::int64_t chunks = p.chunks();
    std::int32_t* const row = p.scratch + at.block * chunks;
    detail::ExclusiveScan::run(phase, at, shared, row, chunks,
                               [&](std::int64_t i, std::int64_t sum) {
                                 std::int32_t* to = i < chunks ? row + i : p.total() + at.block;
                                 *to = static_cast<std::int32_t>(sum);
                               });
  }

  Permutation p;
};

/// One block: expert_begin from the totals.
struct PermuteExperts {
  static constexpr std::uint32_t kThreads = detail::kPermuteThreads;
  using Shared = detail::ScanShared;
  struct State {};

  std::int64_t blocks(std::uint32_t) const { return 1; }
  TAILOR_HOST_DEVICE int phases(std::uint32_t threads) const {
    return detail::ExclusiveScan::phases(threads);
  }
  TAILOR_HOST_DEVICE void run(int phase, Place at, State&, Shared& shared) const {
    detail::ExclusiveScan::run(phase, at, shared, p.total(), p.E,
                               [&](std::int64_t e, std::int64_t sum) { p.expert_begin[e] = sum; });
  }

  Permutation p;
};

/// A block a chunk, `threads` slots at a time.
struct PermuteScatter {
  static constexpr std::uint32_t kThreads = detail::kPermuteThreads;
  struct alignas(16) Four {
    std::int32_t at[4];
  };
  struct Shared {
    std::int32_t next[kExpertsMax];  ///< the row of each expert's next slot
    Four expert[kThreads / 4];       ///< of the slots at hand, -1 past the last
  };
  struct State {};

  std::int64_t blocks(std::uint32_t) const { return p.chunks(); }
  TAILOR_HOST_DEVICE int phases(std::uint32_t threads) const {
    return 1 + 2 * static_cast<int>((kChunk + threads - 1) / threads);
  }
  TAILOR_HOST_DEVICE void run(int phase, Place at, State&, Shared& shared) const {
    std::int32_t& mine = shared.expert[at.thread / 4].at[at.thread % 4];
    if (phase == 0) {
      for (auto e = static_cast<std::int32_t>(at.thread); e < p.E;
           e += static_cast<std::int32_t>(at.threads)) {
        shared.next[e] =
            static_cast<std::int32_t>(p.expert_begin[e]) + p.scratch[e * p.chunks() + at.block];
      }
      mine = expert_of(slot_of(at, 0));
      return;
    }
    const int part = (phase - 1) / 2;
    if (phase % 2 == 1) {
      if (mine >= 0) place(slot_of(at, part), shared.next[mine] + rank(at.thread, mine, shared));
    } else {  // everybody has its row: the next slots'
      if (mine >= 0) detail::shared_add(&shared.next[mine], 1);
      mine = expert_of(slot_of(at, part + 1));
    }
  }

  /// Slots of the same expert among those of the threads before.
  TAILOR_HOST_DEVICE static std::int32_t rank(std::uint32_t thread, std::int32_t expert,
                                              const Shared& shared) {
    std::int32_t out = 0;
    for (std::uint32_t quad = 0; quad <= thread / 4; ++quad) {
      const Four four = shared.expert[quad];
      TAILOR_UNROLL
      for (std::uint32_t i = 0; i < 4; ++i) {
        out += four.at[i] == expert && quad * 4 + i < thread ? 1 : 0;
      }
    }
    return out;
  }
  /// -1 past the chunk's end and the last slot.
  TAILOR_HOST_DEVICE std::int64_t slot_of(Place at, int part) const {
    const std::int64_t in_chunk = std::int64_t{part} * at.threads + at.thread;
    const std::int64_t slot = at.block * kChunk + in_chunk;
    return in_chunk < kChunk && slot < p.slots() ? slot : -1;
  }
  TAILOR_HOST_DEVICE std::int32_t expert_of(std::int64_t slot) const {
    return slot < 0 ? -1 : p.expert[slot];
  }
  TAILOR_HOST_DEVICE void place(std::int64_t slot, std::int32_t row) const {
    const auto k = static_cast<std::uint32_t>(p.K);
    const std::uint32_t token = static_cast<std::uint32_t>(slot) / k;
    p.row_of_slot[slot] = row;
    p.token_of_row[row] = static_cast<std::int32_t>(token);
    if (p.gate != nullptr) p.gate_of_row[row] = p.gate[slot];
    if (p.token_id != nullptr) {
      const std::uint64_t of_token = static_cast<std::uint32_t>(slot) - token * k;
      p.id_of_row[row] = p.token_id[token] | of_token << 56U;
    }
  }

  Permutation p;
};

}  // namespace tailor::cuda
