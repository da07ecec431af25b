#pragma once

#include <array>
#include <cstdint>

namespace tailor {

/// Philox4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3",
/// SC 2011): four 32-bit words that depend on counter and key alone, so that a number can be asked
/// for by name (seed, stream, index) in any order, on any thread, on any rank.
/// Always inlined: it is also used by files compiled for one instruction-set level only.
[[gnu::always_inline]] constexpr std::array<std::uint32_t, 4> philox(
    std::array<std::uint32_t, 4> counter, std::array<std::uint32_t, 2> key) {
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t a = std::uint64_t{0xD2511F53U} * counter[0];
    const std::uint64_t b = std::uint64_t{0xCD9E8D57U} * counter[2];
    counter = {
        static_cast<std::uint32_t>(b >> 32U) ^ counter[1] ^ key[0], static_cast<std::uint32_t>(b),
        static_cast<std::uint32_t>(a >> 32U) ^ counter[3] ^ key[1], static_cast<std::uint32_t>(a)};
    key[0] += 0x9E3779B9U;
    key[1] += 0xBB67AE85U;
  }
  return counter;
}

/// What a random number is for; part of its name, so that two uses never share numbers.
enum class RandomStream : std::uint32_t { lora_init = 1, shuffle = 2, dropout = 3, sample = 4 };

/// 64 random bits named by (seed, stream, a, b).
constexpr std::uint64_t random_bits(std::uint64_t seed, RandomStream stream, std::uint64_t a,
                                    std::uint64_t b = 0) {
  const auto words =
      philox({static_cast<std::uint32_t>(a), static_cast<std::uint32_t>(a >> 32U),
              static_cast<std::uint32_t>(b),
              static_cast<std::uint32_t>(b >> 32U) ^ (static_cast<std::uint32_t>(stream) << 24U)},
             {static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32U)});
  return (std::uint64_t{words[1]} << 32U) | words[0];
}

/// Uniform in [0, 1) with 53 bits.
constexpr double random_unit(std::uint64_t seed, RandomStream stream, std::uint64_t a,
                             std::uint64_t b = 0) {
  return static_cast<double>(random_bits(seed, stream, a, b) >> 11U) * 0x1.0p-53;
}

/// FNV-1a, to name a stream by a string (a tensor's name).
constexpr std::uint64_t name_hash(const char* text) {
  std::uint64_t hash = 14695981039346656037ULL;
  for (; *text != '\0'; ++text) {
    hash = (hash ^ static_cast<unsigned char>(*text)) * 1099511628211ULL;
  }
  return hash;
}

}  // namespace tailor
