#include "data/gguf/header.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <fstream>
#include <limits>

#include "base/error.h"
#include "base/text.h"
#include "base/units.h"

namespace tailor {
namespace {

constexpr std::uint64_t kKeyBytesMax = 65535;
constexpr std::uint32_t kDimensionsMax = 4;
constexpr std::uint64_t kTextBytesMax = std::uint64_t{64} << 20U;
constexpr std::uint64_t kArrayValuesMax = std::uint64_t{1} << 26U;  // of all arrays together

std::int64_t size_of(GgufType type) {
  switch (type) {
    case GgufType::u8:
    case GgufType::i8:
    case GgufType::boolean:
      return 1;
    case GgufType::u16:
    case GgufType::i16:
      return 2;
    case GgufType::u32:
    case GgufType::i32:
    case GgufType::f32:
      return 4;
    case GgufType::u64:
    case GgufType::i64:
    case GgufType::f64:
    case GgufType::text:  // its length
      return 8;
    case GgufType::array:
      return 12;  // type and count
  }
  return 0;
}

bool is_float(GgufType type) { return type == GgufType::f32 || type == GgufType::f64; }

/// Reads forward through the head, never past the file's end.
class HeadReader {
 public:
  HeadReader(std::span<const std::byte> file, const fs::path& path) : file_(file), path_(path) {}

  [[noreturn]] void refuse(const std::string& what, const std::string& mend = {}) const {
    throw Error(
        Fault::bad_file,
        {what,
         path_.string() + (name_.empty() ? "" : ", " + name_) + ", byte " + std::to_string(at_),
         mend.empty() ? "The file is damaged, cut off, or was written by a program that "
                        "does not keep to the format: fetch it again."
                      : mend});
  }
  void name(std::string name) { name_ = std::move(name); }
  std::uint64_t left() const { return file_.size() - at_; }
  std::size_t at() const { return at_; }

  template <class T>
  T number(const char* what) {
    if (left() < sizeof(T)) refuse(std::string("the file ends inside ") + what);
    T value;
    std::memcpy(&value, file_.data() + at_, sizeof value);
    at_ += sizeof value;
    return value;
  }
  std::string text(const char* what, std::uint64_t most) {
    const auto length = number<std::uint64_t>(what);
    if (length > most) {
      refuse(std::string(what) + " is " + std::to_string(length) + " bytes long, the most is " +
             std::to_string(most));
    }
    if (length > left()) {
      refuse(std::string(what) + " is " + std::to_string(length) + " bytes long, the file has " +
             std::to_string(left()) + " left");
    }
    std::string out(reinterpret_cast<const char*>(file_.data()) + at_,
                    static_cast<std::size_t>(length));
    at_ += static_cast<std::size_t>(length);
    return out;
  }
  std::int64_t integer(GgufType type) {
    switch (type) {
      case GgufType::u8:
        return number<std::uint8_t>("a value");
      case GgufType::i8:
        return number<std::int8_t>("a value");
      case GgufType::u16:
        return number<std::uint16_t>("a value");
      case GgufType::i16:
        return number<std::int16_t>("a value");
      case GgufType::u32:
        return number<std::uint32_t>("a value");
      case GgufType::i32:
        return number<std::int32_t>("a value");
      case GgufType::i64:
        return number<std::int64_t>("a value");
      case GgufType::u64: {
        const auto value = number<std::uint64_t>("a value");
        if (value > static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max())) {
          refuse("the number " + std::to_string(value) + " is above 2^63 - 1");
        }
        return static_cast<std::int64_t>(value);
      }
      default:
        break;
    }
    TAILOR_CHECK(false, "an integer type");
  }
  double real(GgufType type) {
    return type == GgufType::f32 ? static_cast<double>(number<float>("a value"))
                                 : number<double>("a value");
  }
  bool boolean() {
    const auto value = number<std::uint8_t>("a value");
    if (value > 1) refuse("a truth value is " + std::to_string(value) + ", neither 0 nor 1");
    return value == 1;
  }
  GgufType type() {
    const auto type = number<std::uint32_t>("a value's type");
    if (type > 12) refuse("value type " + std::to_string(type) + " is not known");
    return static_cast<GgufType>(type);
  }
  GgufValue value() {
    GgufValue out{type(), {}, {}};
    out.element = out.type;
    if (out.type != GgufType::array) {
      if (out.type == GgufType::text) {
        out.value = text("a text", kTextBytesMax);
      } else if (out.type == GgufType::boolean) {
        out.value = boolean();
      } else if (is_float(out.type)) {
        out.value = real(out.type);
      } else {
        out.value = integer(out.type);
      }
      return out;
    }
    out.element = type();
    if (out.element == GgufType::array) {
      refuse("an array of arrays is not read", "No model that Tailor knows has one.");
    }
    const auto count = number<std::uint64_t>("an array's length");
    if (count > left() / static_cast<std::uint64_t>(size_of(out.element))) {
      refuse("an array has " + std::to_string(count) + " values, the file only " +
             std::to_string(left()) + " bytes more");
    }
    if (count > kArrayValuesMax - array_values_) {
      refuse("the arrays have more than " + std::to_string(kArrayValuesMax) + " values");
    }
    array_values_ += count;
    if (out.element == GgufType::text) {
      std::vector<std::string> texts;
      texts.reserve(static_cast<std::size_t>(count));
      for (std::uint64_t i = 0; i < count; ++i) texts.push_back(text("a text", kTextBytesMax));
      out.value = std::move(texts);
    } else if (is_float(out.element)) {
      std::vector<double> numbers;
      numbers.reserve(static_cast<std::size_t>(count));
      for (std::uint64_t i = 0; i < count; ++i) numbers.push_back(real(out.element));
      out.value = std::move(numbers);
    } else {
      std::vector<std::int64_t> numbers;
      numbers.reserve(static_cast<std::size_t>(count));
      for (std::uint64_t i = 0; i < count; ++i) {
        numbers.push_back(out.element == GgufType::boolean ? boolean() : integer(out.element));
      }
      out.value = std::move(numbers);
    }
    return out;
  }

 private:
  std::span<const std::byte> file_;
  const fs::path& path_;
  std::string name_;
  std::size_t at_ = 0;
  std::uint64_t array_values_ = 0;
};

/// A tensor's entry; its offset still counts from the data's begin.
std::pair<std::string, GgufTensor> read_tensor(HeadReader& reader) {
  reader.name("");
  std::string name = reader.text("a tensor's name", kKeyBytesMax);
  reader.name("tensor " + name);
  if (name.empty() || !is_utf8(name)) reader.refuse("a tensor's name is empty or not UTF-8");
  const auto dimensions = reader.number<std::uint32_t>("a tensor's shape");
  if (dimensions == 0 || dimensions > kDimensionsMax) {
    reader.refuse("a tensor of " + std::to_string(dimensions) + " dimensions");
  }
  GgufTensor out{};
  std::int64_t elements = 1;
  for (std::uint32_t i = 0; i < dimensions; ++i) {
    const auto side = reader.number<std::uint64_t>("a tensor's shape");
    if (side == 0 || side > static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max()) ||
        __builtin_mul_overflow(elements, static_cast<std::int64_t>(side), &elements)) {
      reader.refuse("a side of " + std::to_string(side) + " in a tensor's shape");
    }
    out.shape.push_back(static_cast<std::int64_t>(side));
  }
  std::reverse(out.shape.begin(), out.shape.end());
  const auto type = reader.number<std::uint32_t>("a tensor's type");
  const GgmlLayout* layout = ggml_layout(type);
  if (layout == nullptr) {
    const std::string_view known = ggml_type_name(type);
    reader.refuse(
        known.empty() ? "tensor type " + std::to_string(type) + " is not known"
                      : "tensors of type " + std::string(known) + " are not read",
        "F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K and Q6_K are. Use a GGUF file of "
        "one of these, or the checkpoint it was made from.");
  }
  out.type = layout->type;
  if (out.row() % layout->block != 0) {
    reader.refuse("rows of " + std::to_string(out.row()) + " are not whole blocks of " +
                  std::to_string(layout->block) + ", as " + std::string(layout->name) +
                  " has them");
  }
  if (__builtin_mul_overflow(elements / layout->block, layout->bytes, &out.bytes)) {
    reader.refuse("a tensor of more bytes than 64 bits count");
  }
  const auto offset = reader.number<std::uint64_t>("a tensor's offset");
  if (offset > static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max())) {
    reader.refuse("a tensor's offset is " + std::to_string(offset));
  }
  out.offset = static_cast<std::int64_t>(offset);
  return {std::move(name), std::move(out)};
}

/// Adds the data's begin to the offsets and holds every tensor against the file and its neighbours.
void place_tensors(GgufHeader& header, std::int64_t alignment, std::int64_t head_bytes,
                   std::int64_t file_bytes, const fs::path& path) {
  const auto refuse = [&](const std::string& name, const std::string& what) {
    throw Error(Fault::bad_file, {what, path.string() + ", tensor " + name,
                                  "The file is damaged or cut off: fetch it again."});
  };
  header.data_begin = align_up(head_bytes, alignment);
  std::vector<std::pair<std::int64_t, const std::string*>> order;
  for (auto& [name, tensor] : header.tensors) {
    if (tensor.offset % alignment != 0) {
      refuse(name, "offset " + std::to_string(tensor.offset) +
                       " is no multiple of the alignment, " + std::to_string(alignment));
    }
    const std::int64_t room = file_bytes - header.data_begin;
    if (tensor.bytes > room || tensor.offset > room - tensor.bytes) {
      refuse(name, "the tensor's " + count_text(tensor.bytes) + " bytes from byte " +
                       count_text(tensor.offset) +
                       " of the data end past the file, whose data are " +
                       count_text(std::max<std::int64_t>(room, 0)) + " bytes");
    }
    tensor.offset += header.data_begin;
    order.emplace_back(tensor.offset, &name);
  }
  std::sort(order.begin(), order.end());
  std::int64_t end = header.data_begin;
  for (const auto& [offset, name] : order) {
    if (offset < end) refuse(*name, "the tensor overlaps its neighbour");
    end = offset + header.tensors.find(*name)->second.bytes;
  }
}

}  // namespace

std::int64_t GgufTensor::elements() const {
  std::int64_t product = 1;
  for (const std::int64_t side : shape) product *= side;
  return product;
}

bool is_gguf_file(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  std::uint32_t magic = 0;
  return file.read(reinterpret_cast<char*>(&magic), sizeof magic) && magic == kGgufMagic;
}

GgufHeader parse_gguf_header(std::span<const std::byte> file, const fs::path& path) {
  HeadReader reader(file, path);
  if (reader.number<std::uint32_t>("the magic number") != kGgufMagic) {
    reader.refuse("this is no GGUF file: it does not begin with GGUF");
  }
  const auto version = reader.number<std::uint32_t>("the version");
  if ((version & 0xFFFFU) == 0 && version != 0) {
    reader.refuse("a big-endian GGUF file is not read", "Convert the model to little-endian.");
  }
  if (version != 2 && version != 3) {
    reader.refuse("GGUF version " + std::to_string(version) + " is not read",
                  "Versions 2 and 3 are. Convert the model again with a current llama.cpp.");
  }
  const auto tensors = reader.number<std::uint64_t>("the number of tensors");
  const auto values = reader.number<std::uint64_t>("the number of values");
  constexpr std::uint64_t kTensorBytesMin = 8 + 1 + 4 + 8 + 4 + 8, kValueBytesMin = 8 + 1 + 4 + 1;
  if (tensors > reader.left() / kTensorBytesMin || values > reader.left() / kValueBytesMin) {
    reader.refuse("the file claims " + std::to_string(tensors) + " tensors and " +
                  std::to_string(values) + " values, more than its " + std::to_string(file.size()) +
                  " bytes can hold");
  }
  GgufHeader out;
  for (std::uint64_t i = 0; i < values; ++i) {
    reader.name("");
    std::string key = reader.text("a key", kKeyBytesMax);
    reader.name("key " + key);
    if (key.empty() || !is_utf8(key)) reader.refuse("a key is empty or not UTF-8");
    if (!out.values.emplace(key, reader.value()).second) reader.refuse("the key is there twice");
  }
  std::int64_t alignment = kGgufAlignment;
  if (const auto found = out.values.find("general.alignment"); found != out.values.end()) {
    const auto* value = std::get_if<std::int64_t>(&found->second.value);
    reader.name("key general.alignment");
    if (value == nullptr || *value < 8 || *value > (1 << 20) ||
        !std::has_single_bit(static_cast<std::uint64_t>(*value))) {
      reader.refuse("the alignment is no power of two from 8 to 1,048,576");
    }
    alignment = *value;
  }
  for (std::uint64_t i = 0; i < tensors; ++i) {
    auto [name, tensor] = read_tensor(reader);
    if (!out.tensors.emplace(name, std::move(tensor)).second) {
      reader.refuse("the tensor is there twice");
    }
  }
  place_tensors(out, alignment, narrow<std::int64_t>(reader.at()),
                narrow<std::int64_t>(file.size()), path);
  return out;
}

}  // namespace tailor
