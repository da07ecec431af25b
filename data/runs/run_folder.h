#pragma once

#include <cstdint>
#include <string>

#include "base/clock.h"
#include "base/file.h"

namespace tailor {

/// The folder of one run: its layout, and the rules by which it is taken. Holds a lock while it
/// lives, so that two processes cannot train into one folder. Layout: docs/formats/run_folder.md.
///
///   run.json  run.lock  recipe.resolved.yaml  plan.json  metrics.jsonl  events.out.tfevents.*
///   checkpoints/  adapter/  report.html  summary.json
class RunFolder {
 public:
  /// Takes `path`, making it and its parents where absent.
  ///
  ///   absent or empty                    a new run
  ///   holds a run, no `resume`           Error{usage}: --resume, or another output_dir
  ///   holds a run, `resume`              goes on with it
  ///   holds files, but no run of ours    Error{usage}, whatever `resume`; nothing is touched
  ///   taken by another process           Error{usage} naming it
  ///
  /// That the folder can be written to is tried before it returns: Error{io} if not.
  static RunFolder open(const fs::path& path, bool resume, const Clock& clock);

  RunFolder(RunFolder&& other) noexcept;
  RunFolder& operator=(RunFolder&& other) noexcept;
  RunFolder(const RunFolder&) = delete;
  RunFolder& operator=(const RunFolder&) = delete;
  ~RunFolder();

  /// The run's identifier, made with the folder: give it to Ledger::begin_run.
  const std::string& run() const noexcept { return run_; }
  /// True when the folder held a run before.
  bool resumed() const noexcept { return resumed_; }
  /// Absolute.
  const fs::path& path() const noexcept { return path_; }

  /// Keeps the file of chosen experts (lora.experts) as experts() and its SHA-256 in the marker, so
  /// that the run can be read, and gone on with, when the file is gone or changed. On a resumed run
  /// that has one already it must be that file: Error{usage} if not. A copy that is missing or
  /// damaged is made again.
  void keep_experts(const fs::path& source) const;

  fs::path recipe() const { return recipe(path_); }
  fs::path experts() const { return experts(path_); }
  fs::path plan() const { return plan(path_); }
  fs::path metrics() const { return metrics(path_); }
  fs::path checkpoints() const { return checkpoints(path_); }
  fs::path adapter() const { return adapter(path_); }
  fs::path report() const { return report(path_); }
  fs::path summary() const { return summary(path_); }

  // The names, also for folders that are only read.
  static fs::path marker(const fs::path& folder) { return folder / "run.json"; }
  static fs::path lock(const fs::path& folder) { return folder / "run.lock"; }
  static fs::path recipe(const fs::path& folder) { return folder / "recipe.resolved.yaml"; }
  static fs::path experts(const fs::path& folder) { return folder / "experts.yaml"; }
  static fs::path plan(const fs::path& folder) { return folder / "plan.json"; }
  static fs::path metrics(const fs::path& folder) { return folder / "metrics.jsonl"; }
  static fs::path checkpoints(const fs::path& folder) { return folder / "checkpoints"; }
  static fs::path adapter(const fs::path& folder) { return folder / "adapter"; }
  static fs::path report(const fs::path& folder) { return folder / "report.html"; }
  static fs::path summary(const fs::path& folder) { return folder / "summary.json"; }

  /// The identifier in a folder's marker, or empty where there is none.
  static std::string run_in(const fs::path& folder);

 private:
  RunFolder() = default;

  fs::path path_;
  std::string run_;
  bool resumed_ = false;
  int lock_descriptor_ = -1;
};

/// Throws Error{does_not_fit} when the disk of `path` has fewer than `bytes` bytes free; `purpose`
/// completes "... are needed for <purpose>".
void require_free_bytes(const fs::path& path, std::int64_t bytes, const std::string& purpose);

}  // namespace tailor
