#pragma once

#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "base/file.h"
#include "data/gguf/blocks.h"

namespace tailor {

constexpr std::uint32_t kGgufMagic = 0x46554747;  ///< "GGUF", little-endian
constexpr std::int64_t kGgufAlignment = 32;       ///< where general.alignment says nothing

/// Types of metadata values by the numbers that files hold (ggml's docs/gguf.md).
enum class GgufType : std::uint32_t {
  u8 = 0,
  i8 = 1,
  u16 = 2,
  i16 = 3,
  u32 = 4,
  i32 = 5,
  f32 = 6,
  boolean = 7,
  text = 8,
  array = 9,
  u64 = 10,
  i64 = 11,
  f64 = 12,
};

/// One metadata value. Integers of every width are kept as int64 (u64 above its largest is
/// refused), f32 and f64 as double; an array is a list of one of them.
struct GgufValue {
  GgufType type;            ///< of the value, or `array`
  GgufType element = type;  ///< of an array
  std::variant<std::int64_t, double, bool, std::string, std::vector<std::int64_t>,
               std::vector<double>, std::vector<std::string>>
      value;

  static GgufValue of_u32(std::int64_t value);
  static GgufValue of_f32(double value);
  static GgufValue of_bool(bool value);
  static GgufValue of_text(std::string value);
  static GgufValue of_texts(std::vector<std::string> values);
  static GgufValue of_i32s(std::vector<std::int64_t> values);
};

struct GgufTensor {
  GgmlType type;
  std::vector<std::int64_t> shape;  ///< rows first, as in safetensors: reversed to the file's
  std::int64_t offset;              ///< from the start of the file
  std::int64_t bytes;

  std::int64_t elements() const;
  std::int64_t row() const { return shape.back(); }
};

/// The head of a GGUF file, version 2 or 3, little-endian.
///
/// Nothing in the file is believed: every count and length is held against what is left of the file
/// before memory is taken for it, names against repetition, tensors against the file's end, its
/// alignment and each other. Throws Error{bad_file} naming the key or tensor and the byte.
struct GgufHeader {
  std::map<std::string, GgufValue, std::less<>> values;
  std::map<std::string, GgufTensor, std::less<>> tensors;
  std::int64_t data_begin = 0;
};
GgufHeader parse_gguf_header(std::span<const std::byte> file, const fs::path& path);

/// Whether a file begins as a GGUF file does.
bool is_gguf_file(const fs::path& path);

/// A tensor to write.
struct GgufTensorToWrite {
  std::string name;
  GgmlType type;
  std::vector<std::int64_t> shape;  ///< rows first
  std::int64_t offset = 0;          ///< set by gguf_header_bytes: from the start of the file
  std::int64_t bytes = 0;           ///< likewise
};
/// Header and its padding, version 3; tensors follow one after the other on borders of 32 bytes.
/// `file_bytes` gets the size of the whole file.
std::string gguf_header_bytes(const std::vector<std::pair<std::string, GgufValue>>& values,
                              std::vector<GgufTensorToWrite>& tensors, std::int64_t& file_bytes);

}  // namespace tailor
