#pragma once

#include <cstdint>

#include "base/random.h"
#include "trainer/cuda/host_device.h"

namespace tailor {

/// The body of the self-check kernel, a function of block and thread: number i of out [count] is
/// word i % 4 of Philox block i / 4. Dropout masks on a GPU rest on these bits.
TAILOR_HOST_DEVICE inline void self_check_body(unsigned block, unsigned thread,
                                               unsigned block_threads, std::uint32_t count,
                                               std::uint32_t* out) {
  const std::uint32_t i = block * block_threads + thread;
  if (i >= count) return;
  out[i] = philox({i / 4, 0x243F6A88U, 0x85A308D3U, 0}, {0xA4093822U, 0x299F31D0U})[i % 4];
}

}  // namespace tailor
