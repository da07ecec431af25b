#pragma once

// What the bodies of kernels are made of: where a thread stands, bfloat16, words of eight of them.
//
// A body is a struct of arguments with
//   static constexpr std::uint32_t kThreads   threads of a block where nobody says otherwise
//   std::int64_t blocks(threads) const        how many blocks do the work (host only)
//   void run(Place) const                     all of a thread's work
// or, where the threads of a block speak with each other,
//   struct Shared, struct State               of a block; of a thread, kept between phases
//   phases(threads) const                     a barrier stands between one phase and the next
//   void run(phase, Place, State&, Shared&) const
// Within a phase no thread reads what another one writes in it, so threads may run in any order:
// on a GPU at once, in the tests one after another. kernels.cu and tests/cuda/cpu_launch.h are the
// two that run bodies. Files that hold bodies are compiled without fused multiply-add
// (--fmad=false, -ffp-contract=off): where one is wanted it is written std::fma, and the bits
// agree.

#include <cmath>
#include <cstdint>
#include <cstring>

#include "base/error.h"
#include "base/units.h"
#include "trainer/cuda/host_device.h"

namespace tailor::cuda {

struct Place {
  std::uint32_t block, thread, threads;  ///< threads of the block
};

template <class Body>
concept Phased = requires {
  typename Body::Shared;
};

/// A bfloat16: the upper half of a float.
using Bf16Bits = std::uint16_t;

/// Steps of a tree over the threads of a block, a power of two.
TAILOR_HOST_DEVICE inline int tree_levels(std::uint32_t threads) {
  int out = 0;
  while (1U << out < threads) ++out;
  return out;
}

template <class To, class From>
TAILOR_HOST_DEVICE inline To bits_as(From value) {
  static_assert(sizeof(To) == sizeof(From));
  return __builtin_bit_cast(To, value);
}

TAILOR_HOST_DEVICE inline float to_float(Bf16Bits value) {
  return bits_as<float>(std::uint32_t{value} << 16U);
}

/// Two floats rounded to nearest, ties to even; `low` in the lower half. NaN becomes 0x7FFF, as the
/// GPU's instruction has it.
TAILOR_HOST_DEVICE inline std::uint32_t to_bf16_pair(float low, float high) {
  std::uint32_t pair = 0;
#ifdef __CUDA_ARCH__
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
#else
  const float values[2] = {low, high};
  for (unsigned i = 0; i < 2; ++i) {
    const auto bits = bits_as<std::uint32_t>(values[i]);
    const bool nan = (bits & 0x7FFFFFFFU) > 0x7F800000U;
    const std::uint32_t rounded = (bits + 0x7FFFU + ((bits >> 16U) & 1U)) >> 16U;
    pair |= (nan ? 0x7FFFU : rounded) << (16U * i);
  }
#endif
  return pair;
}
TAILOR_HOST_DEVICE inline Bf16Bits to_bf16(float value) {
  return static_cast<Bf16Bits>(to_bf16_pair(value, 0.0F));
}

/// Eight numbers: what a thread reads or writes at once, 16 bytes in bfloat16.
constexpr std::uint32_t kWord = 8;
struct Eight {
  float at[kWord];
};
struct alignas(16) EightBf16 {
  std::uint32_t pair[kWord / 2];
};

/// A load or store of sizeof(Word) bytes in one instruction. The address has to be a multiple of
/// that, which the CPU checks.
template <class Word>
TAILOR_HOST_DEVICE inline Word load_word(const void* from) {
#ifdef __CUDA_ARCH__
  return *static_cast<const Word*>(from);
#else
  TAILOR_CHECK(reinterpret_cast<std::uintptr_t>(from) % sizeof(Word) == 0, "a word's address");
  Word word;
  std::memcpy(&word, from, sizeof word);
  return word;
#endif
}
template <class Word>
TAILOR_HOST_DEVICE inline void store_word(void* to, const Word& word) {
#ifdef __CUDA_ARCH__
  *static_cast<Word*>(to) = word;
#else
  TAILOR_CHECK(reinterpret_cast<std::uintptr_t>(to) % sizeof(Word) == 0, "a word's address");
  std::memcpy(to, &word, sizeof word);
#endif
}

/// Eight numbers from base[offset], of which `count` are there; the others are `fill`. One load
/// where the place allows it; base is aligned to 16 bytes.
TAILOR_HOST_DEVICE inline EightBf16 load_eight_bf16(const Bf16Bits* base, std::int64_t offset,
                                                    std::uint32_t count, Bf16Bits fill = 0) {
  if (count == kWord && offset % kWord == 0) return load_word<EightBf16>(base + offset);
  EightBf16 out;
  TAILOR_UNROLL
  for (std::uint32_t i = 0; i < kWord / 2; ++i) {
    const std::uint32_t low = 2 * i < count ? base[offset + 2 * i] : fill;
    const std::uint32_t high = 2 * i + 1 < count ? base[offset + 2 * i + 1] : fill;
    out.pair[i] = low | high << 16U;
  }
  return out;
}
TAILOR_HOST_DEVICE inline Eight to_floats(const EightBf16& word) {
  Eight out;
  TAILOR_UNROLL
  for (std::uint32_t i = 0; i < kWord / 2; ++i) {
    out.at[2 * i] = bits_as<float>(word.pair[i] << 16U);
    out.at[2 * i + 1] = bits_as<float>(word.pair[i] & 0xFFFF0000U);
  }
  return out;
}
TAILOR_HOST_DEVICE inline Eight load_eight(const Bf16Bits* base, std::int64_t offset,
                                           std::uint32_t count) {
  return to_floats(load_eight_bf16(base, offset, count));
}

TAILOR_HOST_DEVICE inline void store_eight_bf16(Bf16Bits* base, std::int64_t offset,
                                                std::uint32_t count, const EightBf16& word) {
  if (count == kWord && offset % kWord == 0) return store_word(base + offset, word);
  TAILOR_UNROLL
  for (std::uint32_t i = 0; i < kWord; ++i) {
    if (i < count) base[offset + i] = static_cast<Bf16Bits>(word.pair[i / 2] >> 16U * (i % 2));
  }
}
TAILOR_HOST_DEVICE inline void store_eight(Bf16Bits* base, std::int64_t offset, std::uint32_t count,
                                           const Eight& values) {
  EightBf16 word;
  TAILOR_UNROLL
  for (std::uint32_t i = 0; i < kWord / 2; ++i) {
    word.pair[i] = to_bf16_pair(values.at[2 * i], values.at[2 * i + 1]);
  }
  store_eight_bf16(base, offset, count, word);
}

/// Division of numbers below 2^31 by a divisor known at launch, as a product and a shift:
/// m = ceil(2^p / d), p = 31 + ceil(log2 d), is too large by e / d < 1 with n e < 2^p for every
/// such n (Granlund and Montgomery, "Division by invariant integers using multiplication", PLDI
/// 1994). The GPU has no integer division; its long way round costs as much as a word's whole work.
class Divider {
 public:
  Divider() = default;
  explicit Divider(std::int64_t divisor) : divisor_(static_cast<std::uint32_t>(divisor)) {
    TAILOR_CHECK(divisor > 0 && divisor < std::int64_t{1} << 31U, "divisor");
    while ((std::uint64_t{1} << (shift_ - 31U)) < divisor_) ++shift_;
    multiplier_ = ((std::uint64_t{1} << shift_) + divisor_ - 1) / divisor_;
  }
  TAILOR_HOST_DEVICE std::uint32_t divide(std::uint32_t value) const {
    return static_cast<std::uint32_t>(value * multiplier_ >> shift_);
  }
  TAILOR_HOST_DEVICE std::uint32_t divisor() const { return divisor_; }

 private:
  std::uint64_t multiplier_ = std::uint64_t{1} << 31U;  // below 2^32: the product fits
  std::uint32_t divisor_ = 1, shift_ = 31;
};

/// A matrix [rows, columns] cut into words of eight columns, the last word of a row shorter.
class WordGrid {
 public:
  struct Spot {
    std::uint32_t row, column;  ///< of the word's first number
    std::int64_t offset;        ///< row * columns + column
    std::uint32_t count;        ///< numbers of the word, 1 .. 8
  };

  WordGrid(std::int64_t rows, std::int64_t columns) : columns_(columns) {
    TAILOR_CHECK(rows >= 0 && columns >= 0, "sizes of a matrix");
    const std::int64_t across = columns == 0 ? 1 : div_ceil(columns, kWord);
    words_ = columns == 0 ? 0 : checked_multiply(rows, across);
    TAILOR_CHECK(words_ < std::int64_t{1} << 31U, "a matrix of 2^34 numbers or more");
    across_ = Divider(across);
  }
  TAILOR_HOST_DEVICE std::int64_t words() const { return words_; }
  TAILOR_HOST_DEVICE Spot spot(std::uint32_t word) const {
    Spot out;
    out.row = across_.divide(word);
    out.column = (word - out.row * across_.divisor()) * kWord;
    out.offset = out.row * columns_ + out.column;
    const std::int64_t left = columns_ - out.column;
    out.count = left < kWord ? static_cast<std::uint32_t>(left) : kWord;
    return out;
  }

 private:
  std::int64_t columns_, words_ = 0;
  Divider across_;
};

}  // namespace tailor::cuda
