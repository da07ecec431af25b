#include "data/runs/journaled_ledger.h"

#include <unistd.h>

#include <algorithm>
#include <utility>

#include "base/error.h"
#include "base/log.h"
#include "base/text.h"
#include "base/url.h"

namespace tailor {
namespace {

constexpr std::string_view kPrefix = "ledger-journal-";
constexpr std::string_view kSuffix = ".jsonl";

/// Errors after which the ledger may be well again.
bool may_pass(const Error& error) {
  return error.fault() == Fault::io || error.fault() == Fault::bad_file;
}

struct JournalText {
  std::string journal, place;
  std::vector<LedgerEntry> entries;
};

JournalText read_journal(const fs::path& path) {
  JournalText out;
  const std::string text = read_text(path);
  std::size_t begin = 0;
  for (int line = 1; begin < text.size(); ++line) {
    const std::size_t end = text.find('\n', begin);
    if (end == std::string::npos) break;  // torn
    const std::string where = path.string() + ":" + std::to_string(line);
    const Json json = parse_json(std::string_view(text).substr(begin, end - begin), where);
    if (line == 1) {
      const JsonReader head(json, where);
      out.journal = head.text("journal");
      out.place = head.text("ledger");
    } else {
      out.entries.push_back(entry_from_json(json, where));
      out.entries.back().journal = out.journal;
    }
    begin = end + 1;
  }
  return out;
}

/// Gives `ledger` the journal at `path` and removes it; how many entries it had.
std::int64_t take_in(const fs::path& path, Ledger& ledger) {
  const JournalText left = read_journal(path);
  for (const LedgerEntry& entry : left.entries) ledger.apply(entry);
  fs::remove(path);
  sync_path(path.parent_path());
  return static_cast<std::int64_t>(left.entries.size());
}

/// `record` without the last attempt, and that one.
void drop_attempt(RunRecord& record, int attempt) {
  const auto of_it = [attempt](const auto& row) { return row.attempt == attempt; };
  std::erase_if(record.attempts, of_it);
  std::erase_if(record.segments, of_it);
  std::erase_if(record.artifacts, of_it);
  std::erase_if(record.events, of_it);
}

}  // namespace

std::vector<fs::path> journals_in(const fs::path& folder) {
  std::vector<fs::path> out;
  std::error_code error;
  for (fs::directory_iterator it(folder, error), end; !error && it != end; it.increment(error)) {
    const std::string name = it->path().filename().string();
    if (name.starts_with(kPrefix) && name.ends_with(kSuffix)) out.push_back(it->path());
  }
  std::sort(out.begin(), out.end());
  return out;
}

std::string journal_place(const fs::path& journal) { return read_journal(journal).place; }

Replayed replay_journals(const fs::path& folder, Ledger& ledger) {
  Replayed out;
  for (const fs::path& path : journals_in(folder)) {
    out.entries += take_in(path, ledger);
    ++out.journals;
  }
  return out;
}

JournaledLedger::JournaledLedger(const std::string& place, const fs::path& folder,
                                 const Clock& clock, Start start, int patience_ms)
    : address_(place),
      place_(without_password(place)),
      folder_(folder),
      clock_(clock),
      patience_ms_(patience_ms),
      own_(Ledger::in_memory(clock)),
      journal_(new_ulid(clock.unix_ms())) {
  file_ = folder_ / (std::string(kPrefix) + journal_ + std::string(kSuffix));
  try {
    connect();
  } catch (const Error& error) {
    const bool server = place_.find("://") != std::string::npos;
    if (!may_pass(error) || (server && start == Start::refuse)) throw;
    away(error);
  }
}

JournaledLedger::~JournaledLedger() {
  const std::lock_guard guard(mutex_);
  try {
    if (away_) try_again();
    if (away_) {
      log_warning("the ledger is still away; what it has to learn is in " + file_.string() +
                  ". It is taken in when the run goes on, or by: tailor runs replay " +
                  folder_.string());
    }
  } catch (const std::exception&) {  // NOLINT(bugprone-empty-catch): the journal stays
  }
}

/// Opens the ledger where that is to be done, and gives it what earlier processes left.
void JournaledLedger::connect() {
  tried_ms_ = clock_.steady_ms();
  if (!ledger_) ledger_ = Ledger::open(address_, clock_, {patience_ms_});
  for (const fs::path& path : journals_in(folder_)) {
    if (path == file_) continue;
    const std::int64_t entries = take_in(path, *ledger_);
    log_info("the ledger has taken in " + count_text(entries) + " entries of the journal " +
             path.string());
  }
}

void JournaledLedger::away(const Error& error) {
  if (away_) return;
  away_ = true;
  tried_ms_ = clock_.steady_ms();
  log_warning("the ledger cannot be written, the run goes on: " + error.parts().what + " (" +
              error.parts().where + "). What it has to learn is kept in " + file_.string() +
              " and written later.");
  for (const LedgerEntry& entry : beginning_) spool(entry);
}

/// Tries the ledger; false where the entry has to wait.
bool JournaledLedger::deliver(const LedgerEntry& entry) {
  if (away_) return false;
  try {
    const AttemptId id = ledger_->apply(entry);
    if (id.attempt > 0) attempt_ = id.attempt;
    return true;
  } catch (const Error& error) {
    if (!may_pass(error)) throw;
    away(error);
    return false;
  }
}

AttemptId JournaledLedger::apply(const LedgerEntry&) {
  TAILOR_CHECK(false, "a journaled ledger numbers its entries itself");
  return {};
}

void JournaledLedger::submit(LedgerEntry::What what) {
  LedgerEntry entry;
  entry.journal = journal_;
  entry.number = ++number_;
  entry.attempt = {run_, attempt_};
  entry.unix_ms = clock_.unix_ms();
  if (attempt_ > 0) entry.ms = clock_.steady_ms() - began_steady_ms_;
  entry.what = std::move(what);
  const bool delivered = deliver(entry);
  if (!delivered) spool(entry);
  own_->apply(entry);
  if (std::holds_alternative<RunFacts>(entry.what) ||
      std::holds_alternative<AttemptFacts>(entry.what)) {
    beginning_.push_back(entry);
  }
}

std::string JournaledLedger::begin_run(const RunFacts& facts) {
  const std::lock_guard guard(mutex_);
  run_ = facts.run.empty() ? new_ulid(clock_.unix_ms()) : facts.run;
  RunFacts named = facts;
  named.run = run_;
  submit(named);
  return run_;
}

AttemptId JournaledLedger::begin_attempt(const std::string& run, const AttemptFacts& facts) {
  const std::lock_guard guard(mutex_);
  TAILOR_CHECK(run == run_ && attempt_ == 0, "one attempt of one run");
  began_steady_ms_ = clock_.steady_ms() - facts.held_ms_before;
  submit(facts);
  if (!away_) {
    try {
      before_ = ledger_->read(run_);
      drop_attempt(before_, attempt_);
      return {run_, attempt_};
    } catch (const Error& error) {
      if (!may_pass(error)) throw;
      away(error);
    }
  }
  // Earlier attempts that are known here are those whose journals wait beside ours.
  const auto earlier = Ledger::in_memory(clock_);
  for (const fs::path& path : journals_in(folder_)) {
    if (path == file_) continue;
    for (const LedgerEntry& entry : read_journal(path).entries) earlier->apply(entry);
  }
  before_ = {};
  if (earlier->find_run(run_)) before_ = earlier->read(run_);
  attempt_ = static_cast<int>(before_.attempts.size()) + 1;
  return {run_, attempt_};
}

void JournaledLedger::segments(const AttemptId&, std::span<const SegmentFacts> facts) {
  const std::lock_guard guard(mutex_);
  if (away_ && clock_.steady_ms() - tried_ms_ >= kHeartbeatMs) try_again();
  submit(std::vector(facts.begin(), facts.end()));
}

void JournaledLedger::heartbeat(const AttemptId&) {
  const std::lock_guard guard(mutex_);
  if (away_ && clock_.steady_ms() - tried_ms_ >= kHeartbeatMs) try_again();
  submit(HeartbeatFacts{});
}

void JournaledLedger::end_attempt(const AttemptId&, RunStatus status, int exit_code,
                                  const std::string& reason) {
  const std::lock_guard guard(mutex_);
  if (away_) try_again();
  submit(EndFacts{status, exit_code, reason});
}

void JournaledLedger::artifact(const AttemptId&, const ArtifactFacts& facts) {
  const std::lock_guard guard(mutex_);
  submit(facts);
}

void JournaledLedger::artifact_deleted(const AttemptId&, const std::string& path) {
  const std::lock_guard guard(mutex_);
  submit(DeletedFacts{path});
}

void JournaledLedger::event(const AttemptId&, std::optional<std::int64_t> step,
                            const std::string& kind, const std::string& text) {
  const std::lock_guard guard(mutex_);
  submit(EventFacts{step, kind, text});
}

void JournaledLedger::spool(const LedgerEntry& entry) {
  backlog_.push_back(entry);
  write_backlog();
}

/// Moves the backlog to the journal; what does not fit on the disk waits in memory.
void JournaledLedger::write_backlog() {
  try {
    if (file_bytes_ == 0) {
      std::error_code ignored;
      fs::remove(file_, ignored);
    } else if (::truncate(file_.c_str(), file_bytes_) != 0) {  // a line half written before
      throw io_error(errno, "cannot write the journal", file_.string());
    }
    FileWriter out(file_, true);
    std::int64_t bytes = file_bytes_;
    const auto line = [&](const Json& json) {
      const std::string text = json.dump() + "\n";
      out.write(text);
      bytes += static_cast<std::int64_t>(text.size());
    };
    if (file_bytes_ == 0) line({{"journal", journal_}, {"ledger", place_}, {"version", 1}});
    for (const LedgerEntry& entry : backlog_) line(entry_json(entry));
    out.close();
    sync_path(file_);
    if (file_bytes_ == 0) sync_path(folder_);
    file_bytes_ = bytes;
    backlog_.clear();
  } catch (const Error& error) {
    if (error.fault() != Fault::io && error.fault() != Fault::does_not_fit) throw;
    if (!std::exchange(warned_of_file_, true)) {
      log_warning("the journal cannot be written either, its entries wait in memory: " +
                  error.parts().what + " (" + error.parts().where + ")");
    }
  }
}

/// Gives the ledger the journal. Each entry is taken once, so that being cut short does no harm.
void JournaledLedger::try_again() {
  tried_ms_ = clock_.steady_ms();
  try {
    connect();
    if (!backlog_.empty()) write_backlog();
    std::vector<LedgerEntry> entries;
    if (file_bytes_ > 0) entries = read_journal(file_).entries;
    entries.insert(entries.end(), backlog_.begin(), backlog_.end());
    for (const LedgerEntry& entry : entries) {
      const AttemptId id = ledger_->apply(entry);
      if (id.attempt > 0) attempt_ = id.attempt;
    }
    away_ = false;
    warned_of_file_ = false;
    backlog_.clear();
    file_bytes_ = 0;
    std::error_code ignored;
    fs::remove(file_, ignored);
    RunRecord record = ledger_->read(run_);
    drop_attempt(record, attempt_);
    before_ = std::move(record);
    log_info("the ledger can be written again and has taken in " +
             count_text(static_cast<std::int64_t>(entries.size())) + " entries of the journal");
  } catch (const Error& error) {
    if (!may_pass(error)) throw;
  }
}

std::optional<ProjectBudget> JournaledLedger::budget(const std::string& project) const {
  const std::lock_guard guard(mutex_);
  if (away_) return std::nullopt;
  return ledger_->budget(project);
}

void JournaledLedger::set_budget(const std::string& project, const ProjectBudget& budget) {
  const std::lock_guard guard(mutex_);
  TAILOR_CHECK(ledger_ != nullptr);
  ledger_->set_budget(project, budget);
}

ProjectSpending JournaledLedger::spending_without(const std::string& project,
                                                  const std::string& except) const {
  const std::lock_guard guard(mutex_);
  return (away_ ? own_ : ledger_)->spending_without(project, except);
}

std::vector<std::string> JournaledLedger::runs() const {
  const std::lock_guard guard(mutex_);
  return (away_ ? own_ : ledger_)->runs();
}

std::optional<std::string> JournaledLedger::run_in_folder(const std::string& output_dir) const {
  const std::lock_guard guard(mutex_);
  return (away_ ? own_ : ledger_)->run_in_folder(output_dir);
}

std::optional<std::string> JournaledLedger::find_run(std::string_view what) const {
  const std::lock_guard guard(mutex_);
  return (away_ ? own_ : ledger_)->find_run(what);
}

RunRecord JournaledLedger::read(const std::string& run) const {
  const std::lock_guard guard(mutex_);
  if (!away_) {
    try {
      return ledger_->read(run);
    } catch (const Error& error) {
      if (!may_pass(error) || run != run_) throw;
    }
  }
  RunRecord own = own_->read(run);
  RunRecord out = before_;
  out.facts = own.facts;
  if (out.created_unix_ms == 0) out.created_unix_ms = own.created_unix_ms;
  const auto take = [&](auto& to, auto& from) {
    for (auto& row : from) {
      row.attempt = attempt_;
      to.push_back(std::move(row));
    }
  };
  take(out.attempts, own.attempts);
  take(out.segments, own.segments);
  take(out.artifacts, own.artifacts);
  take(out.events, own.events);
  return out;
}

bool JournaledLedger::connected() const {
  const std::lock_guard guard(mutex_);
  return !away_;
}

fs::path JournaledLedger::journal() const {
  const std::lock_guard guard(mutex_);
  return file_bytes_ > 0 ? file_ : fs::path();
}

}  // namespace tailor
