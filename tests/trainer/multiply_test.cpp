// The choice between our product of few rows and LibTorch's, and its split over threads.

#include <gtest/gtest.h>

#include "trainer/ops.h"

namespace tailor {
namespace {

/// Within the rounding of the result and K of float sums, of what double gives.
void expect_product(const at::Tensor& x, const at::Tensor& w, const at::Tensor& got) {
  const at::Tensor want = at::mm(x.to(at::kDouble), w.to(at::kDouble));
  const at::Tensor mass = at::mm(x.to(at::kDouble).abs(), w.to(at::kDouble).abs());
  const auto K = static_cast<double>(w.size(0));
  const at::Tensor bound = want.abs() * 0x1p-8 + mass * (1.01 * (K + 1) * 0x1p-24);
  EXPECT_TRUE(at::all((got.to(at::kDouble) - want).abs() <= bound).item<bool>());
}

at::Tensor random_bf16(at::IntArrayRef shape) { return at::randn(shape).to(at::kBFloat16); }

TEST(Multiply, either_orientation_and_side_of_the_threshold) {
  at::manual_seed(1);
  constexpr std::int64_t K = 150, N = 330;
  ASSERT_TRUE(ops::few_enough_rows(128, K * N));
  ASSERT_FALSE(ops::few_enough_rows(129, K * N));
  for (const std::int64_t M : {3, 128, 129}) {
    SCOPED_TRACE(M);
    const at::Tensor x = random_bf16({M, K}), w = random_bf16({K, N});
    const at::Tensor as_stored = at::empty({M, N}, at::kBFloat16);
    ops::multiply(x, w, as_stored);
    expect_product(x, w, as_stored);
    const at::Tensor transposed = at::empty({M, N}, at::kBFloat16);
    ops::multiply(x, w.t().contiguous().t(), transposed);
    expect_product(x, w, transposed);
    // Rows of wider tensors.
    const at::Tensor wide = at::zeros({M, N + 7}, at::kBFloat16);
    ops::multiply(at::cat({x, x}, 1).narrow(1, 0, K), at::cat({w, w}, 1).narrow(1, 0, N),
                  wide.narrow(1, 2, N));
    EXPECT_TRUE(at::equal(wide.narrow(1, 2, N), as_stored));
    EXPECT_EQ(wide.narrow(1, 0, 2).count_nonzero().item<std::int64_t>(), 0);
    EXPECT_EQ(wide.narrow(1, N + 2, 5).count_nonzero().item<std::int64_t>(), 0);
  }
}

TEST(Multiply, other_types_and_empty_products) {
  at::manual_seed(2);
  const at::Tensor x = at::randn({5, 9}), w = at::randn({9, 4}), y = at::empty({5, 4});
  ops::multiply(x, w, y);
  EXPECT_TRUE(at::equal(y, at::mm(x, w)));
  const at::Tensor none = at::ones({5, 4}, at::kBFloat16);
  ops::multiply(random_bf16({5, 0}), random_bf16({0, 4}), none);
  EXPECT_EQ(none.count_nonzero().item<std::int64_t>(), 0);
}

TEST(Multiply, threads_do_not_change_bits) {
  if (kernels<Bf16>().few_rows == nullptr) GTEST_SKIP() << kernel_level();
  at::manual_seed(3);
  const int before = at::get_num_threads();
  for (const std::int64_t N : {70, 1000, 2000}) {
    const at::Tensor x = random_bf16({19, 3001}), w = random_bf16({3001, N});
    at::set_num_threads(1);
    const at::Tensor want = at::empty({19, N}, at::kBFloat16);
    ops::multiply(x, w, want);
    for (const int threads : {2, 3}) {
      at::set_num_threads(threads);
      const at::Tensor got = at::empty({19, N}, at::kBFloat16);
      ops::multiply(x, w, got);
      EXPECT_TRUE(at::equal(got, want)) << threads << " threads, " << N << " columns";
    }
  }
  at::set_num_threads(before);
}

}  // namespace
}  // namespace tailor
