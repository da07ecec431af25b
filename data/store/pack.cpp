#include "data/store/pack.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <condition_variable>
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
#include "data/store/download.h"
#include "data/store/fingerprint.h"
#include "data/store/journal.h"
#include "data/store/unit_queue.h"
#include "data/store/writer.h"

namespace tailor {
namespace {

constexpr std::int64_t kSyncBytes = std::int64_t{256} << 20;
constexpr double kSyncSeconds = 5;

bool of_a_layer(const UnitId& id) {
  return id.kind == UnitKind::attention || id.kind == UnitKind::feed_forward ||
         id.kind == UnitKind::expert;
}

class Packer {
 public:
  Packer(const fs::path& model, const fs::path& to, const PackOptions& options)
      : model_(model),
        to_(to),
        options_(options),
        began_(seconds_now()),
        download_(model, options.follow),
        queue_(plan_, options.memory_bytes_max) {}

  PackReport go() {
    refuse_foreign_folder();
    if (is_complete()) return report_complete();
    prepare();
    open_store();
    run_workers();
    finish();
    return std::move(report_);
  }

 private:
  // ------------------------------------------------------------------ before the weights
  void refuse_foreign_folder() const {
    std::error_code error;
    if (!fs::exists(to_, error) || Store::is_store(to_) || fs::is_empty(to_, error)) return;
    throw Error(Fault::usage, {"the folder is not empty and not a store", to_.string(),
                               "Choose another folder with --to; nothing was changed."});
  }

  [[noreturn]] void refuse_other_store() const {
    throw Error(Fault::usage,
                {"a store of another model or with other formats is there", to_.string(),
                 "Choose another folder with --to; nothing was changed."});
  }

  /// Whether the store is there already. Throws when it is another one.
  bool is_complete() {
    std::error_code error;
    if (!fs::exists(to_ / kManifestName, error)) return false;
    const Store store = Store::open(to_);
    plan_.spec = store.spec();
    if (!store.forms()) refuse_other_store();
    if (!(layout_of(plan_.spec, options_.formats, *store.forms()) == store.layout())) {
      refuse_other_store();
    }
    plan_.layout = store.layout();
    plan_.forms = *store.forms();
    // A download that was followed may have been removed since.
    if (options_.follow && !download_.awaited().empty()) return true;
    if (read_text(model_ / "config.json") != read_text(to_ / "config.json")) refuse_other_store();
    download_.look();
    if (download_.whole() &&
        fingerprint(*download_.checkpoint(), plan_.spec) != store.fingerprint()) {
      refuse_other_store();
    }
    return true;
  }

  PackReport report_complete() {
    std::error_code error;
    if (fs::exists(to_ / kJournalName, error)) ::unlink((to_ / kJournalName).c_str());
    if (options_.delete_source && download_.checkpoint() != nullptr) {
      queue_.list_shards(download_.checkpoint());
      remove_shards(queue_.shards());
    }
    report_.units = report_.units_before = narrow<std::int64_t>(plan_.layout.units.size());
    report_.bytes = plan_.layout.bytes();
    report_.seconds = seconds_now() - began_;
    return std::move(report_);
  }

  void prepare() {
    if (options_.follow) {
      wait_until([&](std::string& awaited) { return (awaited = download_.awaited()).empty(); });
    }
    plan_.spec = read_model_spec(model_);
    plan_.formats = options_.formats;
    config_text_ = read_text(model_ / "config.json");
    const Json config = parse_json(config_text_, (model_ / "config.json").string());
    download_.look();
    const auto begun = PackJournal::begun(to_);
    if (begun) {
      plan_.forms = begun->forms;
    } else if (!options_.follow) {
      plan_.forms = find_forms(*download_.checkpoint(), plan_.spec);
    } else {
      wait_until([&](std::string& awaited) {
        download_.look();
        auto forms = promised_forms(*download_.checkpoint(), plan_.spec, config, awaited);
        if (forms) plan_.forms = std::move(*forms);
        return forms.has_value();
      });
    }
    try {
      plan_.layout = layout_of(plan_.spec, options_.formats, plan_.forms);
    } catch (const Error&) {
      if (begun) refuse_other_store();
      throw;
    }
    plan_.mark = store_mark(plan_.layout, config_text_);
    if (begun && begun->mark != plan_.mark) refuse_other_store();
    plan_.index();
    queue_.check_memory(model_);
    queue_.list_shards(download_.checkpoint());
  }

  /// Asks `arrived` until it says yes; it is to name what it waits for.
  template <class Arrived>
  void wait_until(const Arrived& arrived) {
    PackProgress progress;
    while (!arrived(progress.waiting_for)) {
      if (options_.stop && options_.stop()) {
        throw Error(Fault::stopped, {"interrupted while waiting for " + progress.waiting_for,
                                     model_.string(), "Run the same command again to go on."});
      }
      progress.seconds = seconds_now() - began_;
      if (options_.progress) options_.progress(progress);
      std::this_thread::sleep_for(
          std::chrono::duration<double>(std::clamp(options_.poll_seconds, 0.01, 1.0)));
    }
  }

  // ------------------------------------------------------------------ the folder
  void open_store() {
    make_folders(to_);
    journal_ = std::make_unique<PackJournal>(to_, PackJournal::Header{plan_.mark, plan_.forms});
    check_begun_files();
    check_samples();
    remove_leftovers();
    make_folders(to_ / "layers");
    check_disk_space(to_, plan_.layout);
    for (const StoreLayout::File& file : plan_.layout.files) {
      files_.push_back(std::make_unique<StoreFile>(to_ / file.name, file.bytes));
    }
    // The files' names must be on disk before the journal says what is in them.
    sync_path(to_ / "layers");
    sync_path(to_);
    for (const StoredUnit& unit : plan_.layout.units) {
      const auto done = journal_->units().find(unit.id);
      if (of_a_layer(unit.id)) ++units_left_of_[layer_part(unit.id)];
      if (done == journal_->units().end()) {
        queue_.add(unit);
        continue;
      }
      ++progress_.units_before;
      progress_.bytes_before += unit.bytes;
      count_error(unit.id, done->second);
      if (of_a_layer(unit.id)) --units_left_of_[layer_part(unit.id)];
    }
    progress_.units_done = progress_.units_before;
    progress_.bytes_done = progress_.bytes_before;
    progress_.units = narrow<std::int64_t>(plan_.layout.units.size());
    progress_.bytes = plan_.layout.bytes();
  }

  /// The journal is not to speak of files that are not there.
  void check_begun_files() const {
    for (const StoredUnit& unit : plan_.layout.units) {
      if (journal_->units().count(unit.id) == 0) continue;
      const StoreLayout::File& file = plan_.layout.files[static_cast<std::size_t>(unit.file)];
      std::error_code error;
      const auto size = fs::file_size(to_ / file.name, error);
      if (!error && narrow<std::int64_t>(size) == file.bytes) continue;
      throw Error(Fault::bad_file,
                  {"a file of this begun store is missing or cut off", (to_ / file.name).string(),
                   "Put the file back, or remove the folder and pack again."});
    }
  }

  /// Files that a process was writing when it was killed (base/file.h's temporary names).
  void remove_leftovers() const {
    for (const auto& entry : fs::directory_iterator(to_)) {
      if (entry.path().filename().string().find(".staging.") == std::string::npos) continue;
      ::unlink(entry.path().c_str());
    }
  }

  /// Two models of one shape are not to become one store.
  void check_samples() const {
    for (const auto& [id, packed] : journal_->units()) {
      const StoredUnit* unit = plan_.layout.find(id);
      if (packed.sample.empty() || unit == nullptr || !queue_.has_arrived(*unit)) continue;
      if (layer_sample(queue_.checkpoint(), plan_.spec, id.layer) != packed.sample)
        refuse_other_store();
    }
  }

  // ------------------------------------------------------------------ the weights
  void run_workers() {
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
  }

  /// The calling thread: progress, arriving shards, syncing, stopping.
  void watch() {
    double synced_at = seconds_now(), looked_at = synced_at, told_at = 0;
    while (true) {
      bool sync_now = false;
      {
        std::unique_lock lock(mutex_);
        const auto ended = [&] { return failure_ || progress_.units_done == progress_.units; };
        if (!ended()) {
          changed_.wait_for(lock,
                            std::chrono::milliseconds(options_.poll_seconds < 0.1 ? 10 : 100));
        }
        if (ended()) break;
        sync_now = unsynced_bytes_ >= kSyncBytes;
      }
      const double now = seconds_now();
      if (options_.stop && options_.stop()) {
        throw Error(Fault::stopped,
                    {"interrupted while packing", to_.string(),
                     "What is packed is kept. Run the same command again to go on."});
      }
      if (sync_now || now - synced_at > std::min(kSyncSeconds, 5 * options_.poll_seconds)) {
        sync();
        remove_sources();
        synced_at = now;
      }
      if (options_.follow && now - looked_at > options_.poll_seconds) {
        look();
        looked_at = now;
      }
      if (options_.progress && now - told_at > 0.5) {
        tell();
        told_at = now;
      }
    }
    changed_.notify_all();
  }

  void look() {
    if (!download_.look()) return;
    const std::lock_guard lock(mutex_);
    queue_.set_checkpoint(download_.checkpoint());
    changed_.notify_all();
  }

  void tell() {
    PackProgress copy;
    {
      const std::lock_guard lock(mutex_);
      progress_.seconds = seconds_now() - began_;
      const std::string awaited = queue_.awaited();
      progress_.waiting_for = awaited.empty() ? "" : download_.text_of_missing(awaited);
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

  const StoreFile& file_of(const StoredUnit& unit) const {
    return *files_[static_cast<std::size_t>(unit.file)];
  }

  /// A unit to make; waits for one that can be made. Nothing at the end.
  std::optional<UnitQueue::Job> claim(UnitQueue::Worker& worker) {
    std::unique_lock lock(mutex_);
    while (!failure_ && !queue_.empty()) {
      if (auto job = queue_.next(worker)) return job;
      changed_.wait_for(lock, std::chrono::milliseconds(200));
    }
    queue_.let_go(worker);
    return std::nullopt;
  }

  void work() {
    UnitQueue::Worker worker;
    try {
      while (const std::optional<UnitQueue::Job> job = claim(worker)) {
        const std::int64_t read_before = worker.maker->source_bytes_read();
        for (const StoredUnit* unit : job->ahead) worker.maker->read_ahead(*unit);
        make_unit(*job->unit, *worker.maker);
        const std::lock_guard lock(mutex_);
        progress_.source_bytes_read += worker.maker->source_bytes_read() - read_before;
        queue_.finished();
        changed_.notify_all();
      }
    } catch (...) {
      fail(std::current_exception());
    }
  }

  void make_unit(const StoredUnit& unit, UnitMaker& maker) {
    PackedUnit packed;
    const std::span<const std::byte> bytes = maker.make(unit, packed);
    if (unit.id.kind == UnitKind::attention) {
      packed.sample = layer_sample(*maker.checkpoint(), plan_.spec, unit.id.layer);
    }
    file_of(unit).write(unit.offset, bytes);
    const std::lock_guard lock(mutex_);
    written_.emplace_back(&unit, packed);
    unsynced_bytes_ += unit.bytes;
    ++progress_.units_done;
    progress_.bytes_done += unit.bytes;
    count_error(unit.id, packed);
    if (of_a_layer(unit.id) && --units_left_of_[layer_part(unit.id)] == 0) {
      const auto found = errors_.find(layer_part(unit.id));
      if (found != errors_.end()) progress_.finished.push_back(found->second);
    }
  }

  using LayerPart = std::pair<std::int64_t, bool>;  ///< layer; whether its experts
  static LayerPart layer_part(const UnitId& id) { return {id.layer, id.kind == UnitKind::expert}; }

  void count_error(const UnitId& id, const PackedUnit& unit) {
    if (unit.squares <= 0 || !of_a_layer(id)) return;
    LayerError& error = errors_[layer_part(id)];
    error.layer = id.layer;
    error.experts = id.kind == UnitKind::expert;
    error.squared_error += unit.squared_error;
    error.squares += unit.squares;
    error.absmax_squared_error += unit.absmax_squared_error;
  }

  // ------------------------------------------------------------------ on disk
  /// Units first, then the journal that says they are there.
  void sync() {
    std::vector<std::pair<const StoredUnit*, PackedUnit>> written;
    {
      const std::lock_guard lock(mutex_);
      written.swap(written_);
      unsynced_bytes_ = 0;
    }
    std::set<std::int64_t> touched;
    for (const auto& [unit, packed] : written) touched.insert(unit->file);
    for (const std::int64_t file : touched) files_[static_cast<std::size_t>(file)]->sync();
    for (const auto& [unit, packed] : written) journal_->add(unit->id, packed);
    journal_->sync();
  }

  void sync_quietly() {
    try {
      sync();
    } catch (const Error&) {  // the first error is the one to tell
    }
  }

  /// Shards of which every unit is in the journal, while there are others: the last ones go when
  /// the manifest is there, so that a folder without any is one that is done with.
  void remove_sources() {
    if (!options_.delete_source || journal_->units().size() >= plan_.layout.units.size()) return;
    remove_shards(queue_.shards_done_with(
        [&](const StoredUnit& unit) { return journal_->units().count(unit.id) > 0; }));
  }

  void remove_shards(const std::vector<std::string>& shards) const {
    for (const std::string& shard : shards) {
      Download::remove(download_.checkpoint()->path_of_shard(shard));
    }
  }

  // ------------------------------------------------------------------ after the weights
  void finish() {
    if (options_.progress) tell();
    copy_small_files();
    StoreManifest manifest;
    manifest.layout = plan_.layout;
    std::map<std::int64_t, std::string> samples;
    for (const StoredUnit& unit : plan_.layout.units) {
      const PackedUnit& packed = journal_->units().at(unit.id);
      manifest.hashes.push_back(packed.hash);
      if (unit.id.kind == UnitKind::attention) samples[unit.id.layer] = packed.sample;
    }
    manifest.source = is_utf8(options_.source) ? options_.source : "(a name that is not UTF-8)";
    manifest.fingerprint = join_samples(samples);
    manifest.prefix = download_.checkpoint()->prefix();
    manifest.forms = plan_.forms;
    manifest.mark = plan_.mark;
    write_atomically(to_ / kManifestName, manifest_text(manifest));
    journal_->remove();
    if (options_.delete_source) remove_shards(queue_.shards());
    report_.units = progress_.units;
    report_.units_before = progress_.units_before;
    report_.bytes = progress_.bytes;
    report_.source_bytes_read = progress_.source_bytes_read;
    for (const auto& [part, error] : errors_) report_.errors.push_back(error);
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
                          !name.ends_with(".index.json") && name != kManifestName &&
                          name != "config.json";
      std::error_code error;
      if (!wanted || !fs::is_regular_file(entry.path(), error)) continue;
      if (narrow<std::int64_t>(fs::file_size(entry.path())) > kSmallBytes) continue;
      write_atomically(to_ / name, read_text(entry.path()));
    }
    write_atomically(to_ / "config.json", config_text_);
  }

  const fs::path model_, to_;
  const PackOptions& options_;
  const double began_;
  Download download_;
  PackPlan plan_;
  std::string config_text_;
  std::unique_ptr<PackJournal> journal_;
  std::vector<std::unique_ptr<StoreFile>> files_;

  std::mutex mutex_;
  std::condition_variable changed_;
  UnitQueue queue_;
  std::int64_t unsynced_bytes_ = 0;
  std::vector<std::pair<const StoredUnit*, PackedUnit>> written_;
  std::map<LayerPart, LayerError> errors_;
  std::map<LayerPart, std::int64_t> units_left_of_;
  PackProgress progress_;
  std::exception_ptr failure_;
  PackReport report_;
};

}  // namespace

double LayerError::relative() const { return squares > 0 ? std::sqrt(squared_error / squares) : 0; }

PackReport pack_store(const fs::path& model, const fs::path& to, const PackOptions& options) {
  return Packer(model, to, options).go();
}

}  // namespace tailor
