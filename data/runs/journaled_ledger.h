#pragma once

#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "base/error.h"
#include "base/file.h"
#include "data/runs/ledger.h"
#include "data/runs/ledger_entry.h"

namespace tailor {

/// The ledger as one training process sees it, for one attempt of one run. While the ledger cannot
/// be written (locked, read-only, full, damaged, its server away), changes go to a journal in the
/// run's folder, this is said once, and every 15 s the ledger is tried again; then it is given what
/// the journal holds. Each change is in the ledger exactly once, whatever was killed when: changes
/// are numbered, and the ledger keeps the number it has come to (docs/formats/ledger.md).
///
/// Only what cannot be mended by waiting is thrown: Error{internal} when another attempt has taken
/// the run over. May be called from several threads.
class JournaledLedger final : public Ledger {
 public:
  enum class Start {
    wait,    ///< a ledger that cannot be opened is written to the journal
    refuse,  ///< a database server that cannot be reached is an error: for a run's very beginning
  };
  /// Opens the ledger and gives it what earlier processes left in `folder`. Error{usage} for a
  /// place that no waiting mends, such as a newer schema.
  JournaledLedger(const std::string& place, const fs::path& folder, const Clock& clock,
                  Start start = Start::wait, int patience_ms = 5'000);
  ~JournaledLedger() override;

  std::string begin_run(const RunFacts& facts) override;
  AttemptId begin_attempt(const std::string& run, const AttemptFacts& facts) override;
  void segments(const AttemptId& attempt, std::span<const SegmentFacts> facts) override;
  void heartbeat(const AttemptId& attempt) override;
  void end_attempt(const AttemptId& attempt, RunStatus status, int exit_code,
                   const std::string& reason) override;
  void artifact(const AttemptId& attempt, const ArtifactFacts& facts) override;
  void artifact_deleted(const AttemptId& attempt, const std::string& path) override;
  void event(const AttemptId& attempt, std::optional<std::int64_t> step, const std::string& kind,
             const std::string& text) override;
  AttemptId apply(const LedgerEntry& entry) override;

  /// Null, and no spending but this run's own, while the ledger is away.
  std::optional<ProjectBudget> budget(const std::string& project) const override;
  void set_budget(const std::string& project, const ProjectBudget& budget) override;
  ProjectSpending spending_without(const std::string& project,
                                   const std::string& except) const override;

  std::vector<std::string> runs() const override;
  std::optional<std::string> run_in_folder(const std::string& output_dir) const override;
  std::optional<std::string> find_run(std::string_view what) const override;
  /// While the ledger is away: what it said when this attempt began, and this attempt.
  RunRecord read(const std::string& run) const override;
  const Clock& clock() const override { return clock_; }
  std::string place() const override { return place_; }

  /// False while changes go to the journal.
  bool connected() const;
  /// The journal, where it holds something; else empty.
  fs::path journal() const;

 private:
  void submit(LedgerEntry::What what);
  bool deliver(const LedgerEntry& entry);
  void connect();
  void away(const Error& error);
  void spool(const LedgerEntry& entry);
  void write_backlog();
  void try_again();

  std::string address_, place_;
  fs::path folder_, file_;
  const Clock& clock_;
  int patience_ms_;

  mutable std::recursive_mutex mutex_;
  std::unique_ptr<Ledger> ledger_;  ///< null while it cannot be opened
  std::unique_ptr<Ledger> own_;     ///< this attempt, in memory
  RunRecord before_;                ///< the run when this attempt began
  std::string run_, journal_;
  std::int64_t number_ = 0, began_steady_ms_ = 0;
  int attempt_ = 0;
  std::vector<LedgerEntry> beginning_;  ///< begin_run and begin_attempt: each journal has them
  std::deque<LedgerEntry> backlog_;     ///< not in the journal yet
  std::int64_t file_bytes_ = 0;         ///< of whole lines
  bool away_ = false, warned_of_file_ = false;
  std::int64_t tried_ms_ = 0;
};

/// What replay_journals did.
struct Replayed {
  int journals = 0;
  std::int64_t entries = 0;  ///< offered; those that were in already count too
};
/// Gives `ledger` what journals in a run's folder hold, oldest first, and removes each that is in.
/// Throws what the ledger throws; Error{bad_file} for a journal that is damaged before its last
/// line (a torn last line is what a kill leaves, and was never promised).
Replayed replay_journals(const fs::path& folder, Ledger& ledger);
/// The journals in a folder, oldest first.
std::vector<fs::path> journals_in(const fs::path& folder);
/// The ledger a journal was meant for.
std::string journal_place(const fs::path& journal);

}  // namespace tailor
