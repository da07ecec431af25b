// What bitsandbytes, compressed-tensors and torch make of the same weights: make_fixtures.py.

#include <gtest/gtest.h>

#include <map>

#include "base/file.h"
#include "data/checkpoint/safetensors.h"
#include "data/quant/tables.h"
#include "tests/support/stored_matrix.h"

namespace tailor {
namespace {

using testing_support::AlignedBytes;
using testing_support::bell_weights;
using testing_support::fnv_text;
using testing_support::StoredMatrix;

class Fixture {
 public:
  explicit Fixture(const std::string& name)
      : file_(fs::path(TAILOR_SOURCE_DIR) / "tests/data/quant/fixtures" / (name + ".safetensors")),
        header_(parse_safetensors_header(file_.bytes(), file_.path())) {}

  std::span<const std::byte> bytes(const std::string& name) const {
    const TensorInfo& info = header_.tensors.at(name);
    return file_.bytes().subspan(static_cast<std::size_t>(info.offset),
                                 static_cast<std::size_t>(info.bytes));
  }
  template <class T>
  std::vector<T> numbers(const std::string& name) const {
    const auto from = bytes(name);
    std::vector<T> out(from.size() / sizeof(T));
    std::memcpy(out.data(), from.data(), from.size());
    return out;
  }
  const std::string& note(const std::string& name) const { return header_.metadata.at(name); }

 private:
  MappedFile file_;
  SafetensorsHeader header_;
};

bool same_bytes(const AlignedBytes& ours, std::span<const std::byte> theirs) {
  return ours.size() == theirs.size() &&
         std::memcmp(ours.data(), theirs.data(), theirs.size()) == 0;
}
template <class T>
bool same_numbers(const std::vector<T>& ours, const std::vector<T>& theirs) {
  return ours.size() == theirs.size() &&
         std::memcmp(ours.data(), theirs.data(), ours.size() * sizeof(T)) == 0;
}
template <class T>
std::string hash_of(const std::vector<T>& numbers) {
  return fnv_text(numbers.data(), numbers.size() * sizeof(T));
}

EncodeStatistics encode(StoredMatrix& out, const std::vector<float>& values,
                        std::optional<float> offset = std::nullopt) {
  MatrixEncoder encoder(out.format, out.rows, out.columns, out.codes.data(), out.scales.data());
  encoder.add_rows(0, out.rows, values.data());
  return encoder.finish(offset);
}

struct Int4Case {
  std::int64_t rows, columns, group;
};

TEST(golden, int4_is_what_compressed_tensors_packs) {
  const Fixture fixture("int4");
  for (const auto& [rows, columns, group] :
       {Int4Case{4, 256, 128}, Int4Case{5, 96, 32}, Int4Case{3, 20, 20}, Int4Case{3, 13, 1}}) {
    const std::string name =
        std::to_string(rows) + "x" + std::to_string(columns) + "g" + std::to_string(group);
    SCOPED_TRACE(name);
    const auto packed = fixture.bytes(name + ".weight_packed");
    const auto scales = fixture.bytes(name + ".weight_scale");
    StoredMatrix theirs(WeightFormat::int4(group), rows, columns);
    ASSERT_EQ(theirs.codes.size(), packed.size());
    ASSERT_EQ(theirs.scales.size(), scales.size());
    std::memcpy(theirs.codes.data(), packed.data(), packed.size());
    std::memcpy(theirs.scales.data(), scales.data(), scales.size());
    const auto decoded = fixture.numbers<std::uint16_t>(name + ".decoded");
    EXPECT_TRUE(same_numbers(theirs.decoded_bf16(), decoded));
    std::vector<float> widened;
    for (const std::uint16_t bits : decoded) widened.push_back(bf16_to_float(bits));
    EXPECT_TRUE(same_numbers(theirs.decoded(), widened));

    // Codes times scales, exactly, must come back as those codes and scales: nothing is nearer.
    const auto codes = fixture.numbers<std::int8_t>(name + ".codes");
    const auto each_scale = fixture.numbers<std::uint16_t>(name + ".weight_scale");
    std::vector<float> products;
    for (std::int64_t i = 0; i < rows * columns; ++i) {
      const auto at =
          static_cast<std::size_t>(i / columns * (columns / group) + i % columns / group);
      products.push_back(static_cast<float>(codes[static_cast<std::size_t>(i)]) *
                         bf16_to_float(each_scale[at]));
    }
    StoredMatrix ours(WeightFormat::int4(group), rows, columns);
    encode(ours, products);
    if (group > 1) {  // in a group of one several pairs of code and scale give the same product
      EXPECT_TRUE(same_bytes(ours.codes, packed));
      EXPECT_TRUE(same_bytes(ours.scales, scales));
    }

    const auto weights = bell_weights(rows, columns, static_cast<std::uint32_t>(rows * columns));
    const EncodeStatistics statistics = encode(ours, weights);
    const double theirs_error = fixture.numbers<double>(name + ".squared_error").at(0);
    EXPECT_NEAR(statistics.absmax_squared_error, theirs_error, 1e-6 * theirs_error);
    EXPECT_LE(statistics.squared_error, theirs_error * (1 + 1e-6));
  }
}

TEST(golden, nf4_tables) {
  const Fixture fixture("nf4");
  EXPECT_EQ(fixture.numbers<float>("nf4"), std::vector<float>(std::begin(kNf4), std::end(kNf4)));
  EXPECT_EQ(fixture.numbers<float>("dynamic_map"),
            std::vector<float>(std::begin(kDynamicMap), std::end(kDynamicMap)));
}

struct Shape {
  std::int64_t rows, columns;
};

TEST(golden, nf4_is_what_bitsandbytes_quantises) {
  const Fixture fixture("nf4");
  for (const auto& [rows, columns] : {Shape{4, 64}, Shape{9, 71}, Shape{3, 5}, Shape{130, 130}}) {
    const std::string name = std::to_string(rows) + "x" + std::to_string(columns);
    SCOPED_TRACE(name);
    const auto weights = bell_weights(rows, columns, static_cast<std::uint32_t>(rows * columns));
    const float offset = fixture.numbers<float>(name + ".offset").at(0);
    StoredMatrix ours(WeightFormat::nf4(), rows, columns);
    encode(ours, weights, offset);
    EXPECT_TRUE(same_bytes(ours.codes, fixture.bytes(name + ".codes")));
    std::vector<std::byte> scales;
    for (const char* part : {".offset", ".second", ".bytes"}) {
      const auto bytes = fixture.bytes(name + part);
      scales.insert(scales.end(), bytes.begin(), bytes.end());
    }
    EXPECT_TRUE(same_bytes(ours.scales, scales));
    const auto decoded = ours.decoded();
    const auto decoded_bf16 = ours.decoded_bf16();
    EXPECT_EQ(hash_of(decoded), fixture.note(name + ".decoded"));
    EXPECT_EQ(hash_of(decoded_bf16), fixture.note(name + ".decoded_bf16"));
    if (rows * columns < 1000) {
      EXPECT_EQ(decoded, fixture.numbers<float>(name + ".decoded"));
      EXPECT_EQ(decoded_bf16, fixture.numbers<std::uint16_t>(name + ".decoded_bf16"));
    }

    encode(ours, weights);
    float own_offset = 0;
    std::memcpy(&own_offset, ours.scales.data(), sizeof own_offset);
    EXPECT_EQ(own_offset, fixture.numbers<float>(name + ".mean").at(0));
  }
}

struct Fp8Case {
  std::int64_t rows, columns, block_rows, block_columns;
};

TEST(golden, fp8_is_torch_s_e4m3_and_deepseek_s_blocks) {
  const Fixture fixture("fp8");
  for (const auto& [rows, columns, block_rows, block_columns] :
       {Fp8Case{18, 40, 16, 16}, Fp8Case{3, 21, 1, 21}, Fp8Case{130, 260, 128, 128}}) {
    const std::string name = std::to_string(rows) + "x" + std::to_string(columns) + "b" +
                             std::to_string(block_rows) + "x" + std::to_string(block_columns);
    SCOPED_TRACE(name);
    const auto weights = bell_weights(rows, columns, static_cast<std::uint32_t>(rows * columns));
    const WeightFormat format = block_rows == 1
                                    ? WeightFormat::fp8_rows()
                                    : WeightFormat{WeightKind::fp8, 0, block_rows, block_columns};
    StoredMatrix ours(format, rows, columns);
    encode(ours, weights);
    EXPECT_TRUE(same_bytes(ours.scales, fixture.bytes(name + ".scales")));
    EXPECT_EQ(fnv_text(ours.codes.data(), ours.codes.size()), fixture.note(name + ".codes"));
    const auto decoded = ours.decoded();
    const auto decoded_bf16 = ours.decoded_bf16();
    EXPECT_EQ(hash_of(decoded), fixture.note(name + ".decoded"));
    EXPECT_EQ(hash_of(decoded_bf16), fixture.note(name + ".decoded_bf16"));
    if (rows * columns < 1000) {
      EXPECT_TRUE(same_bytes(ours.codes, fixture.bytes(name + ".codes")));
      EXPECT_EQ(decoded, fixture.numbers<float>(name + ".decoded"));
      EXPECT_EQ(decoded_bf16, fixture.numbers<std::uint16_t>(name + ".decoded_bf16"));
    }
  }
}

TEST(golden, every_e4m3_code) {
  const auto theirs = Fixture("fp8").numbers<float>("e4m3");  // 0 for NaN
  StoredMatrix every(WeightFormat::fp8_rows(), 1, 256);
  for (std::size_t i = 0; i < 256; ++i) every.codes.data()[i] = static_cast<std::byte>(i);
  const float one = 1;
  std::memcpy(every.scales.data(), &one, sizeof one);
  const auto ours = every.decoded();
  for (std::size_t i = 0; i < 256; ++i) {
    if (i == 0x7F || i == 0xFF) {
      EXPECT_TRUE(std::isnan(ours[i]));
    } else {
      EXPECT_EQ(ours[i], theirs[i]) << i;
    }
  }
}

}  // namespace
}  // namespace tailor
