// What the block reader gets out of a disk beside fio, which asks for the same reads: 1 MiB each,
// 16 at once, O_DIRECT, front to back. The readers take turns within a round, so that other work on
// the machine disturbs all alike; the figures are medians over the rounds.
//
//   build/release/bin/bench_block_reader [FOLDER [GIB [ROUNDS]]]
//
// FOLDER (else the system's folder for temporary files) must be on the disk to measure and have
// room for a file of GIB GiB (2), which is removed at the end. Exits 1 if io_uring reaches less
// than 0.95 of fio, 69 where fio is missing or O_DIRECT is refused.

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "base/aligned_memory.h"
#include "base/block_reader.h"
#include "base/clock.h"
#include "base/error.h"
#include "base/json.h"
#include "base/processor_time.h"

namespace tailor {
namespace {

constexpr std::int64_t kMiB = 1 << 20;
constexpr double kNeeded = 0.95;

struct Round {
  double bytes_per_second = 0, cpu_seconds = 0;
};

/// Every block begins with its number, so that a read can be checked.
void write_file(const fs::path& path, std::int64_t bytes) {
  FileWriter file(path);
  std::vector<std::uint64_t> block(kBlockBytes / 8);
  for (std::uint64_t number = 0; number < static_cast<std::uint64_t>(bytes / kBlockBytes);
       ++number) {
    std::uint64_t state = number;
    for (std::uint64_t& word : block)
      word = state = state * 6364136223846793005U + 1442695040888963407U;
    block[0] = number;
    file.write(std::as_bytes(std::span(block)));
  }
  file.close();
}

/// A reader of ours and the ring of slots it reads through.
struct Way {
  const char* name;
  BlockReader::Engine engine;
  std::int64_t slots, extent_bytes;
  bool stream_memory;  ///< huge pages, registered where the engine can; else small ones, as fio has
};

/// The file once, in extents, one in each slot.
Round read_with(const Way& way, const fs::path& path, std::int64_t bytes, bool check) {
  const std::int64_t extent_bytes = way.extent_bytes;
  // New at each run, as fio's is: how the system's free pages lie decides how many make one
  // request.
  const AlignedMemory memory(way.slots * extent_bytes, way.stream_memory);
  if (!way.stream_memory) {
    ::madvise(memory.data(), static_cast<std::size_t>(memory.size()), MADV_NOHUGEPAGE);
  }
  memory.poison();  // touched once, as a stream's slots are
  const bool registered = way.stream_memory && way.engine == BlockReader::Engine::io_uring;
  BlockReader::Options options;
  options.engine = way.engine;
  const auto reader = BlockReader::create(options);
  const int file = reader->add_file(path);
  if (registered) reader->register_memory(memory.bytes());
  const BlockReader::Facts facts = reader->facts();
  if (!facts.direct || facts.registered != registered) {
    throw Error(Fault::device, {"this is not the reader to measure: " + facts.why, path.string(),
                                "Name a folder on a disk; raise ulimit -l."});
  }
  const double start = seconds_now(), cpu_start = processor_seconds();
  std::int64_t next = 0;
  const auto submit = [&](std::int64_t slot) {
    reader->submit({file, next, extent_bytes, extent_bytes, memory.data() + slot * extent_bytes,
                    static_cast<std::uint64_t>(next) << 8U | static_cast<std::uint64_t>(slot)});
    next += extent_bytes;
  };
  for (std::int64_t slot = 0; slot < way.slots && next < bytes; ++slot) submit(slot);
  while (reader->in_flight() > 0) {
    const BlockDone done = reader->wait();
    const auto slot = static_cast<std::int64_t>(done.tag & 255U);
    const auto offset = static_cast<std::int64_t>(done.tag >> 8U);
    if (!done.good()) throw io_error(done.error_number, "cannot read", path.string());
    for (std::int64_t at = 0; check && at < extent_bytes; at += kBlockBytes) {
      std::int64_t number = 0;
      std::memcpy(&number, memory.data() + slot * extent_bytes + at, sizeof number);
      TAILOR_CHECK(number == (offset + at) / kBlockBytes);
    }
    if (next < bytes) submit(slot);
  }
  TAILOR_CHECK(reader->bytes_read() == bytes);
  return {static_cast<double>(bytes) / (seconds_now() - start), processor_seconds() - cpu_start};
}

Round read_with_fio(const fs::path& path) {
  const std::string command =
      "fio --name=read --filename='" + path.string() +
      "' --direct=1 --ioengine=io_uring --bs=1M --iodepth=16 --rw=read --output-format=json";
  std::FILE* pipe = ::popen(command.c_str(), "r");
  TAILOR_CHECK(pipe != nullptr);
  std::string text;
  char piece[4096];
  for (std::size_t n = 0; (n = std::fread(piece, 1, sizeof piece, pipe)) > 0;)
    text.append(piece, n);
  const int status = ::pclose(pipe);
  const std::size_t begin = text.find('{');  // warnings come before
  if (status != 0 || begin == std::string::npos) {
    throw Error(Fault::device, {"fio failed", command, "Run the command by hand to see why."});
  }
  const Json document = parse_json(std::string_view(text).substr(begin), command);
  const Json& job = document.at("jobs").at(0);
  const double seconds = 1e-3 * job.at("job_runtime").get<double>();
  const double cpu_percent = job.at("usr_cpu").get<double>() + job.at("sys_cpu").get<double>();
  return {job.at("read").at("bw_bytes").get<double>(), 1e-2 * cpu_percent * seconds};
}

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const std::size_t half = values.size() / 2;
  return values.size() % 2 == 1 ? values[half] : (values[half - 1] + values[half]) / 2;
}

int run(const fs::path& folder, std::int64_t bytes, int rounds) {
  // The first way is the stream's; the second does what fio does, request by request.
  using Engine = BlockReader::Engine;
  const std::vector<Way> ways = {{"io_uring", Engine::io_uring, 4, 16 * kMiB, true},
                                 {"io_uring as fio", Engine::io_uring, 16, kMiB, false},
                                 {"threads", Engine::threads, 4, 16 * kMiB, true},
                                 {"threads as fio", Engine::threads, 16, kMiB, false}};
  struct Row {
    std::string name;
    std::function<Round(bool check)> read;
    std::vector<double> bytes_per_second = {}, cpu_seconds = {}, of_fio = {};
  };
  if (std::system("fio --version >/dev/null 2>&1") != 0) {
    throw Error(Fault::device, {"fio is not installed; there is nothing to compare with", "",
                                "apt-get install fio"});
  }
  const fs::path path = folder / ("tailor_bench_" + std::to_string(::getpid()) + ".bin");
  struct Remove {
    fs::path path;
    ~Remove() { ::unlink(path.c_str()); }
  } const remove{path};
  write_file(path, bytes);
  std::vector<Row> rows = {{"fio io_uring", [&](bool) { return read_with_fio(path); }}};
  for (const Way& way : ways) {
    rows.push_back({way.name, [&](bool check) { return read_with(way, path, bytes, check); }});
  }
  for (const Row& row : rows) row.read(true);  // not counted
  for (int round = 0; round < rounds; ++round) {
    for (std::size_t i = 0; i < rows.size(); ++i) {
      Row& row = rows[(i + static_cast<std::size_t>(round)) % rows.size()];
      const Round got = row.read(false);
      row.bytes_per_second.push_back(got.bytes_per_second);
      row.cpu_seconds.push_back(got.cpu_seconds);
    }
    for (Row& row : rows) {
      row.of_fio.push_back(row.bytes_per_second.back() / rows[0].bytes_per_second.back());
    }
  }
  std::printf("%-24s %8s %10s %12s %8s   rounds, GB/s\n", "reader", "GB/s", "CPU s", "CPU s / GB",
              "of fio");
  for (const Row& row : rows) {
    const double cpu = median(row.cpu_seconds);
    std::printf("%-24s %8.3f %10.3f %12.4f %8.3f  ", row.name.c_str(),
                1e-9 * median(row.bytes_per_second), cpu, cpu / (1e-9 * static_cast<double>(bytes)),
                median(row.of_fio));
    for (const double value : row.bytes_per_second) std::printf(" %.3f", 1e-9 * value);
    std::printf("\n");
  }
  const double ratio = median(rows[1].bytes_per_second) / median(rows[0].bytes_per_second);
  std::printf("io_uring / fio, of the medians: %.3f (needed: %.2f)\n", ratio, kNeeded);
  return ratio >= kNeeded ? 0 : 1;
}

}  // namespace
}  // namespace tailor

int main(int count, char** arguments) {
  try {
    const tailor::fs::path folder =
        count > 1 ? tailor::fs::path(arguments[1]) : tailor::fs::temp_directory_path();
    const double gib = count > 2 ? std::atof(arguments[2]) : 2.0;
    const int rounds = count > 3 ? std::atoi(arguments[3]) : 5;
    const auto extents = static_cast<std::int64_t>(gib * 64);
    if (extents < 1 || rounds < 1 || count > 4) {
      std::fprintf(stderr, "usage: bench_block_reader [FOLDER [GIB [ROUNDS]]]\n");
      return 2;
    }
    return tailor::run(folder, extents * 16 * tailor::kMiB, rounds);
  } catch (const tailor::Error& error) {
    std::fprintf(stderr, "%s", tailor::to_text(error).c_str());
    return error.exit_code();
  }
}
