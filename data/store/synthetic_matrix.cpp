#include "data/store/synthetic_matrix.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numbers>

#include "base/error.h"
#include "base/random.h"
#include "base/units.h"
#include "data/quant/numbers.h"
#include "data/quant/tables.h"

namespace tailor {
namespace {

// In the top byte of the counter, where random_bits() has what its numbers are for: none of those.
constexpr std::uint32_t kStream = 0x5EU;
constexpr std::int64_t kBlock = 16;  // bytes of one Philox block

// Units of the largest code a normal element of standard deviation 1 has: where an encoder would
// put it, whose group of 128 (int4), 64 (nf4) or block of 16,384 (fp8) has its largest element at
// about 2.7, 2.4 and 4 standard deviations.
constexpr double kInt4Spread = 7.5 / 2.75, kNf4Spread = 1 / 2.4, kFp8Spread = 448 / 4.0;
constexpr double kScaleVariation = 0.125;
constexpr std::size_t kBf16Entries = 4096;

/// Quantiles (i + 0.5) / count of the standard normal distribution, by bisection.
std::vector<double> normal_quantiles(std::size_t count) {
  std::vector<double> out(count);
  for (std::size_t i = 0; i < count / 2; ++i) {
    const double share = (static_cast<double>(i) + 0.5) / static_cast<double>(count);
    double low = -10, high = 0;
    for (int step = 0; step < 60; ++step) {
      const double middle = (low + high) / 2;
      (std::erfc(-middle / std::numbers::sqrt2) / 2 < share ? low : high) = middle;
    }
    out[i] = high;
    out[count - 1 - i] = -high;
  }
  return out;
}

double mean_square(std::span<const double> values) {
  double sum = 0;
  for (const double value : values) sum += value * value;
  return sum / static_cast<double>(values.size());
}

/// What a random byte becomes, and the mean square of the numbers it stands for at scale 1.
struct CodeTable {
  std::array<std::uint8_t, 256> bytes{};
  double mean_square = 0;
};

/// The second of the two numbers of a byte. Of all steps and shifts those with which the second
/// follows least from the first: their correlation, that of their squares and of one's square with
/// the other are below 0.6 %.
constexpr unsigned partner(unsigned i) { return (i * 121U + 157U) % 256U; }

/// `code_of` gives the code nearest to a number, `number_of` the number of a code.
template <class CodeOf, class NumberOf>
CodeTable pair_table(double spread, bool first_is_high, CodeOf code_of, NumberOf number_of) {
  const std::vector<double> quantiles = normal_quantiles(256);
  CodeTable out;
  std::vector<double> numbers;
  for (unsigned i = 0; i < 256; ++i) {
    const unsigned first = code_of(quantiles[i] * spread);
    const unsigned second = code_of(quantiles[partner(i)] * spread);
    out.bytes[i] =
        static_cast<std::uint8_t>(first_is_high ? first << 4U | second : second << 4U | first);
    numbers.push_back(number_of(first));
    numbers.push_back(number_of(second));
  }
  out.mean_square = mean_square(numbers);
  return out;
}

CodeTable make_int4_table() {
  const auto code_of = [](double value) {
    return static_cast<unsigned>(static_cast<int>(std::clamp(std::rint(value), -8.0, 7.0)) + 8);
  };
  return pair_table(kInt4Spread, false, code_of,
                    [](unsigned code) { return static_cast<double>(code) - 8; });
}

CodeTable make_nf4_table() {
  const auto code_of = [](double value) {
    const auto nearer = [value](float a, float b) {
      return std::abs(double{a} - value) < std::abs(double{b} - value);
    };
    return static_cast<unsigned>(std::min_element(kNf4, kNf4 + 16, nearer) - kNf4);
  };
  return pair_table(kNf4Spread, true, code_of, [](unsigned code) { return double{kNf4[code]}; });
}

CodeTable make_fp8_table() {
  const std::vector<double> quantiles = normal_quantiles(256);
  CodeTable out;
  std::vector<double> numbers;
  for (std::size_t i = 0; i < 256; ++i) {
    const double size = std::abs(quantiles[i]) * kFp8Spread;
    std::uint8_t nearest = 0;
    for (std::uint8_t code = 1; code < 0x7F; ++code) {
      if (std::abs(double{e4m3_magnitude(code)} - size) <
          std::abs(double{e4m3_magnitude(nearest)} - size))
        nearest = code;
    }
    out.bytes[i] = static_cast<std::uint8_t>(quantiles[i] < 0 ? nearest | 0x80U : nearest);
    numbers.push_back(double{e4m3_magnitude(nearest)});
  }
  out.mean_square = mean_square(numbers);
  return out;
}

const CodeTable& code_table(WeightKind kind) {
  static const CodeTable int4 = make_int4_table(), nf4 = make_nf4_table(), fp8 = make_fp8_table();
  return kind == WeightKind::int4 ? int4 : kind == WeightKind::nf4 ? nf4 : fp8;
}

/// 256 scales about one another whose mean square is `wanted`.
std::vector<double> scales_of_mean_square(double wanted) {
  std::vector<double> out(256);
  for (std::size_t i = 0; i < 256; ++i) {
    out[i] = 1 + kScaleVariation * ((2 * static_cast<double>(i) + 1) / 256 - 1);
  }
  const double factor = std::sqrt(wanted / mean_square(out));
  for (double& scale : out) scale *= factor;
  return out;
}

/// Philox blocks first, first + 1, ... to `out`, sixteen bytes each, for the machine's level of
/// instructions: INT4 codes come at 2.1 GB/s a core at x86-64-v4, at 1.4 without.
[[gnu::target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")]] void write_blocks(
    std::uint64_t first, std::size_t count, std::uint32_t matrix, const std::uint32_t (&unit)[2],
    std::uint64_t seed, std::uint8_t* out) {
  const std::array<std::uint32_t, 2> key = {static_cast<std::uint32_t>(seed),
                                            static_cast<std::uint32_t>(seed >> 32U)};
  const std::uint32_t unit_low = unit[0], unit_high = unit[1];
  for (std::size_t i = 0; i < count; ++i) {
    const std::uint64_t number = first + i;
    const auto words =
        philox({static_cast<std::uint32_t>(number),
                static_cast<std::uint32_t>(number >> 32U) | matrix, unit_low, unit_high},
               key);
    // Word by word, or the compiler does not see that blocks can be made side by side.
    for (std::size_t w = 0; w < 4; ++w) {
      std::memcpy(out + (4 * i + w) * sizeof words[w], &words[w], sizeof words[w]);
    }
  }
}

bool is_norm(MatrixRole role) {
  return role == MatrixRole::input_norm || role == MatrixRole::post_norm ||
         role == MatrixRole::final_norm || role == MatrixRole::q_a_norm ||
         role == MatrixRole::kv_a_norm;
}

}  // namespace

SyntheticMatrix::SyntheticMatrix(const UnitId& unit, const MatrixPlace& place, std::uint64_t seed)
    : place_(place),
      seed_(seed),
      unit_words_{narrow<std::uint32_t>(unit.index),
                  kStream << 24U | static_cast<std::uint32_t>(unit.kind) << 20U |
                      narrow<std::uint32_t>(unit.layer)},
      ones_(is_norm(place.role)) {
  TAILOR_CHECK(unit.layer < std::int64_t{1} << 20);
  const double variance = 1 / static_cast<double>(place.columns);
  switch (place.format.kind) {
    case WeightKind::bf16: {
      static const std::vector<double> quantiles = normal_quantiles(kBf16Entries);
      const double factor = std::sqrt(variance / mean_square(quantiles));
      for (const double quantile : quantiles) {
        values_.push_back(bf16_from_float(static_cast<float>(quantile * factor)));
      }
      return;
    }
    case WeightKind::int4:
    case WeightKind::fp8: {
      const auto scales =
          scales_of_mean_square(variance / code_table(place.format.kind).mean_square);
      for (std::size_t i = 0; i < 256; ++i) {
        float_scales_[i] = static_cast<float>(scales[i]);
        bf16_scales_[i] = bf16_from_float(float_scales_[i]);
      }
      return;
    }
    case WeightKind::nf4: {
      // A scale is offset + second * map[byte] with an even byte: second = variation * offset.
      std::vector<double> relative;
      for (const float entry : kDynamicMap) relative.push_back(1 + kScaleVariation * double{entry});
      const double offset =
          std::sqrt(variance / code_table(WeightKind::nf4).mean_square / mean_square(relative));
      offset_ = static_cast<float>(offset);
      second_ = static_cast<float>(offset * kScaleVariation);
      return;
    }
    case WeightKind::f32:
      break;
  }
  TAILOR_CHECK(false, "float32 in a synthetic store");
}

void SyntheticMatrix::random_bytes(Part part, std::int64_t block,
                                   std::span<std::uint8_t> out) const {
  // A matrix of 2^52 bytes is 2^48 blocks; the rest of the second word says which matrix.
  const std::uint32_t matrix =
      static_cast<std::uint32_t>(place_.role) << 17U | static_cast<std::uint32_t>(part) << 16U;
  const auto number = static_cast<std::uint64_t>(block);
  const std::size_t whole = out.size() / kBlock * kBlock;
  write_blocks(number, whole / kBlock, matrix, unit_words_, seed_, out.data());
  if (whole == out.size()) return;
  std::uint8_t last[kBlock];
  write_blocks(number + whole / kBlock, 1, matrix, unit_words_, seed_, last);
  std::memcpy(out.data() + whole, last, out.size() - whole);
}

template <class T>
void SyntheticMatrix::draw_from(const T* table, Part part, std::int64_t begin,
                                std::span<std::byte> out) const {
  constexpr std::size_t kEntries = 4096;
  std::array<std::uint8_t, kEntries> random;
  const std::size_t count = out.size() / sizeof(T);
  std::int64_t block = begin / static_cast<std::int64_t>(sizeof(T)) / kBlock;
  std::byte* to = out.data();
  for (std::size_t done = 0; done < count; done += kEntries) {
    const std::size_t n = std::min(kEntries, count - done);
    random_bytes(part, block, std::span(random).first(n));
    for (std::size_t i = 0; i < n; ++i)
      std::memcpy(to + i * sizeof(T), table + random[i], sizeof(T));
    to += n * sizeof(T);
    block += static_cast<std::int64_t>(kEntries) / kBlock;
  }
}

void SyntheticMatrix::draw_bf16(std::int64_t begin, std::span<std::byte> out) const {
  random_bytes(Part::codes, begin / kBlock,
               {reinterpret_cast<std::uint8_t*>(out.data()), out.size()});
  for (std::size_t at = 0; at < out.size(); at += 2) {
    std::uint16_t random;
    std::memcpy(&random, out.data() + at, 2);
    std::memcpy(out.data() + at, &values_[random >> 4U], 2);
  }
}

/// Each row is whole 32-bit words of eight codes; the last one's unused bits are 0.
void SyntheticMatrix::clear_unused_int4(std::int64_t begin, std::span<std::byte> out) const {
  const std::int64_t used = place_.columns % 8;
  if (used == 0) return;
  const std::uint32_t mask = (1U << (4 * used)) - 1;
  const std::int64_t row_bytes = div_ceil(place_.columns, 8) * 4;
  const auto end = begin + static_cast<std::int64_t>(out.size());
  for (std::int64_t at = (begin / row_bytes + 1) * row_bytes - 4; at < end; at += row_bytes) {
    std::uint32_t word;
    std::memcpy(&word, out.data() + (at - begin), sizeof word);
    word &= mask;
    std::memcpy(out.data() + (at - begin), &word, sizeof word);
  }
}

void SyntheticMatrix::draw_codes(std::int64_t begin, std::span<std::byte> out) const {
  TAILOR_CHECK(begin % kBlock == 0);
  const WeightKind kind = place_.format.kind;
  if (ones_) {
    const std::uint16_t one = bf16_from_float(1);
    for (std::size_t at = 0; at < out.size(); at += 2) std::memcpy(out.data() + at, &one, 2);
    return;
  }
  if (kind == WeightKind::bf16) return draw_bf16(begin, out);
  draw_from(code_table(kind).bytes.data(), Part::codes, begin, out);
  if (kind == WeightKind::int4) clear_unused_int4(begin, out);
  const bool odd = place_.rows % 2 * (place_.columns % 2) != 0;
  if (kind == WeightKind::nf4 && odd &&
      begin + static_cast<std::int64_t>(out.size()) == place_.codes_bytes) {
    out.back() = (out.back() & std::byte{0xF0}) | std::byte{7};
  }
}

void SyntheticMatrix::draw_nf4_scales(std::int64_t begin, std::span<std::byte> out) const {
  const std::int64_t blocks = div_ceil(place_.rows * place_.columns, 64);
  const std::int64_t bytes_at = 4 + 4 * div_ceil(blocks, 256);
  const auto end = begin + static_cast<std::int64_t>(out.size());
  for (std::int64_t at = begin; at < std::min(end, bytes_at); at += 4) {
    std::memcpy(out.data() + (at - begin), at == 0 ? &offset_ : &second_, 4);
  }
  // Byte b of the scales is random byte b of the stream: the floats' places are left out of it.
  for (std::int64_t at = std::max(begin, bytes_at / kBlock * kBlock); at < end; at += kBlock) {
    std::array<std::uint8_t, 16> random;
    random_bytes(Part::scales, at / kBlock, random);
    for (std::int64_t i = std::max(at, bytes_at); i < std::min(end, at + kBlock); ++i) {
      out[static_cast<std::size_t>(i - begin)] =
          std::byte{random[static_cast<std::size_t>(i - at)]};
    }
  }
}

void SyntheticMatrix::draw_scales(std::int64_t begin, std::span<std::byte> out) const {
  TAILOR_CHECK(begin % (kBlock * 4) == 0);
  switch (place_.format.kind) {
    case WeightKind::int4:
      return draw_from(bf16_scales_.data(), Part::scales, begin, out);
    case WeightKind::fp8:
      return draw_from(float_scales_.data(), Part::scales, begin, out);
    case WeightKind::nf4:
      return draw_nf4_scales(begin, out);
    default:
      TAILOR_CHECK(out.empty(), "a format without scales");
  }
}

}  // namespace tailor
