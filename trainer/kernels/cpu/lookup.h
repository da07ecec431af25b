#pragma once
// The few values that the codes of a group or block can stand for, and looking them up.
//
// A 4-bit group has 16 possible values and an fp8 block 128 magnitudes: they are computed once,
// with the format's own roundings, and elements only look theirs up. AVX512-BF16's conversion is
// not used: it flushes denormals.

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "trainer/kernels/simd.h"

namespace tailor {
namespace {

/// To bfloat16 as data/quant/numbers.h has it: nearest, ties to even, any NaN to 0x7FC0.
inline VecU32 bf16_bits(Vec<float> v) {
  const auto bits = bits_as<VecU32>(v);
  const VecU32 rounded = (bits + 0x7FFFU + ((bits >> 16U) & 1U)) >> 16U;
  const auto is_nan = v != v;
  return is_nan ? VecU32{} + 0x7FC0U : rounded;
}
inline Vec<float> plain_nan(Vec<float> v) {
  const auto is_nan = v != v;
  return is_nan ? bits_as<Vec<float>>(VecU32{} + 0x7FC00000U) : v;
}

template <class S>
constexpr bool kIsBf16 = std::is_same_v<S, Bf16>;

/// Rounds products to what S holds of them: bfloat16 bits, or the float itself.
inline void store_values(Bf16* out, Vec<float> v) {
  const HalfU16 raw = __builtin_convertvector(bf16_bits(v), HalfU16);
  std::memcpy(out, &raw, sizeof raw);
}
inline void store_values(float* out, Vec<float> v) { store(out, plain_nan(v)); }

/// How far ahead of the reader codes are asked for: the processor's own prefetching stops at the
/// end of every page, and few steps fit into its window. Past a matrix's end it does nothing.
constexpr std::int64_t kPrefetchBytes = 1024;

/// How results go to memory. Past the caches, where a call writes more than a core's share of any
/// of them, so that memory is not read only to be overwritten: half of the time of a plain store.
/// Such a store wants its address aligned to its size.
enum class Store { plain, past_caches };
constexpr std::int64_t kPastCachesBytes = std::int64_t{8} << 20;

#if defined(__AVX512F__)
template <Store how>
inline void put_vector(void* out, __m512i v) {
  if constexpr (how == Store::past_caches) {
    _mm512_stream_si512(static_cast<__m512i*>(out), v);
  } else {
    std::memcpy(out, &v, sizeof v);
  }
}
#elif defined(__AVX2__)
template <Store how>
inline void put_vector(void* out, __m256i v) {
  if constexpr (how == Store::past_caches) {
    _mm256_stream_si256(static_cast<__m256i*>(out), v);
  } else {
    std::memcpy(out, &v, sizeof v);
  }
}
#endif

/// Calls body(std::integral_constant<Store, ..>) for rows of `columns`, `out_stride` apart, in
/// which runs of elements start at multiples of `run`.
template <class S, class Body>
void with_store([[maybe_unused]] std::int64_t rows, [[maybe_unused]] std::int64_t columns,
                [[maybe_unused]] const S* out, [[maybe_unused]] std::int64_t out_stride,
                [[maybe_unused]] std::int64_t run, const Body& body) {
#if defined(__AVX2__)
  constexpr std::int64_t kSize = sizeof(S), kLine = 64;
  const bool aligned = reinterpret_cast<std::uintptr_t>(out) % kLine == 0 &&
                       out_stride * kSize % kLine == 0 && run * kSize % kLine == 0;
  if (aligned && rows * columns * kSize >= kPastCachesBytes) {
    body(std::integral_constant<Store, Store::past_caches>{});
    _mm_sfence();  // before another thread is told that the rows are there
    return;
  }
#endif
  body(std::integral_constant<Store, Store::plain>{});
}

// ---- 4 bits: 16 values a group

/// The 16 values that codes stand for, and the look-up. first_high: the first of a byte's two codes
/// is in its high bits (NF4), else in its low bits (int4).
template <class S, bool first_high>
class Sixteen {
 public:
  /// entries[16] * scale; through bfloat16 whatever S is, if `round` (int4).
  Sixteen(const float* entries, float scale, [[maybe_unused]] bool round) {
    constexpr std::int64_t kVectors = 16 / kLanes<float>;
    VecU32 bits[kVectors];
    for (std::int64_t i = 0; i < kVectors; ++i) {
      const Vec<float> product = load(entries + i * kLanes<float>) * scale;
      if constexpr (kIsBf16<S>) {
        bits[i] = bf16_bits(product);
      } else {
        bits[i] = round ? bf16_bits(product) << 16U : bits_as<VecU32>(plain_nan(product));
      }
    }
    hold(bits);
  }

  /// out[0, n) from codes `begin` .. begin + n of a stream; asks for bytes `ahead` of them.
  template <Store how>
  void expand(const std::uint8_t* stream, std::int64_t begin, std::int64_t n, S* out,
              std::int64_t ahead = kPrefetchBytes) const {
    if (n > 0 && begin % 2 != 0) {
      *out++ = values_[code(stream[begin / 2], 1)];
      ++begin;
      --n;
    }
    const std::uint8_t* bytes = stream + begin / 2;
    std::int64_t i = 0;
    for (; i + kStep <= n; i += kStep) {
      __builtin_prefetch(bytes + i / 2 + ahead);
      whole<how>(bytes + i / 2, out + i);
    }
    for (; i < n; ++i) out[i] = values_[code(bytes[i / 2], i % 2)];
  }

 private:
  static unsigned code(std::uint8_t byte, std::int64_t which) {
    return (which == 0) == first_high ? byte >> 4U : byte & 15U;
  }

#if defined(__AVX512F__)
  static constexpr std::int64_t kStep = kIsBf16<S> ? 32 : 16;
  void hold(const VecU32* bits) {
    if constexpr (kIsBf16<S>) {  // twice, as the permutation's fifth index bit is not cleared
      const __m256i half = _mm512_cvtepi32_epi16(bits_as<__m512i>(bits[0]));
      table_ = _mm512_broadcast_i64x4(half);
      std::memcpy(values_, &half, sizeof half);
    } else {
      table_ = bits_as<__m512i>(bits[0]);
      std::memcpy(values_, &table_, sizeof table_);
    }
  }
  template <Store how>
  void whole(const std::uint8_t* bytes, S* out) const {
    __m512i found;
    if constexpr (kIsBf16<S>) {
      // A byte's two codes to the low bits of two 16-bit lanes; what stands above is ignored.
      __m128i raw;
      std::memcpy(&raw, bytes, sizeof raw);
      const __m512i wide = _mm512_cvtepu8_epi32(raw);
      const __m512i codes =
          first_high ? _mm512_or_si512(_mm512_srli_epi32(wide, 4), _mm512_slli_epi32(wide, 16))
                     : _mm512_or_si512(wide, _mm512_slli_epi32(wide, 12));
      found = _mm512_permutexvar_epi16(codes, table_);
    } else {
      const __m512i wide =
          _mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes)));
      const __m512i codes =
          first_high ? _mm512_or_si512(_mm512_srli_epi64(wide, 4), _mm512_slli_epi64(wide, 32))
                     : _mm512_or_si512(wide, _mm512_slli_epi64(wide, 28));
      found = _mm512_permutexvar_epi32(codes, table_);
    }
    put_vector<how>(out, found);
  }
  __m512i table_;
#elif defined(__AVX2__)
  static constexpr std::int64_t kStep = kIsBf16<S> ? 32 : 8;
  void hold(const VecU32* bits) {
    tables_[0] = bits_as<__m256i>(bits[0]);
    tables_[1] = bits_as<__m256i>(bits[1]);
    if constexpr (kIsBf16<S>) {
      tables_[0] = _mm256_permute4x64_epi64(_mm256_packus_epi32(tables_[0], tables_[1]), 0xD8);
    }
    std::memcpy(values_, tables_, sizeof values_);
    if constexpr (kIsBf16<S>) {
      // The low bytes of the 16 values, and the high ones, each in both halves of a register.
      const __m256i apart = _mm256_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15,
                                             0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
      const __m256i sorted = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(tables_[0], apart), 0xD8);
      tables_[0] = _mm256_permute2x128_si256(sorted, sorted, 0x00);
      tables_[1] = _mm256_permute2x128_si256(sorted, sorted, 0x11);
    }
  }
  template <Store how>
  void whole(const std::uint8_t* bytes, S* out) const {
    if constexpr (kIsBf16<S>) {
      __m128i raw;
      std::memcpy(&raw, bytes, sizeof raw);
      const __m256i wide = _mm256_cvtepu8_epi16(raw);
      const __m256i both =
          first_high ? _mm256_or_si256(_mm256_srli_epi16(wide, 4), _mm256_slli_epi16(wide, 8))
                     : _mm256_or_si256(wide, _mm256_slli_epi16(wide, 4));
      const __m256i codes = _mm256_and_si256(both, _mm256_set1_epi8(15));
      const __m256i low = _mm256_shuffle_epi8(tables_[0], codes);
      const __m256i high = _mm256_shuffle_epi8(tables_[1], codes);
      const __m256i even = _mm256_unpacklo_epi8(low, high), odd = _mm256_unpackhi_epi8(low, high);
      put_vector<how>(out, _mm256_permute2x128_si256(even, odd, 0x20));
      put_vector<how>(out + 16, _mm256_permute2x128_si256(even, odd, 0x31));
    } else {
      std::int32_t word;
      std::memcpy(&word, bytes, sizeof word);
      const __m256i shifts = first_high ? _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24)
                                        : _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
      const __m256i codes = _mm256_srlv_epi32(_mm256_set1_epi32(word), shifts);
      const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28));
      const __m256 values = _mm256_blendv_ps(
          _mm256_castsi256_ps(_mm256_permutevar8x32_epi32(tables_[0], codes)),
          _mm256_castsi256_ps(_mm256_permutevar8x32_epi32(tables_[1], codes)), upper);
      put_vector<how>(out, _mm256_castps_si256(values));
    }
  }
  __m256i tables_[2];
#else
  static constexpr std::int64_t kStep = 2;
  void hold(const VecU32* bits) {
    for (int i = 0; i < 16; ++i) {
      const std::uint32_t value = bits[i / 4][i % 4];
      if constexpr (kIsBf16<S>) {
        values_[i] = {static_cast<std::uint16_t>(value)};
      } else {
        values_[i] = bits_as<float>(value);
      }
    }
  }
  template <Store>
  void whole(const std::uint8_t* bytes, S* out) const {
    out[0] = values_[code(*bytes, 0)];
    out[1] = values_[code(*bytes, 1)];
  }
#endif
  alignas(64) S values_[16];
};

// ---- fp8: 128 magnitudes a block

constexpr std::int64_t kMagnitudes = 128;

struct E4m3Table {
  float magnitude[kMagnitudes];
};
constexpr E4m3Table e4m3_table() {
  E4m3Table out{};
  for (int code = 0; code < kMagnitudes; ++code) {
    float value = static_cast<float>(code % 8) * 0x1p-9F;
    for (int i = 1; i <= code / 8; ++i) value = i == 1 ? value + 0x1p-6F : value * 2;
    out.magnitude[code] = value;
  }
  out.magnitude[127] = __builtin_nanf("");
  return out;
}
alignas(64) constexpr E4m3Table kE4m3 = e4m3_table();

inline Bf16 with_sign(Bf16 value, std::uint8_t code) {
  return {static_cast<std::uint16_t>(value.bits ^ (code & 0x80U) << 8U)};
}
inline float with_sign(float value, std::uint8_t code) {
  return bits_as<float>(bits_as<std::uint32_t>(value) ^ (code & 0x80U) << 24U);
}

/// e4m3's magnitudes times a block's scale.
template <class S>
struct Magnitudes {
  alignas(64) S values[kMagnitudes];

  void fill(float scale) {
    for (std::int64_t i = 0; i < kMagnitudes; i += kLanes<float>) {
      store_values(values + i, load(kE4m3.magnitude + i) * scale);
    }
#if defined(__AVX2__) && !defined(__AVX512F__)
    split();
#endif
  }

#if defined(__AVX2__) && !defined(__AVX512F__)
  // Too many values for AVX2 to look up. But those of one mantissa differ in the exponent alone, by
  // as much as their codes do: the bits of sixteen values, and an addition, give the others.
  using Bits = std::conditional_t<kIsBf16<S>, std::uint16_t, std::uint32_t>;
  static constexpr int kFraction = kIsBf16<S> ? 7 : 23;  ///< bits of S below its exponent

  /// Of [0, 8): the bits of a mantissa with an exponent of 0. Of [8, 16): those of the denormal
  /// codes, which have no exponent.
  alignas(32) Bits sixteen[16];
  alignas(32) std::uint8_t low[16], high[16];  ///< their bytes, if Bf16
  /// False where a scale is so small or large, or not a positive number, that exponents do not add.
  bool exponents_add;

  void split() {
    constexpr std::int64_t kNormal = 8, kLast = 126;  // codes: the first with an exponent
    constexpr Bits kOne = Bits{1} << kFraction, kInfinite = Bits{0xFF} << kFraction;
    const auto bits = [&](std::int64_t code) { return bits_as<Bits>(values[code]); };
    // A negative product counts as large.
    exponents_add = bits(kNormal) > kOne && bits(kLast) < kInfinite;
    for (std::int64_t i = 0; i < 8; ++i) {
      sixteen[i] = static_cast<Bits>(bits(kNormal + i) - kOne);
      sixteen[8 + i] = bits(i);
    }
    for (std::int64_t i = 0; i < 16; ++i) {
      low[i] = static_cast<std::uint8_t>(sixteen[i]);
      high[i] = static_cast<std::uint8_t>(sixteen[i] >> 8U);
    }
  }
#endif
};

#if defined(__AVX2__) && !defined(__AVX512F__)
inline __m256i both_halves(const std::uint8_t* from) {
  return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(from)));
}

/// The first elements of expand_fp8(), as many as whole vectors hold; returns how many.
template <Store how>
std::int64_t expand_vectors(const Magnitudes<Bf16>& table, const std::uint8_t* codes,
                            std::int64_t n, Bf16* out, std::int64_t ahead) {
  const __m256i zero = _mm256_setzero_si256(), eight = _mm256_set1_epi8(8);
  const __m256i low_table = both_halves(table.low), high_table = both_halves(table.high);
  std::int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    __builtin_prefetch(codes + i + ahead);
    __m256i raw;
    std::memcpy(&raw, codes + i, sizeof raw);
    const __m256i exponent = _mm256_and_si256(raw, _mm256_set1_epi8(0x78));
    const __m256i sign = _mm256_and_si256(raw, _mm256_set1_epi8(-128));
    const __m256i nan = _mm256_cmpeq_epi8(_mm256_xor_si256(raw, sign), _mm256_set1_epi8(127));
    const __m256i denormal = _mm256_and_si256(_mm256_cmpeq_epi8(exponent, zero), eight);
    const __m256i at = _mm256_or_si256(_mm256_and_si256(raw, _mm256_set1_epi8(7)), denormal);
    const __m256i low = _mm256_shuffle_epi8(low_table, at);
    const __m256i high = _mm256_xor_si256(_mm256_shuffle_epi8(high_table, at), sign);
    const auto values = [&](__m256i bits, __m256i exponents) {
      return _mm256_add_epi16(bits, _mm256_slli_epi16(exponents, Magnitudes<Bf16>::kFraction - 3));
    };
    const __m256i even =
        values(_mm256_unpacklo_epi8(low, high), _mm256_unpacklo_epi8(exponent, zero));
    const __m256i odd =
        values(_mm256_unpackhi_epi8(low, high), _mm256_unpackhi_epi8(exponent, zero));
    put_vector<how>(out + i, _mm256_permute2x128_si256(even, odd, 0x20));
    put_vector<how>(out + i + 16, _mm256_permute2x128_si256(even, odd, 0x31));
    if (_mm256_testz_si256(nan, nan) == 0) {
      for (std::int64_t j = i; j < i + 32; ++j) {
        out[j] = with_sign(table.values[codes[j] & 127U], codes[j]);
      }
    }
  }
  return i;
}
template <Store how>
std::int64_t expand_vectors(const Magnitudes<float>& table, const std::uint8_t* codes,
                            std::int64_t n, float* out, std::int64_t ahead) {
  __m256 mantissas, denormals;
  std::memcpy(&mantissas, table.sixteen, sizeof mantissas);
  std::memcpy(&denormals, table.sixteen + 8, sizeof denormals);
  std::int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    if (i % 64 == 0) __builtin_prefetch(codes + i + ahead);
    const __m256i raw =
        _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + i)));
    const __m256i exponent = _mm256_and_si256(raw, _mm256_set1_epi32(0x78));
    const __m256i denormal = _mm256_cmpeq_epi32(exponent, _mm256_setzero_si256());
    const __m256i sign = _mm256_slli_epi32(_mm256_srli_epi32(raw, 7), 31);
    const __m256 chosen =
        _mm256_blendv_ps(_mm256_permutevar8x32_ps(mantissas, raw),
                         _mm256_permutevar8x32_ps(denormals, raw), _mm256_castsi256_ps(denormal));
    const __m256i size = _mm256_add_epi32(
        _mm256_castps_si256(chosen), _mm256_slli_epi32(exponent, Magnitudes<float>::kFraction - 3));
    put_vector<how>(out + i, _mm256_or_si256(size, sign));
    const __m256i nan =
        _mm256_cmpeq_epi32(_mm256_and_si256(raw, _mm256_set1_epi32(127)), _mm256_set1_epi32(127));
    if (_mm256_testz_si256(nan, nan) == 0) {
      for (std::int64_t j = i; j < i + 8; ++j) {
        out[j] = with_sign(table.values[codes[j] & 127U], codes[j]);
      }
    }
  }
  return i;
}
#endif

/// out[i] = the magnitude of code i, with the code's sign.
template <Store how, class S>
void expand_fp8(const Magnitudes<S>& table, const std::uint8_t* codes, std::int64_t n, S* out,
                [[maybe_unused]] std::int64_t ahead = kPrefetchBytes) {
  std::int64_t i = 0;
#if defined(__AVX512F__)
  if constexpr (kIsBf16<S>) {
    __m512i part[4];
    std::memcpy(part, table.values, sizeof part);
    for (; i + 32 <= n; i += 32) {
      __builtin_prefetch(codes + i + ahead);
      __m256i raw;
      std::memcpy(&raw, codes + i, sizeof raw);
      const __m512i wide = _mm512_cvtepu8_epi16(raw);
      const __m512i low = _mm512_permutex2var_epi16(part[0], wide, part[1]);
      const __m512i high = _mm512_permutex2var_epi16(part[2], wide, part[3]);
      const __mmask32 upper = _mm512_test_epi16_mask(wide, _mm512_set1_epi16(64));
      const __m512i size = _mm512_mask_blend_epi16(upper, low, high);
      // size ^ (wide << 8 & 0x8000)
      const __m512i found = _mm512_ternarylogic_epi32(size, _mm512_slli_epi16(wide, 8),
                                                      _mm512_set1_epi16(-0x8000), 0x78);
      put_vector<how>(out + i, found);
    }
  } else {
    __m512 part[8];
    std::memcpy(part, table.values, sizeof part);
    for (; i + 16 <= n; i += 16) {
      __m128i raw;
      std::memcpy(&raw, codes + i, sizeof raw);
      const __m512i wide = _mm512_cvtepu8_epi32(raw);
      const __mmask16 second = _mm512_test_epi32_mask(wide, _mm512_set1_epi32(32));
      const __mmask16 upper = _mm512_test_epi32_mask(wide, _mm512_set1_epi32(64));
      const __m512 low =
          _mm512_mask_blend_ps(second, _mm512_permutex2var_ps(part[0], wide, part[1]),
                               _mm512_permutex2var_ps(part[2], wide, part[3]));
      const __m512 high =
          _mm512_mask_blend_ps(second, _mm512_permutex2var_ps(part[4], wide, part[5]),
                               _mm512_permutex2var_ps(part[6], wide, part[7]));
      const __m512i size = _mm512_castps_si512(_mm512_mask_blend_ps(upper, low, high));
      const __m512i found = _mm512_ternarylogic_epi32(size, _mm512_slli_epi32(wide, 24),
                                                      _mm512_set1_epi32(INT32_MIN), 0x78);
      put_vector<how>(out + i, found);
    }
  }
#elif defined(__AVX2__)
  if (table.exponents_add) i = expand_vectors<how>(table, codes, n, out, ahead);
#endif
  const S* values = table.values;
  for (; i < n; ++i) out[i] = with_sign(values[codes[i] & 127U], codes[i]);
}

}  // namespace
}  // namespace tailor
