#pragma once

// Frozen weights to bfloat16 (data/quant/format.h has the formats to the byte).
//
// What bounds these is memory: for eight numbers a thread reads one word of codes (4 bytes at 4
// bits, 8 at 8) and writes 16. Neighbouring threads take neighbouring words, so a warp reads 128 or
// 256 bytes and writes 512 in a row: every sector that moves is whole. A scale serves 64 to 128
// numbers, thus 8 to 16 neighbouring threads, which get it from one sector in L1. A thread's four
// words are a block's width apart and all four are asked for before the first is used: 16 bytes in
// flight a thread at 4 bits, 20 KB on a multiprocessor that holds 1,280 threads of 48 registers,
// where a fifth of 3.35 TB/s (codes are a fifth of what moves) times 0.7 us wants 4 KB on each of
// an H100's 132. int4 takes 12 instructions a number (in sm_90's assembly), and an H100 issues some
// 20 while 2.5 bytes move, an A100 30. That this reaches 85 % of the memory's speed follows from
// these counts; it has not been measured.

#include "data/quant/format.h"
#include "trainer/cuda/bodies/words.h"

namespace tailor::cuda {

/// Where nf4's tables lie on the device: the 16 values, and the 256 that a byte of scale stands
/// for.
struct Nf4Tables {
  const float* values = nullptr;
  const float* code_map = nullptr;
};

/// A scale for every `group` columns, found with `across` groups a row.
struct ColumnGroups {
  ColumnGroups(std::int64_t columns, std::int64_t group_or_all) {
    const std::int64_t wide = columns < 1 ? 1 : columns;
    const std::int64_t group = group_or_all == 0 || group_or_all > wide ? wide : group_or_all;
    by_group = Divider(group);
    across = div_ceil(wide, group);
    one_a_word = group % kWord == 0 || across == 1;
  }
  TAILOR_HOST_DEVICE std::int64_t index(std::int64_t row, std::uint32_t column) const {
    return row * across + by_group.divide(column);
  }

  Divider by_group;
  std::int64_t across;
  bool one_a_word;  ///< all columns of a word have one scale
};

// A codec reads a whole word of eight columns at once (load, then value of each), or a number by
// itself (number), where a word is cut short, lies askew or has several scales. What load and
// load_scale read is not looked at by them: a thread waits for memory once, not for every word.

/// value = (code - 8) * scale. The product of 4 and 8 bits is exact in float, rounded once.
struct Int4Codec {
  using Word = std::uint32_t;
  using Scale = Bf16Bits;

  TAILOR_HOST_DEVICE Word load(std::uint32_t word, const WordGrid::Spot&) const {
    return codes[word];  // every row begins with a word of its own
  }
  /// 2^23 + n has n in its last bits: the conversion is an or and a subtraction.
  TAILOR_HOST_DEVICE float value(Word word, std::uint32_t i) const {
    return bits_as<float>(0x4B000000U | (word >> 4U * i & 15U)) - 8388616.0F;
  }
  TAILOR_HOST_DEVICE float number(std::uint32_t word, const WordGrid::Spot&,
                                  std::uint32_t i) const {
    return value(codes[word], i);
  }
  TAILOR_HOST_DEVICE Scale load_scale(const WordGrid::Spot& spot, std::uint32_t i) const {
    return scales[groups.index(spot.row, spot.column + i)];
  }
  TAILOR_HOST_DEVICE float scale(Scale loaded) const { return to_float(loaded); }
  TAILOR_HOST_DEVICE bool one_scale() const { return groups.one_a_word; }

  const std::uint32_t* codes;
  const Bf16Bits* scales;
  ColumnGroups groups;
};

/// value = e4m3 * scale of the block, in float.
struct Fp8Codec {
  struct alignas(8) Word {
    std::uint32_t half[2];
  };
  using Scale = float;

  TAILOR_HOST_DEVICE Word load(std::uint32_t, const WordGrid::Spot& spot) const {
    return load_word<Word>(codes + spot.offset);
  }
  TAILOR_HOST_DEVICE float value(const Word& word, std::uint32_t i) const {
    return of_code(word.half[i / 4] >> 8U * (i % 4));
  }
  TAILOR_HOST_DEVICE float number(std::uint32_t, const WordGrid::Spot& spot,
                                  std::uint32_t i) const {
    return of_code(codes[spot.offset + i]);
  }
  /// Exponent and mantissa moved to where a float has them are the value / 2^120, denormals too.
  /// The largest magnitude, 0x7F, is the format's only NaN.
  TAILOR_HOST_DEVICE static float of_code(std::uint32_t code) {
    const std::uint32_t magnitude = (code & 0x7FU) << 20U;
    const std::uint32_t moved = magnitude == 0x7F00000U ? 0x7FC00000U : magnitude;
    return bits_as<float>(moved | (code & 0x80U) << 24U) * 0x1.0p120F;
  }
  TAILOR_HOST_DEVICE Scale load_scale(const WordGrid::Spot& spot, std::uint32_t i) const {
    return scales[groups.index(by_block_row.divide(spot.row), spot.column + i)];
  }
  TAILOR_HOST_DEVICE float scale(Scale loaded) const { return loaded; }
  TAILOR_HOST_DEVICE bool one_scale() const { return groups.one_a_word; }

  const std::uint8_t* codes;
  const float* scales;
  Divider by_block_row;
  ColumnGroups groups;
};

/// value = values[code] * (code_map[byte] * outer + offset), every product and sum rounded to float
/// by itself: bitsandbytes dequantises the scales first, then adds the offset, then uses them. The
/// grid is of the flattened matrix.
struct Nf4Codec {
  using Word = std::uint32_t;
  struct Scale {
    std::uint32_t inner;
    float outer;
  };

  TAILOR_HOST_DEVICE Word load(std::uint32_t, const WordGrid::Spot& spot) const {
    return load_word<Word>(codes + spot.offset / 2);
  }
  TAILOR_HOST_DEVICE float value(Word word, std::uint32_t i) const {
    const std::uint32_t at = 8 * (i / 2) + (i % 2 == 0 ? 4 : 0);  // the first in the high bits
    return tables.values[word >> at & 15U];
  }
  TAILOR_HOST_DEVICE float number(std::uint32_t, const WordGrid::Spot& spot,
                                  std::uint32_t i) const {
    return tables.values[codes[(spot.offset + i) / 2] >> (i % 2 == 0 ? 4U : 0U) & 15U];
  }
  TAILOR_HOST_DEVICE Scale load_scale(const WordGrid::Spot& spot, std::uint32_t) const {
    const std::int64_t block = spot.offset / 64;
    return {block_scales[block], outer_scales[block / 256]};
  }
  TAILOR_HOST_DEVICE float scale(Scale loaded) const {
    return tables.code_map[loaded.inner] * loaded.outer + *offset;
  }
  TAILOR_HOST_DEVICE bool one_scale() const { return true; }

  const std::uint8_t* codes;
  const float* offset;
  const float* outer_scales;
  const std::uint8_t* block_scales;
  Nf4Tables tables;
};

/// No codes: float32 weights rounded to bfloat16.
struct Float32Codec {
  struct alignas(16) Half {
    float at[kWord / 2];
  };
  struct Word {
    Half half[2];
  };
  struct Scale {};

  TAILOR_HOST_DEVICE Word load(std::uint32_t, const WordGrid::Spot& spot) const {
    return {{load_word<Half>(numbers + spot.offset), load_word<Half>(numbers + spot.offset + 4)}};
  }
  TAILOR_HOST_DEVICE float value(const Word& word, std::uint32_t i) const {
    return word.half[i / 4].at[i % 4];
  }
  TAILOR_HOST_DEVICE float number(std::uint32_t, const WordGrid::Spot& spot,
                                  std::uint32_t i) const {
    return numbers[spot.offset + i];
  }
  TAILOR_HOST_DEVICE Scale load_scale(const WordGrid::Spot&, std::uint32_t) const { return {}; }
  TAILOR_HOST_DEVICE float scale(Scale) const { return 1.0F; }
  TAILOR_HOST_DEVICE bool one_scale() const { return true; }

  const float* numbers;
};

template <class Codec>
struct Dequantise {
  static constexpr std::uint32_t kThreads = 256;
  static constexpr std::uint32_t kWords = 4;  ///< of a thread

  std::int64_t blocks(std::uint32_t threads) const {
    return div_ceil(grid.words(), std::int64_t{threads} * kWords);
  }
  TAILOR_HOST_DEVICE void run(Place at) const {
    typename Codec::Word word[kWords];
    typename Codec::Scale scale[kWords];
    WordGrid::Spot spot[kWords];
    TAILOR_UNROLL
    for (std::uint32_t j = 0; j < kWords; ++j) {
      const std::uint32_t index = index_of(at, j);
      spot[j].count = 0;
      if (index >= grid.words()) continue;
      spot[j] = grid.spot(index);
      if (!whole(spot[j])) continue;
      word[j] = codec.load(index, spot[j]);
      scale[j] = codec.load_scale(spot[j], 0);
    }
    TAILOR_UNROLL
    for (std::uint32_t j = 0; j < kWords; ++j) {
      if (whole(spot[j])) {
        const float by = codec.scale(scale[j]);
        Eight values;
        TAILOR_UNROLL
        for (std::uint32_t i = 0; i < kWord; ++i) values.at[i] = codec.value(word[j], i) * by;
        store_eight(out, spot[j].offset, kWord, values);
        continue;
      }
      TAILOR_ROLLED
      for (std::uint32_t i = 0; i < spot[j].count; ++i) {
        const float by = codec.scale(codec.load_scale(spot[j], i));
        out[spot[j].offset + i] = to_bf16(codec.number(index_of(at, j), spot[j], i) * by);
      }
    }
  }

  TAILOR_HOST_DEVICE static std::uint32_t index_of(Place at, std::uint32_t j) {
    return (at.block * kWords + j) * at.threads + at.thread;
  }
  TAILOR_HOST_DEVICE bool whole(const WordGrid::Spot& spot) const {
    return spot.count == kWord && spot.offset % kWord == 0 && codec.one_scale();
  }

  WordGrid grid;
  Codec codec;
  Bf16Bits* out;  ///< [rows, columns], aligned to 16 bytes
};

/// Calls `use` with the body that dequantises `matrix`, whose pointers are of the device that will
/// run it. Every kind but bf16, which is a copy.
template <class Use>
void with_dequantise_body(const EncodedMatrix& matrix, const Nf4Tables& tables, Bf16Bits* out,
                          Use use) {
  const WeightFormat& format = matrix.format;
  const auto* codes = reinterpret_cast<const std::uint8_t*>(matrix.codes);
  const auto* scales = reinterpret_cast<const std::uint8_t*>(matrix.scales);
  const WordGrid grid(matrix.rows, matrix.columns);
  switch (format.kind) {
    case WeightKind::int4:
      TAILOR_CHECK(format.group > 0, "int4 without a group");
      return use(Dequantise<Int4Codec>{
          grid,
          {reinterpret_cast<const std::uint32_t*>(codes), reinterpret_cast<const Bf16Bits*>(scales),
           ColumnGroups(matrix.columns, format.group)},
          out});
    case WeightKind::fp8:
      TAILOR_CHECK(format.block_rows > 0, "fp8 without rows of a block");
      return use(Dequantise<Fp8Codec>{
          grid,
          {codes, reinterpret_cast<const float*>(scales), Divider(format.block_rows),
           ColumnGroups(matrix.columns, format.block_columns)},
          out});
    case WeightKind::nf4: {
      const std::int64_t numbers = checked_multiply(matrix.rows, matrix.columns);
      const std::int64_t outer_bytes = div_ceil(div_ceil(numbers, 64), 256) * 4;
      const auto* outer = reinterpret_cast<const float*>(scales) + 1;
      return use(Dequantise<Nf4Codec>{
          WordGrid(1, numbers),
          {codes, reinterpret_cast<const float*>(scales), outer, scales + 4 + outer_bytes, tables},
          out});
    }
    case WeightKind::f32:
      return use(Dequantise<Float32Codec>{grid, {reinterpret_cast<const float*>(codes)}, out});
    case WeightKind::bf16:
      break;
  }
  TAILOR_CHECK(false, "a kind without codes");
}

}  // namespace tailor::cuda
