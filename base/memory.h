#pragma once

#include <cstdint>
#include <optional>

namespace tailor {

/// Hands memory that was freed but is still held by the allocator back to the system. Worth calling
/// once, after a phase that took and freed many small pieces (a tokenizer's tables are 100 MB of
/// them) and before one that needs large ones.
void release_free_memory();

/// Most memory this process has held at once, its file mappings included (VmHWM); nothing where the
/// system does not say.
std::optional<std::int64_t> resident_bytes_peak();

/// What it holds now (VmRSS).
std::optional<std::int64_t> resident_bytes();

}  // namespace tailor
