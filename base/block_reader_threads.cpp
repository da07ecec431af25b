#include <signal.h>
#include <unistd.h>

#include <cerrno>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "base/block_reader_engine.h"
#include "base/error.h"

namespace tailor::detail {
namespace {

class ThreadsEngine final : public PieceEngine {
 public:
  explicit ThreadsEngine(int depth) {
    // The program's signals are for its own threads; new ones take the mask of their maker.
    sigset_t all, before;
    ::sigfillset(&all);
    ::pthread_sigmask(SIG_SETMASK, &all, &before);
    int error_number = 0;
    try {
      for (int i = 0; i < depth; ++i) threads_.emplace_back([this] { work(); });
    } catch (const std::system_error& error) {
      error_number = error.code().value();
    }
    ::pthread_sigmask(SIG_SETMASK, &before, nullptr);
    // Fewer than `depth` read more slowly and no less rightly.
    if (threads_.empty())
      throw io_error(error_number, "cannot start a thread", "the reader of weights");
  }

  ~ThreadsEngine() override {
    {
      const std::lock_guard lock(mutex_);
      stopping_ = true;
      jobs_.clear();
    }
    job_came_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  void start(const PieceRead& read) override {
    {
      const std::lock_guard lock(mutex_);
      jobs_.push_back(read);
    }
    job_came_.notify_one();
  }

  void flush() override {}  // start() woke a thread already

  void wait(std::vector<PieceResult>& results) override {
    std::unique_lock lock(mutex_);
    result_came_.wait(lock, [this] { return !results_.empty(); });
    results.insert(results.end(), results_.begin(), results_.end());
    results_.clear();
  }

  std::string register_memory(std::span<std::byte> /*memory*/) override {
    return "pread takes no registered memory";
  }

 private:
  void work() {
    std::unique_lock lock(mutex_);
    while (true) {
      job_came_.wait(lock, [this] { return stopping_ || !jobs_.empty(); });
      if (stopping_) return;
      const PieceRead read = jobs_.front();
      jobs_.pop_front();
      lock.unlock();
      const ssize_t got =
          ::pread(read.descriptor, read.to, static_cast<std::size_t>(read.bytes), read.offset);
      const std::int64_t result = got >= 0 ? got : -errno;
      lock.lock();
      results_.push_back({read.slot, result});
      result_came_.notify_one();
    }
  }

  std::mutex mutex_;
  std::condition_variable job_came_, result_came_;
  std::deque<PieceRead> jobs_;
  std::vector<PieceResult> results_;
  bool stopping_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace

std::unique_ptr<PieceEngine> make_threads_engine(int depth) {
  return std::make_unique<ThreadsEngine>(depth);
}

}  // namespace tailor::detail
