#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>

#include "base/file.h"

namespace tailor {

/// What offsets, sizes and addresses of block reads are multiples of: no disk in use has larger
/// sectors, so a read cut this way can go past the page cache everywhere.
constexpr std::int64_t kBlockBytes = 4096;

/// One extent of a file to read. `offset`, `bytes` and `to` are multiples of kBlockBytes.
struct BlockRead {
  int file = -1;                  ///< as add_file() returned it
  std::int64_t offset = 0;        ///< in the file, bytes
  std::int64_t bytes = 0;         ///< asked for; `to` has room for as many
  std::int64_t bytes_needed = 0;  ///< <= bytes: what must arrive; the file may end anywhere behind
  std::byte* to = nullptr;        ///< the caller's, left alone by the caller until the extent's end
  std::uint64_t tag = 0;          ///< comes back with the answer
};

/// How an extent ended. Nothing writes to its memory any more.
struct BlockDone {
  std::uint64_t tag = 0;
  int error_number = 0;         ///< errno value of what failed; 0: nothing did
  std::int64_t bytes_read = 0;  ///< of this extent that arrived; not one run after a failure
  bool cut_off = false;         ///< the file ended before bytes_needed
  /// Where in the file the first byte in file order is that could not be read, or, cut off, where
  /// the file ended or the first piece behind that end began. -1 if all needed bytes are there.
  std::int64_t failed_offset = -1;

  bool good() const noexcept { return error_number == 0 && !cut_off; }
};

/// Reads large extents of files past the page cache, many at once, into the caller's memory: the
/// disk side of the weight stream. For one thread: whoever submits also waits and destroys (or ends
/// first). Extents are cut into pieces; at most `depth` pieces are with the kernel at once, those
/// of extents submitted first go first, and each answer taken by wait() makes room for the next
/// piece.
class BlockReader {
 public:
  enum class Engine { io_uring, threads };

  /// What the kernel answered to the read of a piece or of what was left of it.
  struct Answer {
    int file;
    std::int64_t offset, bytes;
    bool direct;
    std::int64_t result;  ///< bytes read, 0 at the file's end, or a negative errno value
  };

  struct Options {
    /// Unset: io_uring, or threads where the kernel or a container forbids it. Set: that one, and
    /// create() throws if it cannot be had.
    std::optional<Engine> engine;
    int depth = 16;                                    ///< pieces at once, 1..4096
    std::int64_t piece_bytes = std::int64_t{1} << 20;  ///< a multiple of kBlockBytes up to 1 GiB
    bool direct = true;  ///< O_DIRECT where the file system has it; false: the page cache
    /// For tests: an errno value io_uring_queue_init is taken to have failed with.
    int pretend_queue_init_error = 0;
    /// For tests: called on each answer, gives the result to go on with instead.
    std::function<std::int64_t(const Answer&)> alter_answer;
  };

  struct Facts {
    Engine engine = Engine::threads;
    bool direct = false;      ///< every file so far is read past the page cache
    bool registered = false;  ///< the memory of register_memory() is known to the kernel
    /// For people: the reason of each fallback, joined by "; ", such as
    /// "io_uring_queue_init: Operation not permitted". Empty if there was none.
    std::string why;
  };

  /// Throws Error{io} if the engine asked for, or no engine, can be had.
  static std::unique_ptr<BlockReader> create(Options options);

  BlockReader() = default;
  BlockReader(const BlockReader&) = delete;
  BlockReader& operator=(const BlockReader&) = delete;
  /// Starts nothing more and returns when no read is under way: the memory may be reused.
  virtual ~BlockReader() = default;

  /// Opens a file and returns its number. With O_DIRECT where the file system allows it, else
  /// through the page cache, with read-ahead, dropping pages behind the read. Throws Error{io} if
  /// it cannot be opened or is no regular file.
  virtual int add_file(const fs::path& path) = 0;

  /// Tells the kernel of memory that reads will go to, so that it need not pin the pages for each
  /// (IORING_REGISTER_BUFFERS). An offer: refused (RLIMIT_MEMLOCK), all goes on as before and
  /// facts() says why. The memory stays mapped while the reader lives. Only with nothing in flight.
  virtual void register_memory(std::span<std::byte> memory) = 0;

  /// Queues extents and starts what `depth` has room for, in as few system calls as there can be;
  /// does not wait for the disk. Pieces that had no room move on in wait() only.
  virtual void submit(std::span<const BlockRead> reads) = 0;
  void submit(const BlockRead& read) { submit(std::span(&read, 1)); }

  /// Blocks for the next extent that ended, well or not, in any order. One that failed leaves the
  /// others alone. Needs in_flight() > 0. Throws Error{io} only if the engine itself broke.
  virtual BlockDone wait() = 0;

  /// Extents submitted whose end wait() has not told yet.
  virtual std::size_t in_flight() const = 0;

  virtual Facts facts() const = 0;

  /// Bytes the kernel said it read, since create(). With direct reads of whole blocks, exactly what
  /// the disk was asked for.
  virtual std::int64_t bytes_read() const = 0;
};

/// "io_uring" or "threads".
const char* name_of(BlockReader::Engine engine);

}  // namespace tailor
