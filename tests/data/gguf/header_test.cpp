#include "data/gguf/header.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <random>

#include "tests/data/gguf/gguf_files.h"

namespace tailor {
namespace {

using gguf_tests::error_of;
using gguf_tests::parse;
using testing::ElementsAre;
using testing::HasSubstr;

template <class T>
std::string number(T value) {
  std::string out(sizeof value, '\0');
  std::memcpy(out.data(), &value, sizeof value);
  return out;
}
std::string text(const std::string& value) { return number<std::uint64_t>(value.size()) + value; }

/// Head of a file with so many tensors and values.
std::string head(std::uint64_t tensors, std::uint64_t values, std::uint32_t version = 3) {
  return "GGUF" + number(version) + number(tensors) + number(values);
}
std::string entry(const std::string& name, const std::vector<std::uint64_t>& sides,
                  std::uint32_t type, std::uint64_t offset) {
  std::string out = text(name) + number(static_cast<std::uint32_t>(sides.size()));
  for (const std::uint64_t side : sides) out += number(side);
  return out + number(type) + number(offset);
}
std::string with_data(std::string header, std::size_t bytes, std::size_t alignment = 32) {
  header.resize((header.size() + alignment - 1) / alignment * alignment, '\0');
  return header + std::string(bytes, 'x');
}

std::string small_file() {
  std::vector<GgufTensorToWrite> tensors = {{"a.weight", GgmlType::f32, {3, 4}},
                                            {"b.weight", GgmlType::q8_0, {2, 2, 32}},
                                            {"c", GgmlType::f16, {5}}};
  std::int64_t bytes = 0;
  std::string out = gguf_header_bytes({{"general.architecture", GgufValue::of_text("llama")},
                                       {"x.count", GgufValue::of_u32(7)},
                                       {"x.real", GgufValue::of_f32(0.5)},
                                       {"x.flag", GgufValue::of_bool(true)},
                                       {"x.texts", GgufValue::of_texts({"one", "", "thr\xc3\xa9"})},
                                       {"x.kinds", GgufValue::of_i32s({1, -1, 3})}},
                                      tensors, bytes);
  out.resize(static_cast<std::size_t>(bytes), 'd');
  return out;
}

TEST(GgufHeader, reads_what_was_written) {
  const GgufHeader header = parse(small_file());
  EXPECT_EQ(std::get<std::string>(header.values.at("general.architecture").value), "llama");
  EXPECT_EQ(std::get<std::int64_t>(header.values.at("x.count").value), 7);
  EXPECT_EQ(std::get<double>(header.values.at("x.real").value), 0.5);
  EXPECT_TRUE(std::get<bool>(header.values.at("x.flag").value));
  EXPECT_THAT(std::get<std::vector<std::string>>(header.values.at("x.texts").value),
              ElementsAre("one", "", "thr\xc3\xa9"));
  EXPECT_THAT(std::get<std::vector<std::int64_t>>(header.values.at("x.kinds").value),
              ElementsAre(1, -1, 3));
  ASSERT_EQ(header.tensors.size(), 3U);
  EXPECT_THAT(header.tensors.at("b.weight").shape, ElementsAre(2, 2, 32));
  EXPECT_EQ(header.tensors.at("b.weight").bytes, 4 * 34);
  EXPECT_EQ(header.data_begin % 32, 0);
  EXPECT_EQ(header.tensors.at("a.weight").offset, header.data_begin);
  EXPECT_EQ(header.tensors.at("b.weight").offset, header.data_begin + 64);
  EXPECT_EQ(header.tensors.at("c").offset, header.data_begin + 64 + 160);
}

struct Bad {
  const char* name;
  std::string file;
  const char* what;
};
class GgufDamage : public testing::TestWithParam<Bad> {};
std::vector<Bad> bad_files() {
  const std::uint64_t huge = ~std::uint64_t{0};
  const std::string none = head(0, 1);
  return {
      {"not_gguf", "GGML" + std::string(40, '\0'), "does not begin with GGUF"},
      {"empty", "", "ends inside the magic number"},
      {"version_1", head(0, 0, 1), "version 1 is not read"},
      {"big_endian", head(0, 0, 0x03000000U), "big-endian"},
      {"too_many_tensors", head(huge, 0), "more than its 24 bytes can hold"},
      {"too_many_values", head(0, huge), "more than its 24 bytes can hold"},
      {"key_too_long", none + number(huge) + std::string(60, 'k'), "a key is 18446744073709551615"},
      {"key_past_the_end", none + number<std::uint64_t>(1000) + std::string(60, 'k'),
       "has 60 left"},
      {"key_not_utf8", none + text("\xff\xfe") + number(4U) + number(1U), "not UTF-8"},
      {"key_twice",
       head(0, 2) + text("a.b") + number(4U) + number(1U) + text("a.b") + number(4U) + number(2U),
       "the key is there twice"},
      {"value_type", none + text("k") + number(13U) + number(huge), "value type 13"},
      {"text_past_the_end", none + text("k") + number(8U) + number<std::uint64_t>(99) + "abc",
       "has 3 left"},
      {"boolean", none + text("k") + number(7U) + std::string(1, '\2'), "neither 0 nor 1"},
      {"array_of_arrays", none + text("k") + number(9U) + number(9U) + number(huge),
       "array of arrays"},
      {"array_too_long", none + text("k") + number(9U) + number(4U) + number(huge / 4),
       "values, the file only"},
      {"array_of_texts_too_long", none + text("k") + number(9U) + number(8U) + number(huge / 8),
       "values, the file only"},
      {"large_u64", none + text("k") + number(10U) + number(huge), "above 2^63"},
      {"alignment_zero", none + text("general.alignment") + number(4U) + number(0U),
       "power of two"},
      {"alignment_12", none + text("general.alignment") + number(4U) + number(12U), "power of two"},
      {"alignment_text", none + text("general.alignment") + number(8U) + text("32"),
       "power of two"},
      {"no_dimensions", with_data(head(1, 0) + entry("t", {}, 0, 0) + std::string(16, '\0'), 64),
       "0 dimensions"},
      {"five_dimensions", with_data(head(1, 0) + entry("t", {1, 1, 1, 1, 1}, 0, 0), 64),
       "5 dimensions"},
      {"side_of_zero", with_data(head(1, 0) + entry("t", {4, 0}, 0, 0), 64), "a side of 0"},
      {"sides_overflow", with_data(head(1, 0) + entry("t", {1ULL << 40U, 1ULL << 40U}, 0, 0), 64),
       "a side of"},
      {"bytes_overflow", with_data(head(1, 0) + entry("t", {1ULL << 62U}, 0, 0), 64),
       "more bytes than 64 bits"},
      {"unknown_type", with_data(head(1, 0) + entry("t", {32}, 99, 0), 64), "type 99 is not known"},
      {"known_type", with_data(head(1, 0) + entry("t", {256}, 10, 0), 128),
       "type Q2_K are not read"},
      {"no_whole_blocks", with_data(head(1, 0) + entry("t", {33}, 8, 0), 64), "whole blocks of 32"},
      {"past_the_end", with_data(head(1, 0) + entry("t", {32}, 0, 0), 127), "end past the file"},
      {"offset_past_the_end", with_data(head(1, 0) + entry("t", {1}, 0, 1ULL << 40U), 64),
       "end past the file"},
      {"offset_negative", with_data(head(1, 0) + entry("t", {1}, 0, huge), 64),
       "offset is 18446744073709551615"},
      {"misaligned", with_data(head(1, 0) + entry("t", {1}, 0, 4), 64),
       "no multiple of the alignment"},
      {"overlap", with_data(head(2, 0) + entry("t", {16}, 0, 0) + entry("u", {4}, 0, 32), 128),
       "overlaps"},
      {"twice", with_data(head(2, 0) + entry("t", {4}, 0, 0) + entry("t", {4}, 0, 32), 64),
       "the tensor is there twice"},
      {"name_empty", with_data(head(1, 0) + entry("", {4}, 0, 0), 64), "empty or not UTF-8"},
  };
}
TEST_P(GgufDamage, is_told) {
  const Error error = error_of([] { static_cast<void>(parse(GetParam().file)); });
  EXPECT_EQ(error.fault(), Fault::bad_file);
  EXPECT_THAT(error.parts().what, HasSubstr(GetParam().what));
  EXPECT_THAT(error.parts().where, HasSubstr("x.gguf"));
}
INSTANTIATE_TEST_SUITE_P(Files, GgufDamage, testing::ValuesIn(bad_files()),
                         [](const auto& each) { return std::string(each.param.name); });

TEST(GgufHeader, of_another_alignment_is_read) {
  const std::string file =
      with_data(head(2, 1) + text("general.alignment") + number(4U) + number(64U) +
                    entry("t", {4}, 0, 0) + entry("u", {4}, 0, 64),
                128, 64);
  EXPECT_EQ(parse(file).tensors.at("u").offset, parse(file).tensors.at("t").offset + 64);
}

/// Every shorter file is refused, whatever is cut; nothing is read past its end (the sanitizers'
/// builds would say so) and no memory is taken for what is not there.
TEST(GgufHeader, cut_off_anywhere_is_refused) {
  const std::string whole = small_file();
  const auto end = static_cast<std::size_t>(parse(whole).tensors.at("c").offset + 10);
  for (std::size_t size = 0; size < end; ++size) {
    const Error error = error_of([&] { static_cast<void>(parse(whole.substr(0, size))); });
    ASSERT_EQ(error.fault(), Fault::bad_file) << size;
  }
  EXPECT_EQ(parse(whole.substr(0, end)).tensors.size(), 3U);  // padding behind the last may lack
}

TEST(GgufHeader, with_bytes_changed_is_read_or_refused) {
  const std::string whole = small_file();
  const auto head_bytes = static_cast<std::size_t>(parse(whole).data_begin);
  std::mt19937 numbers(11);
  int refused = 0;
  constexpr int kRounds = 30'000;
  for (int round = 0; round < kRounds; ++round) {
    std::string file = whole;
    for (unsigned i = 0; i < 1 + numbers() % 4; ++i) {
      const std::size_t at = numbers() % head_bytes;
      switch (numbers() % 4) {
        case 0:
          file[at] = static_cast<char>(numbers());
          break;
        case 1:
          file[at] = '\xff';
          break;
        case 2:
          file[at] = '\0';
          break;
        default:
          file.erase(at, numbers() % 16);
      }
    }
    try {
      for (const auto& [name, tensor] : parse(file).tensors) {
        ASSERT_LE(tensor.offset + tensor.bytes, static_cast<std::int64_t>(file.size())) << name;
        ASSERT_EQ(tensor.bytes, tensor.elements() / ggml_layout(tensor.type).block *
                                    ggml_layout(tensor.type).bytes);
      }
    } catch (const Error& error) {
      ASSERT_EQ(error.fault(), Fault::bad_file);
      ++refused;
    }
  }
  EXPECT_GT(refused, kRounds / 2);
}

}  // namespace
}  // namespace tailor
