// Compiled once per instruction-set level, with TAILOR_LEVEL its name: see data/CMakeLists.txt. No
// function of another header may be called here: the linker could hand it to code of another level.

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "data/quant/cpu/encode.h"
#include "data/quant/tables.h"

namespace tailor {
namespace {

typedef float F16 __attribute__((vector_size(64)));
typedef float F8 __attribute__((vector_size(32)));
typedef float F4 __attribute__((vector_size(16)));
typedef double D8 __attribute__((vector_size(64)));
typedef double D4 __attribute__((vector_size(32)));
typedef double D2 __attribute__((vector_size(16)));
typedef std::int32_t I16 __attribute__((vector_size(64)));
typedef std::uint32_t U16 __attribute__((vector_size(64)));
typedef std::uint8_t B16 __attribute__((vector_size(16)));
typedef std::uint16_t H16 __attribute__((vector_size(32)));

constexpr std::int64_t kLanes = 16;
constexpr float kSmallestNormal = 0x1p-126F;

template <class To, class From>
inline To bits_as(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To out;
  std::memcpy(&out, &value, sizeof out);
  return out;
}
inline F16 load(const float* p) {
  F16 v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
/// The first n < 16 values, then zeros.
inline F16 load_part(const float* p, std::int64_t n) {
  F16 v{};
  std::memcpy(&v, p, static_cast<std::size_t>(n) * sizeof(float));
  return v;
}
inline F16 load_up_to(const float* p, std::int64_t n) {
  return n >= kLanes ? load(p) : load_part(p, n);
}
template <class V>
inline void store_up_to(void* p, const V& v, std::int64_t n) {
  std::memcpy(p, &v, n >= kLanes ? sizeof v : static_cast<std::size_t>(n) * sizeof v[0]);
}
inline F16 splat(float value) { return F16{} + value; }
inline I16 splat(std::int32_t value) { return I16{} + value; }

inline I16 at_least(I16 x, std::int32_t low) { return x < splat(low) ? splat(low) : x; }
inline I16 at_most(I16 x, std::int32_t high) { return x > splat(high) ? splat(high) : x; }
inline I16 magnitude(F16 x) { return bits_as<I16>(x) & 0x7FFFFFFF; }

inline float sum_lanes(F16 v) {
  const F8 eight = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
                   __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
  const F4 four = __builtin_shufflevector(eight, eight, 0, 1, 2, 3) +
                  __builtin_shufflevector(eight, eight, 4, 5, 6, 7);
  return (four[0] + four[2]) + (four[1] + four[3]);
}
inline double sum_lanes(D8 v) {
  const D4 four =
      __builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7);
  return (four[0] + four[2]) + (four[1] + four[3]);
}
inline std::int32_t max_lanes(I16 v) {
  std::int32_t lanes[kLanes], best = 0;
  std::memcpy(lanes, &v, sizeof v);
  for (const std::int32_t lane : lanes) best = lane > best ? lane : best;
  return best;
}
/// Squares in double: those of the largest floats have no float.
inline void add_squares(F16 x, D8& low, D8& high) {
  const D8 a = __builtin_convertvector(__builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7), D8);
  const D8 b =
      __builtin_convertvector(__builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15), D8);
  low += a * a;
  high += b * b;
}

/// To the nearest bfloat16, ties to even, as a float.
inline F16 round_bf16(F16 x) {
  const U16 bits = bits_as<U16>(x);
  return bits_as<F16>((bits + 0x7FFFU + ((bits >> 16U) & 1U)) & 0xFFFF0000U);
}
inline float round_bf16(float x) {
  const auto bits = bits_as<std::uint32_t>(x);
  return bits_as<float>((bits + 0x7FFFU + ((bits >> 16U) & 1U)) & 0xFFFF0000U);
}

std::int64_t scan(const float* values, std::int64_t count, double* squares) {
  D8 low{}, high{};
  I16 largest{};
  for (std::int64_t i = 0; i < count; i += kLanes) {
    const F16 x = load_up_to(values + i, count - i);
    const I16 size = magnitude(x);
    largest = size > largest ? size : largest;
    add_squares(x, low, high);
  }
  constexpr std::int32_t kInfinity = 0x7F800000;
  if (max_lanes(largest) < kInfinity) {
    *squares += sum_lanes(low + high);
    return count;
  }
  std::int64_t at = 0;
  while ((bits_as<std::int32_t>(values[at]) & 0x7FFFFFFF) < kInfinity) ++at;
  return at;
}

double to_bf16(const float* values, std::int64_t count, std::uint16_t* out) {
  D8 low{}, high{};
  for (std::int64_t i = 0; i < count; i += kLanes) {
    const F16 x = load_up_to(values + i, count - i);
    const F16 rounded = round_bf16(x);
    add_squares(rounded - x, low, high);
    store_up_to(out + i, __builtin_convertvector(bits_as<U16>(rounded) >> 16U, H16), count - i);
  }
  return sum_lanes(low + high);
}

// ---- int4

/// A float this large has no bits below 1: adding it rounds to the nearest integer, ties to even,
/// which then stands in the low bits.
constexpr float kRounder = 0x1.8p23F;
constexpr std::int32_t kRounderBits = 0x4B400000;

/// rint(x) clamped to [-8, 7], for |x| < 2^22.
inline F16 to_code(F16 x) {
  const I16 sum = bits_as<I16>(x + kRounder);
  return bits_as<F16>(at_most(at_least(sum, kRounderBits - 8), kRounderBits + 7)) - kRounder;
}

/// A group of values, padded with zeros to whole vectors: zeros cost nothing under any scale.
struct Group {
  const float* values;
  std::int64_t count;
};

/// Scales a group may have: bfloat16, neither so small that a GPU would take it for zero nor so
/// large that 8 of it are infinite.
inline float usable_scale(float scale) {
  constexpr float kLargest = 0x1.FEp124F;
  const float size = round_bf16(scale < 0 ? -scale : scale);
  const float kept = size < kSmallestNormal ? kSmallestNormal : size > kLargest ? kLargest : size;
  return scale < 0 ? -kept : kept;
}

/// The sum of (x / scale - code)^2: the squared error in scales, but for bfloat16's rounding.
inline float quick_error(const Group& group, float scale) {
  const F16 inverse = splat(1 / scale);
  F16 total{};
  for (std::int64_t i = 0; i < group.count; i += kLanes) {
    const F16 x = load(group.values + i) * inverse;
    const F16 off = x - to_code(x);
    total += off * off;
  }
  return sum_lanes(total);
}

/// The squared error of the decoded values, in the square of `unit`; codes + 8 to `codes` unless
/// null. `unit` keeps the squares of very large and very small values in float's range.
inline float exact_error(const Group& group, float scale, float unit, std::uint8_t* codes) {
  const F16 divisor = splat(scale), inverse = splat(1 / unit);
  F16 total{};
  for (std::int64_t i = 0; i < group.count; i += kLanes) {
    const F16 x = load(group.values + i);
    const F16 code = to_code(x / divisor);
    const F16 off = (round_bf16(code * divisor) - x) * inverse;
    total += off * off;
    if (codes != nullptr) {
      const B16 bytes = __builtin_convertvector(__builtin_convertvector(code + 8.0F, I16), B16);
      std::memcpy(codes + i, &bytes, sizeof bytes);
    }
  }
  return sum_lanes(total);
}

/// The scale that minimises sum (x - code scale)^2 for the codes that `scale` gives.
inline float least_squares(const Group& group, float scale) {
  const F16 inverse = splat(1 / scale);
  F16 product{}, square{};
  for (std::int64_t i = 0; i < group.count; i += kLanes) {
    const F16 x = load(group.values + i) * inverse;
    const F16 code = to_code(x);
    product += x * code;
    square += code * code;
  }
  const float codes = sum_lanes(square);
  return codes > 0 ? scale * (sum_lanes(product) / codes) : scale;
}

/// Shares of absmax / 7.5 that are tried: absmax is often an outlier that is better clipped.
constexpr int kTries = 16;
constexpr float kLargestShare = 1.08F, kSmallestShare = 0.62F;

struct Choice {
  float scale, absmax_error, absmax_unit;
};
inline Choice choose_scale(const Group& group, bool any_sign) {
  I16 largest{};
  for (std::int64_t i = 0; i < group.count; i += kLanes) {
    const I16 size = magnitude(load(group.values + i));
    largest = size > largest ? size : largest;
  }
  const float step = bits_as<float>(max_lanes(largest)) / 7.5F;
  const float plain = usable_scale(step);
  const float plain_error = exact_error(group, plain, plain, nullptr);
  Choice choice = {plain, plain_error, plain};
  if (step < kSmallestNormal) return choice;  // zeros, or too small for a choice

  float best = plain, best_error = 0;
  bool first = true;
  for (int sign = 1; sign >= (any_sign ? -1 : 1); sign -= 2) {
    for (int i = 0; i < kTries; ++i) {
      constexpr float kApart = (kLargestShare - kSmallestShare) / (kTries - 1);
      const float share = kLargestShare - static_cast<float>(i) * kApart;
      const float scale = usable_scale(step * share * static_cast<float>(sign));
      const float relative = scale / plain;
      const float error = quick_error(group, scale) * (relative * relative);
      if (first || error < best_error) {
        first = false;
        best = scale;
        best_error = error;
      }
    }
  }
  float lowest = plain_error;
  const float candidates[] = {best, usable_scale(least_squares(group, best))};
  for (const float scale : candidates) {
    const float error = exact_error(group, scale, plain, nullptr);
    if (error < lowest) {
      lowest = error;
      choice.scale = scale;
    }
  }
  return choice;
}

Int4Sums int4_row(const float* values, std::int64_t columns, std::int64_t group, bool any_sign,
                  std::byte* scratch, std::uint8_t* codes, std::uint16_t* scales) {
  const std::int64_t padded_columns = (columns + kLanes - 1) / kLanes * kLanes;
  auto* padded = reinterpret_cast<float*>(scratch);
  auto* each = reinterpret_cast<std::uint8_t*>(padded + padded_columns);
  Int4Sums sums;
  for (std::int64_t begin = 0; begin < columns; begin += group) {
    const std::int64_t count = columns - begin < group ? columns - begin : group;
    Group whole = {values + begin, count};
    if (count % kLanes != 0) {
      whole = {padded, (count + kLanes - 1) / kLanes * kLanes};
      std::memcpy(padded, values + begin, static_cast<std::size_t>(count) * sizeof(float));
      for (std::int64_t i = count; i < whole.count; ++i) padded[i] = 0;
    }
    const Choice choice = choose_scale(whole, any_sign);
    // A whole vector of codes may reach past the group: the next group's come after it.
    const float error = exact_error(whole, choice.scale, choice.absmax_unit, each + begin);
    const double square =
        static_cast<double>(choice.absmax_unit) * static_cast<double>(choice.absmax_unit);
    sums.squared_error += square * static_cast<double>(error);
    sums.absmax_squared_error += square * static_cast<double>(choice.absmax_error);
    const auto bits = bits_as<std::uint32_t>(choice.scale);
    *scales++ = static_cast<std::uint16_t>(bits >> 16U);
  }
  const std::int64_t words = (columns + 7) / 8;
  for (std::int64_t i = columns; i < words * 8; ++i) each[i] = 0;  // compressed-tensors pads so
  for (std::int64_t i = 0; i < words * 4; ++i) {
    std::uint16_t two;
    std::memcpy(&two, each + 2 * i, sizeof two);
    codes[i] = static_cast<std::uint8_t>(two | two >> 4U);
  }
  return sums;
}

// ---- nf4

Nf4Block nf4_block(const float* values, std::int64_t count, bool last, std::uint8_t* codes) {
  constexpr float kFloor = 1e-38F;
  constexpr std::int64_t kBlock = 64;
  I16 largest{};
  F16 x[kBlock / kLanes];
#pragma GCC unroll 4
  for (int i = 0; i < kBlock / kLanes; ++i) {
    const std::int64_t left = count - i * kLanes;
    x[i] = left <= 0 ? F16{} : load_up_to(values + i * kLanes, left);
    const I16 size = magnitude(x[i]);
    largest = size > largest ? size : largest;
  }
  float absmax = bits_as<float>(max_lanes(largest));
  const float divisor = absmax > kFloor ? absmax : kFloor;
  if (last) absmax = divisor;
  const float inverse = 1 / divisor;
  F16 error{}, cross{}, square{};
  std::uint8_t each[kBlock];
#pragma GCC unroll 4
  for (int i = 0; i < kBlock / kLanes; ++i) {
    const F16 u = last ? x[i] / divisor : x[i] * inverse;
    // The code is the number of middles between neighbours that lie below u.
    I16 code{};
    F16 value = splat(kNf4[0]);
#pragma GCC unroll 15
    for (std::size_t k = 1; k < 16; ++k) {
      const float middle = (kNf4[k - 1] + kNf4[k]) / 2;
      const I16 above = u > splat(middle);
      code -= above;
      value = above ? splat(kNf4[k]) : value;
    }
    const F16 off = u - value;
    error += off * off;
    cross += off * value;
    square += value * value;
    const B16 bytes = __builtin_convertvector(code, B16);
    std::memcpy(each + i * kLanes, &bytes, sizeof bytes);
  }
  for (std::int64_t i = 0; i < (count + 1) / 2; ++i) {
    codes[i] = static_cast<std::uint8_t>(each[2 * i] << 4U | each[2 * i + 1]);
  }
  return {absmax, sum_lanes(error), sum_lanes(cross), sum_lanes(square)};
}

// ---- fp8

/// Quotients of weights and their scale, to the nearest e4m3, saturated: the codes, and how far
/// they lie off.
struct E4m3 {
  B16 codes;
  F16 off;
};
inline E4m3 to_e4m3(F16 y) {
  constexpr std::int32_t kLargest = 0x43E00000;  // 448
  constexpr std::int32_t kNormal = 0x3C800000;   // 2^-6, below which e4m3 has steps of 2^-9
  constexpr float kDenormalRounder = 0x1.8p14F;  // the float whose last bit is 2^-9
  const I16 size = magnitude(y);
  const I16 normal = at_most((size + 0x7FFFF + ((size >> 20) & 1)) & ~0xFFFFF, kLargest);
  const F16 sum = bits_as<F16>(size) + kDenormalRounder;
  const auto is_normal = size >= splat(kNormal);
  const F16 rounded = is_normal ? bits_as<F16>(normal) : sum - kDenormalRounder;
  const I16 code = is_normal ? (normal >> 20) - (120 << 3)
                             : bits_as<I16>(sum) - bits_as<std::int32_t>(kDenormalRounder);
  const I16 sign = (bits_as<I16>(y) >> 24) & 0x80;
  return {__builtin_convertvector(code | sign, B16), rounded - bits_as<F16>(size)};
}

double fp8_block(const float* values, std::int64_t rows, std::int64_t columns, std::int64_t stride,
                 bool bf16_scale, std::uint8_t* codes, float* scale) {
  I16 largest{};
  for (std::int64_t r = 0; r < rows; ++r) {
    for (std::int64_t c = 0; c < columns; c += kLanes) {
      const I16 size = magnitude(load_up_to(values + r * stride + c, columns - c));
      largest = size > largest ? size : largest;
    }
  }
  const float chosen = bits_as<float>(max_lanes(largest)) / 448;
  const float normal = chosen < kSmallestNormal ? kSmallestNormal : chosen;
  const float divisor = bf16_scale ? round_bf16(normal) : normal;
  *scale = divisor;
  const F16 divisors = splat(divisor);
  double error = 0;
  for (std::int64_t r = 0; r < rows; ++r) {
    F16 total{};
    for (std::int64_t c = 0; c < columns; c += kLanes) {
      const E4m3 found = to_e4m3(load_up_to(values + r * stride + c, columns - c) / divisors);
      total += found.off * found.off;
      store_up_to(codes + r * stride + c, found.codes, columns - c);
    }
    error += static_cast<double>(sum_lanes(total));
  }
  return error * (static_cast<double>(divisor) * static_cast<double>(divisor));
}

void largest_in_columns(const float* values, std::int64_t rows, std::int64_t columns,
                        float* largest) {
  for (std::int64_t r = 0; r < rows; ++r) {
    for (std::int64_t c = 0; c < columns; c += kLanes) {
      const I16 size = magnitude(load_up_to(values + r * columns + c, columns - c));
      const I16 known = bits_as<I16>(load_up_to(largest + c, columns - c));
      store_up_to(largest + c, size > known ? size : known, columns - c);
    }
  }
}

void fp8_columns(const float* values, std::int64_t rows, std::int64_t columns, const float* scales,
                 std::uint8_t* codes) {
  for (std::int64_t r = 0; r < rows; ++r) {
    for (std::int64_t c = 0; c < columns; c += kLanes) {
      const std::int64_t n = columns - c;
      const F16 value = load_up_to(values + r * columns + c, n);
      const F16 divisor = load_up_to(scales + c, n);
      store_up_to(codes + r * columns + c, to_e4m3(value / divisor).codes, n);
    }
  }
}

}  // namespace

extern const EncodeKernels TAILOR_LEVEL = {
    scan, to_bf16, int4_row, nf4_block, fp8_block, largest_in_columns, fp8_columns};

}  // namespace tailor
