#include "base/error.h"
#include "base/units.h"
#include "data/gguf/header.h"

namespace tailor {
namespace {

void put(std::string& out, const void* from, std::size_t bytes) {
  out.append(static_cast<const char*>(from), bytes);
}
template <class T>
void put_number(std::string& out, T value) {
  put(out, &value, sizeof value);
}
void put_text(std::string& out, std::string_view text) {
  put_number<std::uint64_t>(out, text.size());
  out += text;
}
void put_integer(std::string& out, GgufType type, std::int64_t value) {
  switch (type) {
    case GgufType::u32:
      return put_number(out, narrow<std::uint32_t>(value));
    case GgufType::i32:
      return put_number(out, narrow<std::int32_t>(value));
    default:
      TAILOR_CHECK(false, "an integer type that is written");
  }
}

void put_value(std::string& out, const GgufValue& value) {
  put_number(out, static_cast<std::uint32_t>(value.type));
  switch (value.type) {
    case GgufType::text:
      return put_text(out, std::get<std::string>(value.value));
    case GgufType::boolean:
      return put_number<std::uint8_t>(out, std::get<bool>(value.value) ? 1 : 0);
    case GgufType::f32:
      return put_number(out, static_cast<float>(std::get<double>(value.value)));
    case GgufType::array:
      break;
    default:
      return put_integer(out, value.type, std::get<std::int64_t>(value.value));
  }
  put_number(out, static_cast<std::uint32_t>(value.element));
  if (value.element == GgufType::text) {
    const auto& texts = std::get<std::vector<std::string>>(value.value);
    put_number<std::uint64_t>(out, texts.size());
    for (const std::string& text : texts) put_text(out, text);
    return;
  }
  const auto& numbers = std::get<std::vector<std::int64_t>>(value.value);
  put_number<std::uint64_t>(out, numbers.size());
  for (const std::int64_t number : numbers) put_integer(out, value.element, number);
}

}  // namespace

GgufValue GgufValue::of_u32(std::int64_t value) { return {GgufType::u32, GgufType::u32, value}; }
GgufValue GgufValue::of_f32(double value) { return {GgufType::f32, GgufType::f32, value}; }
GgufValue GgufValue::of_bool(bool value) { return {GgufType::boolean, GgufType::boolean, value}; }
GgufValue GgufValue::of_text(std::string value) {
  return {GgufType::text, GgufType::text, std::move(value)};
}
GgufValue GgufValue::of_texts(std::vector<std::string> values) {
  return {GgufType::array, GgufType::text, std::move(values)};
}
GgufValue GgufValue::of_i32s(std::vector<std::int64_t> values) {
  return {GgufType::array, GgufType::i32, std::move(values)};
}

std::string gguf_header_bytes(const std::vector<std::pair<std::string, GgufValue>>& values,
                              std::vector<GgufTensorToWrite>& tensors, std::int64_t& file_bytes) {
  std::string out;
  put_number(out, kGgufMagic);
  put_number<std::uint32_t>(out, 3);
  put_number<std::uint64_t>(out, tensors.size());
  put_number<std::uint64_t>(out, values.size());
  for (const auto& [key, value] : values) {
    put_text(out, key);
    put_value(out, value);
  }
  std::int64_t offset = 0;
  for (GgufTensorToWrite& tensor : tensors) {
    const GgmlLayout& layout = ggml_layout(tensor.type);
    std::int64_t elements = 1;
    for (const std::int64_t side : tensor.shape) elements = checked_multiply(elements, side);
    TAILOR_CHECK(tensor.shape.back() % layout.block == 0, tensor.name);
    tensor.bytes = checked_multiply(elements / layout.block, layout.bytes);
    tensor.offset = offset;
    put_text(out, tensor.name);
    put_number(out, narrow<std::uint32_t>(tensor.shape.size()));
    for (auto side = tensor.shape.rbegin(); side != tensor.shape.rend(); ++side) {
      put_number(out, static_cast<std::uint64_t>(*side));
    }
    put_number(out, static_cast<std::uint32_t>(tensor.type));
    put_number(out, static_cast<std::uint64_t>(offset));
    offset += align_up(tensor.bytes, kGgufAlignment);
  }
  out.resize(static_cast<std::size_t>(align_up(narrow<std::int64_t>(out.size()), kGgufAlignment)),
             '\0');
  const auto begin = narrow<std::int64_t>(out.size());
  for (GgufTensorToWrite& tensor : tensors) tensor.offset += begin;
  file_bytes = begin + offset;
  return out;
}

}  // namespace tailor
