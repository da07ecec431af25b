#include "data/gguf/blocks.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <utility>

#include "base/error.h"
#include "data/quant/numbers.h"

namespace tailor {
namespace {

constexpr GgmlLayout kLayouts[] = {
    {GgmlType::f32, "F32", 1, 4},       {GgmlType::f16, "F16", 1, 2},
    {GgmlType::bf16, "BF16", 1, 2},     {GgmlType::q4_0, "Q4_0", 32, 18},
    {GgmlType::q4_1, "Q4_1", 32, 20},   {GgmlType::q5_0, "Q5_0", 32, 22},
    {GgmlType::q5_1, "Q5_1", 32, 24},   {GgmlType::q8_0, "Q8_0", 32, 34},
    {GgmlType::q4_k, "Q4_K", 256, 144}, {GgmlType::q5_k, "Q5_K", 256, 176},
    {GgmlType::q6_k, "Q6_K", 256, 210},
};

/// Those that are known and not read.
constexpr std::pair<std::uint32_t, std::string_view> kOtherTypes[] = {
    {9, "Q8_1"},     {10, "Q2_K"},  {11, "Q3_K"},   {15, "Q8_K"},  {16, "IQ2_XXS"}, {17, "IQ2_XS"},
    {18, "IQ3_XXS"}, {19, "IQ1_S"}, {20, "IQ4_NL"}, {21, "IQ3_S"}, {22, "IQ2_S"},   {23, "IQ4_XS"},
    {24, "I8"},      {25, "I16"},   {26, "I32"},    {27, "I64"},   {28, "F64"},     {29, "IQ1_M"},
    {34, "TQ1_0"},   {35, "TQ2_0"}, {39, "MXFP4"},  {40, "NVFP4"},
};

template <class T>
T load(const std::byte* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}
unsigned byte_at(const std::byte* from) { return std::to_integer<unsigned>(*from); }

/// Every half by its bits: 256 KiB, made once.
const std::array<float, 65536>& halves() {
  static const std::array<float, 65536> table = [] {
    std::array<float, 65536> out{};
    for (std::uint32_t bits = 0; bits < out.size(); ++bits) {
      out[bits] = half_to_float(static_cast<std::uint16_t>(bits));
    }
    return out;
  }();
  return table;
}
float half_at(const std::byte* from) { return halves()[load<std::uint16_t>(from)]; }

void from_4_bits(const std::byte* from, std::int64_t blocks, bool has_minimum, float* out) {
  const std::int64_t size = has_minimum ? 20 : 18;
  for (std::int64_t b = 0; b < blocks; ++b, from += size, out += 32) {
    const float d = half_at(from), m = has_minimum ? half_at(from + 2) : 0;
    const std::byte* codes = from + (has_minimum ? 4 : 2);
    for (std::int64_t i = 0; i < 32; ++i) {
      const unsigned both = byte_at(codes + i % 16);
      const auto code = static_cast<int>(i < 16 ? both & 15U : both >> 4U);
      out[i] = has_minimum ? d * static_cast<float>(code) + m : d * static_cast<float>(code - 8);
    }
  }
}

void from_5_bits(const std::byte* from, std::int64_t blocks, bool has_minimum, float* out) {
  const std::int64_t size = has_minimum ? 24 : 22;
  for (std::int64_t b = 0; b < blocks; ++b, from += size, out += 32) {
    const float d = half_at(from), m = has_minimum ? half_at(from + 2) : 0;
    const std::byte* high = from + (has_minimum ? 4 : 2);
    const auto fifths = load<std::uint32_t>(high);
    for (std::int64_t i = 0; i < 32; ++i) {
      const unsigned both = byte_at(high + 4 + i % 16);
      const unsigned fifth = fifths >> static_cast<unsigned>(i) & 1U;
      const auto code = static_cast<int>((i < 16 ? both & 15U : both >> 4U) | fifth << 4U);
      out[i] = has_minimum ? d * static_cast<float>(code) + m : d * static_cast<float>(code - 16);
    }
  }
}

void from_8_bits(const std::byte* from, std::int64_t blocks, float* out) {
  for (std::int64_t b = 0; b < blocks; ++b, from += 34, out += 32) {
    const float d = half_at(from);
    for (std::int64_t i = 0; i < 32; ++i) {
      out[i] = d * static_cast<float>(static_cast<std::int8_t>(byte_at(from + 2 + i)));
    }
  }
}

/// Scale and minimum `i` of the eight that Q4_K and Q5_K pack into 12 bytes, 6 bits each.
std::pair<float, float> packed_scale(const std::byte* scales, int i) {
  const auto at = [&](int k) { return byte_at(scales + k); };
  if (i < 4) return {static_cast<float>(at(i) & 63U), static_cast<float>(at(i + 4) & 63U)};
  return {static_cast<float>((at(i + 4) & 15U) | (at(i - 4) >> 6U) << 4U),
          static_cast<float>(at(i + 4) >> 4U | (at(i) >> 6U) << 4U)};
}

/// Q4_K, and Q5_K whose codes have a fifth bit: bit i of byte j belongs to number 32 i + j.
void from_k_4_or_5(const std::byte* from, std::int64_t blocks, bool five, float* out) {
  const std::int64_t size = five ? 176 : 144;
  for (std::int64_t b = 0; b < blocks; ++b, from += size, out += 256) {
    const float d = half_at(from), minimum = half_at(from + 2);
    const std::byte* fifths = from + 16;
    const std::byte* codes = from + (five ? 48 : 16);
    for (int group = 0; group < 8; ++group) {
      const auto [scale, least] = packed_scale(from + 4, group);
      const float step = d * scale, below = minimum * least;
      for (int j = 0; j < 32; ++j) {
        const unsigned both = byte_at(codes + group / 2 * 32 + j);
        unsigned code = group % 2 == 0 ? both & 15U : both >> 4U;
        if (five) code |= (byte_at(fifths + j) >> static_cast<unsigned>(group) & 1U) << 4U;
        out[group * 32 + j] = step * static_cast<float>(code) - below;
      }
    }
  }
}

/// 256 codes of 6 bits: the low four in 128 bytes, the high two in 64, in two halves of 128 numbers
/// that each are four runs of 32.
void from_k_6(const std::byte* from, std::int64_t blocks, float* out) {
  for (std::int64_t b = 0; b < blocks; ++b, from += 210, out += 256) {
    const float d = half_at(from + 208);
    for (int i = 0; i < 256; ++i) {
      const int half = i / 128, run = i % 128 / 32, j = i % 32;
      const unsigned low = byte_at(from + half * 64 + run % 2 * 32 + j);
      const unsigned high = byte_at(from + 128 + half * 32 + j) >> static_cast<unsigned>(2 * run);
      const unsigned code = (run < 2 ? low & 15U : low >> 4U) | (high & 3U) << 4U;
      const auto scale = static_cast<std::int8_t>(byte_at(from + 192 + i / 16));
      out[i] = d * static_cast<float>(scale) * static_cast<float>(static_cast<int>(code) - 32);
    }
  }
}

bool to_q8_0(const float* from, std::int64_t blocks, std::byte* out, std::int64_t& bad) {
  for (std::int64_t b = 0; b < blocks; ++b, from += 32, out += 34) {
    float largest = 0;
    for (std::int64_t i = 0; i < 32; ++i) largest = std::max(largest, std::fabs(from[i]));
    const float step = largest / 127.0F;
    const float own = step == 0 ? 0 : 1.0F / step;
    const float inverse = std::isfinite(own) ? own : 0;  // the scale is 0 as a half then
    const std::uint16_t scale = half_from_float(step);
    if (scale == 0x7C00U) {
      bad = b * 32 +
            std::find_if(from, from + 32, [&](float x) { return std::fabs(x) == largest; }) - from;
      return false;
    }
    std::memcpy(out, &scale, sizeof scale);
    for (std::int64_t i = 0; i < 32; ++i) {
      // std::round, without the call: |scaled| is at most 127 and a bit.
      const float scaled = from[i] * inverse;
      const float whole = std::trunc(scaled);
      const float code =
          std::fabs(scaled - whole) >= 0.5F ? whole + std::copysign(1.0F, scaled) : whole;
      out[2 + i] = static_cast<std::byte>(static_cast<std::int8_t>(code));
    }
  }
  return true;
}

}  // namespace

const GgmlLayout* ggml_layout(std::uint32_t type) {
  for (const GgmlLayout& layout : kLayouts) {
    if (static_cast<std::uint32_t>(layout.type) == type) return &layout;
  }
  return nullptr;
}
const GgmlLayout& ggml_layout(GgmlType type) {
  return *ggml_layout(static_cast<std::uint32_t>(type));
}
std::string_view ggml_type_name(std::uint32_t type) {
  if (const GgmlLayout* layout = ggml_layout(type)) return layout->name;
  for (const auto& [number, name] : kOtherTypes) {
    if (number == type) return name;
  }
  return {};
}

void dequantise(GgmlType type, const std::byte* from, std::int64_t count, float* out) {
  const std::int64_t blocks = count / ggml_layout(type).block;
  TAILOR_CHECK(blocks * ggml_layout(type).block == count, "whole blocks");
  switch (type) {
    case GgmlType::f32:
      std::memcpy(out, from, static_cast<std::size_t>(count) * sizeof(float));
      return;
    case GgmlType::f16:
      for (std::int64_t i = 0; i < count; ++i) out[i] = half_at(from + 2 * i);
      return;
    case GgmlType::bf16:
      for (std::int64_t i = 0; i < count; ++i) {
        out[i] = std::bit_cast<float>(std::uint32_t{load<std::uint16_t>(from + 2 * i)} << 16U);
      }
      return;
    case GgmlType::q4_0:
      return from_4_bits(from, blocks, false, out);
    case GgmlType::q4_1:
      return from_4_bits(from, blocks, true, out);
    case GgmlType::q5_0:
      return from_5_bits(from, blocks, false, out);
    case GgmlType::q5_1:
      return from_5_bits(from, blocks, true, out);
    case GgmlType::q8_0:
      return from_8_bits(from, blocks, out);
    case GgmlType::q4_k:
      return from_k_4_or_5(from, blocks, false, out);
    case GgmlType::q5_k:
      return from_k_4_or_5(from, blocks, true, out);
    case GgmlType::q6_k:
      return from_k_6(from, blocks, out);
  }
  TAILOR_CHECK(false, "a type that is read");
}

bool quantise(GgmlType type, const float* from, std::int64_t count, std::byte* out,
              std::int64_t& bad) {
  const std::int64_t blocks = count / ggml_layout(type).block;
  TAILOR_CHECK(blocks * ggml_layout(type).block == count, "whole blocks");
  const float* odd = std::find_if_not(from, from + count, [](float x) { return std::isfinite(x); });
  if (bad = odd - from; bad < count) return false;
  switch (type) {
    case GgmlType::f32:
      std::memcpy(out, from, static_cast<std::size_t>(count) * sizeof(float));
      return true;
    case GgmlType::f16:
      for (std::int64_t i = 0; i < count; ++i) {
        const std::uint16_t half = half_from_float(from[i]);
        if ((half & 0x7FFFU) == 0x7C00U) {
          bad = i;
          return false;
        }
        std::memcpy(out + 2 * i, &half, sizeof half);
      }
      return true;
    case GgmlType::bf16:
      for (std::int64_t i = 0; i < count; ++i) {
        const auto bits = std::bit_cast<std::uint32_t>(from[i]);
        const auto half = static_cast<std::uint16_t>((bits + 0x7FFFU + (bits >> 16U & 1U)) >> 16U);
        if ((half & 0x7FFFU) == 0x7F80U) {
          bad = i;
          return false;
        }
        std::memcpy(out + 2 * i, &half, sizeof half);
      }
      return true;
    case GgmlType::q8_0:
      return to_q8_0(from, blocks, out, bad);
    default:
      TAILOR_CHECK(false, "a type that is written");
  }
}

}  // namespace tailor
