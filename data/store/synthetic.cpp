#include "data/store/synthetic.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <set>
#include <thread>

#include "base/clock.h"
#include "base/error.h"
#include "base/text.h"
#include "base/units.h"
#include "data/store/journal.h"
#include "data/store/store.h"
#include "data/store/synthetic_unit.h"
#include "data/store/writer.h"

namespace tailor {
namespace {

constexpr std::int64_t kSyncBytes = std::int64_t{256} << 20;
constexpr double kSyncSeconds = 5;
/// Part of the store's mark: with other draws a begun store cannot be gone on with.
constexpr int kDrawsVersion = 1;

/// Sizes multiply without overflow below it, and a list of units still fits in memory.
void check_size(const ModelSpec& spec) {
  constexpr double kElementsMax = 0x1p50, kUnitsMax = 1e7;
  const auto real = [](std::int64_t value) { return static_cast<double>(value); };
  const double moe = real(spec.moe_layer_count()), layers = real(spec.layer_count());
  const double width = real(spec.heads + spec.kv_heads) * real(spec.head_dim) +
                       real(spec.dense_width) + real(spec.expert_width) * (real(spec.experts) + 1);
  const double elements = real(spec.hidden) * (2 * real(spec.vocab) + 3 * layers * width);
  const double units = moe * real(spec.experts) + 2 * layers + real(spec.vocab) / 32;
  if (elements <= kElementsMax && units <= kUnitsMax) return;
  throw Error(Fault::bad_file, {"a model of " + number_text(elements) + " weights in " +
                                    number_text(units) + " tiles is beyond what a store can hold",
                                "config.json", "Check its sizes."});
}

class Synthesis {
 public:
  Synthesis(const Json& config, const std::vector<std::int64_t>& layers, const fs::path& to,
            const SynthesisOptions& options)
      : to_(to), options_(options), began_(seconds_now()) {
    Json reduced = config_of_layers(config, layers, "config.json");
    const std::int64_t of = model_spec_from_config(config, "config.json").layer_count();
    // The seed is told here too: the mark that ties units, config and a begun store together is a
    // digest of config.json.
    reduced["tailor_synthetic"] = {
        {"layers", layers}, {"of", of}, {"seed", options.seed}, {"draws", kDrawsVersion}};
    config_text_ = reduced.dump(2) + "\n";
    spec_ = model_spec_from_config(reduced, "config.json");
    check_size(spec_);
    layout_ = make_layout(spec_, options.formats, false,
                          [](const PublishedMatrix&) { return WeightFormat::bf16(); });
    mark_ = store_mark(layout_, config_text_);
    source_ = "synthetic, seed " + std::to_string(options.seed);
  }

  SynthesisReport go() {
    open_folder();
    run_workers();
    return finish();
  }

 private:
  // ------------------------------------------------------------------ before the weights
  void open_folder() {
    std::error_code error;
    const bool there = fs::exists(to_, error);
    const bool begun = fs::exists(to_ / kJournalName, error);
    const bool whole = fs::exists(to_ / kManifestName, error);
    if (whole || (there && !begun && !(fs::is_directory(to_, error) && fs::is_empty(to_, error)))) {
      throw Error(Fault::usage,
                  {whole ? "a store is there already" : "there is something already", to_.string(),
                   "Choose another folder with --to, or remove this one; nothing was changed."});
    }
    make_folders(to_);
    try {
      journal_ = std::make_unique<PackJournal>(to_, PackJournal::Header{mark_, {}});
      check_disk_space(to_, layout_);
      make_folders(to_ / "layers");
      for (const StoreLayout::File& file : layout_.files) {
        files_.push_back(std::make_unique<StoreFile>(to_ / file.name, file.bytes));
      }
    } catch (...) {
      if (journal_ && journal_->units().empty()) remove_what_was_made(!there);
      throw;
    }
    progress_.bytes = layout_.bytes();
    for (const StoredUnit& unit : layout_.units) {
      if (journal_->units().count(unit.id) == 0) {
        waiting_.push_back(&unit);
      } else {
        ++units_before_;
        progress_.bytes_before += unit.bytes;
      }
    }
    bytes_done_ = progress_.bytes_before;
    // The largest first: no thread is left alone with one at the end.
    std::stable_sort(waiting_.begin(), waiting_.end(),
                     [](const StoredUnit* a, const StoredUnit* b) { return a->bytes > b->bytes; });
  }

  /// A disk that is too small gets back what was reserved of it.
  void remove_what_was_made(bool folder_too) {
    files_.clear();
    std::error_code ignored;
    for (const StoreLayout::File& file : layout_.files) fs::remove(to_ / file.name, ignored);
    fs::remove(to_ / "layers", ignored);
    fs::remove(to_ / kJournalName, ignored);
    if (folder_too) fs::remove(to_, ignored);
  }

  // ------------------------------------------------------------------ the weights
  void run_workers() {
    std::vector<std::thread> threads;
    running_ = std::max(1, options_.threads);
    for (int i = running_; i-- > 0;) threads.emplace_back([this] { work(); });
    try {
      watch();
    } catch (...) {
      fail(std::current_exception());
    }
    for (std::thread& thread : threads) thread.join();
    if (failure_) {
      try {
        sync();
      } catch (const Error&) {  // the first error is the one to tell
      }
      std::rethrow_exception(failure_);
    }
    sync();
  }

  void work() {
    try {
      SyntheticUnitMaker maker(options_.seed, mark_, ended_);
      while (!ended_) {
        const std::size_t i = next_++;
        if (i >= waiting_.size()) break;
        const StoredUnit& unit = *waiting_[i];
        UnitHash hash;
        if (!maker.make(unit, *files_[static_cast<std::size_t>(unit.file)], bytes_done_, hash)) {
          break;
        }
        const std::lock_guard lock(mutex_);
        written_.emplace_back(&unit, hash);
        unsynced_bytes_ += unit.bytes;
      }
    } catch (...) {
      fail(std::current_exception());
    }
    const std::lock_guard lock(mutex_);
    --running_;
    changed_.notify_all();
  }

  /// The calling thread: progress, syncing, stopping.
  void watch() {
    double synced_at = seconds_now(), told_at = 0;
    while (true) {
      std::int64_t unsynced = 0;
      {
        std::unique_lock lock(mutex_);
        changed_.wait_for(lock, std::chrono::milliseconds(50));
        if (failure_ || running_ == 0) break;
        unsynced = unsynced_bytes_;
      }
      if (options_.stop && options_.stop()) {
        throw Error(Fault::stopped,
                    {"interrupted while writing a synthetic store", to_.string(),
                     "What is written is kept. Run the same command again to go on, or remove the "
                     "folder."});
      }
      const double now = seconds_now();
      if (unsynced >= kSyncBytes || now - synced_at > kSyncSeconds) {
        sync();
        synced_at = now;
      }
      if (now - told_at > 0.5) {
        tell();
        told_at = now;
      }
    }
    tell();
  }

  void tell() {
    if (!options_.progress) return;
    progress_.bytes_done = bytes_done_;
    progress_.seconds = seconds_now() - began_;
    options_.progress(progress_);
  }

  void fail(std::exception_ptr error) {
    const std::lock_guard lock(mutex_);
    if (!failure_) failure_ = std::move(error);
    ended_ = true;
    changed_.notify_all();
  }

  /// Units first, then the journal that says they are there.
  void sync() {
    std::vector<std::pair<const StoredUnit*, UnitHash>> written;
    {
      const std::lock_guard lock(mutex_);
      written.swap(written_);
      unsynced_bytes_ = 0;
    }
    std::set<std::int64_t> touched;
    for (const auto& [unit, hash] : written) touched.insert(unit->file);
    for (const std::int64_t file : touched) files_[static_cast<std::size_t>(file)]->sync();
    for (const auto& [unit, hash] : written) {
      PackedUnit packed;
      packed.hash = hash;
      journal_->add(unit->id, packed);
    }
    journal_->sync();
  }

  // ------------------------------------------------------------------ after the weights
  SynthesisReport finish() {
    write_atomically(to_ / "config.json", config_text_);
    StoreManifest manifest;
    manifest.layout = layout_;
    for (const StoredUnit& unit : layout_.units) {
      manifest.hashes.push_back(journal_->units().at(unit.id).hash);
    }
    manifest.source = source_;
    manifest.fingerprint = sha256_hex(source_ + "\n" + hash_text(mark_));
    manifest.mark = mark_;
    write_atomically(to_ / kManifestName, manifest_text(manifest));
    journal_->remove();
    SynthesisReport report;
    report.bytes = layout_.bytes();
    report.units = narrow<std::int64_t>(layout_.units.size());
    report.units_before = units_before_;
    report.seconds = seconds_now() - began_;
    return report;
  }

  fs::path to_;
  const SynthesisOptions& options_;
  double began_;
  std::string config_text_, source_;
  ModelSpec spec_;
  StoreLayout layout_;
  std::array<std::byte, 16> mark_{};
  std::unique_ptr<PackJournal> journal_;
  std::vector<std::unique_ptr<StoreFile>> files_;
  std::vector<const StoredUnit*> waiting_;
  std::int64_t units_before_ = 0;
  SynthesisProgress progress_;

  std::atomic<std::size_t> next_{0};
  std::atomic<std::int64_t> bytes_done_{0};
  std::atomic<bool> ended_{false};
  std::mutex mutex_;
  std::condition_variable changed_;
  int running_ = 0;
  std::int64_t unsynced_bytes_ = 0;
  std::vector<std::pair<const StoredUnit*, UnitHash>> written_;
  std::exception_ptr failure_;
};

}  // namespace

SynthesisReport synthesise_store(const Json& config, const std::vector<std::int64_t>& layers,
                                 const fs::path& to, const SynthesisOptions& options) {
  return Synthesis(config, layers, to, options).go();
}

}  // namespace tailor
