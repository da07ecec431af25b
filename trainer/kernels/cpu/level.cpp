// Compiled once per instruction-set level, with TAILOR_LEVEL its name: see trainer/CMakeLists.txt.
// Register tiles are arrays of vectors indexed by int: every such index would need a cast.
#pragma GCC diagnostic ignored "-Wsign-conversion"
#include "trainer/kernels/cpu/attention.h"
#include "trainer/kernels/cpu/dequantise.h"
#include "trainer/kernels/cpu/few_rows.h"
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
    .few_rows = few_rows_of<S>(),
    .lora_down = lora_down<S>,
    .lora_up = lora_up<S>,
    .lora_gradient = lora_gradient<S>,
    .gather_rows = gather_rows<S>,
    .combine_rows = combine_rows<S>,
    .gate_gradient = gate_gradient<S>,
    .softmax_run = softmax_run<S>,
    .softmax_gradient = softmax_gradient<S>,
    .dropout = dropout<S>,
    .add = add<S>,
    .dequantise = dequantise<S>,
};

#if defined(__AMX_BF16__)
constexpr Kernels<Bf16> with_amx() {
  Kernels<Bf16> all = kTable<Bf16>;
  all.few_rows = few_rows<AmxBlock>;
  return all;
}
constexpr Kernels<Bf16> kAmxTable = with_amx();
#endif

}  // namespace

const LevelTables TAILOR_LEVEL = {&kTable<double>, &kTable<float>, &kTable<Bf16>};
#if defined(__AMX_BF16__)
const LevelTables kLevelV4Amx = {&kTable<double>, &kTable<float>, &kAmxTable};
#endif

}  // namespace tailor
