#pragma once

// Runs bodies of kernels on the CPU, over every block and thread, in an order of one's choice.

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "trainer/cuda/bodies/words.h"

namespace tailor::cuda {

enum class Order { forward, reverse, shuffled };

struct Launch {
  std::uint32_t threads;
  Order order;
  std::string text() const {
    const char* const orders[] = {"forward", "reverse", "shuffled"};
    return std::to_string(threads) + " threads, " + orders[static_cast<int>(order)];
  }
};

inline std::vector<Launch> launches() {
  std::vector<Launch> out;
  for (const std::uint32_t threads : {32U, 128U, 256U}) {
    for (const Order order : {Order::forward, Order::reverse, Order::shuffled}) {
      out.push_back({threads, order});
    }
  }
  return out;
}

class CpuLauncher {
 public:
  explicit CpuLauncher(Launch launch, std::uint32_t seed = 1) : launch_(launch), random_(seed) {}

  template <class Body>
  void operator()(const Body& body) {
    const auto blocks = static_cast<std::uint32_t>(body.blocks(launch_.threads));
    for (const std::uint32_t block : order(blocks)) {
      if constexpr (Phased<Body>) {
        // What a block finds in shared memory and registers is what another left there.
        typename Body::Shared shared;
        std::memset(static_cast<void*>(&shared), 0xA5, sizeof shared);
        std::vector<typename Body::State> states(launch_.threads);
        std::memset(static_cast<void*>(states.data()), 0xA5, sizeof states[0] * states.size());
        const int phases = body.phases(launch_.threads);
        for (int phase = 0; phase < phases; ++phase) {
          for (const std::uint32_t thread : order(launch_.threads)) {
            body.run(phase, {block, thread, launch_.threads}, states[thread], shared);
          }
        }
      } else {
        for (const std::uint32_t thread : order(launch_.threads)) {
          body.run({block, thread, launch_.threads});
        }
      }
    }
  }

 private:
  std::vector<std::uint32_t> order(std::uint32_t count) {
    std::vector<std::uint32_t> out(count);
    std::iota(out.begin(), out.end(), 0U);
    if (launch_.order == Order::reverse) std::reverse(out.begin(), out.end());
    if (launch_.order == Order::shuffled) std::shuffle(out.begin(), out.end(), random_);
    return out;
  }

  Launch launch_;
  std::mt19937 random_;
};

/// Memory aligned as a device's, with guards on both sides that have to stay as they are.
template <class T>
class Guarded {
 public:
  explicit Guarded(std::size_t count, unsigned char fill = 0xCD)
      : count_(count), bytes_(count * sizeof(T) + 3 * kGuard, fill), fill_(fill) {}
  explicit Guarded(const std::vector<T>& values) : Guarded(values.size()) {
    std::copy(values.begin(), values.end(), data());
  }

  T* data() { return const_cast<T*>(std::as_const(*this).data()); }
  const T* data() const {
    const auto begin = reinterpret_cast<std::uintptr_t>(bytes_.data());
    const std::size_t shift = (kGuard - begin % kGuard) % kGuard;
    return reinterpret_cast<const T*>(bytes_.data() + shift + kGuard);
  }
  std::vector<T> values() { return std::vector<T>(data(), data() + count_); }
  std::size_t size() const { return count_; }
  bool guards_whole() {
    const auto* begin = bytes_.data();
    const auto* first = reinterpret_cast<unsigned char*>(data());
    const auto* last = first + count_ * sizeof(T);
    const auto same = [&](unsigned char byte) { return byte == fill_; };
    return std::all_of(begin, first, same) && std::all_of(last, begin + bytes_.size(), same);
  }

 private:
  static constexpr std::size_t kGuard = 64;
  std::size_t count_;
  std::vector<unsigned char> bytes_;
  unsigned char fill_;
};

/// How often each cell of an output of `count` cells is written: every thread runs by itself on two
/// backgrounds, one of which a written value differs from. `make` gives the body for an output.
template <class T, class Make>
std::vector<int> write_counts(std::size_t count, std::uint32_t threads, Make make) {
  std::vector<int> counts(count, 0);
  Guarded<T> light(count, 0x11), dark(count, 0xEE);
  const std::vector<T> light_before = light.values(), dark_before = dark.values();
  const auto on_light = make(light.data()), on_dark = make(dark.data());
  const auto blocks = static_cast<std::uint32_t>(on_light.blocks(threads));
  for (std::uint32_t block = 0; block < blocks; ++block) {
    for (std::uint32_t thread = 0; thread < threads; ++thread) {
      on_light.run({block, thread, threads});
      on_dark.run({block, thread, threads});
      for (std::size_t i = 0; i < count; ++i) {
        const bool written = light.data()[i] != light_before[i] || dark.data()[i] != dark_before[i];
        if (!written) continue;
        ++counts[i];
        light.data()[i] = light_before[i];
        dark.data()[i] = dark_before[i];
      }
    }
  }
  EXPECT_TRUE(light.guards_whole() && dark.guards_whole()) << "written outside";
  return counts;
}

/// Rounded to nearest even by trying both neighbours in double: nothing shared with to_bf16.
inline Bf16Bits reference_bf16(float value) {
  if (std::isnan(value)) return 0x7FFF;
  std::uint32_t bits = 0;
  std::memcpy(&bits, &value, sizeof bits);
  const auto down = static_cast<Bf16Bits>(bits >> 16U);
  const auto up = static_cast<Bf16Bits>(down + 1U);  // the next in magnitude; infinity at the top
  const auto wide = [](Bf16Bits half) {
    const std::uint32_t whole = std::uint32_t{half} << 16U;
    float out = 0;
    std::memcpy(&out, &whole, sizeof out);
    return std::isinf(out) ? std::copysign(0x1.0p128, static_cast<double>(out))
                           : static_cast<double>(out);
  };
  if (std::isinf(value)) return down;
  const auto exact = static_cast<double>(value);
  const double below = std::fabs(exact - wide(down)), above = std::fabs(wide(up) - exact);
  if (below == above) return down % 2 == 0 ? down : up;
  return below < above ? down : up;
}

/// Numbers of many magnitudes, zeros of both signs among them.
inline std::vector<Bf16Bits> random_bf16(std::size_t count, std::uint32_t seed,
                                         float deviation = 1.0F) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0.0F, deviation);
  std::vector<Bf16Bits> out(count);
  for (Bf16Bits& value : out) value = reference_bf16(normal(random));
  for (std::size_t i = 3; i < count; i += 97) out[i] = i % 2 == 0 ? 0x8000 : 0;
  return out;
}

}  // namespace tailor::cuda
