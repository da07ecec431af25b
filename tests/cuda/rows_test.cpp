#include "trainer/cuda/bodies/rows.h"

#include <gmock/gmock.h>

#include "tests/cuda/cpu_launch.h"
#include "tests/cuda/gpu.h"
#include "trainer/cuda/kernels.h"

namespace tailor::cuda {
namespace {

using testing::Each;

struct Size {
  std::int64_t rows, width;
  std::string text() const { return std::to_string(rows) + " x " + std::to_string(width); }
};

std::vector<Size> sizes() {
  std::vector<Size> out;
  for (const std::int64_t rows : {0, 1, 2, 13, 101}) {
    for (const std::int64_t width : {1, 7, 8, 24, 61, 128, 1032}) out.push_back({rows, width});
  }
  return out;
}

std::vector<Bf16Bits> numbers(std::int64_t rows, std::int64_t width, std::uint32_t seed,
                              float deviation = 1.0F) {
  return random_bf16(static_cast<std::size_t>(rows * width), seed, deviation);
}
std::vector<std::int32_t> indices(std::int64_t count, std::int64_t below, std::uint32_t seed) {
  std::mt19937 random(seed);
  std::vector<std::int32_t> out;
  for (std::int64_t i = 0; i < count; ++i) {
    out.push_back(static_cast<std::int32_t>(random() % static_cast<std::uint64_t>(below)));
  }
  return out;
}
std::vector<float> gates(std::int64_t count, std::uint32_t seed) {
  std::mt19937 random(seed);
  std::uniform_real_distribution<float> unit(-1, 1);
  std::vector<float> out;
  for (std::int64_t i = 0; i < count; ++i) out.push_back(unit(random));
  return out;
}
double wide(Bf16Bits value) { return static_cast<double>(to_float(value)); }

/// `got` is `want` to half a unit of bfloat16's last place and float rounding relative to `mass`,
/// the size of what was added up.
void expect_near(Bf16Bits got, double want, double mass, const std::string& where) {
  const double bound = std::fabs(want) * 0x1.0p-8 + mass * 1e-6 + 0x1.0p-133;
  ASSERT_NEAR(wide(got), want, bound) << where;
}

double reference_sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

template <class Body>
void launch(const Body& body, const Launch& with) {
  CpuLauncher run(with);
  run(body);
}

// -- SwiGLU -------------------------------------------------------------------------------------

struct SwigluCase {
  explicit SwigluCase(Size of)
      : size(of),
        gate_up(numbers(of.rows, 2 * of.width, 1, 4.0F)),
        dm(numbers(of.rows, of.width, 2)) {
    // Where sigmoid is 0 or 1 to the last bit, and beyond.
    for (std::size_t i = 0; i < gate_up.size(); i += 53) {
      gate_up[i] = reference_bf16(i % 2 == 0 ? 100.0F : -100.0F);
    }
  }
  std::size_t count() const { return dm.size(); }
  Size size;
  std::vector<Bf16Bits> gate_up, dm;
};

std::vector<Bf16Bits> forward(const SwigluCase& of, const Launch& with) {
  Guarded<Bf16Bits> gate_up(of.gate_up), m(of.count());
  launch(Swiglu{WordGrid(of.size.rows, of.size.width), of.size.width, gate_up.data(), m.data()},
         with);
  EXPECT_TRUE(m.guards_whole()) << of.size.text();
  return m.values();
}

struct Backward {
  std::vector<Bf16Bits> d_gate_up, m;
  bool operator==(const Backward&) const = default;
};
Backward backward(const SwigluCase& of, const Launch& with, bool in_place, bool with_m = true) {
  Guarded<Bf16Bits> gate_up(of.gate_up), dm(of.dm);
  Guarded<Bf16Bits> d_gate_up(of.gate_up.size()), m(of.count());
  Guarded<Bf16Bits>& to = in_place ? gate_up : d_gate_up;
  Guarded<Bf16Bits>& product = in_place ? dm : m;
  launch(SwigluBackward{WordGrid(of.size.rows, of.size.width), of.size.width, gate_up.data(),
                        dm.data(), to.data(), with_m ? product.data() : nullptr},
         with);
  EXPECT_TRUE(to.guards_whole() && product.guards_whole()) << of.size.text();
  return {to.values(), product.values()};
}

TEST(CudaSwiglu, forward_and_backward_follow_their_formulas) {
  for (const Size& size : sizes()) {
    const SwigluCase of(size);
    const Launch with{256, Order::forward};
    const std::vector<Bf16Bits> m = forward(of, with);
    const Backward back = backward(of, with, false);
    ASSERT_EQ(back.m, m) << "m again, to the bit";
    for (std::int64_t t = 0; t < size.rows; ++t) {
      for (std::int64_t i = 0; i < size.width; ++i) {
        const std::string where = size.text() + ", " + std::to_string(t) + ", " + std::to_string(i);
        const auto at = static_cast<std::size_t>(t * size.width + i);
        const auto gate_at = static_cast<std::size_t>(2 * t * size.width + i);
        const std::size_t up_at = gate_at + static_cast<std::size_t>(size.width);
        const double g = wide(of.gate_up[gate_at]), u = wide(of.gate_up[up_at]);
        const double d = wide(of.dm[at]), s = reference_sigmoid(g);
        expect_near(m[at], g * s * u, std::fabs(g * s * u), where + " m");
        expect_near(back.d_gate_up[gate_at], d * u * s * (1 + g * (1 - s)),
                    std::fabs(d * u * s * (1 + std::fabs(g))), where + " d_gate");
        expect_near(back.d_gate_up[up_at], d * g * s, std::fabs(d * g * s), where + " d_up");
      }
    }
  }
}

TEST(CudaSwiglu, bits_do_not_depend_on_blocks_threads_or_place) {
  for (const Size& size : sizes()) {
    const SwigluCase of(size);
    const std::vector<Bf16Bits> m = forward(of, {256, Order::forward});
    const Backward back = backward(of, {256, Order::forward}, false);
    for (const Launch& with : launches()) {
      EXPECT_EQ(forward(of, with), m) << size.text() << ", " << with.text();
      EXPECT_EQ(backward(of, with, false), back) << size.text() << ", " << with.text();
      EXPECT_EQ(backward(of, with, true), back) << size.text() << ", " << with.text();
    }
    const Backward alone = backward(of, {256, Order::forward}, false, false);
    EXPECT_EQ(alone.d_gate_up, back.d_gate_up);
    EXPECT_THAT(alone.m, Each(0xCDCD)) << "not asked for";
  }
}

TEST(CudaSwiglu, every_number_is_written_once) {
  for (const Size& size : sizes()) {
    if (size.rows > 13 || size.width > 128) continue;
    const SwigluCase of(size);
    const Guarded<Bf16Bits> gate_up(of.gate_up), dm(of.dm);
    const WordGrid grid(size.rows, size.width);
    EXPECT_THAT((write_counts<Bf16Bits>(of.count(), 32,
                                        [&](Bf16Bits* m) {
                                          return Swiglu{grid, size.width, gate_up.data(), m};
                                        })),
                Each(1));
    EXPECT_THAT((write_counts<Bf16Bits>(2 * of.count(), 32,
                                        [&](Bf16Bits* to) {
                                          return SwigluBackward{
                                              grid,      size.width, gate_up.data(),
                                              dm.data(), to,         nullptr};
                                        })),
                Each(1));
  }
}

// -- Rows by token ------------------------------------------------------------------------------

constexpr std::int64_t kTokens = 29;

std::size_t index(std::int64_t value) { return static_cast<std::size_t>(value); }

struct GatherCase {
  explicit GatherCase(Size of)
      : size(of),
        x(numbers(kTokens, of.width, 3)),
        token(indices(of.rows, kTokens, 4)),
        scale(gates(of.rows, 5)) {
    x[0] = 0x7FC1;  // a copy keeps a NaN's bits
  }
  std::size_t count() const { return static_cast<std::size_t>(size.rows * size.width); }
  Size size;
  std::vector<Bf16Bits> x;
  std::vector<std::int32_t> token;
  std::vector<float> scale;
};

std::vector<Bf16Bits> gathered(const GatherCase& of, bool scaled, const Launch& with) {
  Guarded<Bf16Bits> x(of.x), out(of.count());
  launch(GatherRows{WordGrid(of.size.rows, of.size.width), of.size.width, x.data(), of.token.data(),
                    scaled ? of.scale.data() : nullptr, out.data()},
         with);
  EXPECT_TRUE(out.guards_whole());
  return out.values();
}

TEST(CudaGatherRows, takes_the_tokens_rows_and_scales_them) {
  for (const Size& size : sizes()) {
    const GatherCase of(size);
    for (const bool scaled : {false, true}) {
      for (const Launch& with : launches()) {
        const std::vector<Bf16Bits> out = gathered(of, scaled, with);
        for (std::size_t i = 0; i < out.size(); ++i) {
          const std::size_t row = i / static_cast<std::size_t>(size.width);
          const std::int64_t from =
              of.token[row] * size.width + static_cast<std::int64_t>(i) % size.width;
          const Bf16Bits x = of.x[static_cast<std::size_t>(from)];
          const Bf16Bits want = scaled ? reference_bf16(to_float(x) * of.scale[row]) : x;
          ASSERT_EQ(out[i], want) << size.text() << ", " << i << ", " << with.text();
        }
      }
    }
  }
}

struct CombineCase {
  CombineCase(Size of, std::int64_t slots_each)
      : size(of), K(slots_each), slot_of(static_cast<std::size_t>(of.rows * K)) {
    std::iota(slot_of.begin(), slot_of.end(), 0);
    std::shuffle(slot_of.begin(), slot_of.end(), std::mt19937(7));
    y = numbers(of.rows * K, of.width, 8);
    out = numbers(of.rows, of.width, 9);
    scale = gates(of.rows * K, 10);
  }
  Size size;
  std::int64_t K;
  std::vector<std::int32_t> slot_of;
  std::vector<Bf16Bits> y, out;
  std::vector<float> scale;
};

std::vector<Bf16Bits> combined(const CombineCase& of, bool scaled, const Launch& with) {
  Guarded<Bf16Bits> y(of.y), out(of.out);
  launch(CombineRows{WordGrid(of.size.rows, of.size.width), of.size.width, of.K, y.data(),
                     of.slot_of.data(), scaled ? of.scale.data() : nullptr, out.data()},
         with);
  EXPECT_TRUE(out.guards_whole());
  return out.values();
}

TEST(CudaCombineRows, adds_a_tokens_rows_in_the_order_of_its_slots) {
  for (const Size& size : sizes()) {
    for (const std::int64_t K : {1, 2, 8}) {
      const CombineCase of(size, K);
      for (const bool scaled : {false, true}) {
        for (const Launch& with : launches()) {
          const std::vector<Bf16Bits> out = combined(of, scaled, with);
          for (std::size_t i = 0; i < out.size(); ++i) {
            const auto t = static_cast<std::int64_t>(i) / size.width;
            float total = to_float(of.out[i]);
            for (std::int64_t k = 0; k < K; ++k) {
              const auto slot = index(of.slot_of[index(t * K + k)]);
              const float y = to_float(of.y[slot * index(size.width) + i % index(size.width)]);
              // A product of 8 and 24 bits is exact in double: fused, and rounded once.
              const double term =
                  static_cast<double>(y) * static_cast<double>(scaled ? of.scale[slot] : 1.0F);
              total = static_cast<float>(term + static_cast<double>(total));
            }
            ASSERT_EQ(out[i], reference_bf16(total))
                << size.text() << ", " << i << ", " << with.text();
          }
        }
      }
    }
  }
}

TEST(CudaRowCopies, every_number_is_written_once) {
  for (const Size& size : sizes()) {
    if (size.rows > 13 || size.width > 128) continue;
    const WordGrid grid(size.rows, size.width);
    const auto count = static_cast<std::size_t>(size.rows * size.width);
    const GatherCase gather(size);
    const Guarded<Bf16Bits> x(gather.x);
    EXPECT_THAT((write_counts<Bf16Bits>(count, 32,
                                        [&](Bf16Bits* out) {
                                          return GatherRows{grid,     size.width,
                                                            x.data(), gather.token.data(),
                                                            nullptr,  out};
                                        })),
                Each(1));
    const CombineCase combine(size, 2);
    const Guarded<Bf16Bits> y(combine.y);
    EXPECT_THAT((write_counts<Bf16Bits>(
                    count, 32,
                    [&](Bf16Bits* out) {
                      return CombineRows{grid,    size.width, 2, y.data(), combine.slot_of.data(),
                                         nullptr, out};
                    })),
                Each(1));
  }
}

// -- The gate's gradient ------------------------------------------------------------------------

std::vector<float> gate_gradients(const GatherCase& of, const std::vector<Bf16Bits>& dxs,
                                  const Launch& with, std::uint32_t seed = 1) {
  Guarded<Bf16Bits> x(of.x), d(dxs);
  Guarded<float> dot(static_cast<std::size_t>(of.size.rows));
  CpuLauncher run(with, seed);
  run(GateGradient{of.size.rows, of.size.width, d.data(), x.data(), of.token.data(), dot.data()});
  EXPECT_TRUE(dot.guards_whole());
  return dot.values();
}

TEST(CudaGateGradient, is_the_product_of_the_rows_in_every_order_of_threads) {
  for (const Size& size : sizes()) {
    GatherCase of(size);
    of.x[0] = 0x3F80;
    const std::vector<Bf16Bits> dxs = numbers(size.rows, size.width, 11);
    for (const std::uint32_t threads : {32U, 128U, 256U}) {
      const std::vector<float> dot = gate_gradients(of, dxs, {threads, Order::forward});
      for (std::int64_t row = 0; row < size.rows; ++row) {
        double want = 0, mass = 0;
        for (std::int64_t i = 0; i < size.width; ++i) {
          const double term = wide(dxs[index(row * size.width + i)]) *
                              wide(of.x[index(of.token[index(row)] * size.width + i)]);
          want += term;
          mass += std::fabs(term);
        }
        ASSERT_NEAR(static_cast<double>(dot[index(row)]), want, mass * 1e-6)
            << size.text() << ", row " << row;
      }
      EXPECT_TRUE(same_bits(dot, gate_gradients(of, dxs, {threads, Order::reverse})));
      EXPECT_TRUE(same_bits(dot, gate_gradients(of, dxs, {threads, Order::shuffled}, 5)));
    }
  }
}

// -- All of them on a GPU -----------------------------------------------------------------------

TEST(CudaRows, the_gpu_gives_the_bits_of_the_cpu) {
  if (!Gpu::missing().empty()) GTEST_SKIP() << Gpu::missing();
  const Launch with{256, Order::forward};
  for (const Size& size : sizes()) {
    const std::int64_t T = size.rows, F = size.width;
    const auto count = static_cast<std::size_t>(T * F);
    Gpu gpu;
    const SwigluCase of(size);
    const Bf16Bits* gate_up = gpu.upload(of.gate_up);
    auto* m = gpu.output<Bf16Bits>(count);
    swiglu(T, F, gate_up, m, gpu.stream());
    EXPECT_EQ(gpu.download(m, count), forward(of, with)) << size.text();
    auto* d_gate_up = gpu.output<Bf16Bits>(2 * count);
    swiglu_backward(T, F, gate_up, gpu.upload(of.dm), d_gate_up, m, gpu.stream());
    const Backward back{gpu.download(d_gate_up, 2 * count), gpu.download(m, count)};
    EXPECT_EQ(back, backward(of, with, false)) << size.text();

    const GatherCase gather(size);
    const Bf16Bits* x = gpu.upload(gather.x);
    const std::int32_t* token = gpu.upload(gather.token);
    for (const bool scaled : {false, true}) {
      auto* out = gpu.output<Bf16Bits>(count);
      gather_rows(T, F, x, token, scaled ? gpu.upload(gather.scale) : nullptr, out, gpu.stream());
      EXPECT_EQ(gpu.download(out, count), gathered(gather, scaled, with)) << size.text();
      const CombineCase combine(size, 3);
      auto* total = gpu.upload(combine.out);
      combine_rows(T, F, 3, gpu.upload(combine.y), gpu.upload(combine.slot_of),
                   scaled ? gpu.upload(combine.scale) : nullptr, total, gpu.stream());
      EXPECT_EQ(gpu.download(total, count), combined(combine, scaled, with)) << size.text();
    }
    GatherCase finite(size);
    finite.x[0] = 0x3F80;
    const std::vector<Bf16Bits> dxs = numbers(T, F, 11);
    auto* dot = gpu.output<float>(static_cast<std::size_t>(T));
    gate_gradient(T, F, gpu.upload(dxs), gpu.upload(finite.x), token, dot, gpu.stream());
    EXPECT_TRUE(same_bits(gpu.download(dot, static_cast<std::size_t>(T)),
                          gate_gradients(finite, dxs, {GateGradient::kThreads, Order::forward})))
        << size.text();
  }
}

}  // namespace
}  // namespace tailor::cuda
