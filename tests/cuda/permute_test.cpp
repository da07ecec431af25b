#include "trainer/cuda/bodies/permute.h"

#include <gmock/gmock.h>

#include "tests/cuda/cpu_launch.h"
#include "tests/cuda/gpu.h"
#include "trainer/cuda/kernels.h"

namespace tailor::cuda {
namespace {

struct Case {
  std::string name;
  std::int64_t tokens;
  std::int32_t K, E;
  std::vector<std::int32_t> expert;
  std::vector<float> gate;
  std::vector<std::uint64_t> token_id;
};

template <class Choose>
Case make_case(const std::string& name, std::int64_t tokens, std::int32_t K, std::int32_t E,
               Choose choose) {
  Case out{name + ": " + std::to_string(tokens) + " tokens, K " + std::to_string(K) + ", E " +
               std::to_string(E),
           tokens,
           K,
           E,
           {},
           {},
           {}};
  std::mt19937_64 random(static_cast<std::uint64_t>(tokens * 31 + K * 7 + E));
  for (std::int64_t slot = 0; slot < tokens * K; ++slot) {
    out.expert.push_back(choose(slot, random));
    out.gate.push_back(static_cast<float>(random() >> 40U));
  }
  for (std::int64_t t = 0; t < tokens; ++t) out.token_id.push_back(random() >> 8U);
  return out;
}

std::vector<Case> cases() {
  std::vector<Case> out;
  for (const std::int64_t tokens : {0, 1, 31, 1021, 2503}) {
    for (const std::int32_t K : {1, 3, 8}) {
      for (const std::int32_t E : {1, 7, 128, 256, 1000}) {
        out.push_back(make_case("random", tokens, K, E, [E](std::int64_t, std::mt19937_64& random) {
          return static_cast<std::int32_t>(random() % static_cast<std::uint64_t>(E));
        }));
      }
    }
  }
  out.push_back(make_case("all to one", 2049, 2, 37, [](auto, auto&) { return 21; }));
  out.push_back(make_case("all to the last", 300, 1, 1024, [](auto, auto&) { return 1023; }));
  // 36 chunks, more than a block of 32 threads has threads.
  out.push_back(make_case("many chunks", 12001, 3, 12, [](auto, std::mt19937_64& random) {
    return static_cast<std::int32_t>(random() % 12);
  }));
  out.push_back(make_case("falling", 3000, 1, 300, [](std::int64_t slot, auto&) {
    return static_cast<std::int32_t>(299 - slot / 10);
  }));
  out.push_back(make_case("every fifth expert", 4000, 2, 100, [](auto, std::mt19937_64& random) {
    return static_cast<std::int32_t>(random() % 20 * 5 + 2);
  }));
  return out;
}

struct Result {
  std::vector<std::int64_t> expert_begin;
  std::vector<std::int32_t> token_of_row, row_of_slot;
  std::vector<float> gate_of_row;
  std::vector<std::uint64_t> id_of_row;
  bool operator==(const Result&) const = default;
};

/// What sorting gives: a stable sort of the slots by expert.
Result reference(const Case& of) {
  std::vector<std::size_t> order(of.expert.size());
  std::iota(order.begin(), order.end(), 0U);
  std::stable_sort(order.begin(), order.end(),
                   [&](std::size_t a, std::size_t b) { return of.expert[a] < of.expert[b]; });
  Result out;
  for (std::int32_t e = 0; e <= of.E; ++e) {
    out.expert_begin.push_back(std::count_if(of.expert.begin(), of.expert.end(),
                                             [e](std::int32_t chosen) { return chosen < e; }));
  }
  const auto K = static_cast<std::size_t>(of.K);
  out.row_of_slot.resize(order.size());
  for (std::size_t row = 0; row < order.size(); ++row) {
    const std::size_t slot = order[row];
    out.row_of_slot[slot] = static_cast<std::int32_t>(row);
    out.token_of_row.push_back(static_cast<std::int32_t>(slot / K));
    out.gate_of_row.push_back(of.gate[slot]);
    out.id_of_row.push_back(of.token_id[slot / K] + (std::uint64_t{slot % K} << 56U));
  }
  return out;
}

Result on_cpu(const Case& of, Launch launch) {
  const std::size_t slots = of.expert.size();
  Guarded<std::int64_t> expert_begin(static_cast<std::size_t>(of.E) + 1);
  Guarded<std::int32_t> token_of_row(slots), row_of_slot(slots);
  Guarded<float> gate_of_row(slots);
  Guarded<std::uint64_t> id_of_row(slots);
  Guarded<std::int32_t> scratch(static_cast<std::size_t>(permute_scratch(of.tokens, of.K, of.E)));
  const Permutation p = {of.tokens,
                         of.K,
                         of.E,
                         of.expert.data(),
                         of.gate.data(),
                         of.token_id.data(),
                         expert_begin.data(),
                         token_of_row.data(),
                         row_of_slot.data(),
                         gate_of_row.data(),
                         id_of_row.data(),
                         scratch.data()};
  CpuLauncher run(launch);
  run(PermuteCount{p});
  run(PermuteChunks{p});
  run(PermuteExperts{p});
  run(PermuteScatter{p});
  EXPECT_TRUE(expert_begin.guards_whole() && token_of_row.guards_whole() &&
              row_of_slot.guards_whole() && gate_of_row.guards_whole() &&
              id_of_row.guards_whole() && scratch.guards_whole())
      << of.name;
  return {expert_begin.values(), token_of_row.values(), row_of_slot.values(), gate_of_row.values(),
          id_of_row.values()};
}

TEST(CudaPermute, rows_are_sorted_by_expert_then_token_then_slot) {
  for (const Case& of : cases()) {
    const Result want = reference(of);
    for (const Launch& launch : launches()) {
      ASSERT_TRUE(on_cpu(of, launch) == want) << of.name << ", " << launch.text();
    }
  }
}

TEST(CudaPermute, gates_and_ids_may_be_left_out) {
  Case of = make_case("random", 500, 2, 5, [](auto, std::mt19937_64& random) {
    return static_cast<std::int32_t>(random() % 5);
  });
  const Result want = reference(of);
  std::vector<std::int64_t> expert_begin(6);
  std::vector<std::int32_t> token_of_row(1000), row_of_slot(1000),
      scratch(static_cast<std::size_t>(permute_scratch(500, 2, 5)));
  Permutation p{};
  p.tokens = 500;
  p.K = 2;
  p.E = 5;
  p.expert = of.expert.data();
  p.expert_begin = expert_begin.data();
  p.token_of_row = token_of_row.data();
  p.row_of_slot = row_of_slot.data();
  p.scratch = scratch.data();
  CpuLauncher run({256, Order::shuffled});
  run(PermuteCount{p});
  run(PermuteChunks{p});
  run(PermuteExperts{p});
  run(PermuteScatter{p});
  EXPECT_EQ(expert_begin, want.expert_begin);
  EXPECT_EQ(token_of_row, want.token_of_row);
  EXPECT_EQ(row_of_slot, want.row_of_slot);
}

TEST(CudaPermute, the_gpu_gives_the_bits_of_the_cpu) {
  if (!Gpu::missing().empty()) GTEST_SKIP() << Gpu::missing();
  for (const Case& of : cases()) {
    const std::size_t slots = of.expert.size(), begins = static_cast<std::size_t>(of.E) + 1;
    Gpu gpu;
    const Permutation p = {
        of.tokens,
        of.K,
        of.E,
        gpu.upload(of.expert),
        gpu.upload(of.gate),
        gpu.upload(of.token_id),
        gpu.output<std::int64_t>(begins),
        gpu.output<std::int32_t>(slots),
        gpu.output<std::int32_t>(slots),
        gpu.output<float>(slots),
        gpu.output<std::uint64_t>(slots),
        gpu.output<std::int32_t>(static_cast<std::size_t>(permute_scratch(of.tokens, of.K, of.E)))};
    permute(p, gpu.stream());
    const Result got{gpu.download(p.expert_begin, begins), gpu.download(p.token_of_row, slots),
                     gpu.download(p.row_of_slot, slots), gpu.download(p.gate_of_row, slots),
                     gpu.download(p.id_of_row, slots)};
    EXPECT_TRUE(got == reference(of)) << of.name;
  }
}

}  // namespace
}  // namespace tailor::cuda
