#include <liburing.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <vector>

#include "base/block_reader_engine.h"
#include "base/error.h"

namespace tailor::detail {
namespace {

constexpr std::size_t kBufferBytesMax = std::size_t{1} << 30;  // the kernel's limit on one buffer
constexpr useconds_t kPauseMicroseconds = 1000;

std::string told(const char* call, int error_number) {
  return std::string(call) + ": " + std::strerror(error_number);
}

class UringEngine final : public PieceEngine {
 public:
  UringEngine() = default;

  ~UringEngine() override {
    if (!open_) return;
    // Closing the ring does not wait for its reads, and they write to memory that is about to be
    // freed. Entries the kernel has not taken from the queue are never begun.
    io_uring_cqe* entry = nullptr;
    while (under_way_ > static_cast<int>(io_uring_sq_ready(&ring_))) {
      if (io_uring_wait_cqe(&ring_, &entry) != 0) {
        ::usleep(kPauseMicroseconds);  // results also come without a call
        if (io_uring_peek_cqe(&ring_, &entry) != 0) continue;
      }
      io_uring_cqe_seen(&ring_, entry);
      --under_way_;
    }
    io_uring_queue_exit(&ring_);
  }

  /// Empty: ready. Else why io_uring cannot be used.
  std::string open(int depth);

  void start(const PieceRead& read) override {
    io_uring_sqe* entry = io_uring_get_sqe(&ring_);
    TAILOR_CHECK(entry != nullptr);
    const auto bytes = static_cast<unsigned>(read.bytes);
    const auto offset = static_cast<std::uint64_t>(read.offset);
    const int buffer = buffer_of(read.to, read.bytes);
    if (buffer >= 0) {
      io_uring_prep_read_fixed(entry, read.descriptor, read.to, bytes, offset, buffer);
    } else {
      io_uring_prep_read(entry, read.descriptor, read.to, bytes, offset);
    }
    io_uring_sqe_set_data64(entry, static_cast<unsigned>(read.slot));
    ++under_way_;
  }

  // An error here is one for wait(), which calls again.
  void flush() override {
    if (io_uring_sq_ready(&ring_) > 0) io_uring_submit(&ring_);
  }

  void wait(std::vector<PieceResult>& results) override;
  std::string register_memory(std::span<std::byte> memory) override;

 private:
  bool reap(std::vector<PieceResult>& results) {
    std::array<io_uring_cqe*, 64> entries;
    unsigned count = 0;
    bool any = false;
    while ((count = io_uring_peek_batch_cqe(&ring_, entries.data(), entries.size())) > 0) {
      for (unsigned i = 0; i < count; ++i) {
        results.push_back({static_cast<int>(io_uring_cqe_get_data64(entries[i])), entries[i]->res});
      }
      io_uring_cq_advance(&ring_, count);
      under_way_ -= static_cast<int>(count);
      any = true;
    }
    return any;
  }

  /// The registered buffer that holds all of the memory; -1: none.
  int buffer_of(const std::byte* to, std::int64_t bytes) const {
    const auto begin = reinterpret_cast<std::uintptr_t>(to);
    for (std::size_t i = 0; i < buffers_.size(); ++i) {
      const auto start = reinterpret_cast<std::uintptr_t>(buffers_[i].iov_base);
      if (begin >= start &&
          begin + static_cast<std::uintptr_t>(bytes) <= start + buffers_[i].iov_len) {
        return static_cast<int>(i);
      }
    }
    return -1;
  }

  io_uring ring_{};
  bool open_ = false;
  int under_way_ = 0;  ///< started, result not taken yet
  std::vector<iovec> buffers_;
};

std::string UringEngine::open(int depth) {
  // COOP_TASKRUN (Linux 5.19): results are put in the queue when the reader asks, instead of
  // interrupting whatever its core does.
  const auto entries = static_cast<unsigned>(depth);
  int result = io_uring_queue_init(entries, &ring_, IORING_SETUP_COOP_TASKRUN);
  if (result == -EINVAL) result = io_uring_queue_init(entries, &ring_, 0);
  if (result != 0) return told("io_uring_queue_init", -result);
  open_ = true;

  io_uring_probe* probe = io_uring_get_probe_ring(&ring_);
  const bool can_read = probe != nullptr && io_uring_opcode_supported(probe, IORING_OP_READ) != 0;
  io_uring_free_probe(probe);
  if (!can_read) return "io_uring: this kernel has no read without a vector (Linux 5.6)";

  // A seccomp profile may allow the queue and forbid its use: one that carries nothing shows it.
  io_uring_prep_nop(io_uring_get_sqe(&ring_));
  result = io_uring_submit(&ring_);
  if (result < 0) return told("io_uring_enter", -result);
  io_uring_cqe* entry = nullptr;
  do {
    result = io_uring_wait_cqe(&ring_, &entry);
  } while (result == -EINTR);
  if (result != 0) return told("io_uring_enter", -result);
  io_uring_cqe_seen(&ring_, entry);
  return {};
}

void UringEngine::wait(std::vector<PieceResult>& results) {
  TAILOR_CHECK(under_way_ > 0);
  while (!reap(results)) {
    const int result = io_uring_submit_and_wait(&ring_, 1);
    if (result >= 0 || result == -EINTR) continue;
    if (result != -EAGAIN && result != -EBUSY) {
      throw io_error(-result, "cannot read: io_uring_enter", "the reader of weights");
    }
    // The kernel is short of memory for requests: those under way give some back when they end.
    io_uring_cqe* entry = nullptr;
    if (under_way_ > static_cast<int>(io_uring_sq_ready(&ring_))) {
      io_uring_wait_cqe(&ring_, &entry);
    } else {
      ::usleep(kPauseMicroseconds);
    }
  }
}

std::string UringEngine::register_memory(std::span<std::byte> memory) {
  // The kernel takes one list and no additions, so the list is given anew.
  if (!buffers_.empty()) io_uring_unregister_buffers(&ring_);
  for (std::size_t at = 0; at < memory.size(); at += kBufferBytesMax) {
    const std::size_t bytes = std::min(kBufferBytesMax, memory.size() - at);
    buffers_.push_back({memory.data() + at, bytes});
  }
  const int result =
      io_uring_register_buffers(&ring_, buffers_.data(), static_cast<unsigned>(buffers_.size()));
  if (result == 0) return {};
  buffers_.clear();
  std::string why = told("io_uring_register_buffers", -result);
  rlimit limit{};
  if (result == -ENOMEM && ::getrlimit(RLIMIT_MEMLOCK, &limit) == 0 &&
      limit.rlim_cur != RLIM_INFINITY) {
    why += ", ulimit -l is " + std::to_string(limit.rlim_cur / 1024) + " KiB";
  }
  return why;
}

}  // namespace

std::unique_ptr<PieceEngine> make_uring_engine(int depth, int pretend_error, std::string& why) {
  if (pretend_error != 0) {
    why = told("io_uring_queue_init", pretend_error);
    return nullptr;
  }
  auto engine = std::make_unique<UringEngine>();
  why = engine->open(depth);
  if (!why.empty()) return nullptr;
  return engine;
}

}  // namespace tailor::detail
