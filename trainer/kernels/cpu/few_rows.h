#pragma once
// y = x W for few rows of x and W as it lies in memory, row-major bfloat16: W passes once from DRAM
// through registers, where rows 2k and 2k + 1 are interleaved to the pairs that the bfloat16
// instructions multiply, into a block of 4 KiB that is used from L1 at once. A matrix library lays
// all of W out anew for every call, which for few rows costs more than the product.

#include <algorithm>

#include "trainer/kernels/cpu/stored_rows.h"
#include "trainer/kernels/simd.h"

namespace tailor {
namespace {

#if defined(__AVX512BF16__)

// A block of W is kDepth rows of kWide columns: two AMX tiles deep and two wide. Two tiles deep
// halves how often sums go to L1 or L2 and back; with three more for x and the sums that is all 8.
constexpr std::int64_t kDepth = 64, kWide = 32;
// A panel is columns that are summed at once: of 256, half a KiB of each row of W is fetched in a
// run, and the sums of 16 rows take 16 KiB of L1, those of 256 rows 256 KiB of L2.
constexpr std::int64_t kTileRows = 16, kTileDepth = 32;
constexpr std::int64_t kTile = kTileRows * kTileDepth;    // bfloat16 of x or W: 1 KiB
constexpr std::int64_t kSumTile = kTileRows * kTileRows;  // floats: 1 KiB
constexpr std::int64_t kDeepTiles = kDepth / kTileDepth;  // 2

inline __mmask32 first_halves(std::int64_t n) {
  return n >= 32 ? ~__mmask32{0} : n <= 0 ? __mmask32{0} : (__mmask32{1} << n) - 1;
}

/// Rows of x at k .. k + kDepth as tiles [row / 16][k / 32][row % 16][k % 32], zero past K; rows
/// past M are left as they are.
inline void lay_out_x(std::int64_t M, std::int64_t K, std::int64_t k, const Bf16* x,
                      std::int64_t stride, Bf16* tiles) {
  for (std::int64_t m = 0; m < M; ++m) {
    Bf16* to = tiles + m / kTileRows * kDeepTiles * kTile + m % kTileRows * kTileDepth;
    for (std::int64_t d = 0; d < kDeepTiles; ++d) {
      const std::int64_t at = k + d * kTileDepth;
      _mm512_store_si512(to + d * kTile,
                         _mm512_maskz_loadu_epi16(first_halves(K - at), x + m * stride + at));
    }
  }
}

/// Fetches rows of W that come next into L2, a line a step, in the order in which DRAM has them.
class Prefetch {
 public:
  Prefetch(const Bf16* w, std::int64_t stride, std::int64_t rows, std::int64_t width)
      : w_(w), stride_(stride), rows_(width > 0 ? rows : 0), width_(width) {}
  void step() {
    if (rows_ == 0) return;
    _mm_prefetch(w_ + at_, _MM_HINT_T1);
    at_ += kLine;
    if (at_ < width_) return;
    at_ = 0;
    w_ += stride_;
    --rows_;
  }

 private:
  static constexpr std::int64_t kLine = 32;
  const Bf16* w_;
  std::int64_t stride_, rows_, width_, at_ = 0;
};

/// kDepth rows of W, zero past `rows` and `columns`, as tiles [k / 32][half][k / 2 % 16][16 pairs].
/// Half 0 has columns 0-3, 8-11, 16-19, 24-27 of the block, half 1 the others: neighbours within
/// 128 bits interleave in one operation, and write_sums() puts columns back in order.
template <bool whole>
inline void lay_out_w(std::int64_t rows, std::int64_t columns, const Bf16* w, std::int64_t stride,
                      Bf16* tiles, Prefetch& next) {
  const __mmask32 mask = first_halves(columns);
  const auto row = [&](std::int64_t k) {
    if constexpr (whole) return _mm512_loadu_si512(w + k * stride);
    return k < rows ? _mm512_maskz_loadu_epi16(mask, w + k * stride) : _mm512_setzero_si512();
  };
#pragma GCC unroll 4
  for (std::int64_t k = 0; k < kDepth; k += 2) {
    next.step();
    next.step();
    const __m512i even = row(k), odd = row(k + 1);
    Bf16* to = tiles + k / kTileDepth * 2 * kTile + k % kTileDepth / 2 * kTileDepth;
    _mm512_store_si512(to, _mm512_unpacklo_epi16(even, odd));
    _mm512_store_si512(to + kTile, _mm512_unpackhi_epi16(even, odd));
  }
}

/// One row's sums of a block, rounded, in the order of the columns.
inline void write_sums(const float* half_0, const float* half_1, std::int64_t columns, Bf16* y) {
  const auto both =
      bits_as<__m512i>(_mm512_cvtne2ps_pbh(_mm512_load_ps(half_1), _mm512_load_ps(half_0)));
  const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
  _mm512_mask_storeu_epi16(y, first_halves(columns), _mm512_permutexvar_epi64(order, both));
}

/// The products of a block: sums[row / 16][half][row % 16][16] (+)= x W.
struct Avx512Block {
  static void multiply(std::int64_t row_tiles, const Bf16* x, const Bf16* w, float* sums,
                       bool first) {
    constexpr int kRows = 8;  // with two vectors each, 16 sums in flight
    for (std::int64_t m = 0; m < row_tiles * kTileRows; m += kRows) {
      float* sum = sums + m / kTileRows * 2 * kSumTile + m % kTileRows * kTileRows;
      __m512 acc[kRows][2];
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
        for (int half = 0; half < 2; ++half) {
          acc[i][half] =
              first ? _mm512_setzero_ps() : _mm512_load_ps(sum + half * kSumTile + i * kTileRows);
        }
      }
      for (std::int64_t d = 0; d < kDeepTiles; ++d) {
        const Bf16* x_tile =
            x + (m / kTileRows * kDeepTiles + d) * kTile + m % kTileRows * kTileDepth;
        const Bf16* w_tile = w + d * 2 * kTile;
        for (std::int64_t k = 0; k < kTileDepth; k += 2) {
          const auto low = bits_as<__m512bh>(_mm512_load_si512(w_tile + k / 2 * kTileDepth));
          const auto high =
              bits_as<__m512bh>(_mm512_load_si512(w_tile + kTile + k / 2 * kTileDepth));
#pragma GCC unroll 8
          for (int i = 0; i < kRows; ++i) {
            std::int32_t pair = 0;
            std::memcpy(&pair, x_tile + i * kTileDepth + k, sizeof pair);
            const auto factor = bits_as<__m512bh>(_mm512_set1_epi32(pair));
            acc[i][0] = _mm512_dpbf16_ps(acc[i][0], factor, low);
            acc[i][1] = _mm512_dpbf16_ps(acc[i][1], factor, high);
          }
        }
      }
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
        for (int half = 0; half < 2; ++half) {
          _mm512_store_ps(sum + half * kSumTile + i * kTileRows, acc[i][half]);
        }
      }
    }
  }
};

#if defined(__AMX_BF16__)
/// All eight tile registers as 16 rows of 64 bytes, as long as it lives.
struct AmxBlock {
  AmxBlock() {
    struct alignas(64) {
      std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
      std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } const config;
    _tile_loadconfig(&config);
  }
  AmxBlock(const AmxBlock&) = delete;
  AmxBlock& operator=(const AmxBlock&) = delete;
  ~AmxBlock() { _tile_release(); }

  static void multiply(std::int64_t row_tiles, const Bf16* x, const Bf16* w, float* sums,
                       bool first) {
    asm volatile("" ::: "memory");  // the compiler does not know that tiles are loaded from memory
    _tile_loadd(4, w, 64);
    _tile_loadd(5, w + kTile, 64);
    _tile_loadd(6, w + 2 * kTile, 64);
    _tile_loadd(7, w + 3 * kTile, 64);
    for (std::int64_t m = 0; m < row_tiles; ++m, x += kDeepTiles * kTile, sums += 2 * kSumTile) {
      if (first) {
        _tile_zero(0);
        _tile_zero(1);
      } else {
        _tile_loadd(0, sums, 64);
        _tile_loadd(1, sums + kSumTile, 64);
      }
      _tile_loadd(2, x, 64);
      _tile_loadd(3, x + kTile, 64);
      _tile_dpbf16ps(0, 2, 4);
      _tile_dpbf16ps(1, 2, 5);
      _tile_dpbf16ps(0, 3, 6);
      _tile_dpbf16ps(1, 3, 7);
      _tile_stored(0, sums, 64);
      _tile_stored(1, sums + kSumTile, 64);
    }
  }
};
#endif

/// W as it lies in memory.
struct PlainRows {
  const Bf16* w;
  std::int64_t stride;
  static constexpr std::int64_t kPanel = 256;

  RowBlock block(std::int64_t k, std::int64_t, std::int64_t column, std::int64_t) const {
    return {w + k * stride + column, stride};
  }
  Prefetch ahead(std::int64_t k, std::int64_t rows, std::int64_t column, std::int64_t width) const {
    return {w + k * stride + column, stride, rows, width};
  }
};

/// W decoded block by block; codes are prefetched by their decoder. Wider panels: a panel of a row
/// has a quarter of the bytes.
struct DecodedRows {
  const StoredRows& rows;
  static constexpr std::int64_t kPanel = 512;

  RowBlock block(std::int64_t k, std::int64_t n, std::int64_t column, std::int64_t width) const {
    return rows.block(k, n, column, width);
  }
  Prefetch ahead(std::int64_t, std::int64_t, std::int64_t, std::int64_t) const {
    return {nullptr, 0, 0, 0};
  }
};

/// Every sum takes pairs of k in order, in one accumulator, whichever columns a call is for and
/// however W is stored.
template <class Block, class Rows>
void few_rows_of_source(std::int64_t begin, std::int64_t end, std::int64_t M, std::int64_t K,
                        const Bf16* x, std::int64_t x_stride, const Rows& source, Bf16* y,
                        std::int64_t y_stride) {
  const std::int64_t row_tiles = (M + kTileRows - 1) / kTileRows;
  const std::int64_t blocks_most = (std::min(Rows::kPanel, end - begin) + kWide - 1) / kWide;
  const Scratch<Bf16> x_tiles(row_tiles * kDeepTiles * kTile), w_tiles(kDeepTiles * 2 * kTile);
  const Scratch<float> sums(blocks_most * row_tiles * 2 * kSumTile);
  std::memset(x_tiles.get(), 0,
              static_cast<std::size_t>(row_tiles * kDeepTiles * kTile) * sizeof(Bf16));
  [[maybe_unused]] const Block block;
  for (std::int64_t panel = begin; panel < end; panel += Rows::kPanel) {
    const std::int64_t width = std::min(Rows::kPanel, end - panel);
    const std::int64_t blocks = (width + kWide - 1) / kWide;
    for (std::int64_t k = 0; k < K; k += kDepth) {
      lay_out_x(M, K, k, x, x_stride, x_tiles.get());
      // The rows that follow, or the next panel's first.
      const bool last = k + kDepth >= K;
      const std::int64_t next_rows = std::min(kDepth, last ? K : K - k - kDepth);
      const std::int64_t next_width = last ? std::min(Rows::kPanel, end - panel - width) : width;
      Prefetch next = last ? source.ahead(0, next_rows, panel + width, next_width)
                           : source.ahead(k + kDepth, next_rows, panel, next_width);
      const RowBlock rows = source.block(k, std::min(kDepth, K - k), panel, width);
      for (std::int64_t b = 0; b < blocks; ++b) {
        const std::int64_t columns = width - b * kWide;
        const Bf16* from = rows.w + b * kWide;
        if (K - k >= kDepth && columns >= kWide) {
          lay_out_w<true>(kDepth, kWide, from, rows.stride, w_tiles.get(), next);
        } else {
          lay_out_w<false>(K - k, columns, from, rows.stride, w_tiles.get(), next);
        }
        block.multiply(row_tiles, x_tiles.get(), w_tiles.get(),
                       sums.get() + b * row_tiles * 2 * kSumTile, k == 0);
      }
    }
    for (std::int64_t m = 0; m < M; ++m) {
      for (std::int64_t b = 0; b < blocks; ++b) {
        const float* sum =
            sums.get() + (b * row_tiles + m / kTileRows) * 2 * kSumTile + m % kTileRows * kTileRows;
        write_sums(sum, sum + kSumTile, width - b * kWide, y + m * y_stride + panel + b * kWide);
      }
    }
  }
}

template <class Block>
void few_rows(std::int64_t begin, std::int64_t end, std::int64_t M, std::int64_t K, const Bf16* x,
              std::int64_t x_stride, const Bf16* w, std::int64_t w_stride, Bf16* y,
              std::int64_t y_stride) {
  few_rows_of_source<Block>(begin, end, M, K, x, x_stride, PlainRows{w, w_stride}, y, y_stride);
}

template <class Block>
void few_rows_stored(std::int64_t begin, std::int64_t end, std::int64_t M, const Bf16* x,
                     std::int64_t x_stride, const StoredParts& w, Bf16* y, std::int64_t y_stride) {
  const StoredRows rows(w, kDepth, DecodedRows::kPanel);
  few_rows_of_source<Block>(begin, end, M, rows.count(), x, x_stride, DecodedRows{rows}, y,
                            y_stride);
}

#endif

}  // namespace
}  // namespace tailor
