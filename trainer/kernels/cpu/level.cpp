// Compiled once per instruction-set level, with TAILOR_LEVEL its name: see trainer/CMakeLists.txt.
// Register tiles are arrays of vectors indexed by int: every such index would need a cast.
#pragma GCC diagnostic ignored "-Wsign-conversion"
#include "trainer/kernels/cpu/attention.h"
#include "trainer/kernels/cpu/dequantise.h"
#include "trainer/kernels/cpu/few_rows_t.h"
#include "trainer/kernels/cpu/lora.h"
#include "trainer/kernels/cpu/rows.h"
#include "trainer/kernels/levels.h"

namespace tailor {
namespace {

template <class S>
constexpr Kernels<S> kTable = {
    .rms_norm = rms_norm<S>,
    .rms_norm_backward = rms_norm_backward<S>,
    .qk_prepare = qk_prepare<S>,
    .qk_prepare_backward = qk_prepare_backward<S>,
    .attention = attention<S>,
    .attention_backward = attention_backward<S>,
    .swiglu = swiglu<S>,
    .swiglu_backward = swiglu_backward<S>,
    .few_rows = nullptr,
    .few_rows_stored = nullptr,
    .few_rows_t = nullptr,
    .few_rows_t_stored = nullptr,
    .lora_down = lora_down<S>,
    .lora_up = lora_up<S>,
    .lora_gradient = lora_gradient<S>,
    .gather_rows = gather_rows<S>,
    .combine_rows = combine_rows<S>,
    .gate_gradient = gate_gradient<S>,
    .softmax_run = softmax_run<S>,
    .softmax_weights = softmax_weights<S>,
    .softmax_sum = softmax_sum<S>,
    .softmax_gradient = softmax_gradient<S>,
    .dropout = dropout<S>,
    .add = add<S>,
    .dequantise = dequantise<S>,
};

#if defined(__AVX512BF16__)
template <class Block, class RowsOfW>
constexpr Kernels<Bf16> with_products() {
  Kernels<Bf16> all = kTable<Bf16>;
  all.few_rows = few_rows<Block>;
  all.few_rows_stored = few_rows_stored<Block>;
  all.few_rows_t = few_rows_t<RowsOfW>;
  all.few_rows_t_stored = few_rows_t_stored<RowsOfW>;
  return all;
}
constexpr Kernels<Bf16> kBf16Table = with_products<Avx512Block, Avx512RowsOfW>();
#else
constexpr Kernels<Bf16> kBf16Table = kTable<Bf16>;
#endif
#if defined(__AMX_BF16__)
constexpr Kernels<Bf16> kAmxTable = with_products<AmxBlock, AmxRowsOfW>();
#endif

}  // namespace

const LevelTables TAILOR_LEVEL = {&kTable<double>, &kTable<float>, &kBf16Table};
#if defined(__AMX_BF16__)
const LevelTables kLevelV4Amx = {&kTable<double>, &kTable<float>, &kAmxTable};
#endif

}  // namespace tailor
