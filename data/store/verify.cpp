#include "data/store/verify.h"

#include <fcntl.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <exception>
#include <map>
#include <mutex>
#include <thread>

#include "base/aligned_memory.h"
#include "base/clock.h"
#include "base/error.h"
#include "base/text.h"
#include "base/units.h"
#include "data/quant/codec.h"
#include "data/store/source.h"

namespace tailor {
namespace {

/// Reads units of one store with plain reads, O_DIRECT where possible. One object a thread.
class UnitFile {
 public:
  explicit UnitFile(const Store& store) : store_(store) {}
  UnitFile(const UnitFile&) = delete;
  UnitFile& operator=(const UnitFile&) = delete;
  ~UnitFile() { close_all(); }

  const std::byte* read(const StoredUnit& unit) {
    if (memory_.size() < unit.bytes) memory_ = AlignedMemory(unit.bytes);
    for (std::int64_t done = 0; done < unit.bytes;) {
      const ssize_t n = ::pread(descriptor(unit), memory_.data() + done,
                                static_cast<std::size_t>(unit.bytes - done), unit.offset + done);
      if (n < 0 && errno == EINTR) continue;
      if (n < 0 && errno == EINVAL &&
          direct_) {  // opened so, but not read so, or not at such places
        direct_ = false;
        close_all();
        continue;
      }
      if (n < 0) throw io_error(errno, "cannot read", store_.where(unit));
      if (n == 0) {
        throw Error(Fault::bad_file, {"the file ends inside a tile", store_.where(unit),
                                      "The file was cut off: pack the model again."});
      }
      done += n;
    }
    return memory_.data();
  }

 private:
  void close_all() {
    for (const auto& [file, descriptor] : descriptors_) ::close(descriptor);
    descriptors_.clear();
  }
  int descriptor(const StoredUnit& unit) {
    const auto found = descriptors_.find(unit.file);
    if (found != descriptors_.end()) return found->second;
    const fs::path path = store_.path_of(unit);
    int descriptor = direct_ ? ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_DIRECT) : -1;
    if (descriptor < 0) descriptor = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (descriptor < 0) throw io_error(errno, "cannot open", path.string());
    return descriptors_.emplace(unit.file, descriptor).first->second;
  }

  const Store& store_;
  std::map<std::int64_t, int> descriptors_;
  AlignedMemory memory_;
  bool direct_ = true;
};

/// Compares a unit's matrices with the checkpoint's; a problem as text, or empty.
std::string compare(const Store& store, const StoredUnit& unit, const std::byte* bytes, bool fused,
                    SourceReader& reader) {
  const auto matrices = unit_matrices(store.spec(), unit.id, fused);
  const bool vocabulary = unit.id.kind == UnitKind::embedding || unit.id.kind == UnitKind::head;
  for (std::size_t i = 0; i < matrices.size(); ++i) {
    const MatrixPlace& place = unit.matrices[i];
    const std::int64_t first = vocabulary ? unit.id.index : 0;
    const EncodedMatrix encoded = place.in(bytes);
    constexpr std::int64_t kStep = 128;
    std::vector<float> wanted(static_cast<std::size_t>(kStep * place.columns)), found(wanted);
    std::vector<double> bounds(static_cast<std::size_t>(place.columns));
    for (std::int64_t r = 0; r < place.rows; r += kStep) {
      const std::int64_t end = std::min(place.rows, r + kStep);
      reader.read_rows(matrices[i], first + r, first + end, wanted.data());
      decode_rows(encoded, r, end, found.data());
      for (std::int64_t row = r; row < end; ++row) {
        const float* of_row = wanted.data() + (row - r) * place.columns;
        const float* decoded = found.data() + (row - r) * place.columns;
        error_bounds(encoded, row, of_row, bounds.data());
        for (std::int64_t c = 0; c < place.columns; ++c) {
          const double difference = std::abs(double{decoded[c]} - double{of_row[c]});
          if (difference <= bounds[static_cast<std::size_t>(c)]) continue;
          return std::string(role_name(place.role)) + " [" + std::to_string(first + row) + ", " +
                 std::to_string(c) + "] is " + number_text(double{decoded[c]}) +
                 ", the checkpoint has " + number_text(double{of_row[c]}) +
                 ": further apart than " + format_text(place.format) + " can be";
        }
      }
    }
  }
  return "";
}

}  // namespace

VerifyReport verify_store(const Store& store, const VerifyOptions& options) {
  const double began = seconds_now();
  VerifyReport report;
  const std::vector<StoredUnit>& units = store.layout().units;
  const bool fused =
      options.against != nullptr && experts_are_fused(store.spec(), [&](const std::string& name) {
        return options.against->has(name);
      });
  std::atomic<std::size_t> next{0}, running{0};
  std::atomic<std::int64_t> done_bytes{0};
  std::atomic<bool> ended{false};
  std::mutex mutex;
  std::map<std::size_t, std::string> problems;
  std::exception_ptr failure;
  const auto work = [&] {
    try {
      UnitFile file(store);
      std::unique_ptr<SourceReader> reader;
      if (options.against != nullptr) reader = std::make_unique<SourceReader>(*options.against);
      while (!ended) {
        const std::size_t i = next++;
        if (i >= units.size()) break;
        const StoredUnit& unit = units[i];
        std::string problem;
        try {
          const std::byte* bytes = file.read(unit);
          store.check_header(unit, bytes);
          store.check_hash(unit, bytes);
          if (reader) problem = compare(store, unit, bytes, fused, *reader);
        } catch (const Error& error) {
          problem = error.parts().what;
          // Of the store the place is named below; of the checkpoint it is told here.
          if (error.parts().where != store.where(unit)) problem += " (" + error.parts().where + ")";
        }
        if (!problem.empty()) {
          const std::lock_guard lock(mutex);
          problems[i] = store.where(unit) + ": " + problem;
        }
        done_bytes += unit.bytes;
      }
    } catch (...) {
      const std::lock_guard lock(mutex);
      failure = std::current_exception();
      ended = true;
    }
    --running;
  };
  std::vector<std::thread> threads;
  running = static_cast<std::size_t>(std::max(1, options.threads));
  for (std::size_t i = running; i-- > 0;) threads.emplace_back(work);
  bool stopped = false;
  while (running > 0) {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    if (options.progress) {
      options.progress(done_bytes, store.layout().bytes(), seconds_now() - began);
    }
    if (options.stop && options.stop()) stopped = ended = true;
  }
  for (std::thread& thread : threads) thread.join();
  if (failure) std::rethrow_exception(failure);
  if (stopped) {
    throw Error(Fault::stopped, {"interrupted while verifying", store.folder().string(),
                                 "Run the command again; nothing was changed."});
  }
  for (const auto& [unit, problem] : problems) report.problems.push_back(problem);
  report.units = narrow<std::int64_t>(units.size());
  report.bytes = store.layout().bytes();
  report.seconds = seconds_now() - began;
  return report;
}

}  // namespace tailor
