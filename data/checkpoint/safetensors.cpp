#include "data/checkpoint/safetensors.h"

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstring>
#include <set>

#include "base/error.h"
#include "base/json.h"
#include "base/text.h"
#include "base/units.h"

namespace tailor {
namespace {

struct DtypeRow {
  Dtype dtype;
  std::string_view name;
  std::int64_t bytes;
};
constexpr std::array<DtypeRow, 11> kDtypes = {{{Dtype::f64, "F64", 8},
                                               {Dtype::f32, "F32", 4},
                                               {Dtype::f16, "F16", 2},
                                               {Dtype::bf16, "BF16", 2},
                                               {Dtype::f8_e4m3, "F8_E4M3", 1},
                                               {Dtype::i64, "I64", 8},
                                               {Dtype::i32, "I32", 4},
                                               {Dtype::i16, "I16", 2},
                                               {Dtype::i8, "I8", 1},
                                               {Dtype::u8, "U8", 1},
                                               {Dtype::boolean, "BOOL", 1}}};
constexpr std::int64_t kHeaderBytesMax = 100'000'000;
constexpr std::size_t kLengthBytes = 8;
constexpr std::uint64_t kOffsetMax = std::uint64_t{1} << 62U;

[[noreturn]] void refuse(const fs::path& path, const std::string& what,
                         const std::string& tensor = {}) {
  throw Error(
      Fault::bad_file,
      {what, path.string() + (tensor.empty() ? "" : ", tensor " + tensor),
       "The file is damaged or cut off. Download it again and compare its size or checksum."});
}

TensorInfo read_entry(const Json& entry, const std::string& name, std::int64_t data_begin,
                      const fs::path& path) {
  const JsonReader reader(entry, path.string() + ", tensor " + name);
  const std::string dtype = reader.text("dtype");
  const auto known = std::find_if(kDtypes.begin(), kDtypes.end(),
                                  [&](const DtypeRow& row) { return row.name == dtype; });
  if (known == kDtypes.end()) refuse(path, "element type '" + dtype + "' is not known", name);
  TensorInfo info{known->dtype, {}, 0, 0};
  std::int64_t bytes = known->bytes;
  const Json& shape = reader.at("shape");
  if (!shape.is_array()) refuse(path, "shape is not a list of sizes", name);
  for (const Json& size : shape) {
    if (!size.is_number_unsigned() || size.get<std::uint64_t>() > kOffsetMax) {
      refuse(path, "shape is not a list of sizes", name);
    }
    info.shape.push_back(size.get<std::int64_t>());
    if (__builtin_mul_overflow(bytes, info.shape.back(), &bytes)) {
      refuse(path, "shape " + info.shape_text() + " has more bytes than 64 bits count", name);
    }
  }
  const Json& offsets = reader.at("data_offsets");
  if (!offsets.is_array() || offsets.size() != 2 || !offsets[0].is_number_unsigned() ||
      !offsets[1].is_number_unsigned()) {
    refuse(path, "data_offsets is not a pair of offsets", name);
  }
  const auto begin = offsets[0].get<std::uint64_t>();
  const auto end = offsets[1].get<std::uint64_t>();
  if (begin > end || end > kOffsetMax) refuse(path, "data_offsets run backwards", name);
  info.offset = data_begin + static_cast<std::int64_t>(begin);
  info.bytes = static_cast<std::int64_t>(end - begin);
  if (info.bytes != bytes) {
    refuse(path,
           "shape " + info.shape_text() + " of " + dtype + " needs " + count_text(bytes) +
               " bytes, the header gives it " + count_text(info.bytes),
           name);
  }
  return info;
}

/// A parsed object keeps the last of two equal keys, so they are looked for in the text.
void refuse_duplicates(std::string_view text, const fs::path& path) {
  std::set<std::string> names;
  const auto look = [&](int depth, Json::parse_event_t event, const Json& parsed) {
    if (event == Json::parse_event_t::key && depth == 1 &&
        !names.insert(parsed.get<std::string>()).second) {
      refuse(path, "tensor is listed twice", parsed.get<std::string>());
    }
    return true;
  };
  const Json again = Json::parse(text, look);
  TAILOR_CHECK(again.is_object());
}

}  // namespace

std::int64_t dtype_bytes(Dtype dtype) {
  return std::find_if(kDtypes.begin(), kDtypes.end(),
                      [&](const DtypeRow& row) { return row.dtype == dtype; })
      ->bytes;
}

std::string_view dtype_name(Dtype dtype) {
  return std::find_if(kDtypes.begin(), kDtypes.end(),
                      [&](const DtypeRow& row) { return row.dtype == dtype; })
      ->name;
}

std::int64_t TensorInfo::elements() const {
  std::int64_t product = 1;
  for (const std::int64_t size : shape) product *= size;
  return product;
}

std::string TensorInfo::shape_text() const {
  std::string out = "[";
  for (std::size_t i = 0; i < shape.size(); ++i)
    out += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
  return out + "]";
}

SafetensorsHeader parse_safetensors_header(std::span<const std::byte> file, const fs::path& path) {
  if (file.size() < kLengthBytes)
    refuse(path, "file of " + bytes_text(narrow<std::int64_t>(file.size())) +
                     " is too short for a safetensors header");
  std::uint64_t length = 0;
  std::memcpy(&length, file.data(), kLengthBytes);
  if (length > static_cast<std::uint64_t>(kHeaderBytesMax)) {
    refuse(path,
           "header length " + std::to_string(length) + " is above the format's limit of 100 MB");
  }
  const std::uint64_t data_begin = kLengthBytes + length;
  if (data_begin > file.size()) {
    refuse(path, "file is cut off: the header alone needs " +
                     count_text(narrow<std::int64_t>(data_begin)) + " bytes, the file has " +
                     count_text(narrow<std::int64_t>(file.size())));
  }
  const std::string_view text(reinterpret_cast<const char*>(file.data()) + kLengthBytes, length);
  const Json header = parse_json(text, path.string() + " (header)");
  if (!header.is_object()) refuse(path, "header is not a JSON object");
  refuse_duplicates(text, path);

  SafetensorsHeader out;
  for (const auto& [name, entry] : header.items()) {
    if (name == "__metadata__") {
      if (!entry.is_object()) refuse(path, "__metadata__ is not an object");
      for (const auto& [key, value] : entry.items()) {
        if (!value.is_string())
          refuse(path, "__metadata__ may hold strings only, '" + key + "' is not one");
        out.metadata[key] = value.get<std::string>();
      }
      continue;
    }
    out.tensors.emplace(name, read_entry(entry, name, static_cast<std::int64_t>(data_begin), path));
  }
  std::vector<std::pair<std::int64_t, const std::pair<const std::string, TensorInfo>*>> by_offset;
  for (const auto& entry : out.tensors) by_offset.emplace_back(entry.second.offset, &entry);
  std::sort(by_offset.begin(), by_offset.end(), [](const auto& a, const auto& b) {
    return std::pair(a.first, a.second->second.bytes) < std::pair(b.first, b.second->second.bytes);
  });
  auto end = static_cast<std::int64_t>(data_begin);
  for (const auto& [offset, entry] : by_offset) {
    if (offset != end)
      refuse(path,
             offset < end ? "tensor data overlaps its neighbour's"
                          : "there is a hole before the tensor's data",
             entry->first);
    end = offset + entry->second.bytes;
  }
  if (end != narrow<std::int64_t>(file.size())) {
    refuse(path, "tensor data should end at byte " + count_text(end) + ", the file has " +
                     count_text(narrow<std::int64_t>(file.size())) + " bytes");
  }
  return out;
}

std::string safetensors_head(std::string header) {
  header.resize((header.size() + 7) / 8 * 8, ' ');
  const std::uint64_t length = header.size();
  return std::string(reinterpret_cast<const char*>(&length), sizeof length) + header;
}

std::string shard_name(std::size_t index, std::size_t count) {
  char name[64];
  std::snprintf(name, sizeof name, "model-%05zu-of-%05zu.safetensors", index + 1, count);
  return name;
}

void write_safetensors(const fs::path& path, const std::vector<TensorToWrite>& tensors,
                       const std::map<std::string, std::string>& metadata) {
  Json header = Json::object();
  if (!metadata.empty()) header["__metadata__"] = metadata;
  std::int64_t offset = 0;
  for (const TensorToWrite& tensor : tensors) {
    std::int64_t bytes = dtype_bytes(tensor.dtype);
    for (const std::int64_t size : tensor.shape) bytes = checked_multiply(bytes, size);
    TAILOR_CHECK(tensor.make || bytes == narrow<std::int64_t>(tensor.bytes.size()), tensor.name);
    header[tensor.name] = {{"dtype", dtype_name(tensor.dtype)},
                           {"shape", tensor.shape},
                           {"data_offsets", {offset, offset + bytes}}};
    offset += bytes;
  }
  replace_atomically(path, [&](const fs::path& staging) {
    FileWriter writer(staging);
    writer.write(safetensors_head(header.dump()));
    for (const TensorToWrite& tensor : tensors) {
      if (!tensor.make) {
        writer.write(tensor.bytes);
        continue;
      }
      const std::int64_t before = writer.bytes_written();
      const std::vector<std::byte> made = tensor.make();
      writer.write(made);
      TAILOR_CHECK(header[tensor.name]["data_offsets"][1].get<std::int64_t>() -
                           header[tensor.name]["data_offsets"][0].get<std::int64_t>() ==
                       writer.bytes_written() - before,
                   tensor.name);
    }
    writer.close();
  });
}

}  // namespace tailor
