#include "trainer/cuda/bodies/cross_entropy.h"

#include <gmock/gmock.h>

#include "tests/cuda/cpu_launch.h"
#include "tests/cuda/gpu.h"
#include "trainer/cuda/kernels.h"

namespace tailor::cuda {
namespace {

struct Rows {
  std::int64_t n, V;
  std::vector<Bf16Bits> logits;
  std::vector<std::int32_t> target;
  double scale = 0.25;
};

Rows random_rows(std::int64_t n, std::int64_t V, std::uint32_t seed, float deviation = 3.0F) {
  Rows out{n, V, random_bf16(static_cast<std::size_t>(n * V), seed, deviation), {}};
  std::mt19937 random(seed);
  for (std::int64_t row = 0; row < n; ++row) {
    out.target.push_back(static_cast<std::int32_t>(random() % static_cast<std::uint64_t>(V)));
  }
  return out;
}

struct Result {
  std::vector<Bf16Bits> logits;
  std::vector<double> loss;
  std::vector<std::int32_t> best;
  bool operator==(const Result& other) const {
    return same_bits(logits, other.logits) && same_bits(loss, other.loss) && best == other.best;
  }
};

Result whole(const Rows& rows, Launch launch, std::uint32_t seed = 1) {
  const auto n = static_cast<std::size_t>(rows.n);
  Guarded<Bf16Bits> logits(rows.logits);
  Guarded<double> loss(n);
  Guarded<std::int32_t> best(n);
  CpuLauncher run(launch, seed);
  run(CrossEntropy{rows.n, rows.V, logits.data(), rows.target.data(), rows.scale, loss.data(),
                   best.data()});
  EXPECT_TRUE(logits.guards_whole() && loss.guards_whole() && best.guards_whole());
  return {logits.values(), loss.values(), best.values()};
}

/// One row in long double.
struct Reference {
  std::int32_t best = 0;
  long double loss = 0;
  std::vector<double> gradient;
};
Reference reference(const Rows& rows, std::int64_t row) {
  Reference out;
  std::vector<long double> z;
  for (std::int64_t c = 0; c < rows.V; ++c) {
    z.push_back(static_cast<long double>(
        to_float(rows.logits[static_cast<std::size_t>(row * rows.V + c)])));
  }
  out.best = static_cast<std::int32_t>(std::max_element(z.begin(), z.end()) - z.begin());
  const long double top = z[static_cast<std::size_t>(out.best)];
  long double sum = 0;
  for (const long double value : z) sum += std::exp(value - top);
  const auto target = static_cast<std::size_t>(rows.target[static_cast<std::size_t>(row)]);
  out.loss = std::log(sum) + top - z[target];
  for (std::size_t c = 0; c < z.size(); ++c) {
    const long double p = std::exp(z[c] - top) / sum;
    out.gradient.push_back(static_cast<double>((p - (c == target ? 1 : 0)) * rows.scale));
  }
  return out;
}

void expect_right(const Rows& rows, const Result& got, const std::string& where) {
  for (std::int64_t row = 0; row < rows.n; ++row) {
    const auto at = static_cast<std::size_t>(row);
    const Reference want = reference(rows, row);
    ASSERT_EQ(got.best[at], want.best) << where << ", row " << row;
    ASSERT_NEAR(got.loss[at], static_cast<double>(want.loss), 2e-6) << where << ", row " << row;
    for (std::int64_t c = 0; c < rows.V; ++c) {
      const double gradient = want.gradient[static_cast<std::size_t>(c)];
      const auto value =
          static_cast<double>(to_float(got.logits[static_cast<std::size_t>(row * rows.V + c)]));
      // Half a unit of bfloat16's last place, and what float arithmetic was off by before. p - 1
      // keeps the error of p.
      const double bound = std::fabs(gradient) * (0x1.0p-8 + 3e-6) +
                           (c == rows.target[at] ? 1e-6 * rows.scale : 0) +
                           0x1.0p-133;  // half of bfloat16's smallest number
      ASSERT_NEAR(value, gradient, bound) << where << ", row " << row << ", column " << c;
    }
  }
}

std::vector<Rows> cases() {
  std::vector<Rows> out;
  std::uint32_t seed = 1;
  for (const std::int64_t V : {1, 7, 8, 13, 1000, 1024, 8191, 8192, 8193, 20011, 24576}) {
    for (const std::int64_t n : {1, 3}) out.push_back(random_rows(n, V, ++seed));
  }
  out.push_back(random_rows(2, 9000, 99, 0.0F));    // all logits alike
  out.push_back(random_rows(2, 9000, 98, 300.0F));  // one takes all
  out.push_back(random_rows(1, 202048, 96));        // Maverick's vocabulary
  out.push_back(random_rows(0, 100, 97));
  return out;
}

TEST(CudaCrossEntropy, loss_best_and_gradient_are_right_in_every_order_of_threads) {
  for (const Rows& rows : cases()) {
    for (const std::uint32_t threads : {32U, 128U, 256U}) {
      const std::string where = std::to_string(rows.n) + " x " + std::to_string(rows.V) + ", " +
                                std::to_string(threads) + " threads";
      const Result forward = whole(rows, {threads, Order::forward});
      expect_right(rows, forward, where);
      EXPECT_TRUE(forward == whole(rows, {threads, Order::reverse})) << where;
      EXPECT_TRUE(forward == whole(rows, {threads, Order::shuffled}, 7)) << where;
    }
  }
}

TEST(CudaCrossEntropy, without_a_scale_the_logits_stay) {
  Rows rows = random_rows(3, 1000, 5);
  rows.scale = 0;
  const Result got = whole(rows, {256, Order::shuffled});
  EXPECT_TRUE(same_bits(got.logits, rows.logits));
  for (std::int64_t row = 0; row < rows.n; ++row) {
    EXPECT_NEAR(got.loss[static_cast<std::size_t>(row)],
                static_cast<double>(reference(rows, row).loss), 2e-6);
  }
}

TEST(CudaCrossEntropy, the_lowest_of_equal_logits_is_best) {
  constexpr std::int64_t kV = 20000;
  const Bf16Bits high = reference_bf16(9.0F);
  for (const auto& [first, second] :
       std::vector<std::pair<std::size_t, std::size_t>>{{3, 4},
                                                        {7, 8},
                                                        {9, 8190},
                                                        {8191, 8192},
                                                        {100, 19999},
                                                        {2047, 2048},
                                                        {16384, 16392},
                                                        {2056, 6000}}) {
    Rows rows = random_rows(1, kV, 11, 1.0F);
    rows.logits[first] = rows.logits[second] = high;
    for (const Launch& launch : launches()) {
      EXPECT_EQ(whole(rows, launch).best[0], static_cast<std::int32_t>(first)) << launch.text();
    }
  }
}

TEST(CudaCrossEntropy, logits_of_minus_infinity_are_impossible_and_nan_is_seen) {
  constexpr Bf16Bits kLowest = 0xFF80, kNan = 0x7FC0;
  for (const std::size_t from : {0U, 8192U}) {  // a whole segment of them, first or last
    Rows rows = random_rows(1, 16384, 12, 1.0F);
    std::fill_n(rows.logits.begin() + static_cast<std::ptrdiff_t>(from), 8192, kLowest);
    rows.target[0] = from == 0 ? 9000 : 5;
    const Result got = whole(rows, {256, Order::shuffled});
    expect_right(rows, got, "half of the logits -infinity");
    EXPECT_EQ(got.logits[from + 17], 0);
  }
  for (const std::size_t at : {0U, 8191U, 16383U}) {
    Rows rows = random_rows(1, 16384, 13, 1.0F);
    rows.logits[at] = kNan;
    const Result got = whole(rows, {256, Order::forward});
    EXPECT_TRUE(std::isnan(got.loss[0]));
    EXPECT_TRUE(std::isnan(to_float(got.logits[100])));
    EXPECT_GE(got.best[0], 0);
    EXPECT_LT(got.best[0], 16384);
  }
  for (const Bf16Bits value : {kLowest, kNan}) {
    Rows rows = random_rows(1, 9000, 14);
    std::fill(rows.logits.begin(), rows.logits.end(), value);
    const Result got = whole(rows, {256, Order::forward});
    EXPECT_TRUE(std::isnan(got.loss[0]));
    EXPECT_EQ(got.best[0], 0);
  }
}

TEST(CudaCrossEntropy, a_near_certain_target_keeps_its_gradient) {
  for (const float lead : {4.0F, 8.0F, 10.0F}) {  // p - 1 down to -4.5e-5
    Rows rows = random_rows(1, 3, 15);
    rows.logits = {reference_bf16(lead), 0, reference_bf16(-5.0F)};
    rows.target = {0};
    const double want = reference(rows, 0).gradient[0];
    const Result got = whole(rows, {256, Order::forward});
    EXPECT_NEAR(static_cast<double>(to_float(got.logits[0])), want,
                std::fabs(want) * 0x1.0p-8 + rows.scale * 1e-7);
    EXPECT_LT(to_float(got.logits[0]), 0);
  }
}

/// Tiles that begin at multiples of `tile` columns, each a matrix of its own.
Result tiled(const Rows& rows, std::int64_t tile, Launch launch) {
  const auto n = static_cast<std::size_t>(rows.n);
  Guarded<float> top(n), target_logit(n), weight(n);
  Guarded<double> sum(n), loss(n);
  Guarded<std::int32_t> best(n);
  const HeadRows state = {top.data(), sum.data(), target_logit.data(), best.data()};
  std::vector<Guarded<Bf16Bits>> tiles;
  for (std::int64_t begin = 0; begin < rows.V; begin += tile) {
    const std::int64_t v = std::min(tile, rows.V - begin);
    tiles.emplace_back(static_cast<std::size_t>(rows.n * v));
    for (std::int64_t row = 0; row < rows.n; ++row) {
      std::copy_n(rows.logits.begin() + row * rows.V + begin, v, tiles.back().data() + row * v);
    }
  }
  CpuLauncher run(launch);
  const auto width = [&](std::size_t i) {
    return std::min(tile, rows.V - static_cast<std::int64_t>(i) * tile);
  };
  for (std::size_t i = 0; i < tiles.size(); ++i) {
    run(HeadOnline{rows.n, width(i), static_cast<std::int64_t>(i) * tile, tiles[i].data(),
                   rows.target.data(), state});
  }
  run(HeadFinish{rows.n, state, rows.scale, loss.data(), weight.data()});
  Result out{std::vector<Bf16Bits>(rows.logits.size()), loss.values(), best.values()};
  for (std::size_t i = tiles.size(); i-- > 0;) {
    const std::int64_t v = width(i), begin = static_cast<std::int64_t>(i) * tile;
    run(HeadGradient{WordGrid(rows.n, v), begin, tiles[i].data(), rows.target.data(), state,
                     weight.data(), rows.scale});
    EXPECT_TRUE(tiles[i].guards_whole());
    for (std::int64_t row = 0; row < rows.n; ++row) {
      std::copy_n(tiles[i].data() + row * v, v, out.logits.begin() + row * rows.V + begin);
    }
  }
  EXPECT_TRUE(top.guards_whole() && sum.guards_whole() && target_logit.guards_whole());
  EXPECT_TRUE(weight.guards_whole() && loss.guards_whole() && best.guards_whole());
  return out;
}

TEST(CudaCrossEntropy, tiles_give_the_bits_of_whole_rows_however_they_are_cut) {
  for (const Rows& rows : cases()) {
    for (const std::uint32_t threads : {32U, 256U}) {
      const Result want = whole(rows, {threads, Order::forward});
      for (const std::int64_t tile : {kSegment, 2 * kSegment, 5 * kSegment}) {
        EXPECT_TRUE(want == tiled(rows, tile, {threads, Order::shuffled}))
            << rows.n << " x " << rows.V << " in tiles of " << tile;
      }
    }
  }
}

TEST(CudaCrossEntropy, the_gpu_gives_the_bits_of_the_cpu) {
  if (!Gpu::missing().empty()) GTEST_SKIP() << Gpu::missing();
  for (const Rows& rows : cases()) {
    const auto n = static_cast<std::size_t>(rows.n);
    const Result want = whole(rows, {256, Order::forward});
    Gpu gpu;
    Bf16Bits* logits = gpu.upload(rows.logits);
    const std::int32_t* target = gpu.upload(rows.target);
    auto* loss = gpu.output<double>(n);
    auto* best = gpu.output<std::int32_t>(n);
    cross_entropy(rows.n, rows.V, logits, target, rows.scale, loss, best, gpu.stream());
    const Result got{gpu.download(logits, rows.logits.size()), gpu.download(loss, n),
                     gpu.download(best, n)};
    EXPECT_TRUE(got == want) << rows.n << " x " << rows.V;

    Bf16Bits* tile = gpu.upload(rows.logits);  // the whole head as one tile
    const HeadRows state = {gpu.output<float>(n), gpu.output<double>(n), gpu.output<float>(n),
                            gpu.output<std::int32_t>(n)};
    auto* weight = gpu.output<float>(n);
    head_online(rows.n, rows.V, 0, tile, target, state, gpu.stream());
    head_finish(rows.n, state, rows.scale, loss, weight, gpu.stream());
    head_gradient(rows.n, rows.V, 0, tile, target, state, weight, rows.scale, gpu.stream());
    const Result streamed{gpu.download(tile, rows.logits.size()), gpu.download(loss, n),
                          gpu.download(state.best, n)};
    EXPECT_TRUE(streamed == want) << rows.n << " x " << rows.V << " as a tile";
  }
}

}  // namespace
}  // namespace tailor::cuda
