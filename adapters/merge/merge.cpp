#include "adapters/merge/merge.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <set>
#include <thread>

#include "adapters/base_record.h"
#include "adapters/merge/journal.h"
#include "adapters/merge/receipt.h"
#include "adapters/merge/worker.h"
#include "base/clock.h"
#include "base/cores.h"
#include "base/error.h"
#include "base/memory.h"
#include "base/text.h"
#include "base/units.h"
#include "data/store/fingerprint.h"

namespace tailor {
namespace {

constexpr std::int64_t kSyncBytes = std::int64_t{512} << 20;
constexpr double kSyncSeconds = 5;
constexpr std::int64_t kSmallFileBytes = std::int64_t{100} << 20;
/// What the process takes beside its threads and factors: the program, headers, names.
constexpr std::int64_t kOwnBytes = std::int64_t{64} << 20;

/// Tokenizer, chat template, configs, code of the model: what is no weight and lies beside them.
bool is_carried(const fs::path& path) {
  const std::string name = path.filename(), extension = path.extension();
  static const std::set<std::string> kKinds = {".json", ".jinja",    ".model", ".txt",
                                               ".py",   ".tiktoken", ".vocab"};
  if (name == "config.json" || name == kReceiptName || name.ends_with(".index.json")) return false;
  return kKinds.count(extension) > 0 || name.starts_with("LICENSE") || name.starts_with("NOTICE") ||
         name.starts_with("USE_POLICY");
}

class Merger {
 public:
  Merger(const fs::path& base, const fs::path& out, const MergeOptions& options)
      : base_(base),
        out_(out.has_filename() ? out : out.parent_path()),
        options_(options),
        began_(seconds_now()) {}

  MergeReport go() {
    refuse_base_as_output();
    open();
    if (is_complete()) {
      remove_journal(out_);
      report_.was_complete = true;
      return report_;
    }
    check_memory();
    prepare_folder();
    run_threads();
    finish();
    return report_;
  }

 private:
  // ------------------------------------------------------------------ before the weights
  void refuse_base_as_output() const {
    std::error_code error;
    if (!fs::equivalent(base_, out_, error) || error) return;
    throw Error(Fault::usage, {"the merged model would be written over the base", out_.string(),
                               "Name a new folder with --out; nothing was changed."});
  }

  void open() {
    spec_ = read_model_spec(base_);
    checkpoint_ = std::make_unique<Checkpoint>(Checkpoint::open(base_));
    fingerprint_ = fingerprint(*checkpoint_, spec_);
    Json mark_text = {{"version", 1}, {"fingerprint", fingerprint_}};
    for (const MergeOptions::AdapterFolder& adapter : options_.adapters) {
      if (!std::isfinite(adapter.weight)) {
        throw Error(Fault::usage, {"an adapter's weight is not a finite number", "--weight",
                                   "Give numbers such as 1 or 0.5."});
      }
      readers_.push_back(std::make_unique<PeftReader>(adapter.folder, spec_));
      const PeftReader& reader = *readers_.back();
      check_trained(adapter, reader.folder().base_fingerprint());
      reader.check_finite();
      const Json& config = reader.config();
      Json facts = {
          {"path", fs::absolute(adapter.folder).lexically_normal().string()},
          {"weight", adapter.weight},
          {"adapter_model.safetensors", sha256_file(reader.weights_path())},
          {"adapter_config.json", sha256_file(reader.config_path())},
          {"base_model",
           config.contains("base_model_name_or_path") ? config["base_model_name_or_path"] : Json()},
          {"targets", describe_sites(reader.sites())}};
      mark_text["adapters"].push_back(
          {facts["adapter_model.safetensors"], facts["adapter_config.json"], adapter.weight});
      adapter_facts_.push_back(std::move(facts));
    }
    std::vector<AdapterToMerge> adapters;
    for (std::size_t i = 0; i < readers_.size(); ++i) {
      adapters.push_back({readers_[i].get(), options_.adapters[i].weight});
    }
    plan_ = plan_merge(*checkpoint_, spec_, adapters, options_.dtype);
    mark_text["dtype"] = static_cast<int>(options_.dtype);
    mark_text["onto"] = onto_text();
    mark_text["config"] = sha256_file(base_ / "config.json");
    for (const MergeShard& shard : plan_.shards) {
      mark_text["shards"].push_back({shard.name, narrow<std::int64_t>(fs::file_size(shard.source)),
                                     sha256_hex(shard.header)});
    }
    mark_ = sha256_hex(mark_text.dump());
    report_.base_bytes = plan_.input_bytes;
    report_.bytes = plan_.output_bytes;
    report_.tensors = narrow<std::int64_t>(plan_.outputs.size());
    report_.adapted = plan_.adapted_tensors;
    report_.jobs = narrow<std::int64_t>(plan_.jobs.size());
  }

  /// Whether a format of training is that of the base's own weights: it was not quantised for it.
  bool is_published_in(const std::string& format) const {
    if (format == "as_is" || format == "bf16") return true;
    const auto& tensors = checkpoint_->tensors();
    return std::any_of(tensors.begin(), tensors.end(), [&](const auto& entry) {
      return format == "fp8"    ? entry.second.info.dtype == Dtype::f8_e4m3
             : format == "int4" ? entry.first.ends_with(".weight_packed")
                                : false;
    });
  }

  /// Merging onto other numbers than the adapter was trained on is for the user to say.
  void check_trained(const MergeOptions::AdapterFolder& adapter, const std::string& trained_on) {
    const std::optional<BaseRecord> record = read_base_record(adapter.folder);
    trained_on_.push_back({{"fingerprint", trained_on.empty() ? Json() : Json(trained_on)},
                           {"formats", record ? Json(record->text()) : Json()}});
    const bool other_numbers =
        record && record->quantised() &&
        !(is_published_in(record->experts) && is_published_in(record->others));
    if (other_numbers && options_.onto == MergeOptions::Onto::unset) {
      throw Error(Fault::usage,
                  {"the adapter was trained on a quantised base: " + record->text(),
                   adapter.folder.string(),
                   "Say which weights it is added to: --onto original for those of --base as they "
                   "are, or --onto trained with the store it was trained from as --base."});
    }
    const std::string& known =
        options_.base_fingerprint.empty() ? fingerprint_ : options_.base_fingerprint;
    // Weights that were decoded from a store have a fingerprint of their own.
    const bool decoded = other_numbers && options_.onto == MergeOptions::Onto::trained &&
                         options_.base_fingerprint.empty();
    if (decoded || trained_on.empty() || trained_on == known) return;
    throw Error(Fault::bad_file,
                {"the adapter was trained on another base: its fingerprint is " +
                     trained_on.substr(0, 16) + "..., this one's " + known.substr(0, 16) + "...",
                 adapter.folder.string() + ", " + base_.string(),
                 "Name the model that the adapter was trained on with --base."});
  }

  bool is_complete() const {
    std::error_code error;
    if (!fs::exists(fs::symlink_status(out_, error))) return false;
    if (fs::is_directory(out_, error) && fs::is_empty(out_, error)) return false;
    if (receipt_mark(out_) == mark_) return true;
    throw Error(Fault::usage, {"the output folder is not empty", out_.string(),
                               "Name a new folder with --out; nothing was changed."});
  }

  void check_memory() {
    std::int64_t factors = 0;
    for (const auto& reader : readers_) factors += FactorGroups::group_bytes_max(*reader);
    const std::int64_t each = MergeWorker::memory_bytes(plan_) + factors;
    // Two recent groups of every adapter are kept beside those in use.
    const std::int64_t fixed = kOwnBytes + 2 * factors + headers_bytes();
    const std::int64_t room = (options_.memory_bytes_max - fixed) / each;
    if (room < 1) {
      throw Error(
          Fault::does_not_fit,
          {"--max-ram of " + bytes_text(options_.memory_bytes_max) + " is too little: " +
               bytes_text(fixed + each) + " are needed for a piece of the largest tensor",
           base_.string(),
           "Give --max-ram " + std::to_string(div_ceil(fixed + each, 1 << 20)) + "MiB or more."});
    }
    const int wanted = options_.threads > 0 ? options_.threads : std::max(2, 2 * usable_cores());
    threads_ = static_cast<int>(std::min<std::int64_t>(wanted, room));
  }
  std::int64_t headers_bytes() const {
    return narrow<std::int64_t>(plan_.inputs.size() + plan_.outputs.size()) * 1024;
  }

  void prepare_folder() {
    staging_ = out_.parent_path() / ("." + out_.filename().string() + ".tailor-merge");
    const fs::path parent = out_.parent_path().empty() ? fs::path(".") : out_.parent_path();
    make_folders(parent);
    check_disk(parent);
    make_folders(staging_);
    journal_ = std::make_unique<MergeJournal>(staging_, mark_);
    for (const auto& [job, piece] : journal_->done()) {
      if (job < plan_.jobs.size()) continue;
      throw Error(Fault::bad_file, {"the journal of this begun merge is damaged", staging_.string(),
                                    "Remove that folder and merge again."});
    }
    for (const MergeShard& shard : plan_.shards) {
      if (!journal_->done().empty()) check_begun(shard);
      files_.targets.push_back(std::make_unique<SliceTarget>(staging_ / shard.name, shard.bytes));
      files_.targets.back()->write(0, std::as_bytes(std::span(shard.header)));
      files_.sources.push_back(std::make_unique<SliceSource>(shard.source));
    }
    sync_path(staging_);
    for (std::size_t j = 0; j < plan_.jobs.size(); ++j) {
      if (journal_->done().count(j) == 0) {
        todo_.push_back(j);
      } else {
        progress_.bytes_before += bytes_of(plan_.jobs[j]);
      }
    }
    report_.jobs_before = narrow<std::int64_t>(plan_.jobs.size() - todo_.size());
    progress_.bytes_done = progress_.bytes_before;
    progress_.bytes = plan_.input_bytes;
  }

  void check_begun(const MergeShard& shard) const {
    std::error_code error;
    const auto size = fs::file_size(staging_ / shard.name, error);
    if (!error && narrow<std::int64_t>(size) == shard.bytes) return;
    throw Error(Fault::bad_file,
                {"a file of this begun merge is missing or cut off",
                 (staging_ / shard.name).string(), "Remove that folder and merge again."});
  }

  /// What the merge needs beyond what an earlier attempt took.
  void check_disk(const fs::path& parent) const {
    const std::int64_t free = free_disk_bytes(parent);
    // Journal and receipt: a line a piece, a line a tensor.
    std::int64_t needed = (std::int64_t{1} << 20) + narrow<std::int64_t>(plan_.jobs.size()) * 512 +
                          narrow<std::int64_t>(plan_.outputs.size()) * 1024;
    for (const MergeShard& shard : plan_.shards) {
      needed += bytes_to_reserve(staging_ / shard.name, shard.bytes);
    }
    for (const auto& entry : fs::directory_iterator(base_)) {
      std::error_code error;
      if (is_carried(entry.path()) && fs::is_regular_file(entry.path(), error)) {
        needed += narrow<std::int64_t>(fs::file_size(entry.path()));
      }
    }
    if (needed <= free) return;
    throw Error(Fault::does_not_fit,
                {"the merged model needs " + bytes_text(needed) + " of disk, " + bytes_text(free) +
                     " are free",
                 parent.string(), "Free some, or name a folder on a larger disk with --out."});
  }

  // ------------------------------------------------------------------ the weights
  std::int64_t bytes_of(const MergeJob& job) const {
    const MergePart& part = plan_.parts[job.part];
    const auto piece = [&](const MergeTensor& tensor) {
      // Of scales that go with every piece of a slice, those of the first are counted.
      return std::clamp<std::int64_t>(
          tensor.pieces.slice_bytes - job.piece * tensor.pieces.piece_bytes, 0,
          tensor.pieces.piece_bytes);
    };
    std::int64_t bytes = piece(plan_.inputs[part.in]);
    if (part.in_scales) bytes += piece(plan_.inputs[*part.in_scales]);
    return bytes;
  }

  void run_threads() {
    std::vector<const PeftReader*> readers;
    for (const auto& reader : readers_) readers.push_back(reader.get());
    FactorGroups factors(readers);
    std::vector<std::thread> threads;
    progress_.in_flight = threads_;
    for (int i = 0; i < threads_; ++i) {
      threads.emplace_back([this, &factors] { work(factors); });
    }
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
    if (options_.progress) options_.progress(progress_);
  }

  void work(FactorGroups& factors) {
    try {
      MergeWorker worker(plan_, files_, factors);
      while (true) {
        throw_if_stopped();
        std::size_t job = 0;
        {
          const std::lock_guard lock(mutex_);
          if (failure_ || next_ == todo_.size()) return;
          job = todo_[next_++];
        }
        const MergedPiece piece = worker.run(plan_.jobs[job]);
        const std::lock_guard lock(mutex_);
        written_.emplace_back(job, piece);
        const std::int64_t bytes = bytes_of(plan_.jobs[job]);
        progress_.bytes_done += bytes;
        unsynced_bytes_ += bytes;
        ++done_;
        if (done_ == todo_.size()) changed_.notify_all();
      }
    } catch (...) {
      fail(std::current_exception());
    }
  }

  /// The calling thread: progress, syncing, stopping.
  void watch() {
    double synced_at = seconds_now(), told_at = 0;
    while (true) {
      bool sync_now = false;
      {
        std::unique_lock lock(mutex_);
        const auto ended = [&] { return failure_ || done_ == todo_.size(); };
        if (!ended()) changed_.wait_for(lock, std::chrono::milliseconds(50));
        if (ended()) return;
        sync_now = unsynced_bytes_ >= kSyncBytes;
      }
      const double now = seconds_now();
      throw_if_stopped();
      if (sync_now || now - synced_at > kSyncSeconds) {
        sync();
        synced_at = now;
      }
      if (options_.progress && now - told_at > 0.5) {
        MergeProgress copy;
        {
          const std::lock_guard lock(mutex_);
          progress_.seconds = now - began_;
          copy = progress_;
        }
        options_.progress(copy);
        told_at = now;
      }
    }
  }

  void throw_if_stopped() const {
    if (!options_.stop || !options_.stop()) return;
    throw Error(Fault::stopped, {"interrupted while merging", staging_.string(),
                                 "What is merged is kept. Run the same command again to go on."});
  }

  void fail(std::exception_ptr error) {
    const std::lock_guard lock(mutex_);
    if (!failure_) failure_ = std::move(error);
    changed_.notify_all();
  }

  /// Bytes first, then the journal that says they are there.
  void sync() {
    std::vector<std::pair<std::size_t, MergedPiece>> written;
    {
      const std::lock_guard lock(mutex_);
      written.swap(written_);
      unsynced_bytes_ = 0;
    }
    std::set<std::size_t> touched;
    for (const auto& [job, piece] : written) {
      const MergePart& part = plan_.parts[plan_.jobs[job].part];
      touched.insert(plan_.outputs[part.out].file);
      if (part.out_scales) touched.insert(plan_.outputs[*part.out_scales].file);
    }
    for (const std::size_t file : touched) files_.targets[file]->sync();
    for (const auto& [job, piece] : written) journal_->add(job, piece);
    journal_->sync();
  }

  // ------------------------------------------------------------------ after the weights
  void finish() {
    for (const auto& target : files_.targets) target->sync();
    copy_small_files();
    const std::vector<MergedTensor> tensors = merged_tensors(plan_, journal_->done());
    sum_up(tensors);
    ReceiptFacts facts;
    facts.mark = mark_;
    facts.fingerprint = fingerprint_;
    facts.base = {{"name", options_.base_name},
                  {"path", fs::absolute(base_).lexically_normal().string()},
                  {"config.json", sha256_file(base_ / "config.json")}};
    for (std::size_t i = 0; i < adapter_facts_.size(); ++i) {
      adapter_facts_[i]["trained_on"] = trained_on_[i];
    }
    facts.adapters = adapter_facts_;
    facts.onto = onto_text();
    facts.files = carried_;
    report_.seconds = seconds_now() - began_;
    report_.peak_rss_bytes = resident_bytes_peak().value_or(0);
    const auto read = static_cast<double>(plan_.input_bytes - progress_.bytes_before);
    facts.run = {{"peak_rss_bytes", report_.peak_rss_bytes},
                 {"seconds", report_.seconds},
                 {"base_bytes_per_second", std::round(read / report_.seconds)},
                 {"threads", threads_},
                 {"jobs", report_.jobs},
                 {"jobs_of_earlier_attempts", report_.jobs_before}};
    write_receipt(staging_, plan_, tensors, facts, report_, options_.dtype);
    sync_path(staging_);
    publish(staging_, out_);
    remove_journal(out_);
  }

  const char* onto_text() const {
    return options_.onto == MergeOptions::Onto::trained ? "trained" : "original";
  }

  static void remove_journal(const fs::path& folder) {
    std::error_code error;
    if (fs::remove(folder / MergeJournal::kName, error)) sync_path(folder);
  }

  void carry(const std::string& name, const std::string& text) {
    write_atomically(staging_ / name, text);
    carried_[name] = sha256_hex(text);
  }

  void copy_small_files() {
    for (const auto& entry : fs::directory_iterator(base_)) {
      const std::string name = entry.path().filename();
      std::error_code error;
      if (!is_carried(entry.path()) || !fs::is_regular_file(entry.path(), error)) continue;
      if (narrow<std::int64_t>(fs::file_size(entry.path())) > kSmallFileBytes) {
        report_.notes.push_back(name + " is larger than 100 MB and was left behind");
        continue;
      }
      carry(name, read_text(entry.path()));
    }
    const std::string config = read_text(base_ / "config.json");
    carry("config.json",
          plan_.config_changes
              ? merged_config(parse_json(config, (base_ / "config.json").string()), options_.dtype)
                        .dump(2) +
                    "\n"
              : config);
    if (plan_.had_index) carry("model.safetensors.index.json", merged_index(plan_));
  }

  void sum_up(const std::vector<MergedTensor>& tensors) {
    MergeSums all;
    for (std::size_t i = 0; i < tensors.size(); ++i) {
      if (!tensors[i].adapted) continue;
      const MergeShares shares = shares_of(tensors[i].sums);
      all.add(tensors[i].sums);
      if (shares.kept < kKeptLimit) ++report_.below_limit;
      if (shares.kept < report_.least_kept) {
        report_.least_kept = shares.kept;
        report_.least_kept_tensor = plan_.outputs[i].name;
      }
    }
    report_.shares = shares_of(all);
    for (const MergePart& part : plan_.parts) {
      report_.quantised = report_.quantised || (part.requantised && !part.terms.empty());
    }
    if (report_.below_limit > 0) {
      report_.notes.push_back(
          count_text(report_.below_limit) + " of " + count_text(report_.adapted) +
          " adapted tensors kept less than " + number_text(100 * kKeptLimit, 2) +
          " % of their change: it is below half a step of their format. Least: " +
          number_text(100 * report_.least_kept, 3) + " % in " + report_.least_kept_tensor);
    }
    if (spec_.prediction_layers > 0) {
      report_.notes.push_back("the prediction layers are the base's: adapters do not change them");
    }
  }

  const fs::path base_, out_;
  const MergeOptions& options_;
  const double began_;
  ModelSpec spec_;
  std::unique_ptr<Checkpoint> checkpoint_;
  std::vector<std::unique_ptr<PeftReader>> readers_;
  MergePlan plan_;
  std::string fingerprint_, mark_;
  Json adapter_facts_ = Json::array();
  std::vector<Json> trained_on_;
  fs::path staging_;
  std::unique_ptr<MergeJournal> journal_;
  MergeFiles files_;
  int threads_ = 1;

  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<std::size_t> todo_;
  std::size_t next_ = 0, done_ = 0;
  std::int64_t unsynced_bytes_ = 0;
  std::vector<std::pair<std::size_t, MergedPiece>> written_;
  MergeProgress progress_;
  std::exception_ptr failure_;
  std::map<std::string, std::string> carried_;
  MergeReport report_;
};

}  // namespace

MergeShares shares_of(const MergeSums& sums) {
  MergeShares out;
  if (sums.base_squares > 0) {
    out.relative_change = std::sqrt(sums.delta_squares / sums.base_squares);
    out.error = std::sqrt(sums.error_squares / sums.base_squares);
  }
  if (sums.delta_squares > 0) out.kept = sums.kept / sums.delta_squares;
  return out;
}

MergeReport merge_adapters(const fs::path& base, const fs::path& out, const MergeOptions& options) {
  return Merger(base, out, options).go();
}

}  // namespace tailor
