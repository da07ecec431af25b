#include "data/store/export.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <memory>

#include "base/aligned_memory.h"
#include "base/block_file.h"
#include "base/clock.h"
#include "base/error.h"
#include "base/staging_folder.h"
#include "base/text.h"
#include "base/units.h"
#include "data/quant/codec.h"
#include "data/store/export_plan.h"
#include "data/store/fingerprint.h"

namespace tailor {
namespace {

/// A safetensors file whose header is known; tensors are written into their places in any order.
class ShardFile {
 public:
  ShardFile(const fs::path& folder, const ExportShard& shard) : path_(folder / shard.name) {
    descriptor_ = ::open(path_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
    if (descriptor_ < 0) throw io_error(errno, "cannot create", path_.string());
    try {
      // Space is taken now: a disk that is too small says so before anything is read.
      if (const int error = reserve_file(descriptor_, shard.bytes); error != 0) {
        throw io_error(error, "cannot reserve " + bytes_text(shard.bytes) + " for the export",
                       path_.string());
      }
      write(0, reinterpret_cast<const std::byte*>(shard.header.data()),
            narrow<std::int64_t>(shard.header.size()));
    } catch (...) {
      ::close(descriptor_);
      throw;
    }
  }
  ShardFile(const ShardFile&) = delete;
  ShardFile& operator=(const ShardFile&) = delete;
  ~ShardFile() { ::close(descriptor_); }

  void write(std::int64_t offset, const std::byte* bytes, std::int64_t count) const {
    const int error = write_at(descriptor_, offset, {bytes, static_cast<std::size_t>(count)});
    if (error != 0) throw io_error(error, "cannot write", path_.string());
    // Writing out begins now, so that the sync at the end has little left to wait for.
    ::sync_file_range(descriptor_, offset, count, SYNC_FILE_RANGE_WRITE);
  }
  void sync() const {
    if (::fdatasync(descriptor_) != 0) throw io_error(errno, "cannot write", path_.string());
    ::posix_fadvise(descriptor_, 0, 0, POSIX_FADV_DONTNEED);
  }

 private:
  fs::path path_;
  int descriptor_ = -1;
};

/// Units of a store one after the other, past the page cache where the file system allows.
class UnitReader {
 public:
  explicit UnitReader(const Store& store) : store_(store) {}

  /// The unit's bytes, checked; they stay until the next call.
  const std::byte* read(const StoredUnit& unit) {
    if (memory_.size() < unit.bytes) memory_ = AlignedMemory(unit.bytes);
    if (!file_ || of_file_ != unit.file) {
      file_ = std::make_unique<BlockFile>(store_.path_of(unit), true);
      of_file_ = unit.file;
    }
    for (std::int64_t done = 0; done < unit.bytes;) {
      const ssize_t n = ::pread(file_->descriptor(), memory_.data() + done,
                                static_cast<std::size_t>(unit.bytes - done), unit.offset + done);
      if (n < 0 && errno == EINTR) continue;
      if (n < 0 && errno == EINVAL && file_->direct() && file_->leave_direct("reading failed")) {
        continue;
      }
      if (n < 0) throw io_error(errno, "cannot read", store_.where(unit));
      if (n == 0) {
        throw Error(Fault::bad_file, {"the file ends inside a tile", store_.where(unit),
                                      "The file was cut off: pack the model again."});
      }
      done += n;
    }
    if (!file_->direct()) file_->drop(unit.offset, unit.bytes);
    store_.check_header(unit, memory_.data());
    store_.check_hash(unit, memory_.data());
    return memory_.data();
  }

 private:
  const Store& store_;
  std::unique_ptr<BlockFile> file_;
  std::int64_t of_file_ = -1;
  AlignedMemory memory_;
};

/// out[c * width + r] = rows[r * columns + c]
template <class Element>
void turn(const Element* rows, std::int64_t count, std::int64_t columns, std::int64_t width,
          Element* out) {
  for (std::int64_t c = 0; c < columns; ++c) {
    for (std::int64_t r = 0; r < count; ++r) out[c * width + r] = rows[r * columns + c];
  }
}

class Exporter {
 public:
  Exporter(const Store& store, const fs::path& to, const ExportOptions& options)
      : store_(store),
        options_(options),
        towers_(towers_of(store, options.towers_from)),
        plan_(store, options.bfloat16, options.shard_bytes_max, towers_),
        staging_(to) {}

  ExportReport go() {
    const double began = seconds_now();
    for (const ExportShard& shard : plan_.shards()) {
      files_.push_back(std::make_unique<ShardFile>(staging_.path(), shard));
    }
    write_units(began);
    write_towers();
    for (const auto& file : files_) file->sync();
    write_small_files();
    staging_.publish();
    ExportReport report;
    report.tensors = narrow<std::int64_t>(plan_.tensors().size());
    report.shards = narrow<std::int64_t>(plan_.shards().size());
    report.bytes = plan_.bytes();
    report.seconds = seconds_now() - began;
    report.format = plan_.format();
    report.notes = plan_.notes();
    return report;
  }

 private:
  static constexpr std::int64_t kRows = 32;  ///< decoded at a time

  static std::vector<TowerTensor> towers_of(const Store& store, const fs::path& model) {
    if (model.empty()) return {};
    const Checkpoint checkpoint = Checkpoint::open(model);
    if (checkpoint.prefix().empty()) {
      throw Error(Fault::usage, {"this is a language model alone, without other towers",
                                 model.string(), "Leave --towers-from out."});
    }
    if (fingerprint(checkpoint, store.spec()) != store.fingerprint()) {
      throw Error(Fault::bad_file,
                  {"the store was made from another model", model.string(),
                   "It was packed from " + store.source() + ": name that with --towers-from."});
    }
    return tower_tensors(model);
  }

  void write_units(double began) {
    UnitReader reader(store_);
    std::int64_t done = 0;
    double told = 0;
    for (const StoredUnit& unit : store_.layout().units) {
      if (options_.stop && options_.stop()) {
        throw Error(Fault::stopped, {"interrupted while exporting", store_.folder().string(),
                                     "Nothing was left behind. Run the same command again."});
      }
      write_unit(unit, reader.read(unit));
      done += unit.bytes;
      const double now = seconds_now();
      if (options_.progress && (now - told > 0.2 || done == store_.layout().bytes())) {
        options_.progress(done, store_.layout().bytes(), now - began);
        told = now;
      }
    }
  }

  void write_towers() {
    constexpr std::int64_t kPiece = std::int64_t{16} << 20;
    for (const TowerTensor& tower : towers_) {
      const MappedFile file(tower.file);
      for (std::int64_t at = 0; at < tower.info.bytes; at += kPiece) {
        const std::int64_t count = std::min(kPiece, tower.info.bytes - at);
        put(plan_.tensor(tower.name), at, file.bytes().data() + tower.info.offset + at, count);
        file.drop(static_cast<std::size_t>(tower.info.offset + at),
                  static_cast<std::size_t>(count));
      }
    }
  }

  void write_unit(const StoredUnit& unit, const std::byte* bytes) {
    const std::vector<ExportMatrix> matrices = plan_.matrices(unit);
    for (std::size_t i = 0; i < matrices.size(); ++i) {
      const ExportMatrix& matrix = matrices[i];
      const MatrixPlace& place = unit.matrices[i];
      if (matrix.published.fused) {
        write_turned(matrix, place.in(bytes));
        continue;
      }
      switch (matrix.form) {
        case ExportForm::plain:
          put(matrix.tensor, matrix.first_row * (place.codes_bytes / place.rows),
              bytes + place.codes_offset, place.codes_bytes);
          break;
        case ExportForm::bfloat16:
          write_decoded(matrix, place.in(bytes));
          break;
        case ExportForm::packed: {
          put(matrix.tensor, 0, bytes + place.codes_offset, place.codes_bytes);
          put(matrix.tensor + 1, 0, bytes + place.scales_offset, place.scales_bytes);
          const std::int64_t shape[] = {place.rows, place.columns};
          put(matrix.tensor + 2, 0, reinterpret_cast<const std::byte*>(shape), sizeof shape);
          break;
        }
        case ExportForm::fp8:
          put(matrix.tensor, 0, bytes + place.codes_offset, place.codes_bytes);
          put(matrix.tensor + 1, 0, bytes + place.scales_offset, place.scales_bytes);
          break;
      }
    }
  }

  void write_decoded(const ExportMatrix& matrix, const EncodedMatrix& encoded) {
    const std::int64_t row_bytes = encoded.columns * 2;
    const std::int64_t step = std::max<std::int64_t>(1, (std::int64_t{4} << 20) / row_bytes);
    for (std::int64_t r = 0; r < encoded.rows; r += step) {
      const std::int64_t end = std::min(encoded.rows, r + step);
      put(matrix.tensor, (matrix.first_row + r) * row_bytes, decoded(encoded, r, end),
          (end - r) * row_bytes);
    }
  }

  /// An expert's slice of a fused tensor is [inputs, width] and made whole in memory: gate and up
  /// lie side by side in every row of it.
  void write_turned(const ExportMatrix& matrix, const EncodedMatrix& encoded) {
    const PublishedMatrix& of = matrix.published;
    const std::int64_t size = dtype_bytes(plan_.tensors()[matrix.tensor].dtype);
    const std::int64_t slice_bytes = of.columns * of.width * size;
    slice_.resize(static_cast<std::size_t>(slice_bytes));
    for (std::int64_t r = 0; r < encoded.rows; r += kRows) {
      const std::int64_t end = std::min(encoded.rows, r + kRows);
      const std::byte* rows = matrix.form == ExportForm::bfloat16
                                  ? decoded(encoded, r, end)
                                  : encoded.codes + r * encoded.columns * size;
      std::byte* to = slice_.data() + (of.first + r) * size;
      if (size == 2) {
        turn(reinterpret_cast<const std::uint16_t*>(rows), end - r, of.columns, of.width,
             reinterpret_cast<std::uint16_t*>(to));
      } else {
        turn(reinterpret_cast<const float*>(rows), end - r, of.columns, of.width,
             reinterpret_cast<float*>(to));
      }
    }
    if (of.first + of.rows < of.width) return;  // up follows gate
    put(matrix.tensor, of.expert * slice_bytes, slice_.data(), slice_bytes);
  }

  const std::byte* decoded(const EncodedMatrix& encoded, std::int64_t begin, std::int64_t end) {
    rows_.resize(static_cast<std::size_t>((end - begin) * encoded.columns));
    decode_rows_bf16(encoded, begin, end, rows_.data());
    return reinterpret_cast<const std::byte*>(rows_.data());
  }

  void put(std::size_t tensor, std::int64_t offset, const std::byte* bytes, std::int64_t count) {
    const ExportTensor& to = plan_.tensors()[tensor];
    TAILOR_CHECK(offset >= 0 && count <= to.bytes - offset, to.name);
    files_[to.shard]->write(to.offset + offset, bytes, count);
  }

  /// Tokenizer, chat template and the like, as the store has them.
  void write_small_files() const {
    for (const auto& entry : fs::directory_iterator(store_.folder())) {
      const std::string name = entry.path().filename();
      const std::string extension = entry.path().extension();
      const bool wanted = (extension == ".json" || extension == ".jinja" || extension == ".model" ||
                           extension == ".txt" || name.starts_with("LICENSE")) &&
                          name != "config.json" && name != kManifestName &&
                          name != "model.safetensors.index.json";
      std::error_code error;
      if (!wanted || !fs::is_regular_file(entry.path(), error)) continue;
      write_atomically(staging_.path() / name, read_text(entry.path()));
    }
    const Json config = plan_.config(read_json(store_.folder() / "config.json"));
    write_atomically(staging_.path() / "config.json", config.dump(2) + "\n");
    write_atomically(staging_.path() / "model.safetensors.index.json", plan_.index_text());
  }

  const Store& store_;
  const ExportOptions& options_;
  std::vector<TowerTensor> towers_;
  ExportPlan plan_;
  StagingFolder staging_;
  std::vector<std::unique_ptr<ShardFile>> files_;
  std::vector<std::uint16_t> rows_;
  std::vector<std::byte> slice_;
};

}  // namespace

ExportReport export_store(const Store& store, const fs::path& to, const ExportOptions& options) {
  // "out/" names the folder out.
  const fs::path folder = to.has_filename() ? to : to.parent_path();
  return Exporter(store, folder, options).go();
}

}  // namespace tailor
