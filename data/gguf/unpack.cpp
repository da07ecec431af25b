#include <sys/stat.h>

#include <algorithm>
#include <cerrno>

#include "base/error.h"
#include "base/file.h"
#include "base/file_lock.h"
#include "base/log.h"
#include "base/text.h"
#include "base/units.h"
#include "data/checkpoint/safetensors.h"
#include "data/gguf/model.h"

namespace tailor {
namespace {

constexpr std::int64_t kShardBytes = 5'000'000'000;
constexpr int kVersion = 1;  ///< raised when unpacked folders change

GgmlType type_of(Dtype dtype) {
  return dtype == Dtype::f32    ? GgmlType::f32
         : dtype == Dtype::bf16 ? GgmlType::bf16
                                : GgmlType::f16;
}

std::int64_t bytes_of(const GgufModel& model, const GgufMatrix& matrix) {
  return checked_multiply(checked_multiply(matrix.matrix.rows, matrix.matrix.columns),
                          dtype_bytes(model.unpacked_dtype(matrix)));
}

class Unpacker {
 public:
  Unpacker(const GgufModel& model, const fs::path& folder) : model_(model), folder_(folder) {}

  void go() {
    for (const GgufMatrix& matrix : model_.matrices()) {
      const std::int64_t bytes = bytes_of(model_, matrix);
      if (shards_.empty() || (shard_bytes_ > 0 && shard_bytes_ + bytes > kShardBytes)) {
        shards_.emplace_back();
        shard_bytes_ = 0;
      }
      shards_.back().push_back(&matrix);
      shard_bytes_ += bytes;
      total_ += bytes;
    }
    Json map = Json::object();
    nlohmann::json sorted = nlohmann::json::object();
    for (std::size_t i = 0; i < shards_.size(); ++i) {
      const std::string name = shard_name(i, shards_.size());
      for (const GgufMatrix* matrix : shards_[i]) sorted[matrix->matrix.name] = name;
      write_shard(folder_ / name, shards_[i]);
    }
    for (const auto& [name, text] : model_.tokenizer_files()) write(name, text);
    write("config.json", model_.config().dump(2) + "\n");
    const nlohmann::json index = {{"metadata", {{"total_size", total_}}}, {"weight_map", sorted}};
    write("model.safetensors.index.json", index.dump(2) + "\n");
  }

 private:
  void write(const std::string& name, const std::string& text) const {
    write_atomically(folder_ / name, text);
  }

  void write_shard(const fs::path& path, const std::vector<const GgufMatrix*>& matrices) {
    nlohmann::json header = nlohmann::json::object();
    std::int64_t offset = 0;
    for (const GgufMatrix* matrix : matrices) {
      const std::int64_t end = offset + bytes_of(model_, *matrix);
      header[matrix->matrix.name] = {{"dtype", dtype_name(model_.unpacked_dtype(*matrix))},
                                     {"shape", matrix->matrix.tensor_shape(0)},
                                     {"data_offsets", {offset, end}}};
      offset = end;
    }
    FileWriter writer(path);
    writer.write(safetensors_head(header.dump()));
    for (const GgufMatrix* matrix : matrices) write_matrix(writer, *matrix);
    writer.close();
  }

  void write_matrix(FileWriter& writer, const GgufMatrix& matrix) {
    const std::int64_t step = GgufModel::rows_at_once(matrix), columns = matrix.matrix.columns;
    const GgmlType type = type_of(model_.unpacked_dtype(matrix));
    for (std::int64_t r = 0; r < matrix.matrix.rows; r += step) {
      const std::int64_t end = std::min(matrix.matrix.rows, r + step);
      const std::int64_t count = (end - r) * columns;
      values_.resize(static_cast<std::size_t>(count));
      bytes_.resize(static_cast<std::size_t>(count * ggml_layout(type).bytes));
      model_.read_rows(matrix, r, end, values_.data());
      std::int64_t bad = 0;
      if (!quantise(type, values_.data(), count, bytes_.data(), bad)) {
        throw Error(
            Fault::bad_file,
            {"a weight is infinite, not a number, or too large for float16",
             model_.path().string() + ", tensor " + matrix.places.front().tensor + ", row " +
                 std::to_string(r + bad / columns) + ", column " + std::to_string(bad % columns),
             "The file is damaged: fetch it again."});
      }
      writer.write(bytes_);
    }
    // An expert's slice is a small part of its tensor, whose pages go with the last one.
    if (matrix.places.front().first + matrix.matrix.rows * columns ==
        model_.header().tensors.find(matrix.places.front().tensor)->second.elements()) {
      model_.drop(matrix);
    }
  }

  const GgufModel& model_;
  const fs::path& folder_;
  std::vector<std::vector<const GgufMatrix*>> shards_;
  std::int64_t shard_bytes_ = 0, total_ = 0;
  std::vector<float> values_;
  std::vector<std::byte> bytes_;
};

void check_space(const GgufModel& model, const fs::path& folder) {
  std::int64_t needed = std::int64_t{64} << 20U;
  for (const GgufMatrix& matrix : model.matrices()) needed += bytes_of(model, matrix);
  const std::int64_t free_bytes = free_disk_bytes(folder);
  if (free_bytes >= needed) return;
  throw Error(Fault::does_not_fit,
              {"unpacking this GGUF file takes " + bytes_text(needed) + " of disk, " +
                   bytes_text(free_bytes) + " are free",
               model.path().string() + ", into " + folder.string(),
               "Make room there, or name a folder on a larger disk: TAILOR_CACHE=DIR."});
}

}  // namespace

void unpack_gguf(const GgufModel& model, const fs::path& folder) { Unpacker(model, folder).go(); }

fs::path unpacked_gguf(const fs::path& path) {
  std::error_code error;
  const fs::path whole = fs::canonical(path, error);
  struct stat facts {};
  if (error || ::stat(whole.c_str(), &facts) != 0) {
    throw io_error(error ? error.value() : errno, "cannot open", path.string());
  }
  const std::string stamp = whole.string() + "\n" + std::to_string(facts.st_size) + "\n" +
                            std::to_string(facts.st_mtim.tv_sec) + "." +
                            std::to_string(facts.st_mtim.tv_nsec) + "\n" + std::to_string(kVersion);
  const std::string name = whole.stem().string() + "-" + sha256_hex(stamp).substr(0, 16);
  const fs::path cache = cache_folder() / "gguf", out = cache / name;
  if (fs::is_directory(out, error)) return out;
  const GgufModel model =
      GgufModel::open(path);  // what is unusable says so before anything is made
  make_folders(cache);
  const FileLock lock(cache / (name + ".lock"));
  if (fs::is_directory(out, error)) return out;
  const fs::path staging = cache / ("." + name + ".unpacking");
  fs::remove_all(staging, error);  // of one that was killed
  check_space(model, cache);
  log_info("unpacking " + path.string() + " into " + out.string());
  make_folders(staging);
  try {
    unpack_gguf(model, staging);
    const Json source = {{"source", whole.string()}, {"bytes", facts.st_size}};
    write_atomically(staging / "gguf.json", source.dump(2) + "\n");
    publish(staging, out);
  } catch (...) {
    fs::remove_all(staging, error);
    throw;
  }
  return out;
}

}  // namespace tailor
