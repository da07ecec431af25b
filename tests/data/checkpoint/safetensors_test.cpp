#include "data/checkpoint/safetensors.h"

#include <gmock/gmock.h>

#include "tests/data/checkpoint/folder_fixture.h"

namespace tailor {
namespace {

using testing::HasSubstr;
using testing_support::error_of;
using testing_support::FolderTest;

std::string file_of(const std::string& header, std::size_t data_bytes) {
  std::string file(8, '\0');
  const std::uint64_t length = header.size();
  std::memcpy(file.data(), &length, 8);
  return file + header + std::string(data_bytes, 'x');
}
SafetensorsHeader parse(const std::string& file) {
  return parse_safetensors_header(std::as_bytes(std::span(file.data(), file.size())),
                                  "m.safetensors");
}
std::string refusal(const std::string& header, std::size_t data_bytes = 24) {
  return error_of([&] { parse(file_of(header, data_bytes)); });
}
/// {"dtype":"F32","shape":[2,3],"data_offsets":[begin,end]}
std::string entry(const std::string& begin, const std::string& end,
                  const std::string& shape = "[2,3]", const std::string& dtype = "F32") {
  return R"({"dtype":")" + dtype + R"(","shape":)" + shape + R"(,"data_offsets":[)" + begin + "," +
         end + "]}";
}

TEST(SafetensorsHeader, a_small_file) {
  const SafetensorsHeader header = parse(
      file_of(R"({"__metadata__":{"format":"pt"},"b":)" + entry("24", "25", "[]", "U8") +
                  R"(,"a":)" + entry("0", "24") + R"(,"none":)" + entry("25", "25", "[0,7]") + "}",
              25));
  EXPECT_EQ(header.metadata.at("format"), "pt");
  ASSERT_EQ(header.tensors.size(), 3U);
  const TensorInfo& a = header.tensors.at("a");
  EXPECT_EQ(a.shape_text(), "[2, 3]");
  EXPECT_EQ(a.elements(), 6);
  EXPECT_EQ(a.bytes, 24);
  EXPECT_EQ(header.tensors.at("b").offset - a.offset, 24);
  EXPECT_EQ(header.tensors.at("b").elements(), 1);
  EXPECT_EQ(header.tensors.at("none").elements(), 0);
  EXPECT_TRUE(parse(file_of("{}", 0)).tensors.empty());
}

TEST(SafetensorsHeader, a_file_cut_at_any_length_is_refused) {
  const std::string whole = file_of(
      R"({"a":)" + entry("0", "24") + R"(,"b":)" + entry("24", "32", "[1]", "I64") + "}  ", 32);
  EXPECT_EQ(parse(whole).tensors.size(), 2U);
  for (std::size_t length = 0; length < whole.size(); ++length) {
    const std::string text = error_of([&] { parse(whole.substr(0, length)); });
    EXPECT_THAT(text, HasSubstr("m.safetensors")) << "cut at " << length;
  }
  EXPECT_THAT(error_of([&] { parse(whole + "x"); }), HasSubstr("tensor data should end at byte"));
}

TEST(SafetensorsHeader, every_damaged_byte_is_refused_or_read_within_the_file) {
  const std::string whole = file_of(R"({"a":)" + entry("0", "24") + "}", 24);
  for (std::size_t i = 0; i < whole.size() - 24; ++i) {
    for (const int flip : {1, 2, 16, 128}) {
      std::string bad = whole;
      bad[i] = static_cast<char>(bad[i] ^ flip);
      try {
        for (const auto& [name, info] : parse(bad).tensors) {
          EXPECT_GE(info.offset, 8);
          EXPECT_LE(info.offset + info.bytes, static_cast<std::int64_t>(bad.size()));
        }
      } catch (const Error& error) {
        EXPECT_EQ(error.fault(), Fault::bad_file) << to_text(error);
      }
    }
  }
}

TEST(SafetensorsHeader, lengths_beyond_the_format) {
  std::string file = file_of("{}", 0);
  const std::uint64_t limit = 100'000'001;
  std::memcpy(file.data(), &limit, 8);
  EXPECT_EQ(error_of([&] { parse(file); }),
            "error: header length 100000001 is above the format's limit of 100 MB\n"
            "  where: m.safetensors\n"
            "  mend:  The file is damaged or cut off. Download it again and compare its size or "
            "checksum.\n");
  const std::uint64_t all = ~std::uint64_t{0};
  std::memcpy(file.data(), &all, 8);
  EXPECT_THAT(error_of([&] { parse(file); }), HasSubstr("above the format's limit"));
}

TEST(SafetensorsHeader, data_that_does_not_add_up) {
  EXPECT_THAT(refusal(R"({"a":)" + entry("4", "28") + "}", 28), HasSubstr("there is a hole"));
  EXPECT_THAT(refusal(R"({"a":)" + entry("0", "24") + R"(,"b":)" + entry("28", "52") + "}", 52),
              HasSubstr("there is a hole before the tensor's data"));
  EXPECT_THAT(refusal(R"({"a":)" + entry("0", "24") + R"(,"b":)" + entry("20", "44") + "}", 44),
              HasSubstr("overlaps its neighbour's"));
  EXPECT_THAT(refusal(R"({"a":)" + entry("0", "24") + R"(,"b":)" + entry("0", "24") + "}"),
              HasSubstr("overlaps its neighbour's"));
  EXPECT_THAT(refusal(R"({"a":)" + entry("0", "20") + "}", 20),
              HasSubstr("shape [2, 3] of F32 needs 24 bytes, the header gives it 20"));
  EXPECT_THAT(refusal(R"({"a":)" + entry("24", "0") + "}"), HasSubstr("run backwards"));
  EXPECT_THAT(refusal(R"({"a":)" + entry("0", "18446744073709551615") + "}"),
              HasSubstr("run backwards"));
  EXPECT_THAT(refusal(R"({"a":)" + entry("-1", "23") + "}"), HasSubstr("not a pair of offsets"));
  EXPECT_THAT(refusal(R"({"a":)" + entry("0", "24") + "}", 30), HasSubstr("should end at byte"));
}

TEST(SafetensorsHeader, entries_of_wrong_types) {
  EXPECT_THAT(refusal(R"({"a":)" + entry("0", "24", "[2,3]", "F31") + "}"),
              HasSubstr("element type 'F31' is not known"));
  for (const char* shape : {"[2,-3]", "[2,3.0]", "[\"2\",3]", "6", "\"6\"", "{\"rows\":6}",
                            "[9223372036854775808]", "[18446744073709551615]"}) {
    EXPECT_THAT(refusal(R"({"a":)" + entry("0", "24", shape) + "}"),
                HasSubstr("shape is not a list of sizes"))
        << shape;
  }
  EXPECT_THAT(refusal(R"({"a":)" + entry("0", "24", "[4294967296,4294967296]") + "}"),
              HasSubstr("has more bytes than 64 bits count"));
  EXPECT_THAT(refusal(R"({"a":{"dtype":"F32","shape":[6],"data_offsets":[0]}})"),
              HasSubstr("not a pair of offsets"));
  EXPECT_THAT(refusal(R"({"a":{"dtype":"F32","shape":[6]}})"), HasSubstr("'data_offsets'"));
  EXPECT_THAT(refusal(R"({"a":{"dtype":3,"shape":[6],"data_offsets":[0,24]}})"),
              HasSubstr("must be a string"));
  EXPECT_THAT(refusal(R"({"a":[]})"), HasSubstr("a JSON object is needed"));
  EXPECT_THAT(refusal("[]"), HasSubstr("header is not a JSON object"));
  EXPECT_THAT(refusal("{\"a\":"), HasSubstr("not valid JSON"));
  EXPECT_THAT(refusal(R"({"__metadata__":{"a":1}})", 0), HasSubstr("may hold strings only"));
  EXPECT_THAT(refusal(R"({"__metadata__":"a"})", 0), HasSubstr("__metadata__ is not an object"));
}

TEST(SafetensorsHeader, a_tensor_listed_twice) {
  const std::string text =
      refusal(R"({"a":)" + entry("0", "24") + R"(,"a":)" + entry("0", "24") + "}");
  EXPECT_THAT(text, HasSubstr("tensor is listed twice"));
  EXPECT_THAT(text, HasSubstr("m.safetensors, tensor a"));
}

TEST(SafetensorsHeader, json_deeper_than_any_header) {
  std::string deep = R"({"__metadata__":)" + std::string(100'000, '[');
  EXPECT_THAT(refusal(deep), HasSubstr("nested deeper than 200 levels"));
}

using SafetensorsFile = FolderTest;

TEST_F(SafetensorsFile, what_is_written_reads_back) {
  const std::vector<float> floats = {1.5F, -2.0F, 3.25F, 0.0F, 1e-40F, 3e38F};
  const std::vector<std::int64_t> numbers = {-1, 1LL << 62};
  const std::uint8_t byte = 7;
  const std::vector<TensorToWrite> tensors = {
      {"z", Dtype::f32, {2, 3}, std::as_bytes(std::span(floats))},
      {"a", Dtype::u8, {}, std::as_bytes(std::span(&byte, 1))},
      {"quote \" and \xC3\xA9", Dtype::i64, {2}, std::as_bytes(std::span(numbers))},
      {"none", Dtype::bf16, {0, 4}, {}}};
  const fs::path path = folder_ / "m.safetensors";
  write_safetensors(path, tensors, {{"format", "pt"}});
  const MappedFile file(path);
  const SafetensorsHeader header = parse_safetensors_header(file.bytes(), path);
  EXPECT_EQ(header.metadata, (std::map<std::string, std::string>{{"format", "pt"}}));
  ASSERT_EQ(header.tensors.size(), tensors.size());
  for (const TensorToWrite& tensor : tensors) {
    const TensorInfo& info = header.tensors.at(tensor.name);
    EXPECT_EQ(info.dtype, tensor.dtype);
    EXPECT_EQ(info.shape, tensor.shape);
    const auto bytes = file.bytes().subspan(static_cast<std::size_t>(info.offset),
                                            static_cast<std::size_t>(info.bytes));
    EXPECT_TRUE(std::equal(bytes.begin(), bytes.end(), tensor.bytes.begin(), tensor.bytes.end()));
  }
  EXPECT_EQ(header.tensors.at("z").offset % 8, 0);
  // The same call gives the same file.
  const std::string digest = sha256_file(path);
  write_safetensors(path, tensors, {{"format", "pt"}});
  EXPECT_EQ(sha256_file(path), digest);
}

TEST_F(SafetensorsFile, bytes_that_are_not_the_shapes_are_our_mistake) {
  const float one = 1;
  EXPECT_THROW(write_safetensors(folder_ / "m.safetensors",
                                 {{"a", Dtype::f32, {2}, std::as_bytes(std::span(&one, 1))}}),
               Error);
  EXPECT_TRUE(fs::is_empty(folder_));
}

TEST(Dtypes, have_names_and_sizes) {
  EXPECT_EQ(dtype_name(Dtype::bf16), "BF16");
  EXPECT_EQ(dtype_bytes(Dtype::bf16), 2);
  EXPECT_EQ(dtype_bytes(Dtype::f8_e4m3), 1);
  EXPECT_EQ(dtype_bytes(Dtype::f64), 8);
}

}  // namespace
}  // namespace tailor
