#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

namespace tailor {

/// Element types of GGUF tensors by the numbers that files hold (ggml.h, enum ggml_type).
enum class GgmlType : std::uint32_t {
  f32 = 0,
  f16 = 1,
  q4_0 = 2,
  q4_1 = 3,
  q5_0 = 6,
  q5_1 = 7,
  q8_0 = 8,
  q4_k = 12,
  q5_k = 13,
  q6_k = 14,
  bf16 = 30,
};

/// How a type's numbers lie: `block` of them in `bytes` bytes, along a row.
struct GgmlLayout {
  GgmlType type;
  std::string_view name;  ///< "Q8_0", as llama.cpp prints it
  std::int64_t block, bytes;
};
/// Null for a type that is not read here.
const GgmlLayout* ggml_layout(std::uint32_t type);
const GgmlLayout& ggml_layout(GgmlType type);
/// Name of a type that files may hold, whether it is read here or not; empty for an unknown number.
std::string_view ggml_type_name(std::uint32_t type);

/// `count` numbers, whole blocks, as float32: sums and products in float32 in the order in which
/// PyPI's gguf and ggml form them, so that the bits are theirs. No pointer need be aligned.
void dequantise(GgmlType type, const std::byte* from, std::int64_t count, float* out);

/// The reverse for f32, f16, bf16 and q8_0; to nearest, ties to even, and q8_0's codes as ggml
/// rounds them: half away from zero, with a scale of (largest magnitude) / 127 kept as float16.
/// False where a number is not finite, or becomes infinite (f16; q8_0 from 127 * 65,504 on);
/// `bad` then is its index. NaN and infinity are refused for every type.
bool quantise(GgmlType type, const float* from, std::int64_t count, std::byte* out,
              std::int64_t& bad);

}  // namespace tailor
