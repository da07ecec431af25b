#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace tailor {

/// Element types of checkpoints, by their safetensors names.
enum class Dtype { f64, f32, f16, bf16, f8_e4m3, i64, i32, i16, i8, u8, boolean };

std::int64_t dtype_bytes(Dtype dtype);
std::string_view dtype_name(Dtype dtype);  ///< "BF16"

}  // namespace tailor
