#pragma once

#include <map>
#include <string>

#include "data/checkpoint/checkpoint.h"
#include "data/checkpoint/model_spec.h"

namespace tailor {

/// SHA-256 over the first 4 KiB of every attention matrix: tells checkpoints of one shape apart,
/// unless they differ in nothing but MLPs and experts.
std::string fingerprint(const Checkpoint& checkpoint, const ModelSpec& spec);

/// The part of it that is a layer's, and what makes the whole of all of them, by layer.
std::string layer_sample(const Checkpoint& checkpoint, const ModelSpec& spec, std::int64_t layer);
std::string join_samples(const std::map<std::int64_t, std::string>& samples);

}  // namespace tailor
