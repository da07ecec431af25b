#pragma once
// y = x W^T for few rows of x and W row-major: W's rows are tiles as they are, and what is laid out
// anew is x, once. A block of rows of W is copied or decoded into L2 and multiplied there, so that
// W is read once from DRAM, in order.

#include "trainer/kernels/cpu/few_rows.h"

namespace tailor {
namespace {

#if defined(__AVX512BF16__)

constexpr std::int64_t kRowsOfW = 32;  // at once: two tiles, beside two of x and four of sums

/// 16 vectors of 16 numbers, rows to columns.
inline void transpose_16(__m512i (&v)[16]) {
  const auto exchange = [&v](auto distance) {
    constexpr int d = decltype(distance)::value;
    alignas(64) static constexpr auto kOrder = [] {
      struct {
        std::int32_t low[16], high[16];
      } order{};
      for (int lane = 0; lane < 16; ++lane) {
        order.low[lane] = (lane & d) == 0 ? lane : 16 + lane - d;
        order.high[lane] = (lane & d) == 0 ? lane + d : 16 + lane;
      }
      return order;
    }();
    const __m512i low = _mm512_loadu_si512(kOrder.low), high = _mm512_loadu_si512(kOrder.high);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      if ((i & d) != 0) continue;
      const __m512i first = _mm512_permutex2var_epi32(v[i], low, v[i + d]);
      v[i + d] = _mm512_permutex2var_epi32(v[i], high, v[i + d]);
      v[i] = first;
    }
  };
  exchange(std::integral_constant<int, 1>{});
  exchange(std::integral_constant<int, 2>{});
  exchange(std::integral_constant<int, 4>{});
  exchange(std::integral_constant<int, 8>{});
}

/// x[M, K] as tiles [k / 32][m / 16][k / 2 % 16][m % 16][k % 2], zero past M and K.
inline void lay_out_x_t(std::int64_t M, std::int64_t K, const Bf16* x, std::int64_t stride,
                        Bf16* tiles) {
  for (std::int64_t k = 0; k < K; k += kTileDepth) {
    for (std::int64_t m = 0; m < M; m += kTileRows, tiles += kTile) {
      __m512i rows[16];
      for (std::int64_t i = 0; i < kTileRows; ++i) {
        rows[i] = m + i < M
                      ? _mm512_maskz_loadu_epi16(first_halves(K - k), x + (m + i) * stride + k)
                      : _mm512_setzero_si512();
      }
      transpose_16(rows);
      for (std::int64_t i = 0; i < kTileRows; ++i) {
        _mm512_store_si512(tiles + i * kTileDepth, rows[i]);
      }
    }
  }
}

/// sums[n / 16][m / 16][n % 16][m % 16] = W x^T for 32 rows of W and `m_tiles` (1 or 2) tiles of x,
/// whose steps along k are `x_step` apart.
struct Avx512RowsOfW {
  static void multiply(std::int64_t k_tiles, const Bf16* w, std::int64_t w_stride, const Bf16* x,
                       std::int64_t x_step, std::int64_t m_tiles, float* sums) {
    constexpr int kRows = 16;
    for (std::int64_t m = 0; m < m_tiles; ++m) {
      for (std::int64_t n = 0; n < kRowsOfW; n += kRows) {
        __m512 acc[kRows];
#pragma GCC unroll 16
        for (auto& sum : acc) sum = _mm512_setzero_ps();
        for (std::int64_t t = 0; t < k_tiles; ++t) {
          const Bf16* x_tile = x + t * x_step + m * kTile;
          const Bf16* of_w = w + n * w_stride + t * kTileDepth;
          for (std::int64_t k = 0; k < kTileDepth; k += 2) {
            const auto values = bits_as<__m512bh>(_mm512_load_si512(x_tile + k / 2 * kTileDepth));
#pragma GCC unroll 16
            for (int i = 0; i < kRows; ++i) {
              std::int32_t pair = 0;
              std::memcpy(&pair, of_w + i * w_stride + k, sizeof pair);
              acc[i] = _mm512_dpbf16_ps(acc[i], bits_as<__m512bh>(_mm512_set1_epi32(pair)), values);
            }
          }
        }
        float* to = sums + (n / kTileRows * 2 + m) * kSumTile;
#pragma GCC unroll 16
        for (int i = 0; i < kRows; ++i) _mm512_store_ps(to + i * kTileRows, acc[i]);
      }
    }
  }
};

#if defined(__AMX_BF16__)
struct AmxRowsOfW : AmxBlock {
  static void multiply(std::int64_t k_tiles, const Bf16* w, std::int64_t w_stride, const Bf16* x,
                       std::int64_t x_step, std::int64_t m_tiles, float* sums) {
    const auto row_bytes = static_cast<std::size_t>(w_stride) * sizeof(Bf16);
    asm volatile("" ::: "memory");
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    const Bf16* lower = w + kTileRows * w_stride;
    if (m_tiles == 1) {
      for (std::int64_t t = 0; t < k_tiles;
           ++t, w += kTileDepth, lower += kTileDepth, x += x_step) {
        _tile_loadd(6, x, 64);
        _tile_loadd(4, w, row_bytes);
        _tile_loadd(5, lower, row_bytes);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(2, 5, 6);
      }
    } else {
      for (std::int64_t t = 0; t < k_tiles;
           ++t, w += kTileDepth, lower += kTileDepth, x += x_step) {
        _tile_loadd(6, x, 64);
        _tile_loadd(7, x + kTile, 64);
        _tile_loadd(4, w, row_bytes);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, lower, row_bytes);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + kSumTile, 64);
    _tile_stored(2, sums + 2 * kSumTile, 64);
    _tile_stored(3, sums + 3 * kSumTile, 64);
    asm volatile("" ::: "memory");
  }
};
#endif

/// Rows of W copied, zero past K and past the last row.
class CopiedRows {
 public:
  CopiedRows(const Bf16* w, std::int64_t stride, std::int64_t K)
      : w_(w),
        stride_(stride),
        columns_(K),
        padded_((K + 31) / 32 * 32 + 32),
        block_(kRowsOfW * padded_) {}
  RowBlock block(std::int64_t row, std::int64_t rows, std::int64_t, std::int64_t) const {
    for (std::int64_t r = 0; r < kRowsOfW; ++r) {
      Bf16* to = block_.get() + r * padded_;
      for (std::int64_t k = 0; k < columns_; k += kTileDepth) {
        const Bf16* from = w_ + (row + r) * stride_ + k;
        _mm512_store_si512(to + k, r < rows
                                       ? _mm512_maskz_loadu_epi16(first_halves(columns_ - k), from)
                                       : _mm512_setzero_si512());
      }
    }
    return {block_.get(), padded_};
  }
  std::int64_t columns() const { return columns_; }

 private:
  const Bf16* w_;
  std::int64_t stride_, columns_, padded_;
  Scratch<Bf16> block_;
};

/// Of 32 rows of W from n on and 16 rows of x: y[m, n ..), rounded.
inline void write_sums_t(const float* upper, const float* lower, std::int64_t m_count,
                         std::int64_t n_count, Bf16* y, std::int64_t y_stride) {
  __m512i first[16], second[16];
  for (int i = 0; i < 16; ++i) {
    first[i] = _mm512_load_si512(upper + i * kTileRows);
    second[i] = _mm512_load_si512(lower + i * kTileRows);
  }
  transpose_16(first);
  transpose_16(second);
  for (std::int64_t m = 0; m < m_count; ++m) {
    const auto both = bits_as<__m512i>(
        _mm512_cvtne2ps_pbh(bits_as<__m512>(second[m]), bits_as<__m512>(first[m])));
    _mm512_mask_storeu_epi16(y + m * y_stride, first_halves(n_count), both);
  }
}

/// Sums take pairs of k in order, in one accumulator, whichever rows of W a call is for.
template <class Block, class Rows>
void few_rows_t_of_source(std::int64_t begin, std::int64_t end, std::int64_t M, const Bf16* x,
                          std::int64_t x_stride, const Rows& source, Bf16* y,
                          std::int64_t y_stride) {
  const std::int64_t K = source.columns();
  const std::int64_t m_tiles = (M + kTileRows - 1) / kTileRows;
  const std::int64_t k_tiles = (K + kTileDepth - 1) / kTileDepth;
  const Scratch<Bf16> x_tiles(k_tiles * m_tiles * kTile);
  const Scratch<float> sums(4 * kSumTile);
  lay_out_x_t(M, K, x, x_stride, x_tiles.get());
  [[maybe_unused]] const Block block;
  for (std::int64_t n = begin; n < end; n += kRowsOfW) {
    const std::int64_t rows = std::min(kRowsOfW, end - n);
    const RowBlock w = source.block(n, rows, 0, K);
    for (std::int64_t m = 0; m < m_tiles; m += 2) {
      const std::int64_t tiles = std::min<std::int64_t>(2, m_tiles - m);
      block.multiply(k_tiles, w.w, w.stride, x_tiles.get() + m * kTile, m_tiles * kTile, tiles,
                     sums.get());
      for (std::int64_t i = 0; i < tiles; ++i) {
        const std::int64_t row = (m + i) * kTileRows;
        write_sums_t(sums.get() + i * kSumTile, sums.get() + (2 + i) * kSumTile,
                     std::min(kTileRows, M - row), rows, y + row * y_stride + n, y_stride);
      }
    }
  }
}

template <class Block>
void few_rows_t(std::int64_t begin, std::int64_t end, std::int64_t M, std::int64_t K, const Bf16* x,
                std::int64_t x_stride, const Bf16* w, std::int64_t w_stride, Bf16* y,
                std::int64_t y_stride) {
  few_rows_t_of_source<Block>(begin, end, M, x, x_stride, CopiedRows(w, w_stride, K), y, y_stride);
}

template <class Block>
void few_rows_t_stored(std::int64_t begin, std::int64_t end, std::int64_t M, const Bf16* x,
                       std::int64_t x_stride, const StoredParts& w, Bf16* y,
                       std::int64_t y_stride) {
  few_rows_t_of_source<Block>(begin, end, M, x, x_stride, StoredRows(w, kRowsOfW, w.first->columns),
                              y, y_stride);
}

#endif

}  // namespace
}  // namespace tailor
