#pragma once

// The vector types the CPU kernels are written with. Only files that are compiled once per
// instruction-set level include this: everything here has internal linkage on purpose, so that the
// linker can never hand code of one level to another.

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "trainer/kernels/kernels.h"

namespace tailor {
namespace {

/// 64 bytes of A: one AVX-512 register, two AVX2 ones, four SSE ones.
template <class A>
struct VecOf {
  typedef A type __attribute__((vector_size(64)));
};
template <class A>
using Vec = typename VecOf<A>::type;
template <class A>
constexpr std::int64_t kLanes = 64 / static_cast<std::int64_t>(sizeof(A));

typedef std::uint32_t U32x16 __attribute__((vector_size(64)));
typedef std::int32_t I32x16 __attribute__((vector_size(64)));
typedef std::uint16_t U16x16 __attribute__((vector_size(32)));

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
  U16x16 raw;
  std::memcpy(&raw, p, sizeof raw);
  return bits_as<Vec<float>>(__builtin_convertvector(raw, U32x16) << 16U);
}
inline void store(float* p, Vec<float> v) { std::memcpy(p, &v, sizeof v); }
inline void store(double* p, Vec<double> v) { std::memcpy(p, &v, sizeof v); }
inline void store(Bf16* p, Vec<float> v) {
  const auto bits = bits_as<U32x16>(v);
  const U32x16 rounded = (bits + 0x7FFFU + ((bits >> 16U) & 1U)) >> 16U;
  const U16x16 raw = __builtin_convertvector(rounded, U16x16);
  std::memcpy(p, &raw, sizeof raw);
}

inline float scalar(float value) { return value; }
inline double scalar(double value) { return value; }
inline float scalar(Bf16 value) { return to_float(value); }
inline void put(float* p, float value) { *p = value; }
inline void put(double* p, double value) { *p = value; }
inline void put(Bf16* p, float value) { *p = to_bf16(value); }

/// Sum of the lanes, always in the same order (a tree), whatever the instruction set.
template <class A>
inline A sum_lanes(Vec<A> v) {
  A lanes[kLanes<A>];
  std::memcpy(lanes, &v, sizeof v);
  for (std::int64_t width = kLanes<A> / 2; width > 0; width /= 2) {
    for (std::int64_t i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}

template <class A>
inline A max_lanes(Vec<A> v) {
  A lanes[kLanes<A>];
  std::memcpy(lanes, &v, sizeof v);
  A best = lanes[0];
  for (std::int64_t i = 1; i < kLanes<A>; ++i) best = lanes[i] > best ? lanes[i] : best;
  return best;
}

/// e^x, within 2 units in the last place for x in [-87, 88]; 0 below (flushed), inf never reached
/// by our callers (softmax and sigmoid arguments are <= 0). Range reduction x = n ln2 + r with ln2
/// in two parts, then the degree-6 Taylor-Chebyshev polynomial of Cephes' expf.
inline Vec<float> exp_vec(Vec<float> x) {
  const Vec<float> low = splat(-87.336F);
  const I32x16 under = x < low;
  x = under ? low : x;
  x = x > splat(88.0F) ? splat(88.0F) : x;
  constexpr float kMagic = 12582912.0F;  // 1.5 * 2^23: adding it rounds to an integer
  const Vec<float> n = (x * 1.44269504088896341F + kMagic) - kMagic;
  const Vec<float> r = x - n * 0.693359375F - n * -2.12194440e-4F;
  Vec<float> y = splat(1.9875691500e-4F);
  y = y * r + 1.3981999507e-3F;
  y = y * r + 8.3334519073e-3F;
  y = y * r + 4.1665795894e-2F;
  y = y * r + 1.6666665459e-1F;
  y = y * r + 5.0000001201e-1F;
  y = y * (r * r) + r + 1.0F;
  const I32x16 exponent = (__builtin_convertvector(n, I32x16) + 127) << 23;
  y = y * bits_as<Vec<float>>(exponent);
  return under ? Vec<float>{} : y;
}
inline Vec<double> exp_vec(Vec<double> x) {
  double lanes[kLanes<double>];
  std::memcpy(lanes, &x, sizeof x);
  for (double& lane : lanes) lane = std::exp(lane);
  std::memcpy(&x, lanes, sizeof x);
  return x;
}

/// Calls body(i, n) over [0, size) in steps of one vector; the last step may have n < lanes.
/// Loads and stores of a short step go through a padded copy, so body is written once.
template <class A>
inline Vec<A> load_part(const A* p, std::int64_t n) {
  A lanes[kLanes<A>] = {};
  for (std::int64_t i = 0; i < n; ++i) lanes[i] = p[i];
  return load(lanes);
}
inline Vec<float> load_part(const Bf16* p, std::int64_t n) {
  Bf16 lanes[kLanes<float>] = {};
  for (std::int64_t i = 0; i < n; ++i) lanes[i] = p[i];
  return load(lanes);
}
template <class S, class A>
inline void store_part(S* p, Vec<A> v, std::int64_t n) {
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
