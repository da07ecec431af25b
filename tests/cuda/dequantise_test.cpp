#include "trainer/cuda/bodies/dequantise.h"

#include <gmock/gmock.h>

#include "data/quant/codec.h"
#include "data/quant/tables.h"
#include "tests/cuda/cpu_launch.h"
#include "tests/cuda/gpu.h"
#include "trainer/cuda/kernels.h"

namespace tailor::cuda {
namespace {

struct Case {
  std::string name;
  WeightFormat format;
  std::int64_t rows, columns;
};

std::vector<Case> cases() {
  std::vector<Case> out;
  for (const std::int64_t rows : {1, 3, 7, 130}) {
    for (const std::int64_t columns : {1, 7, 8, 64, 101, 128, 264, 640}) {
      const auto add = [&](WeightFormat format) {
        out.push_back(
            {format_text(format) + " " + std::to_string(rows) + "x" + std::to_string(columns),
             format, rows, columns});
      };
      for (const std::int64_t group : {3, 32, 128}) add(WeightFormat::int4(group));
      add(WeightFormat::int4(columns));
      add(WeightFormat::fp8_blocks());
      add(WeightFormat::fp8_rows());
      add({WeightKind::fp8, 0, 5, 12});
      add(WeightFormat::nf4());
      add(WeightFormat::f32());
    }
  }
  out.push_back({"nf4 with two outer scales", WeightFormat::nf4(), 129, 256});
  return out;
}

/// A matrix of random bytes whose scales are numbers of a sensible size.
struct Matrix {
  explicit Matrix(const Case& of)
      : format(of.format),
        rows(of.rows),
        columns(of.columns),
        codes(random_bytes(code_bytes(format, rows, columns), 1)),
        scales(random_bytes(scale_bytes(format, rows, columns), 2)) {
    std::mt19937 random(3);
    std::normal_distribution<float> normal(0.0F, 0.02F);
    for (float& value : values) value = normal(random);
    for (float& value : code_map) value = normal(random);
    if (format.kind == WeightKind::int4) {
      const auto numbers = random_bf16(scales.size() / 2, 4, 0.02F);
      std::memcpy(scales.data(), numbers.data(), scales.size());
    } else {
      const std::int64_t blocks = div_ceil(rows * columns, 64);
      const std::size_t floats = format.kind == WeightKind::nf4
                                     ? static_cast<std::size_t>(1 + div_ceil(blocks, 256))
                                     : scales.size() / 4;
      for (std::size_t i = 0; i < floats; ++i) put_float(scales, i, normal(random));
    }
    if (format.kind == WeightKind::f32) {
      for (std::size_t i = 0; i < codes.size() / 4; ++i) put_float(codes, i, normal(random));
    }
  }

  static std::vector<std::uint8_t> random_bytes(std::int64_t count, std::uint32_t seed) {
    std::mt19937 random(seed);
    std::vector<std::uint8_t> out(static_cast<std::size_t>(count));
    for (std::uint8_t& byte : out) byte = static_cast<std::uint8_t>(random());
    return out;
  }
  static void put_float(std::vector<std::uint8_t>& to, std::size_t index, float value) {
    std::memcpy(to.data() + 4 * index, &value, sizeof value);
  }
  static float get_float(const std::vector<std::uint8_t>& from, std::int64_t index) {
    float value = 0;
    std::memcpy(&value, from.data() + 4 * index, sizeof value);
    return value;
  }
  std::size_t numbers() const { return static_cast<std::size_t>(rows * columns); }

  WeightFormat format;
  std::int64_t rows, columns;
  std::vector<std::uint8_t> codes, scales;
  float values[16], code_map[256];
};

/// e4m3 from its definition: sign, four bits of exponent with bias 7, three of mantissa; no
/// infinity, and S.1111.111 is NaN.
double e4m3(std::uint8_t code) {
  const int exponent = code >> 3U & 15U, mantissa = code & 7U;
  if ((code & 0x7FU) == 0x7FU) return NAN;
  const double magnitude =
      exponent == 0 ? std::ldexp(mantissa, -9) : std::ldexp(8 + mantissa, exponent - 10);
  return code & 0x80U ? -magnitude : magnitude;
}

/// One number as format.h describes it, a byte at a time.
Bf16Bits reference(const Matrix& m, std::int64_t r, std::int64_t c) {
  const std::int64_t flat = r * m.columns + c;
  const auto at = [](std::int64_t index) { return static_cast<std::size_t>(index); };
  switch (m.format.kind) {
    case WeightKind::int4: {
      const std::int64_t byte = r * div_ceil(m.columns, 8) * 4 + c / 2;
      const int code = (c % 2 == 0 ? m.codes[at(byte)] & 15 : m.codes[at(byte)] >> 4) - 8;
      const std::int64_t scale = r * div_ceil(m.columns, m.format.group) + c / m.format.group;
      const unsigned bits = m.scales[at(2 * scale)] | m.scales[at(2 * scale + 1)] << 8U;
      return reference_bf16(static_cast<float>(code) * bits_as<float>(bits << 16U));
    }
    case WeightKind::fp8: {
      const std::int64_t wide = m.format.block_columns == 0 ? m.columns : m.format.block_columns;
      const float scale = Matrix::get_float(
          m.scales, r / m.format.block_rows * div_ceil(m.columns, wide) + c / wide);
      return reference_bf16(static_cast<float>(e4m3(m.codes[at(flat)])) * scale);
    }
    case WeightKind::nf4: {
      const std::int64_t block = flat / 64, blocks = div_ceil(m.rows * m.columns, 64);
      const std::uint8_t inner = m.scales[at(4 + div_ceil(blocks, 256) * 4 + block)];
      const float product = m.code_map[inner] * Matrix::get_float(m.scales, 1 + block / 256);
      const float scale = product + Matrix::get_float(m.scales, 0);
      const int byte = m.codes[at(flat / 2)];
      return reference_bf16(m.values[flat % 2 == 0 ? byte >> 4 : byte & 15] * scale);
    }
    case WeightKind::f32:
      return reference_bf16(Matrix::get_float(m.codes, flat));
    case WeightKind::bf16:
      break;
  }
  return 0;
}

/// A matrix in memory laid out as a device's, ended by guards where a word too many would be read.
struct Placed {
  explicit Placed(const Matrix& m) : codes(m.codes), scales(m.scales) {
    encoded.format = m.format;
    encoded.rows = m.rows;
    encoded.columns = m.columns;
    encoded.codes = reinterpret_cast<const std::byte*>(codes.data());
    encoded.scales = reinterpret_cast<const std::byte*>(scales.data());
    tables = {m.values, m.code_map};
  }
  Guarded<std::uint8_t> codes, scales;
  EncodedMatrix encoded;
  Nf4Tables tables;
};

TEST(CudaDequantise, every_format_gives_the_bits_its_description_says) {
  for (const Case& of : cases()) {
    const Matrix m(of);
    const Placed placed(m);
    for (const Launch& launch : launches()) {
      Guarded<Bf16Bits> out(m.numbers());
      CpuLauncher run(launch);
      with_dequantise_body(placed.encoded, placed.tables, out.data(),
                           [&](const auto& body) { run(body); });
      for (std::int64_t r = 0; r < m.rows; ++r) {
        for (std::int64_t c = 0; c < m.columns; ++c) {
          ASSERT_EQ(out.data()[r * m.columns + c], reference(m, r, c))
              << of.name << ", " << launch.text() << ", row " << r << ", column " << c;
        }
      }
      ASSERT_TRUE(out.guards_whole()) << of.name << ", " << launch.text();
    }
  }
}

/// All NaNs alike: the codec's payload is that of its CPU's arithmetic, the GPU has another.
Bf16Bits one_nan(Bf16Bits value) { return (value & 0x7FFFU) > 0x7F80U ? 0x7FFF : value; }

TEST(CudaDequantise, every_format_gives_the_bits_of_its_codec) {
  for (const Case& of : cases()) {
    Matrix m(of);
    std::copy_n(kNf4, 16, m.values);
    std::copy_n(kDynamicMap, 256, m.code_map);
    const Placed placed(m);
    Guarded<Bf16Bits> out(m.numbers());
    CpuLauncher run({256, Order::forward});
    with_dequantise_body(placed.encoded, placed.tables, out.data(),
                         [&](const auto& body) { run(body); });
    std::vector<std::uint16_t> want(m.numbers());
    decode_rows_bf16(placed.encoded, 0, m.rows, want.data());
    for (std::size_t i = 0; i < want.size(); ++i) {
      ASSERT_EQ(out.data()[i], one_nan(want[i])) << of.name << ", " << i;
    }
  }
}

TEST(CudaDequantise, every_number_is_written_once) {
  for (const Case& of : cases()) {
    if (of.rows > 7) continue;
    const Matrix m(of);
    const Placed placed(m);
    std::vector<int> counts;
    with_dequantise_body(placed.encoded, placed.tables, nullptr, [&](auto body) {
      counts = write_counts<Bf16Bits>(m.numbers(), 32, [&](Bf16Bits* out) {
        body.out = out;
        return body;
      });
    });
    EXPECT_THAT(counts, testing::Each(1)) << of.name;
  }
}

TEST(CudaDequantise, an_empty_matrix_has_no_blocks) {
  for (const WeightFormat& format :
       {WeightFormat::int4(32), WeightFormat::fp8_blocks(), WeightFormat::nf4()}) {
    for (const auto& [rows, columns] : {std::pair{0, 64}, std::pair{64, 0}}) {
      EncodedMatrix empty;
      empty.format = format;
      empty.rows = rows;
      empty.columns = columns;
      with_dequantise_body(empty, {}, nullptr,
                           [&](const auto& body) { EXPECT_EQ(body.blocks(256), 0); });
    }
  }
}

TEST(CudaDequantise, fp8_knows_all_its_codes) {
  int denormals = 0, numbers = 0;
  for (unsigned code = 0; code < 256; ++code) {
    const double want = e4m3(static_cast<std::uint8_t>(code));
    const float got = Fp8Codec::of_code(code);
    if (std::isnan(want)) {
      EXPECT_TRUE(std::isnan(got)) << code;
      continue;
    }
    EXPECT_EQ(static_cast<double>(got), want) << code;
    EXPECT_EQ(std::signbit(got), std::signbit(want)) << code;
    ++numbers;
    denormals += (code & 0x7FU) < 8 && (code & 7U) != 0;
  }
  EXPECT_EQ(numbers, 254);
  EXPECT_EQ(denormals, 14);
  EXPECT_EQ(e4m3(0x7E), 448);  // the format's largest
}

TEST(CudaDequantise, the_gpu_gives_the_bits_of_the_cpu) {
  if (!Gpu::missing().empty()) GTEST_SKIP() << Gpu::missing();
  for (const Case& of : cases()) {
    const Matrix m(of);
    const Placed placed(m);
    Guarded<Bf16Bits> want(m.numbers());
    CpuLauncher run({256, Order::forward});
    with_dequantise_body(placed.encoded, placed.tables, want.data(),
                         [&](const auto& body) { run(body); });
    Gpu gpu;
    EncodedMatrix there = placed.encoded;
    there.codes = reinterpret_cast<const std::byte*>(gpu.upload(m.codes));
    there.scales = reinterpret_cast<const std::byte*>(gpu.upload(m.scales));
    const Nf4Tables tables = {gpu.upload(std::vector<float>(m.values, m.values + 16)),
                              gpu.upload(std::vector<float>(m.code_map, m.code_map + 256))};
    Bf16Bits* out = gpu.output<Bf16Bits>(m.numbers());
    dequantise(there, tables, out, gpu.stream());
    EXPECT_TRUE(same_bits(gpu.download(out, m.numbers()), want.values())) << of.name;
  }
}

TEST(CudaDequantise, bf16_on_the_gpu_is_a_copy) {
  if (!Gpu::missing().empty()) GTEST_SKIP() << Gpu::missing();
  const std::vector<Bf16Bits> numbers = random_bf16(3 * 101, 1);
  Gpu gpu;
  EncodedMatrix matrix;
  matrix.rows = 3;
  matrix.columns = 101;
  matrix.codes = reinterpret_cast<const std::byte*>(gpu.upload(numbers));
  Bf16Bits* out = gpu.output<Bf16Bits>(numbers.size());
  dequantise(matrix, {}, out, gpu.stream());
  EXPECT_TRUE(same_bits(gpu.download(out, numbers.size()), numbers));
}

TEST(CudaDequantise, without_a_gpu_a_launch_is_an_error_with_the_reason) {
  if (Gpu::missing().empty()) GTEST_SKIP() << "there is one";
  const Matrix m({"", WeightFormat::int4(32), 8, 64});
  const Placed placed(m);
  Guarded<Bf16Bits> out(m.numbers());
  try {
    dequantise(placed.encoded, placed.tables, out.data(), nullptr);
    FAIL() << "no error";
  } catch (const Error& error) {
    EXPECT_EQ(error.fault(), Fault::device);
    EXPECT_THAT(error.parts().what, testing::HasSubstr("dequantise"));
    EXPECT_THAT(error.parts().what, testing::HasSubstr("CUDA"));
  }
}

}  // namespace
}  // namespace tailor::cuda
