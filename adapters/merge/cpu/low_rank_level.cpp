// Compiled once per instruction-set level, with TAILOR_LEVEL its name: see adapters/CMakeLists.txt.
// No function of another header may be called here: the linker could hand it to code of another
// level.

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "adapters/merge/cpu/low_rank.h"

namespace tailor {
namespace {

typedef float F16 __attribute__((vector_size(64)));
typedef std::uint32_t U16 __attribute__((vector_size(64)));
typedef std::uint16_t H16 __attribute__((vector_size(32)));

constexpr std::int64_t kLanes = 16;

template <class To, class From>
inline To bits_as(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To out;
  std::memcpy(&out, &value, sizeof out);
  return out;
}
template <class V>
inline V load_up_to(const void* p, std::int64_t n) {
  V v{};
  std::memcpy(&v, p, n >= kLanes ? sizeof v : static_cast<std::size_t>(n) * sizeof v[0]);
  return v;
}
template <class V>
inline void store_up_to(void* p, const V& v, std::int64_t n) {
  std::memcpy(p, &v, n >= kLanes ? sizeof v : static_cast<std::size_t>(n) * sizeof v[0]);
}
inline F16 splat(float value) { return F16{} + value; }

inline F16 widen(H16 x) { return bits_as<F16>(__builtin_convertvector(x, U16) << 16U); }
/// To the nearest bfloat16, ties to even; of finite numbers.
inline U16 round_bits(F16 x) {
  const U16 bits = bits_as<U16>(x);
  return (bits + 0x7FFFU + ((bits >> 16U) & 1U)) >> 16U;
}

inline double sum_lanes(F16 v) {
  double total = 0;
  for (int i = 0; i < kLanes; ++i) total += static_cast<double>(v[i]);
  return total;
}

struct Lanes {
  F16 base{}, delta{}, error{}, kept{};
  void flush(MergeSums* sums) const {
    sums->base_squares += sum_lanes(base);
    sums->delta_squares += sum_lanes(delta);
    sums->error_squares += sum_lanes(error);
    sums->kept += sum_lanes(kept);
  }
};

template <bool from_bf16, bool to_bf16>
inline void finish(const void* base, void* out, std::int64_t at, F16 delta, std::int64_t n,
                   Lanes& lanes) {
  F16 b;
  if constexpr (from_bf16) {
    b = widen(load_up_to<H16>(static_cast<const std::uint16_t*>(base) + at, n));
  } else {
    b = load_up_to<F16>(static_cast<const float*>(base) + at, n);
  }
  const F16 target = b + delta;
  F16 stored = target;
  if constexpr (to_bf16) {
    const U16 bits = round_bits(target);
    stored = bits_as<F16>(bits << 16U);
    store_up_to(static_cast<std::uint16_t*>(out) + at, __builtin_convertvector(bits, H16), n);
    const F16 error = stored - target;
    lanes.error += error * error;
  } else {
    store_up_to(static_cast<float*>(out) + at, target, n);
  }
  lanes.base += b * b;
  lanes.delta += delta * delta;
  lanes.kept += (stored - b) * delta;
}

/// N rows side by side: each vector is loaded once for all of them.
template <int N, bool from_bf16, bool to_bf16>
void merge_group(const RowsToMerge& w, std::int64_t row, MergeSums* sums) {
  Lanes lanes;
  const float* coefficients = w.coefficients + row * w.terms;
  std::int64_t j = 0;
  for (; j + 2 * kLanes <= w.columns; j += 2 * kLanes) {
    F16 low[std::size_t{N}], high[std::size_t{N}];
    for (int k = 0; k < N; ++k) low[k] = high[k] = splat(0);
    for (std::int64_t t = 0; t < w.terms; ++t) {
      const F16 x = load_up_to<F16>(w.vectors[t] + j, kLanes);
      const F16 y = load_up_to<F16>(w.vectors[t] + j + kLanes, kLanes);
      for (int k = 0; k < N; ++k) {
        const F16 c = splat(coefficients[k * w.terms + t]);
        low[k] += c * x;
        high[k] += c * y;
      }
    }
    for (int k = 0; k < N; ++k) {
      const std::int64_t at = (row + k) * w.columns + j;
      finish<from_bf16, to_bf16>(w.base, w.out, at, low[k], kLanes, lanes);
      finish<from_bf16, to_bf16>(w.base, w.out, at + kLanes, high[k], kLanes, lanes);
    }
  }
  for (; j < w.columns; j += kLanes) {
    const std::int64_t n = w.columns - j;
    F16 sum[std::size_t{N}];
    for (int k = 0; k < N; ++k) sum[k] = splat(0);
    for (std::int64_t t = 0; t < w.terms; ++t) {
      const F16 x = load_up_to<F16>(w.vectors[t] + j, n);
      for (int k = 0; k < N; ++k) sum[k] += splat(coefficients[k * w.terms + t]) * x;
    }
    for (int k = 0; k < N; ++k) {
      finish<from_bf16, to_bf16>(w.base, w.out, (row + k) * w.columns + j, sum[k], n, lanes);
    }
  }
  lanes.flush(sums);
}

template <bool from_bf16, bool to_bf16>
void merge_all(const RowsToMerge& w, MergeSums* sums) {
  std::int64_t row = 0;
  for (; row + 4 <= w.rows; row += 4) merge_group<4, from_bf16, to_bf16>(w, row, sums);
  for (; row < w.rows; ++row) merge_group<1, from_bf16, to_bf16>(w, row, sums);
}

void merge(const RowsToMerge& w, MergeSums* sums) {
  const bool from_bf16 = w.base_number == RowsToMerge::Number::bf16;
  const bool to_bf16 = w.out_number == RowsToMerge::Number::bf16;
  if (from_bf16 && to_bf16) return merge_all<true, true>(w, sums);
  if (from_bf16) return merge_all<true, false>(w, sums);
  if (to_bf16) return merge_all<false, true>(w, sums);
  return merge_all<false, false>(w, sums);
}

void compare(const float* base, const float* target, const float* stored, std::int64_t count,
             MergeSums* sums) {
  constexpr std::int64_t kRun = 4096;
  for (std::int64_t begin = 0; begin < count; begin += kRun) {
    const std::int64_t end = begin + kRun < count ? begin + kRun : count;
    Lanes lanes;
    for (std::int64_t i = begin; i < end; i += kLanes) {
      const F16 b = load_up_to<F16>(base + i, end - i), t = load_up_to<F16>(target + i, end - i);
      const F16 s = load_up_to<F16>(stored + i, end - i);
      lanes.error += (s - t) * (s - t);
      lanes.kept += (s - b) * (t - b);
    }
    lanes.flush(sums);
  }
}

void scale_codes(const std::uint8_t* codes, const float* table, float scale, std::int64_t count,
                 float* out) {
  for (std::int64_t i = 0; i < count; ++i) out[i] = table[codes[i]] * scale;
}

void scale_columns(const std::uint8_t* codes, const float* table, const float* scales,
                   std::int64_t count, float* out) {
  for (std::int64_t i = 0; i < count; ++i) out[i] = table[codes[i]] * scales[i];
}

}  // namespace

extern const LowRankKernels TAILOR_LEVEL;
const LowRankKernels TAILOR_LEVEL = {merge, compare, scale_codes, scale_columns};

}  // namespace tailor
