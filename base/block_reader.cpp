#include "base/block_reader.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <deque>
#include <utility>
#include <vector>

#include "base/block_file.h"
#include "base/block_reader_engine.h"
#include "base/error.h"

namespace tailor {
namespace {

using detail::PieceEngine;
using detail::PieceResult;

constexpr std::int64_t kPieceBytesMax = std::int64_t{1} << 30;  // one read call gives below 2 GiB
constexpr int kDepthMax = 4096;
/// EINTR and EAGAIN in a row on one piece after which the answer is believed.
constexpr int kRetriesMax = 1000;

bool aligned(std::int64_t value) { return value % kBlockBytes == 0; }

/// The BlockReader there is: cuts extents into pieces and decides what each answer means. The
/// engine below only carries reads out, so that both engines mean the same by construction.
class PieceReader final : public BlockReader {
 public:
  PieceReader(Options options, Engine engine_kind, std::unique_ptr<PieceEngine> engine,
              std::string why)
      : options_(std::move(options)), engine_kind_(engine_kind), engine_(std::move(engine)) {
    if (!why.empty()) notes_.push_back({std::move(why), {}, 0});
    pieces_.resize(static_cast<std::size_t>(options_.depth));
    for (int slot = options_.depth - 1; slot >= 0; --slot) free_pieces_.push_back(slot);
  }

  // The engine first: reads under way use the files' descriptors and the callers' memory.
  ~PieceReader() override { engine_.reset(); }

  using BlockReader::submit;
  int add_file(const fs::path& path) override;
  void register_memory(std::span<std::byte> memory) override;
  void submit(std::span<const BlockRead> reads) override;
  BlockDone wait() override;
  std::size_t in_flight() const override { return in_flight_; }
  Facts facts() const override;
  std::int64_t bytes_read() const override { return bytes_read_; }

 private:
  struct Extent {
    BlockRead read;
    std::int64_t next = 0;  ///< file offset of the first byte not handed to a piece yet
    int pieces = 0;         ///< under way
    BlockDone done;
    bool failed = false;

    std::int64_t end() const { return read.offset + read.bytes; }
    std::int64_t needed_end() const { return read.offset + read.bytes_needed; }
  };
  struct Piece {
    std::size_t extent = 0;
    std::int64_t offset = 0, end = 0;  ///< in the file: what has not arrived yet
    bool direct = false;               ///< as the read under way was started
    int retries = 0;
  };
  struct Note {
    std::string reason;
    fs::path path;  ///< the first file it was met with; empty: no file's matter
    int others = 0;
  };

  BlockFile& file_of(const Extent& extent) {
    return files_[static_cast<std::size_t>(extent.read.file)];
  }
  void take(const PieceResult& result);
  bool goes_on(Piece& piece, Extent& extent, std::int64_t result);
  void start(int slot);
  void start_waiting();
  void fail(Extent& extent, std::int64_t offset, int error_number);
  void finish_if_complete(std::size_t index);
  bool leave_direct(BlockFile& file, const std::string& reason);
  void note(const std::string& reason, const fs::path& path);

  Options options_;
  Engine engine_kind_;
  std::vector<BlockFile> files_;
  std::unique_ptr<PieceEngine> engine_;
  std::vector<Note> notes_;
  std::vector<Piece> pieces_;  ///< by slot
  std::vector<int> free_pieces_;
  std::vector<Extent> extents_;
  std::vector<std::size_t> free_extents_;
  std::deque<std::size_t> waiting_;  ///< extents with bytes no piece has yet, oldest first
  std::deque<BlockDone> done_;
  std::vector<PieceResult> results_;
  std::size_t in_flight_ = 0;
  std::int64_t bytes_read_ = 0;
  bool registered_ = false;
};

int PieceReader::add_file(const fs::path& path) {
  files_.emplace_back(path, options_.direct);
  if (!files_.back().why().empty()) note(files_.back().why(), path);
  return static_cast<int>(files_.size()) - 1;
}

void PieceReader::register_memory(std::span<std::byte> memory) {
  TAILOR_CHECK(in_flight_ == 0);
  if (memory.empty()) return;
  const std::string why = engine_->register_memory(memory);
  registered_ = why.empty();
  if (!why.empty()) note(why, {});
}

void PieceReader::submit(std::span<const BlockRead> reads) {
  for (const BlockRead& read : reads) {
    TAILOR_CHECK(read.file >= 0 && static_cast<std::size_t>(read.file) < files_.size());
    TAILOR_CHECK(aligned(read.offset) && aligned(read.bytes) && read.offset >= 0);
    TAILOR_CHECK(read.bytes_needed >= 0 && read.bytes_needed <= read.bytes);
    TAILOR_CHECK(read.bytes <= INT64_MAX - read.offset);
    TAILOR_CHECK(reinterpret_cast<std::uintptr_t>(read.to) % kBlockBytes == 0);
  }
  for (const BlockRead& read : reads) {
    std::size_t index = extents_.size();
    if (free_extents_.empty()) {
      extents_.emplace_back();
    } else {
      index = free_extents_.back();
      free_extents_.pop_back();
    }
    Extent& extent = extents_[index];
    extent = Extent{};
    extent.read = read;
    extent.next = read.offset;
    extent.done.tag = read.tag;
    ++in_flight_;
    if (read.bytes > 0) waiting_.push_back(index);
    finish_if_complete(index);
  }
  start_waiting();
  engine_->flush();
}

BlockDone PieceReader::wait() {
  TAILOR_CHECK(in_flight_ > 0);
  if (done_.empty()) {
    while (done_.empty()) {
      results_.clear();
      engine_->wait(results_);
      for (const PieceResult& result : results_) take(result);
      start_waiting();
    }
    // The caller may be busy with the extent for long; the disk shall not be idle meanwhile.
    engine_->flush();
  }
  const BlockDone done = done_.front();
  done_.pop_front();
  --in_flight_;
  return done;
}

void PieceReader::start_waiting() {
  while (!waiting_.empty() && !free_pieces_.empty()) {
    const std::size_t index = waiting_.front();
    Extent& extent = extents_[index];
    const int slot = free_pieces_.back();
    free_pieces_.pop_back();
    const std::int64_t begin = extent.next;
    extent.next = std::min(extent.end(), begin + options_.piece_bytes);
    pieces_[static_cast<std::size_t>(slot)] = {index, begin, extent.next, false, 0};
    ++extent.pieces;
    if (extent.next == extent.end()) waiting_.pop_front();
    start(slot);
  }
}

void PieceReader::start(int slot) {
  Piece& piece = pieces_[static_cast<std::size_t>(slot)];
  const Extent& extent = extents_[piece.extent];
  const BlockFile& file = file_of(extent);
  piece.direct = file.direct();
  engine_->start({slot, file.descriptor(), piece.offset, piece.end - piece.offset,
                  extent.read.to + (piece.offset - extent.read.offset)});
}

void PieceReader::take(const PieceResult& result) {
  Piece& piece = pieces_[static_cast<std::size_t>(result.slot)];
  Extent& extent = extents_[piece.extent];
  std::int64_t answer = result.result;
  if (options_.alter_answer) {
    answer = options_.alter_answer(
        {extent.read.file, piece.offset, piece.end - piece.offset, piece.direct, answer});
  }
  if (goes_on(piece, extent, answer)) {
    start(result.slot);
    return;
  }
  free_pieces_.push_back(result.slot);
  --extent.pieces;
  finish_if_complete(piece.extent);
}

/// Books one answer. True if the piece must be asked for again, from where it stands now.
bool PieceReader::goes_on(Piece& piece, Extent& extent, std::int64_t result) {
  BlockFile& file = file_of(extent);
  if (result > 0) {
    bytes_read_ += result;
    extent.done.bytes_read += result;
    piece.offset += result;
    piece.retries = 0;
  }
  const bool needs_more = piece.offset < std::min(piece.end, extent.needed_end());
  if (!needs_more) return false;
  // A failure nearer to the extent's start makes this piece's bytes worthless; one further on does
  // not: this piece may yet find an earlier one, and the earliest is what is reported.
  if (extent.failed && extent.done.failed_offset <= piece.offset) return false;

  if (result == 0) {
    fail(extent, piece.offset, 0);
    return false;
  }
  if (result > 0) {
    if (!piece.direct || aligned(piece.offset)) return true;
    // A direct read that stops inside a block has met the file's end, or a bad sector. What is left
    // cannot be asked for directly, as it begins off a block; through the page cache it can.
    if (file.ends_before(piece.offset)) {
      fail(extent, piece.offset, 0);
      return false;
    }
    if (leave_direct(file, "a read with O_DIRECT stopped inside a block")) return true;
    fail(extent, piece.offset, EIO);
    return false;
  }
  const int error_number = static_cast<int>(-result);
  if ((error_number == EINTR || error_number == EAGAIN) && ++piece.retries <= kRetriesMax) {
    return true;
  }
  // Some file systems take O_DIRECT at open and refuse it at the first read.
  if (error_number == EINVAL && piece.direct &&
      leave_direct(file, std::string("read with O_DIRECT: ") + std::strerror(EINVAL))) {
    return true;
  }
  fail(extent, piece.offset, error_number);
  return false;
}

/// Books a failure that comes before any known one in file order. `error_number` 0: the file ended.
void PieceReader::fail(Extent& extent, std::int64_t offset, int error_number) {
  extent.done.error_number = error_number;
  extent.done.cut_off = error_number == 0;
  extent.done.failed_offset = offset;
  extent.failed = true;
  // What no piece has yet stays unread. Pieces are cut from the oldest extent only, so an extent
  // that has pieces and waits for more is the front.
  if (extent.next < extent.end()) {
    waiting_.pop_front();
    extent.next = extent.end();
  }
}

void PieceReader::finish_if_complete(std::size_t index) {
  Extent& extent = extents_[index];
  if (extent.pieces > 0 || extent.next < extent.end()) return;
  // Not piece by piece: what the cache holds in one piece of its own may span several of ours.
  if (!file_of(extent).direct()) file_of(extent).drop(extent.read.offset, extent.read.bytes);
  done_.push_back(extent.done);
  free_extents_.push_back(index);
}

/// True if reads of the file that begin now go through the page cache.
bool PieceReader::leave_direct(BlockFile& file, const std::string& reason) {
  if (!file.direct()) return true;
  if (!file.leave_direct(reason)) return false;
  note(reason, file.path());
  return true;
}

void PieceReader::note(const std::string& reason, const fs::path& path) {
  const auto same = [&](const Note& known) { return known.reason == reason; };
  const auto known = std::find_if(notes_.begin(), notes_.end(), same);
  if (known == notes_.end()) {
    notes_.push_back({reason, path, 0});
  } else {
    ++known->others;
  }
}

BlockReader::Facts PieceReader::facts() const {
  Facts facts;
  facts.engine = engine_kind_;
  facts.direct =
      options_.direct && std::all_of(files_.begin(), files_.end(),
                                     [](const BlockFile& file) { return file.direct(); });
  facts.registered = registered_;
  for (const Note& entry : notes_) {
    if (!facts.why.empty()) facts.why += "; ";
    facts.why += entry.reason;
    if (entry.path.empty()) continue;
    facts.why += " (" + entry.path.string();
    if (entry.others > 0) facts.why += " and " + std::to_string(entry.others) + " more";
    facts.why += ")";
  }
  return facts;
}

}  // namespace

const char* name_of(BlockReader::Engine engine) {
  return engine == BlockReader::Engine::io_uring ? "io_uring" : "threads";
}

std::unique_ptr<BlockReader> BlockReader::create(Options options) {
  TAILOR_CHECK(options.depth >= 1 && options.depth <= kDepthMax);
  TAILOR_CHECK(options.piece_bytes >= kBlockBytes && options.piece_bytes <= kPieceBytesMax &&
               aligned(options.piece_bytes));
  std::string why;
  std::unique_ptr<PieceEngine> engine;
  Engine kind = Engine::io_uring;
  if (options.engine.value_or(Engine::io_uring) == Engine::io_uring) {
    engine = detail::make_uring_engine(options.depth, options.pretend_queue_init_error, why);
    if (!engine && options.engine.has_value()) {
      throw Error(Fault::io,
                  {"io_uring cannot be used here, and no other way to read was allowed", why,
                   "Leave the choice of the reader's engine open: threads then do the "
                   "same reads. Containers allow io_uring in their seccomp profile; the "
                   "system allows it with sysctl kernel.io_uring_disabled=0."});
    }
  }
  if (!engine) {
    engine = detail::make_threads_engine(options.depth);
    kind = Engine::threads;
  }
  return std::make_unique<PieceReader>(std::move(options), kind, std::move(engine), std::move(why));
}

}  // namespace tailor
