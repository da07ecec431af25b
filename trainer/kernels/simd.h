#pragma once

// The vector types the CPU kernels are written with. Only files that are compiled once per
// instruction-set level include this: everything here has internal linkage on purpose, so that the
// linker can never hand code of one level to another.

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "trainer/kernels/kernels.h"

namespace tailor {
namespace {

// One register, whatever its size: GCC keeps vectors of several registers in memory.
#if defined(__AVX512F__)
#define TAILOR_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define TAILOR_VECTOR_BYTES 32
#else
#define TAILOR_VECTOR_BYTES 16
#endif

template <class A>
struct VecOf {
  typedef A type __attribute__((vector_size(TAILOR_VECTOR_BYTES)));
};
template <class A>
using Vec = typename VecOf<A>::type;
template <class A>
constexpr std::int64_t kLanes = TAILOR_VECTOR_BYTES / static_cast<std::int64_t>(sizeof(A));

typedef std::uint32_t VecU32 __attribute__((vector_size(TAILOR_VECTOR_BYTES)));
typedef std::uint16_t HalfU16 __attribute__((vector_size(TAILOR_VECTOR_BYTES / 2)));
#if defined(__AVX512F__)
typedef std::int32_t I32x16 __attribute__((vector_size(64)));
typedef std::uint16_t U16x32 __attribute__((vector_size(64)));
#endif

template <class To, class From>
inline To bits_as(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To out;
  std::memcpy(&out, &value, sizeof out);
  return out;
}

template <class A>
inline Vec<A> splat(A value) {
  return Vec<A>{} + value;
}

/// v, of which the compiler no longer knows that it came from memory: else it reads it again for
/// every use, and a tile waits for loads.
template <class A>
inline Vec<A> in_register(Vec<A> v) {
#if defined(__AVX512F__)
  asm("" : "+v"(v));
#else
  asm("" : "+x"(v));
#endif
  return v;
}

inline float to_float(Bf16 value) { return bits_as<float>(std::uint32_t{value.bits} << 16U); }
inline Bf16 to_bf16(float value) {  // round to nearest, ties to even
  const auto bits = bits_as<std::uint32_t>(value);
  return {static_cast<std::uint16_t>((bits + 0x7FFFU + ((bits >> 16U) & 1U)) >> 16U)};
}

inline Vec<float> load(const float* p) {
  Vec<float> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline Vec<double> load(const double* p) {
  Vec<double> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline Vec<float> load(const Bf16* p) {
  HalfU16 raw;
  std::memcpy(&raw, p, sizeof raw);
  return bits_as<Vec<float>>(__builtin_convertvector(raw, VecU32) << 16U);
}
inline void store(float* p, Vec<float> v) { std::memcpy(p, &v, sizeof v); }
inline void store(double* p, Vec<double> v) { std::memcpy(p, &v, sizeof v); }
// AVX512-BF16's conversion rounds the same way, but flushes denormals (below 2^-126) to zero.
inline void store(Bf16* p, Vec<float> v) {
#if defined(__AVX512BF16__)
  const __m256bh raw = _mm512_cvtneps_pbh(bits_as<__m512>(v));
  std::memcpy(p, &raw, sizeof raw);
#else
  const auto bits = bits_as<VecU32>(v);
  const VecU32 rounded = (bits + 0x7FFFU + ((bits >> 16U) & 1U)) >> 16U;
  const HalfU16 raw = __builtin_convertvector(rounded, HalfU16);
  std::memcpy(p, &raw, sizeof raw);
#endif
}

inline float scalar(float value) { return value; }
inline double scalar(double value) { return value; }
inline float scalar(Bf16 value) { return to_float(value); }
inline void put(float* p, float value) { *p = value; }
inline void put(double* p, double value) { *p = value; }
inline void put(Bf16* p, float value) { *p = to_bf16(value); }

/// Sum of the lanes, always in the same order (a tree).
template <class A>
inline A sum_lanes(Vec<A> v) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<A, float>) {
    constexpr I32x16 kLane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    v += __builtin_shuffle(v, kLane ^ 8);
    v += __builtin_shuffle(v, kLane ^ 4);
    v += __builtin_shuffle(v, kLane ^ 2);
    return v[0] + v[1];
  }
#endif
  A lanes[kLanes<A>];
  std::memcpy(lanes, &v, sizeof v);
  for (std::int64_t width = kLanes<A> / 2; width > 0; width /= 2) {
    for (std::int64_t i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}

/// The sums of `count` vectors that lie one after another, each as sum_lanes would have it.
template <class A>
inline void sum_each(const A* vectors, std::int64_t count, A* sums) {
  std::int64_t i = 0;
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<A, float>) {  // eight at a time: the upper halves of the tree merge
    for (; i + 8 <= count; i += 8) {
      Vec<float> v[8];
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) v[j] = load(vectors + (i + j) * kLanes<A>);
      constexpr I32x16 kEights = {0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23};
      constexpr I32x16 kFours = {0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27};
      constexpr I32x16 kTwos = {0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29};
      constexpr I32x16 kOnes = {0, 2, 4, 6, 8, 10, 12, 14, 0, 2, 4, 6, 8, 10, 12, 14};
#pragma GCC unroll 4
      for (int j = 0; j < 8; j += 2) {
        v[j] = __builtin_shuffle(v[j], v[j + 1], kEights) +
               __builtin_shuffle(v[j], v[j + 1], kEights + 8);
      }
#pragma GCC unroll 2
      for (int j = 0; j < 8; j += 4) {
        v[j] = __builtin_shuffle(v[j], v[j + 2], kFours) +
               __builtin_shuffle(v[j], v[j + 2], kFours + 4);
      }
      v[0] = __builtin_shuffle(v[0], v[4], kTwos) + __builtin_shuffle(v[0], v[4], kTwos + 2);
      v[0] = __builtin_shuffle(v[0], kOnes) + __builtin_shuffle(v[0], kOnes + 1);
      std::memcpy(sums + i, &v[0], 8 * sizeof(float));
    }
  }
#endif
  for (; i < count; ++i) sums[i] = sum_lanes<A>(load(vectors + i * kLanes<A>));
}

template <class A>
inline A max_lanes(Vec<A> v) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<A, float>) return _mm512_reduce_max_ps(bits_as<__m512>(v));
#endif
  A lanes[kLanes<A>];
  std::memcpy(lanes, &v, sizeof v);
  A best = lanes[0];
  for (std::int64_t i = 1; i < kLanes<A>; ++i) best = lanes[i] > best ? lanes[i] : best;
  return best;
}

/// The larger and the smaller of two numbers, lane by lane; x where x is no number.
inline Vec<float> at_least(Vec<float> x, float low) {
#if defined(__AVX512F__)
  return bits_as<Vec<float>>(_mm512_max_ps(_mm512_set1_ps(low), bits_as<__m512>(x)));
#else
  return x < splat(low) ? splat(low) : x;
#endif
}
inline Vec<float> at_most(Vec<float> x, float high) {
#if defined(__AVX512F__)
  return bits_as<Vec<float>>(_mm512_min_ps(_mm512_set1_ps(high), bits_as<__m512>(x)));
#else
  return x > splat(high) ? splat(high) : x;
#endif
}

constexpr float kExpLow = -87.336F, kExpHigh = 88;

/// e^x, within 2 units in the last place, for x in [kExpLow, kExpHigh] and NaN. Range reduction
/// x = n ln2 + r with ln2 in two parts, then the degree-6 Taylor-Chebyshev polynomial of Cephes'
/// expf, at least 1 where n is the smallest exponent, so that n may be added to its bits.
inline Vec<float> exp_in_range(Vec<float> x) {
  constexpr float kMagic = 12582912.0F;  // 1.5 * 2^23: adding it rounds to an integer
  const Vec<float> shifted = x * 1.44269504088896341F + kMagic;
  const Vec<float> n = shifted - kMagic;
  const Vec<float> r = x - n * 0.693359375F - n * -2.12194440e-4F;
  Vec<float> y = splat(1.9875691500e-4F);
  y = y * r + 1.3981999507e-3F;
  y = y * r + 8.3334519073e-3F;
  y = y * r + 4.1665795894e-2F;
  y = y * r + 1.6666665459e-1F;
  y = y * r + 5.0000001201e-1F;
  y = y * r + 1.0F;
  y = y * r + 1.0F;
  return bits_as<Vec<float>>(bits_as<VecU32>(y) + (bits_as<VecU32>(shifted) << 23U));
}

/// e^x; 0 below kExpLow (flushed), e^kExpHigh above, which our callers never reach.
inline Vec<float> exp_vec(Vec<float> x) {
  const Vec<float> y = exp_in_range(at_most(at_least(x, kExpLow), kExpHigh));
#if defined(__AVX512F__)
  const __mmask16 kept =
      _mm512_cmp_ps_mask(bits_as<__m512>(x), _mm512_set1_ps(kExpLow), _CMP_NLT_UQ);
  return bits_as<Vec<float>>(_mm512_maskz_mov_ps(kept, bits_as<__m512>(y)));
#else
  return x < splat(kExpLow) ? Vec<float>{} : y;
#endif
}
inline Vec<double> exp_vec(Vec<double> x) {
  double lanes[kLanes<double>];
  std::memcpy(lanes, &x, sizeof x);
  for (double& lane : lanes) lane = std::exp(lane);
  std::memcpy(&x, lanes, sizeof x);
  return x;
}

#if defined(__AVX512BW__)
/// The mask of the first n of 16 lanes.
inline __mmask16 first_lanes(std::int64_t n) {
  return static_cast<__mmask16>((1U << static_cast<unsigned>(n)) - 1U);
}
#endif

/// The first n numbers at p, zeros behind them: n is less than a vector's lanes. The last step over
/// a row is short, and goes through a mask or a padded copy.
template <class A>
inline Vec<A> load_part(const A* p, std::int64_t n) {
  A lanes[kLanes<A>] = {};
  for (std::int64_t i = 0; i < n; ++i) lanes[i] = p[i];
  return load(lanes);
}
inline Vec<float> load_part(const Bf16* p, std::int64_t n) {
#if defined(__AVX512BW__)
  const auto raw = bits_as<HalfU16>(_mm256_maskz_loadu_epi16(first_lanes(n), p));
  return bits_as<Vec<float>>(__builtin_convertvector(raw, VecU32) << 16U);
#else
  Bf16 lanes[kLanes<float>] = {};
  for (std::int64_t i = 0; i < n; ++i) lanes[i] = p[i];
  return load(lanes);
#endif
}
template <class S, class A>
inline void store_part(S* p, Vec<A> v, std::int64_t n) {
#if defined(__AVX512BW__)
  if constexpr (std::is_same_v<S, Bf16>) {
    Bf16 lanes[kLanes<float>];
    store(lanes, v);
    _mm256_mask_storeu_epi16(p, first_lanes(n), _mm256_loadu_epi16(lanes));
    return;
  }
#endif
  S lanes[kLanes<A>];
  store(lanes, v);
  for (std::int64_t i = 0; i < n; ++i) p[i] = lanes[i];
}
template <class S>
inline Vec<AccumOf<S>> load_up_to(const S* p, std::int64_t n) {
  return n >= kLanes<AccumOf<S>> ? load(p) : load_part(p, n);
}
template <class S, class A = AccumOf<S>>
inline void store_up_to(S* p, Vec<A> v, std::int64_t n) {
  if (n >= kLanes<A>) {
    store(p, v);
  } else {
    store_part<S, A>(p, v, n);
  }
}

/// 2 * kLanes numbers as two vectors. Of Bf16, those of even and those of odd index: as a number is
/// the upper half of a float, that takes one operation a vector, where widening neighbours takes
/// two, of which one competes with all others that cross lanes. Else the two halves in order.
template <class A>
struct Pair {
  Vec<A> first, second;
};
template <class A>
constexpr std::int64_t kPairLanes = 2 * kLanes<A>;
template <class A>
inline Pair<A> operator*(Pair<A> a, Pair<A> b) {
  return {a.first * b.first, a.second * b.second};
}
template <class A>
inline Pair<A> operator*(Pair<A> a, A b) {
  return {a.first * b, a.second * b};
}
template <class A>
inline Pair<A> operator+(Pair<A> a, Pair<A> b) {
  return {a.first + b.first, a.second + b.second};
}
template <class A>
inline Pair<A> operator-(Pair<A> a, Pair<A> b) {
  return {a.first - b.first, a.second - b.second};
}

inline Pair<float> load_pair(const Bf16* p) {
  VecU32 raw;
  std::memcpy(&raw, p, sizeof raw);
  return {bits_as<Vec<float>>(raw << 16U), bits_as<Vec<float>>(raw & 0xFFFF0000U)};
}
template <class A>
inline Pair<A> load_pair(const A* p) {
  return {load(p), load(p + kLanes<A>)};
}
inline void store_pair(Bf16* p, Pair<float> v) {
#if defined(__AVX512BF16__)
  constexpr U16x32 kInterleave = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                  8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const auto raw =
      bits_as<U16x32>(_mm512_cvtne2ps_pbh(bits_as<__m512>(v.second), bits_as<__m512>(v.first)));
  const U16x32 mixed = __builtin_shuffle(raw, kInterleave);
  std::memcpy(p, &mixed, sizeof mixed);
#else
  const auto low = bits_as<VecU32>(v.first), high = bits_as<VecU32>(v.second);
  const VecU32 raw = ((low + 0x7FFFU + ((low >> 16U) & 1U)) >> 16U) |
                     ((high + 0x7FFFU + ((high >> 16U) & 1U)) & 0xFFFF0000U);
  std::memcpy(p, &raw, sizeof raw);
#endif
}
template <class A>
inline void store_pair(A* p, Pair<A> v) {
  store(p, v.first);
  store(p + kLanes<A>, v.second);
}
template <class S, class A = AccumOf<S>>
inline Pair<A> load_pair_part(const S* p, std::int64_t n) {
  S lanes[kPairLanes<A>] = {};
  std::memcpy(lanes, p, static_cast<std::size_t>(n) * sizeof(S));
  return load_pair(lanes);
}
template <class S, class A = AccumOf<S>>
inline void store_pair_part(S* p, Pair<A> v, std::int64_t n) {
  S lanes[kPairLanes<A>];
  store_pair(lanes, v);
  std::memcpy(p, lanes, static_cast<std::size_t>(n) * sizeof(S));
}
template <class S, class A = AccumOf<S>>
inline Pair<A> load_pair_up_to(const S* p, std::int64_t n) {
  return n >= kPairLanes<A> ? load_pair(p) : load_pair_part(p, n);
}
template <class S, class A = AccumOf<S>>
inline void store_pair_up_to(S* p, Pair<A> v, std::int64_t n) {
  if (n >= kPairLanes<A>) {
    store_pair(p, v);
  } else {
    store_pair_part(p, v, n);
  }
}
/// A pair of S from two vectors in order, and back. For Bf16 a pair is no longer in order.
template <class S, class A>
inline Pair<A> split(Pair<A> v) {
  if constexpr (std::is_same_v<S, Bf16>) {
#if defined(__AVX512F__)
    constexpr I32x16 kEven = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
    v = {__builtin_shuffle(v.first, v.second, kEven),
         __builtin_shuffle(v.first, v.second, kEven + 1)};
#else
    A from[kPairLanes<A>], to[kPairLanes<A>];
    store_pair(from, v);
    for (std::int64_t i = 0; i < kPairLanes<A>; ++i) to[i / 2 + i % 2 * kLanes<A>] = from[i];
    v = load_pair(to);
#endif
  }
  return v;
}
template <class S, class A>
inline Pair<A> in_order(Pair<A> v) {
  if constexpr (std::is_same_v<S, Bf16>) {
#if defined(__AVX512F__)
    constexpr I32x16 kLow = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
    v = {__builtin_shuffle(v.first, v.second, kLow),
         __builtin_shuffle(v.first, v.second, kLow + 8)};
#else
    A from[kPairLanes<A>], to[kPairLanes<A>];
    store_pair(from, v);
    for (std::int64_t i = 0; i < kPairLanes<A>; ++i) to[i] = from[i / 2 + i % 2 * kLanes<A>];
    v = load_pair(to);
#endif
  }
  return v;
}

/// Scratch of one kernel call, 64-byte aligned, freed on return.
template <class A>
class Scratch {
 public:
  explicit Scratch(std::int64_t count)
      : data_(static_cast<A*>(std::aligned_alloc(
            64, (static_cast<std::size_t>(count) * sizeof(A) + 127) / 64 * 64))) {
    if (data_ == nullptr) std::abort();  // no memory for a few KiB: nothing sensible is left to do
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(data_); }
  A* get() const { return data_; }

 private:
  A* data_;
};

}  // namespace
}  // namespace tailor
