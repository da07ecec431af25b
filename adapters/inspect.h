#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "adapters/peft_folder.h"
#include "adapters/peft_reader.h"

namespace tailor {

/// One adapted matrix of an adapter, or one for every routed expert of a layer.
struct AdaptedMatrix {
  std::string module;  ///< "model.layers.3.self_attn.q_proj", "...experts.gate_up_proj"
  std::string target;  ///< what of it stands below the layer: "self_attn.q_proj"
  int layer = -1;      ///< -1: in no layer
  std::int64_t experts = 1, rank = 0;
  std::int64_t in = 0, out = 0;  ///< as stored, for fused experts, A's side and B's
  double alpha = 0, scale = 0;
  std::int64_t parameters = 0;
  std::function<LoadedFactors()> load;  ///< reads them, NaN and all
};

/// The matrices of an adapter as its file names them: no model is needed. Experts that lie one by
/// one become one matrix of many experts, gate and up apart; of fused ones a config's rank tells
/// how many they are. `folder` must outlive the result. Throws Error{bad_file} for ranks that do
/// not divide, and experts whose factors differ in shape.
std::vector<AdaptedMatrix> matrices_as_stored(const PeftFolder& folder);

/// As the model knows them, whatever layout the file has. `reader` must outlive the result.
std::vector<AdaptedMatrix> matrices_of_model(const PeftReader& reader);

/// <X, Y> = sum over experts of tr((scale B A)_X^T (scale B A)_Y), in float64, through products of
/// rank times rank only. Experts and sides must be equal.
double inner_product(const AdaptedMatrix& x, const LoadedFactors& factors_x, const AdaptedMatrix& y,
                     const LoadedFactors& factors_y);

/// What one matrix's factors add up to.
struct ChangeOfMatrix {
  double norm = 0;                ///< Frobenius norm of scale B A, over all experts
  std::int64_t experts_used = 0;  ///< whose product is not zero
};
ChangeOfMatrix change_of(const AdaptedMatrix& matrix);

/// Two adapters, matrix by matrix.
struct AdapterDifference {
  struct Matrix {
    std::string module;
    double cosine = 0;    ///< of the two changes as vectors; 0 where one is zero
    double relative = 0;  ///< norm of the difference over the other's norm
    double norm_here = 0, norm_there = 0;
  };
  std::vector<Matrix> matrices;                    ///< of both
  std::vector<std::string> only_here, only_there;  ///< modules
  double cosine = 0, relative = 0;  ///< over all matrices, those of one adapter alone included
};
/// Throws Error{bad_file}, naming `where`, for matrices of one name and other shapes.
AdapterDifference compare(const std::vector<AdaptedMatrix>& here,
                          const std::vector<AdaptedMatrix>& there, const std::string& where);

/// A line of one character a layer: eight heights to the largest of `values`, "0" for zero, "·"
/// where it is negative: no matrix there.
std::string bars(const std::vector<double>& values);

}  // namespace tailor
