// One layer's attention alone, forward and backward with LoRA, on inputs and weights from files:
// what compare_attention.py runs beside transformers and PEFT.
//
//     bench_attention FOLDER float32|bfloat16 THREADS ROUNDS
//
// FOLDER holds model/ (layer 0 is taken), adapter/ (PEFT) and input.safetensors: x and dh [T, D],
// one document. Prints the seconds of every round, the first one included, as JSON, and writes
// output.safetensors (h and dx) and gradients/ (as a PEFT folder).

#include <ATen/Parallel.h>

#include <cstdio>
#include <cstdlib>
#include <map>
#include <numeric>
#include <string>

#include "adapters/peft_files.h"
#include "base/clock.h"
#include "base/error.h"
#include "data/checkpoint/safetensors.h"
#include "trainer/models/attention.h"
#include "trainer/optim/cast_factors.h"

namespace tailor {
namespace {

at::Tensor read_tensor(const fs::path& path, const std::string& name, at::ScalarType dtype) {
  const MappedFile file(path);
  const SafetensorsHeader header = parse_safetensors_header(file.bytes(), path);
  for (const auto& [each, info] : header.tensors) {
    if (each != name || info.dtype != Dtype::f32) continue;
    auto* from = const_cast<std::byte*>(file.bytes().data()) + info.offset;
    return at::from_blob(from, info.shape, at::kFloat).clone().to(dtype);
  }
  throw Error(Fault::bad_file, {"no float32 tensor '" + name + "'", path.string(),
                                "tests/bench/compare_attention.py writes the folder."});
}

template <class S>
void run(const fs::path& folder, int rounds) {
  const ModelSpec spec = read_model_spec(folder / "model");
  const Checkpoint checkpoint = Checkpoint::open(folder / "model");
  const LayerWeights weights = load_weights(checkpoint, spec, kDtype<S>).layers.front();
  Adapter adapter = read_peft_adapter(folder / "adapter", spec);
  CastFactors factors(kDtype<S>);
  factors.cast_all(adapter);
  const at::Tensor gradients = at::zeros({adapter.parameter_count()}, kDtype<AccumOf<S>>);
  Workspace workspace;
  PassContext<S> context;
  context.workspace = &workspace;
  context.adapter = &adapter;
  context.factors = data<S>(factors.tensor());
  context.gradients = data<AccumOf<S>>(gradients);
  const auto attention = Attention<S>::create(spec, 0, weights, context);

  const at::Tensor x = read_tensor(folder / "input.safetensors", "x", kDtype<S>);
  const at::Tensor dh = read_tensor(folder / "input.safetensors", "dh", kDtype<S>);
  const at::Tensor h = at::empty_like(x), dx = at::empty_like(x);
  const auto tokens = static_cast<std::int32_t>(x.size(0));
  std::vector<std::int32_t> position(static_cast<std::size_t>(tokens));
  std::iota(position.begin(), position.end(), 0);
  const std::vector<std::int32_t> bounds = {0, tokens};
  TokenInput input;
  input.ids = input.position = position;
  input.document_start = input.micro_batch_start = bounds;
  const TokenLayout<AccumOf<S>> layout(spec, input);

  const char* comma = "";
  std::printf("{\"rounds\": [");
  for (int round = 0; round < rounds; ++round) {
    const Frame frame(workspace.kept);
    gradients.zero_();
    const double began = seconds_now();
    const AttentionKept kept = attention->allocate(tokens, workspace.kept);
    attention->forward(layout, 0, x, h, kept);
    const double turned = seconds_now();
    attention->backward(layout, 0, x, dh, kept, dx, true);
    const double ended = seconds_now();
    std::printf("%s{\"forward\": %.6f, \"backward\": %.6f}", comma, turned - began, ended - turned);
    comma = ", ";
  }
  std::printf("], \"scratch_bytes\": %lld, \"kept_bytes\": %lld}\n",
              static_cast<long long>(workspace.scratch.bytes_peak()),
              static_cast<long long>(workspace.kept.bytes_peak()));

  const at::Tensor results[] = {h.to(at::kFloat), dx.to(at::kFloat)};
  const char* names[] = {"h", "dx"};
  std::vector<TensorToWrite> files;
  for (std::size_t i = 0; i < 2; ++i) {
    files.push_back({names[i],
                     Dtype::f32,
                     results[i].sizes().vec(),
                     {static_cast<const std::byte*>(results[i].data_ptr()), results[i].nbytes()}});
  }
  write_safetensors(folder / "output.safetensors", files);
  const at::Tensor narrow_gradients = gradients.to(at::kFloat);
  std::copy_n(narrow_gradients.const_data_ptr<float>(), narrow_gradients.numel(),
              adapter.factors().begin());
  write_peft_adapter(folder / "gradients", adapter, spec, {"base", ""});
}

int main_of(int argc, char** argv) {
  const std::string dtype = argc == 5 ? argv[2] : "";
  if (dtype != "float32" && dtype != "bfloat16") {
    std::fprintf(stderr, "usage: bench_attention FOLDER float32|bfloat16 THREADS ROUNDS\n");
    return 2;
  }
  at::set_num_threads(std::atoi(argv[3]));
  const int rounds = std::atoi(argv[4]);
  try {
    dtype == "float32" ? run<float>(argv[1], rounds) : run<Bf16>(argv[1], rounds);
  } catch (const Error& error) {
    std::fprintf(stderr, "%s", to_text(error).c_str());
    return 65;
  }
  return 0;
}

}  // namespace
}  // namespace tailor

int main(int argc, char** argv) { return tailor::main_of(argc, argv); }
