#pragma once

namespace tailor {

/// Hands memory that was freed but is still held by the allocator back to the system. Worth calling
/// once, after a phase that took and freed many small pieces (a tokenizer's tables are 100 MB of
/// them) and before one that needs large ones.
void release_free_memory();

}  // namespace tailor
