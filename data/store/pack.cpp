#include "data/store/pack.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <thread>

#include "base/clock.h"
#include "base/error.h"
#include "base/json.h"
#include "base/text.h"
#include "base/units.h"
#include "data/quant/codec.h"
#include "data/store/journal.h"
#include "data/store/source.h"

namespace tailor {
namespace {

constexpr std::int64_t kSampleBytes = 4096;
constexpr std::int64_t kSyncBytes = std::int64_t{256} << 20;
constexpr double kSyncSeconds = 5;

std::string sample_of(const Checkpoint& checkpoint, const ModelSpec& spec, std::int64_t layer) {
  std::string text;
  for (const PublishedMatrix& matrix : attention_matrices(spec, layer)) {
    const std::string packed = matrix.name.substr(0, matrix.name.rfind('.')) + ".weight_packed";
    const std::string& name = checkpoint.has(matrix.name) ? matrix.name : packed;
    const auto bytes = checkpoint.bytes(checkpoint.find(name));
    text.append(reinterpret_cast<const char*>(bytes.data()),
                std::min(bytes.size(), static_cast<std::size_t>(kSampleBytes)));
  }
  return sha256_hex(text);
}

std::string join_samples(const std::map<std::int64_t, std::string>& samples) {
  std::string text;
  for (const auto& [layer, sample] : samples) text += sample + "\n";
  return sha256_hex(text);
}

/// What a checkpoint that is still being downloaded says of a matrix it does not hold yet.
WeightFormat promised_format(const Json& config, const PublishedMatrix& matrix) {
  const Json* text = &config;
  if (config.contains("text_config")) text = &config["text_config"];
  const bool vector = matrix.rows == 1 || matrix.role == MatrixRole::router ||
                      matrix.role == MatrixRole::embedding || matrix.role == MatrixRole::head;
  if (!vector && config.contains("quantization_config")) {
    const std::string method =
        JsonReader(config["quantization_config"], "config.json").text("quant_method", "");
    if (method == "fp8") return WeightFormat::fp8_blocks();
    if (method == "fbgemm_fp8") return WeightFormat::fp8_rows();
  }
  for (const char* key : {"dtype", "torch_dtype"}) {
    for (const Json* from : {text, &config}) {
      if (!from->contains(key) || !(*from)[key].is_string()) continue;
      return (*from)[key] == "bfloat16" ? WeightFormat::bf16() : WeightFormat::f32();
    }
  }
  return WeightFormat::bf16();
}

/// A file of the store that is being written.
class OutputFile {
 public:
  OutputFile(const fs::path& path, std::int64_t bytes) : path_(path) {
    descriptor_ = ::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0644);
    if (descriptor_ < 0) throw io_error(errno, "cannot create", path.string());
    struct stat info {};
    if (::fstat(descriptor_, &info) != 0) fail(errno, "cannot read");
    if (info.st_size == bytes) return;
    // Space is taken now: a disk that is too small says so before hours of work.
    if (::fallocate(descriptor_, 0, 0, bytes) != 0 && errno != EOPNOTSUPP) {
      const int error = errno;
      if (info.st_size == 0) ::unlink(path.c_str());
      fail(error, ("cannot reserve " + bytes_text(bytes) + " for the store").c_str());
    }
    if (::ftruncate(descriptor_, bytes) != 0) fail(errno, "cannot set the size");
  }
  OutputFile(const OutputFile&) = delete;
  OutputFile& operator=(const OutputFile&) = delete;
  ~OutputFile() {
    if (descriptor_ >= 0) ::close(descriptor_);
  }

  void write(std::int64_t offset, const std::byte* bytes, std::int64_t count) const {
    for (std::int64_t done = 0; done < count;) {
      const ssize_t n = ::pwrite(descriptor_, bytes + done, static_cast<std::size_t>(count - done),
                                 offset + done);
      if (n < 0 && errno == EINTR) continue;
      if (n < 0) throw io_error(errno, "cannot write", path_.string());
      done += n;
    }
  }
  /// Starts writing out, without waiting.
  void start_sync(std::int64_t offset, std::int64_t count) const {
    ::sync_file_range(descriptor_, offset, count, SYNC_FILE_RANGE_WRITE);
  }
  void sync() const {
    if (::fdatasync(descriptor_) != 0) throw io_error(errno, "cannot write", path_.string());
    // Training reads past the page cache; these pages only crowd others out.
    ::posix_fadvise(descriptor_, 0, 0, POSIX_FADV_DONTNEED);
  }

 private:
  [[noreturn]] void fail(int error, const char* doing) {
    ::close(descriptor_);
    descriptor_ = -1;
    throw io_error(error, doing, path_.string());
  }
  fs::path path_;
  int descriptor_ = -1;
};

/// The checkpoint as far as it is there. Replaced by a fuller one when shards arrive.
struct Arrived {
  std::shared_ptr<const Checkpoint> checkpoint;
  std::string missing;  ///< a shard that is not there yet, or empty
};

class Packer {
 public:
  Packer(const fs::path& model, const fs::path& to, const PackOptions& options)
      : model_(model), to_(to), options_(options), began_(seconds_now()) {}

  PackReport go() {
    prepare();
    run_workers();
    finish();
    return std::move(report_);
  }

 private:
  // ------------------------------------------------------------------ before the weights
  void prepare() {
    wait_for_index();
    spec_ = read_model_spec(model_);
    config_text_ = read_text(model_ / "config.json");
    config_ = parse_json(config_text_, (model_ / "config.json").string());
    arrived_ = look();
    const Checkpoint& checkpoint = *arrived_.checkpoint;
    const auto promised = [&](const std::string& name) { return checkpoint.promises(name); };
    experts_fused_ = experts_are_fused(spec_, promised);
    layout_ = make_layout(spec_, options_.formats, experts_fused_, [&](const PublishedMatrix& m) {
      return arrived_.missing.empty() || holds(checkpoint, m)
                 ? SourceReader::published_format(checkpoint, m)
                 : promised_format(config_, m);
    });
    check_memory();
    mark_ = store_mark(layout_, config_text_);
    open_folder();
    for (const StoredUnit& unit : layout_.units) {
      const auto done = journal_->units().find(unit.id);
      if (done == journal_->units().end()) {
        waiting_.push_back(&unit);
      } else {
        ++progress_.units_before;
        progress_.bytes_before += unit.bytes;
      }
      ++units_left_of_[{unit.id.layer, unit.id.kind == UnitKind::expert}];
    }
    for (const auto& [id, unit] : journal_->units()) {
      count_error(id, unit);
      --units_left_of_[{id.layer, id.kind == UnitKind::expert}];
    }
    progress_.units_done = progress_.units_before;
    progress_.bytes_done = progress_.bytes_before;
    progress_.units = narrow<std::int64_t>(layout_.units.size());
    progress_.bytes = layout_.bytes();
  }

  /// A download that has just begun brings its config and index first.
  void wait_for_index() const {
    if (!options_.follow) return;
    std::error_code error;
    while (!fs::exists(model_ / "config.json", error) ||
           !(fs::exists(model_ / "model.safetensors.index.json", error) ||
             fs::exists(model_ / "model.safetensors", error))) {
      if (options_.stop && options_.stop()) {
        throw Error(Fault::stopped, {"interrupted while waiting for the model's index",
                                     model_.string(), "Run the same command again to go on."});
      }
      std::this_thread::sleep_for(std::chrono::milliseconds(200));
    }
  }

  Arrived look() const {
    Arrived out;
    out.checkpoint = std::make_shared<const Checkpoint>(
        options_.follow ? Checkpoint::open_arrived(model_, out.missing) : Checkpoint::open(model_));
    return out;
  }

  /// Whether all that a matrix needs has arrived.
  static bool holds(const Checkpoint& checkpoint, const PublishedMatrix& matrix) {
    return checkpoint.arrived_with_companions(matrix.name);
  }

  bool unit_has_arrived(const Checkpoint& checkpoint, const StoredUnit& unit) const {
    for (const PublishedMatrix& matrix : unit_matrices(spec_, unit.id, experts_fused_)) {
      if (!holds(checkpoint, matrix)) return false;
    }
    return true;
  }

  /// Bytes a worker holds while it makes `unit`: the unit, a slice of the source, rows as floats.
  std::int64_t memory_of(const StoredUnit& unit) const {
    std::int64_t slice = 0, rows = 0;
    for (const PublishedMatrix& matrix : unit_matrices(spec_, unit.id, experts_fused_)) {
      const std::int64_t chunk = chunk_rows(matrix.columns) * matrix.columns;
      slice = std::max(slice, matrix.fused ? matrix.columns * matrix.width * 4 : chunk * 4);
      rows = std::max(rows, chunk * 4);
    }
    return unit.bytes + slice + rows;
  }

  void check_memory() {
    const StoredUnit* largest = nullptr;
    for (const StoredUnit& unit : layout_.units) {
      if (largest == nullptr || memory_of(unit) > memory_of(*largest)) largest = &unit;
    }
    const std::int64_t needed = memory_of(*largest) + kProcessBytes;
    if (needed <= options_.memory_bytes_max) return;
    throw Error(Fault::does_not_fit, {"packing needs " + bytes_text(needed) + " of memory, " +
                                          bytes_text(options_.memory_bytes_max) + " are allowed",
                                      unit_text(largest->id),
                                      "Set --max-ram to " + std::to_string(needed) + " or more."});
  }

  void open_folder() {
    std::error_code error;
    if (fs::exists(to_, error) && !Store::is_store(to_) && !fs::is_empty(to_, error)) {
      throw Error(Fault::usage, {"the folder is not empty and not a store", to_.string(),
                                 "Choose another folder with --to; nothing was changed."});
    }
    if (fs::exists(to_ / kManifestName, error)) {
      const Store store = Store::open(to_);
      if (store.mark() == mark_) {
        complete_ = true;
      } else {
        throw Error(Fault::usage,
                    {"a store of another model or with other formats is there", to_.string(),
                     "Choose another folder with --to; nothing was changed."});
      }
    }
    make_folders(to_ / "layers");
    journal_ = std::make_unique<PackJournal>(to_, mark_);
    if (complete_) return;
    for (const StoreLayout::File& file : layout_.files) {
      files_.push_back(std::make_unique<OutputFile>(to_ / file.name, file.bytes));
    }
  }

  // ------------------------------------------------------------------ the weights
  void run_workers() {
    if (complete_) return;
    std::vector<std::thread> threads;
    for (int i = 0; i < std::max(1, options_.threads); ++i) {
      threads.emplace_back([this] { work(); });
    }
    try {
      watch();
    } catch (...) {
      fail(std::current_exception());
    }
    for (std::thread& thread : threads) thread.join();
    if (failure_) {
      sync_quietly();
      std::rethrow_exception(failure_);
    }
    sync();
    remove_sources();
  }

  /// The calling thread: progress, arriving shards, syncing, stopping.
  void watch() {
    double synced_at = seconds_now(), looked_at = synced_at, told_at = 0;
    while (true) {
      {
        std::unique_lock lock(mutex_);
        changed_.wait_for(lock, std::chrono::milliseconds(100));
        if (failure_ || progress_.units_done == progress_.units) break;
      }
      const double now = seconds_now();
      if (options_.stop && options_.stop()) {
        throw Error(Fault::stopped,
                    {"interrupted while packing", to_.string(),
                     "What is packed is kept. Run the same command again to go on."});
      }
      if (unsynced_bytes_ >= kSyncBytes || now - synced_at > kSyncSeconds) {
        sync();
        remove_sources();
        synced_at = now;
      }
      if (options_.follow && now - looked_at > options_.poll_seconds) {
        Arrived fresh = look();
        const std::lock_guard lock(mutex_);
        arrived_ = std::move(fresh);
        looked_at = now;
        changed_.notify_all();
      }
      if (options_.progress && now - told_at > 0.5) {
        tell();
        told_at = now;
      }
    }
    changed_.notify_all();
  }

  void tell() {
    PackProgress copy;
    {
      const std::lock_guard lock(mutex_);
      progress_.seconds = seconds_now() - began_;
      progress_.waiting_for = active_ == 0 && !waiting_.empty() ? arrived_.missing : "";
      copy = progress_;
      progress_.finished.clear();
    }
    options_.progress(copy);
  }

  void fail(std::exception_ptr error) {
    const std::lock_guard lock(mutex_);
    if (!failure_) failure_ = std::move(error);
    changed_.notify_all();
  }

  struct Job {
    const StoredUnit* unit = nullptr;
    std::shared_ptr<const Checkpoint> checkpoint;
    std::int64_t memory = 0;
  };

  /// The next unit that has arrived and fits in the memory that is left; null at the end.
  std::optional<Job> claim() {
    std::unique_lock lock(mutex_);
    while (!failure_ && !waiting_.empty()) {
      for (auto at = waiting_.begin(); at != waiting_.end(); ++at) {
        const std::int64_t memory = memory_of(**at);
        if (active_ > 0 && memory_used_ + memory + kProcessBytes > options_.memory_bytes_max) break;
        if (!arrived_.missing.empty() && !unit_has_arrived(*arrived_.checkpoint, **at)) continue;
        Job job{*at, arrived_.checkpoint, memory};
        waiting_.erase(at);
        memory_used_ += memory;
        ++active_;
        return job;
      }
      changed_.wait_for(lock, std::chrono::milliseconds(200));
    }
    return std::nullopt;
  }

  void work() {
    try {
      std::shared_ptr<const Checkpoint> of_reader;
      std::unique_ptr<SourceReader> reader;
      while (const std::optional<Job> job = claim()) {
        if (of_reader != job->checkpoint) {
          reader = std::make_unique<SourceReader>(*job->checkpoint);
          of_reader = job->checkpoint;
        }
        const std::int64_t read_before = reader->bytes_read();
        make_unit(*job, *reader);
        const std::lock_guard lock(mutex_);
        progress_.source_bytes_read += reader->bytes_read() - read_before;
        memory_used_ -= job->memory;
        --active_;
        changed_.notify_all();
      }
    } catch (...) {
      fail(std::current_exception());
    }
  }

  static std::int64_t chunk_rows(std::int64_t columns) {
    constexpr std::int64_t kChunkElements = std::int64_t{1} << 20, kMultiple = 128;
    return std::max(kMultiple, kChunkElements / columns / kMultiple * kMultiple);
  }

  void make_unit(const Job& job, SourceReader& reader) {
    const StoredUnit& unit = *job.unit;
    std::vector<std::byte> memory(static_cast<std::size_t>(unit.bytes));
    std::byte* bytes = memory.data();
    write_unit_header({unit.id, mark_, unit.bytes, unit.matrices}, memory);
    const auto matrices = unit_matrices(spec_, unit.id, experts_fused_);
    PackedUnit packed;
    for (std::size_t i = 0; i < matrices.size(); ++i) {
      const bool vocabulary = unit.id.kind == UnitKind::embedding || unit.id.kind == UnitKind::head;
      encode(reader, matrices[i], unit.matrices[i], vocabulary ? unit.id.index : 0, bytes, packed);
    }
    packed.hash = hash_unit(bytes, unit.bytes);
    std::string sample;
    if (unit.id.kind == UnitKind::attention) {
      sample = sample_of(*job.checkpoint, spec_, unit.id.layer);
    }
    const OutputFile& file = *files_[static_cast<std::size_t>(unit.file)];
    file.write(unit.offset, bytes, unit.bytes);
    file.start_sync(unit.offset, unit.bytes);
    const std::lock_guard lock(mutex_);
    if (!sample.empty()) new_samples_[unit.id.layer] = sample;
    written_.emplace_back(&unit, packed);
    unsynced_bytes_ += unit.bytes;
    ++progress_.units_done;
    progress_.bytes_done += unit.bytes;
    count_error(unit.id, packed);
    const std::pair of_layer{unit.id.layer, unit.id.kind == UnitKind::expert};
    if (--units_left_of_[of_layer] == 0) {
      const auto found = errors_.find(of_layer);
      if (found != errors_.end()) progress_.finished.push_back(found->second);
    }
  }

  void encode(SourceReader& reader, const PublishedMatrix& matrix, const MatrixPlace& place,
              std::int64_t first_row, std::byte* unit, PackedUnit& packed) const {
    std::byte* codes = unit + place.codes_offset;
    std::byte* scales = unit + place.scales_offset;
    if (reader.copy_encoded(matrix, place.format, first_row, first_row + place.rows, codes,
                            scales)) {
      return;
    }
    MatrixEncoder encoder(place.format, place.rows, place.columns, codes, scales);
    EncodeStatistics statistics;
    const std::int64_t step = std::min(place.rows, chunk_rows(place.columns));
    std::vector<float> rows(static_cast<std::size_t>(step * place.columns));
    try {
      for (std::int64_t r = 0; r < place.rows; r += step) {
        const std::int64_t end = std::min(place.rows, r + step);
        reader.read_rows(matrix, first_row + r, first_row + end, rows.data());
        encoder.add_rows(r, end, rows.data());
      }
      statistics = encoder.finish();
    } catch (const Error& error) {
      if (!error.parts().where.empty() &&
          error.parts().where.find(matrix.name) != std::string::npos)
        throw;
      throw Error(
          error.fault(),
          {error.parts().what,
           model_.string() + ", tensor " + matrix.name +
               (matrix.fused ? ", expert " + std::to_string(matrix.expert) : std::string()) +
               (error.parts().where.empty() ? "" : ", ") + error.parts().where,
           error.parts().mend});
    }
    const bool quantised =
        place.format.kind != WeightKind::f32 && place.format.kind != WeightKind::bf16;
    if (!quantised) return;
    packed.squared_error += statistics.squared_error;
    packed.squares += statistics.squares;
    packed.absmax_squared_error += statistics.absmax_squared_error;
  }

  void count_error(const UnitId& id, const PackedUnit& unit) {
    if (unit.squares <= 0) return;
    const bool experts = id.kind == UnitKind::expert;
    LayerError& error = errors_[{id.layer, experts}];
    error.layer = id.layer;
    error.experts = experts;
    error.squared_error += unit.squared_error;
    error.squares += unit.squares;
    error.absmax_squared_error += unit.absmax_squared_error;
  }

  // ------------------------------------------------------------------ on disk
  /// Units first, then the journal that says they are there.
  void sync() {
    std::vector<std::pair<const StoredUnit*, PackedUnit>> written;
    std::map<std::int64_t, std::string> samples;
    {
      const std::lock_guard lock(mutex_);
      written.swap(written_);
      samples.swap(new_samples_);
      unsynced_bytes_ = 0;
    }
    std::set<std::int64_t> touched;
    for (const auto& [unit, packed] : written) touched.insert(unit->file);
    for (const std::int64_t file : touched) files_[static_cast<std::size_t>(file)]->sync();
    for (const auto& [layer, sample] : samples) journal_->add_sample(layer, sample);
    for (const auto& [unit, packed] : written) journal_->add(unit->id, packed);
    journal_->sync();
  }

  void sync_quietly() {
    try {
      sync();
    } catch (const Error&) {  // the first error is the one to tell
    }
  }

  /// Shards of which every unit is in the journal.
  void remove_sources() {
    if (!options_.delete_source) return;
    std::shared_ptr<const Checkpoint> checkpoint;
    {
      const std::lock_guard lock(mutex_);
      checkpoint = arrived_.checkpoint;
    }
    std::set<fs::path> needed;
    std::set<fs::path> used;
    for (const StoredUnit& unit : layout_.units) {
      const bool done = journal_->units().count(unit.id) > 0;
      for (const PublishedMatrix& matrix : unit_matrices(spec_, unit.id, experts_fused_)) {
        for (const fs::path& shard : checkpoint->promised_shards(matrix.name)) {
          (done ? used : needed).insert(shard);
        }
      }
    }
    for (const fs::path& shard : used) {
      if (needed.count(shard) == 0) ::unlink(shard.c_str());
    }
  }

  // ------------------------------------------------------------------ after the weights
  void finish() {
    if (options_.progress && !complete_) tell();
    report_.units = progress_.units;
    report_.units_before = complete_ ? progress_.units : progress_.units_before;
    report_.bytes = progress_.bytes;
    report_.source_bytes_read = progress_.source_bytes_read;
    for (const auto& [key, error] : errors_) report_.errors.push_back(error);
    report_.seconds = seconds_now() - began_;
    if (complete_) {
      journal_->remove();
      return;
    }
    copy_small_files();
    StoreManifest manifest;
    manifest.layout = layout_;
    for (const StoredUnit& unit : layout_.units) {
      manifest.hashes.push_back(journal_->units().at(unit.id).hash);
    }
    manifest.source = options_.source;
    manifest.fingerprint = join_samples(journal_->samples());
    manifest.mark = mark_;
    write_atomically(to_ / kManifestName, manifest_json(manifest).dump() + "\n");
    journal_->remove();
    report_.seconds = seconds_now() - began_;
  }

  /// config.json, tokenizer, chat template: the store can then stand for the model.
  void copy_small_files() const {
    constexpr std::int64_t kSmallBytes = std::int64_t{100} << 20;
    for (const auto& entry : fs::directory_iterator(model_)) {
      const std::string name = entry.path().filename();
      const std::string extension = entry.path().extension();
      const bool wanted = (extension == ".json" || extension == ".jinja" || extension == ".model" ||
                           extension == ".txt" || name.starts_with("LICENSE")) &&
                          name != "model.safetensors.index.json" && name != kManifestName;
      std::error_code error;
      if (!wanted || !fs::is_regular_file(entry.path(), error)) continue;
      if (narrow<std::int64_t>(fs::file_size(entry.path())) > kSmallBytes) continue;
      write_atomically(to_ / name, read_text(entry.path()));
    }
  }

  static constexpr std::int64_t kProcessBytes = std::int64_t{64} << 20;

  fs::path model_, to_;
  const PackOptions& options_;
  double began_;
  ModelSpec spec_;
  std::string config_text_;
  Json config_;
  bool experts_fused_ = false, complete_ = false;
  StoreLayout layout_;
  std::array<std::byte, 16> mark_{};
  std::unique_ptr<PackJournal> journal_;
  std::vector<std::unique_ptr<OutputFile>> files_;

  std::mutex mutex_;
  std::condition_variable changed_;
  Arrived arrived_;
  std::deque<const StoredUnit*> waiting_;
  std::int64_t memory_used_ = 0, active_ = 0, unsynced_bytes_ = 0;
  std::vector<std::pair<const StoredUnit*, PackedUnit>> written_;
  std::map<std::int64_t, std::string> new_samples_;
  std::map<std::pair<std::int64_t, bool>, LayerError> errors_;
  std::map<std::pair<std::int64_t, bool>, std::int64_t> units_left_of_;
  PackProgress progress_;
  std::exception_ptr failure_;
  PackReport report_;
};

}  // namespace

double LayerError::relative() const { return squares > 0 ? std::sqrt(squared_error / squares) : 0; }

PackReport pack_store(const fs::path& model, const fs::path& to, const PackOptions& options) {
  return Packer(model, to, options).go();
}

std::string fingerprint(const Checkpoint& checkpoint, const ModelSpec& spec) {
  std::map<std::int64_t, std::string> samples;
  for (std::int64_t l = 0; l < spec.layer_count(); ++l) samples[l] = sample_of(checkpoint, spec, l);
  return join_samples(samples);
}

}  // namespace tailor
