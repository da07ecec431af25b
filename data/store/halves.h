#pragma once

#include <cstddef>
#include <cstdint>

#include "data/checkpoint/dtype.h"
#include "data/quant/numbers.h"

namespace tailor {

/// `value` as the nearest IEEE half, ties to even, infinite beyond 65,504 and a half step.
float rounded_to_half(float value);

/// `count` numbers of F32, F16 or BF16 as floats, exactly; `from` need not be aligned.
void widen(Dtype dtype, const std::byte* from, std::int64_t count, float* out);

}  // namespace tailor
