#pragma once

// Inside base only: what block_reader.cpp asks of the kernel, with two answers to how.

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

namespace tailor::detail {

/// One read for the kernel. `slot` names it, 0..depth-1, and is not used again before its result.
struct PieceRead {
  int slot;
  int descriptor;
  std::int64_t offset, bytes;
  std::byte* to;
};

struct PieceResult {
  int slot;
  std::int64_t result;  ///< bytes read, 0 at the file's end, or a negative errno value
};

/// Carries out single reads, each once, and reports what the kernel said. What an answer means,
/// and whether to ask again, is decided in one place for all engines: block_reader.cpp.
class PieceEngine {
 public:
  PieceEngine() = default;
  PieceEngine(const PieceEngine&) = delete;
  PieceEngine& operator=(const PieceEngine&) = delete;
  /// Returns when no read is under way.
  virtual ~PieceEngine() = default;

  /// Takes a read; it may begin as late as the next flush() or wait(). At most `depth` at once.
  virtual void start(const PieceRead& read) = 0;
  /// Begins what was taken, without waiting.
  virtual void flush() = 0;
  /// flush(), then blocks and appends one result or more. At least one read must be under way.
  virtual void wait(std::vector<PieceResult>& results) = 0;
  /// Adds memory to what the kernel knows. Empty: done, else why not, and all of it is unknown
  /// then.
  virtual std::string register_memory(std::span<std::byte> memory) = 0;
};

/// Null where io_uring cannot be had, with the reason in `why`. A `pretend_error` other than 0 is
/// taken for what io_uring_queue_init answered.
std::unique_ptr<PieceEngine> make_uring_engine(int depth, int pretend_error, std::string& why);

/// `depth` threads that call pread. Throws Error{io} if not one thread can be started.
std::unique_ptr<PieceEngine> make_threads_engine(int depth);

}  // namespace tailor::detail
