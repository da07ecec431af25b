#include "data/store/fingerprint.h"

#include <algorithm>

#include "data/store/source_form.h"

namespace tailor {

std::string layer_sample(const Checkpoint& checkpoint, const ModelSpec& spec, std::int64_t layer) {
  constexpr std::size_t kSampleBytes = 4096;
  std::string text;
  for (const PublishedMatrix& matrix : attention_matrices(spec, layer)) {
    const std::string packed = module_of(matrix.name) + ".weight_packed";
    const std::string& name = checkpoint.has(packed) ? packed : matrix.name;
    const auto bytes = checkpoint.bytes(checkpoint.find(name));
    text.append(reinterpret_cast<const char*>(bytes.data()), std::min(bytes.size(), kSampleBytes));
  }
  return sha256_hex(text);
}

std::string join_samples(const std::map<std::int64_t, std::string>& samples) {
  std::string text;
  for (const auto& [layer, sample] : samples) text += sample + "\n";
  return sha256_hex(text);
}

std::string fingerprint(const Checkpoint& checkpoint, const ModelSpec& spec) {
  std::map<std::int64_t, std::string> samples;
  for (std::int64_t l = 0; l < spec.layer_count(); ++l) {
    samples[l] = layer_sample(checkpoint, spec, l);
  }
  return join_samples(samples);
}

}  // namespace tailor
