#include "data/gguf/blocks.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

#include "data/checkpoint/safetensors.h"
#include "tests/data/gguf/gguf_files.h"

namespace tailor {
namespace {

class Blocks : public testing::Test {
 protected:
  Blocks()
      : file_(gguf_tests::golden("gguf/blocks.safetensors")),
        header_(parse_safetensors_header(file_.bytes(), file_.path())) {}
  std::span<const std::byte> bytes(const std::string& name) const {
    const TensorInfo& info = header_.tensors.at(name);
    return file_.bytes().subspan(static_cast<std::size_t>(info.offset),
                                 static_cast<std::size_t>(info.bytes));
  }
  std::vector<float> floats(const std::string& name) const {
    std::vector<float> out(bytes(name).size() / sizeof(float));
    std::memcpy(out.data(), bytes(name).data(), bytes(name).size());
    return out;
  }
  MappedFile file_;
  SafetensorsHeader header_;
};

TEST_F(Blocks, of_every_type_are_ggufs_numbers_to_the_bit) {
  for (const GgmlType type :
       {GgmlType::q4_0, GgmlType::q4_1, GgmlType::q5_0, GgmlType::q5_1, GgmlType::q8_0,
        GgmlType::q4_k, GgmlType::q5_k, GgmlType::q6_k, GgmlType::f16, GgmlType::bf16}) {
    const std::string name(ggml_layout(type).name);
    const std::vector<float> wanted = floats(name + ".values");
    std::vector<float> got(wanted.size());
    ASSERT_EQ(static_cast<std::int64_t>(wanted.size()) / ggml_layout(type).block *
                  ggml_layout(type).bytes,
              static_cast<std::int64_t>(bytes(name + ".bytes").size()));
    dequantise(type, bytes(name + ".bytes").data(), static_cast<std::int64_t>(got.size()),
               got.data());
    for (std::size_t i = 0; i < got.size(); ++i) {
      ASSERT_EQ(std::bit_cast<std::uint32_t>(got[i]), std::bit_cast<std::uint32_t>(wanted[i]))
          << name << " " << i << ": " << got[i] << ", gguf has " << wanted[i];
    }
  }
}

TEST_F(Blocks, are_quantised_to_q8_0_as_gguf_does) {
  const std::vector<float> values = floats("to_q8_0.values");
  const auto wanted = bytes("to_q8_0.bytes");
  std::vector<std::byte> got(wanted.size());
  std::int64_t bad = 0;
  ASSERT_TRUE(quantise(GgmlType::q8_0, values.data(), static_cast<std::int64_t>(values.size()),
                       got.data(), bad));
  EXPECT_EQ(std::memcmp(got.data(), wanted.data(), got.size()), 0);
}

TEST(Halves, come_back_as_they_were_and_round_to_nearest_even) {
  for (std::uint32_t bits = 0; bits < 65536; ++bits) {
    if ((bits & 0x7C00U) == 0x7C00U) continue;
    const auto half = static_cast<std::uint16_t>(bits);
    float value = 0;
    std::uint16_t back = 0;
    std::int64_t bad = 0;
    dequantise(GgmlType::f16, reinterpret_cast<const std::byte*>(&half), 1, &value);
    ASSERT_TRUE(quantise(GgmlType::f16, &value, 1, reinterpret_cast<std::byte*>(&back), bad));
    ASSERT_EQ(back, half) << value;
    if ((bits & 0x7FFFU) >= 0x7BFFU || (bits & 0x8000U) != 0) continue;
    const auto next = static_cast<std::uint16_t>(bits + 1);
    float above = 0;
    dequantise(GgmlType::f16, reinterpret_cast<const std::byte*>(&next), 1, &above);
    const float middle = (value + above) / 2;  // exact
    ASSERT_TRUE(quantise(GgmlType::f16, &middle, 1, reinterpret_cast<std::byte*>(&back), bad));
    ASSERT_EQ(back, bits % 2 == 0 ? half : next) << middle;
  }
}

TEST(Quantise, names_the_number_a_type_cannot_hold) {
  std::vector<float> values(64, 1.0F);
  std::vector<std::byte> out(256);
  const auto bad_of = [&](GgmlType type, float value) {
    values[37] = value;
    std::int64_t bad = -1;
    return quantise(type, values.data(), 64, out.data(), bad) ? -1 : bad;
  };
  for (const GgmlType type : {GgmlType::f32, GgmlType::f16, GgmlType::bf16, GgmlType::q8_0}) {
    EXPECT_EQ(bad_of(type, std::numeric_limits<float>::quiet_NaN()), 37);
    EXPECT_EQ(bad_of(type, -std::numeric_limits<float>::infinity()), 37);
  }
  EXPECT_EQ(bad_of(GgmlType::f16, 65520.0F), 37);
  EXPECT_EQ(bad_of(GgmlType::f16, 65519.0F), -1);
  EXPECT_EQ(bad_of(GgmlType::q8_0, 1e8F), 37);
  EXPECT_EQ(bad_of(GgmlType::bf16, std::numeric_limits<float>::max()), 37);
  EXPECT_EQ(bad_of(GgmlType::f32, std::numeric_limits<float>::max()), -1);
  EXPECT_EQ(bad_of(GgmlType::q8_0, 1e-44F), -1);
}

TEST(Quantise, leaves_a_block_of_denormals_as_zeros) {
  const std::vector<float> values(32, 1e-44F);
  std::vector<std::byte> out(34);
  std::int64_t bad = 0;
  ASSERT_TRUE(quantise(GgmlType::q8_0, values.data(), 32, out.data(), bad));
  std::vector<float> back(32, 1);
  dequantise(GgmlType::q8_0, out.data(), 32, back.data());
  EXPECT_EQ(back, std::vector<float>(32, 0));
}

}  // namespace
}  // namespace tailor
