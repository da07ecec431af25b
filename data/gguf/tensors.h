#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "data/checkpoint/model_spec.h"
#include "data/checkpoint/published.h"

namespace tailor {

/// How a published matrix becomes (part of) a GGUF tensor.
enum class GgufForm {
  plain,         ///< the same rows
  rotary_pairs,  ///< q and k of llama: the two rows that rotary embedding turns together, half a
                 ///< head apart in Hugging Face's order, lie side by side
  latent_keys,   ///< of kv_b: every head's key rows, turned: [heads, kv_rank, nope]
  latent_values  ///< of kv_b: every head's value rows: [heads, value, kv_rank]
};

/// The place of a published matrix in a GGUF file.
struct GgufPlace {
  std::string tensor;
  std::vector<std::int64_t>
      shape;  ///< of the tensor, rows first; experts first where there are any
  GgufForm form = GgufForm::plain;
  std::int64_t heads = 0;  ///< that `form` goes by
  std::int64_t first = 0;  ///< elements of the tensor before the matrix's: those of other experts
  bool float32 = false;    ///< kept as F32 whatever the file's type: llama.cpp wants it so
};

/// Where `matrix` lies, of layer `layer` (-1 for the matrices of no layer) and, of a routed
/// expert's, `expert`. More than one place only for kv_b_proj, which llama.cpp keeps in two
/// tensors. Names as gguf-py's constants.py gives them (llama.cpp, MODEL_TENSOR).
std::vector<GgufPlace> gguf_places(const ModelSpec& spec, const PublishedMatrix& matrix,
                                   std::int64_t layer, std::int64_t expert);

/// All of a model's matrices with their places: file order, experts one by one, each once.
struct GgufMatrix {
  PublishedMatrix matrix;
  std::vector<GgufPlace> places;
};
/// `experts_fused`: matrices name slices of fused tensors (published.h); places are the same.
std::vector<GgufMatrix> gguf_matrices(const ModelSpec& spec, bool experts_fused);

/// Row of the GGUF order -> row of Hugging Face's, in a head of `width` rows (rotary_pairs).
inline std::int64_t unpaired_row(std::int64_t row, std::int64_t width) {
  return row % 2 * (width / 2) + row / 2;
}

/// Factors on the frequencies of every pair, as `rope_freqs.weight` has them; empty where llama.cpp
/// needs none. Of rope types llama3 and longrope.
std::vector<float> rope_frequency_factors(const ModelSpec& spec);

}  // namespace tailor
