#pragma once

#include <bit>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <new>
#include <string>
#include <utility>
#include <vector>

#include "base/random.h"
#include "data/quant/codec.h"
#include "data/quant/numbers.h"

namespace tailor::testing_support {

/// 64-byte aligned bytes, which EncodedMatrix wants; no byte more than asked for, so that a
/// sanitizer sees reads past the end.
class AlignedBytes {
 public:
  explicit AlignedBytes(std::int64_t size)
      : size_(static_cast<std::size_t>(size)),
        data_(static_cast<std::byte*>(::operator new (size_, std::align_val_t{64}))) {
    std::memset(data_, 0xEE, size_);
  }
  AlignedBytes(const AlignedBytes& other) : AlignedBytes(static_cast<std::int64_t>(other.size_)) {
    std::memcpy(data_, other.data_, size_);
  }
  AlignedBytes& operator=(AlignedBytes other) {
    std::swap(size_, other.size_);
    std::swap(data_, other.data_);
    return *this;
  }
  ~AlignedBytes() { ::operator delete (data_, std::align_val_t{64}); }
  std::byte* data() const { return data_; }
  std::size_t size() const { return size_; }
  bool operator==(const AlignedBytes& other) const {
    return size_ == other.size_ && std::memcmp(data_, other.data_, size_) == 0;
  }

 private:
  std::size_t size_;
  std::byte* data_;
};

/// A matrix in its stored form that owns its bytes.
struct StoredMatrix {
  WeightFormat format;
  std::int64_t rows, columns;
  AlignedBytes codes, scales;

  StoredMatrix(const WeightFormat& kind, std::int64_t row_count, std::int64_t column_count)
      : format(kind),
        rows(row_count),
        columns(column_count),
        codes(code_bytes(kind, rows, columns)),
        scales(scale_bytes(kind, rows, columns)) {}
  EncodedMatrix view() const { return {format, rows, columns, codes.data(), scales.data()}; }

  std::vector<float> decoded() const {
    std::vector<float> out(static_cast<std::size_t>(rows * columns));
    decode_rows(view(), 0, rows, out.data());
    return out;
  }
  std::vector<std::uint16_t> decoded_bf16() const {
    std::vector<std::uint16_t> out(static_cast<std::size_t>(rows * columns));
    decode_rows_bf16(view(), 0, rows, out.data());
    return out;
  }
};

/// Random codes, so every one of them and NaN; scales of every kind of float, one in eight a
/// denormal, zero, infinite or no number.
inline StoredMatrix random_matrix(const WeightFormat& format, std::int64_t rows,
                                  std::int64_t columns, std::uint64_t seed) {
  StoredMatrix out(format, rows, columns);
  const auto fill = [&](AlignedBytes& bytes, std::uint64_t stream) {
    for (std::size_t i = 0; i < bytes.size(); ++i) {
      bytes.data()[i] = static_cast<std::byte>(random_bits(seed, RandomStream::sample, i, stream));
    }
  };
  fill(out.codes, 0);
  fill(out.scales, 1);
  const auto scale = [&](std::uint64_t i) {
    const double unit = random_unit(seed, RandomStream::sample, i, 2);
    const auto value = static_cast<float>(std::ldexp(2 * unit - 1, static_cast<int>(i % 40) - 30));
    constexpr float kOdd[] = {0,
                              -0.0F,
                              0x1.8p-127F,
                              0x1p-149F,
                              3e38F,
                              -3e38F,
                              std::numeric_limits<float>::infinity(),
                              std::numeric_limits<float>::quiet_NaN()};
    return i % 8 == 5 ? kOdd[i / 8 % 8] : value;
  };
  const auto floats = [&](std::int64_t begin, std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i) {
      const float value = scale(static_cast<std::uint64_t>(i));
      std::memcpy(out.scales.data() + begin + 4 * i, &value, sizeof value);
    }
  };
  switch (format.kind) {
    case WeightKind::f32:
    case WeightKind::bf16:
      break;
    case WeightKind::fp8:
      floats(0, static_cast<std::int64_t>(out.scales.size()) / 4);
      break;
    case WeightKind::int4:
      for (std::size_t i = 0; i < out.scales.size() / 2; ++i) {
        const std::uint16_t bits = bf16_from_float(scale(i));
        std::memcpy(out.scales.data() + 2 * i, &bits, sizeof bits);
      }
      break;
    case WeightKind::nf4: {
      const float offset = 0.0625F + 0x1.234p-13F;
      std::memcpy(out.scales.data(), &offset, sizeof offset);
      floats(4, (rows * columns + 16383) / 16384);
      break;
    }
  }
  return out;
}

/// Bell-shaped floats: the sum of four 20-bit uniforms times 2^(row mod 5 - 8), as
/// tests/data/quant/make_fixtures.py has them.
inline std::vector<float> bell_weights(std::int64_t rows, std::int64_t columns,
                                       std::uint32_t seed) {
  std::vector<float> out;
  for (std::int64_t i = 0; i < rows * columns; ++i) {
    double total = -2 * 0x1p20;
    for (int k = 0; k < 4; ++k) {
      seed = seed * 1664525U + 1013904223U;
      total += static_cast<double>(seed >> 12U);
    }
    out.push_back(static_cast<float>(std::ldexp(total, static_cast<int>(i / columns % 5) - 28)));
  }
  return out;
}

/// FNV-1a of bytes, in hexadecimal.
inline std::string fnv_text(const void* bytes, std::size_t size) {
  std::uint64_t hash = 14695981039346656037ULL;
  for (std::size_t i = 0; i < size; ++i) {
    hash = (hash ^ static_cast<const unsigned char*>(bytes)[i]) * 1099511628211ULL;
  }
  char text[17];
  std::snprintf(text, sizeof text, "%016llx", static_cast<unsigned long long>(hash));
  return text;
}

}  // namespace tailor::testing_support
