// Training steps from a store on disk against their two limits, measured in one run: the same step
// with all weights in memory, and the same bytes read without computing.
//
//     bench_stream STORE [--tokens N] [--micro-tokens N] [--rounds N] [--expert-rank N] [--ring
//     BYTES]
//                  [--budget BYTES] [--loss-share X] [--steps N] [--streamed-only] [--against
//                  MODEL]
//                  [--kept] [--piece BYTES] [--depth N] [--control]
//
// --budget: of tiles that stay in memory, 0 without it; --ring: of the slots of experts, what
// share_budget() says without it.
// --steps: so many from disk, one after the other, against as many resident ones and as many passes
// of reading: as in a run, each step but the last reads ahead into the next.
// --piece, --depth: of the reads that the kernel is asked for.
// --control: the resident step once more while a thread reads the same files into memory of its own
// and nobody waits for it: what reading costs computing on this machine, whoever reads.
// --streamed-only leaves the resident step out, for peak memory; --against takes the resident step
// from a checkpoint instead of the store.

#include <ATen/ATen.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <string>
#include <thread>
#include <vector>

#include "base/aligned_memory.h"
#include "base/block_reader.h"
#include "base/clock.h"
#include "base/error.h"
#include "base/random.h"
#include "trainer/models/decoder.h"
#include "trainer/stream/store_weights.h"

namespace tailor {
namespace {

struct Options {
  fs::path store, against;
  std::int64_t tokens = 1024, micro_tokens = 1024, expert_rank = 1, ring = 0, budget = 0;
  int rounds = 3, steps = 1;
  double loss_share = 0.25;
  BlockReader::Options reader;
  bool streamed_only = false, kept = false, control = false;
};

Options read_options(int argc, char** argv) {
  Options out;
  for (int i = 1; i < argc; ++i) {
    const std::string name = argv[i];
    const auto value = [&]() -> std::string {
      TAILOR_CHECK(i + 1 < argc, name + " needs a value");
      return argv[++i];
    };
    if (name == "--tokens") {
      out.tokens = std::stoll(value());
    } else if (name == "--micro-tokens") {
      out.micro_tokens = std::stoll(value());
    } else if (name == "--rounds") {
      out.rounds = std::stoi(value());
    } else if (name == "--steps") {
      out.steps = std::stoi(value());
    } else if (name == "--expert-rank") {
      out.expert_rank = std::stoll(value());
    } else if (name == "--ring") {
      out.ring = std::stoll(value());
    } else if (name == "--budget") {
      out.budget = std::stoll(value());
    } else if (name == "--loss-share") {
      out.loss_share = std::stod(value());
    } else if (name == "--piece") {
      out.reader.piece_bytes = std::stoll(value());
    } else if (name == "--depth") {
      out.reader.depth = std::stoi(value());
    } else if (name == "--against") {
      out.against = value();
    } else if (name == "--streamed-only") {
      out.streamed_only = true;
    } else if (name == "--control") {
      out.control = true;
    } else if (name == "--kept") {
      out.kept = true;
    } else {
      out.store = name;
    }
  }
  return out;
}

/// A number of /proc/self/`file`: bytes read from disk, or kB of peak memory.
std::int64_t proc_number(const char* file, const std::string& key) {
  std::ifstream in(std::string("/proc/self/") + file);
  std::string word;
  while (in >> word) {
    if (word != key) continue;
    std::int64_t value = 0;
    in >> value;
    return value;
  }
  return 0;
}

struct Step {
  std::vector<std::int32_t> ids, position, target, document_start, micro_batch_start;
  TokenInput input() const {
    return {ids, position, target, document_start, micro_batch_start, {}};
  }
};

/// Documents of 128 random tokens, some of them trained.
Step make_step(const Options& options, std::int64_t vocab) {
  Step out;
  out.micro_batch_start.push_back(0);
  for (std::int64_t t = 0; t < options.tokens; ++t) {
    const auto draw = [&](std::uint64_t what) {
      return random_bits(1, RandomStream::sample, static_cast<std::uint64_t>(t), what);
    };
    if (t % 128 == 0) out.document_start.push_back(static_cast<std::int32_t>(t));
    out.ids.push_back(static_cast<std::int32_t>(draw(0) % static_cast<std::uint64_t>(vocab)));
    out.position.push_back(static_cast<std::int32_t>(t % 128));
    const bool trained = static_cast<double>(draw(1) % 1000) < 1000 * options.loss_share;
    out.target.push_back(
        trained ? static_cast<std::int32_t>(draw(2) % static_cast<std::uint64_t>(vocab)) : -1);
    if ((t + 1) % options.micro_tokens == 0 || t + 1 == options.tokens) {
      out.micro_batch_start.push_back(static_cast<std::int32_t>(t + 1));
    }
  }
  out.document_start.push_back(static_cast<std::int32_t>(options.tokens));
  return out;
}

/// Reads a store's files over and over, as fast as the disk gives them.
class OtherReader {
 public:
  explicit OtherReader(const Store& store) {
    for (const StoreLayout::File& file : store.layout().files)
      files_.push_back(store.folder() / file.name);
    thread_ = std::thread([this] { read(); });
  }
  /// Bytes read.
  std::int64_t stop() {
    stop_ = true;
    thread_.join();
    return bytes_;
  }

 private:
  void read() {
    constexpr std::int64_t kExtent = std::int64_t{16} << 20, kExtents = 4;
    const AlignedMemory memory(kExtents * kExtent, true);
    const auto reader = BlockReader::create({});
    std::vector<std::int64_t> sizes;
    for (const fs::path& file : files_) {
      reader->add_file(file);
      sizes.push_back(static_cast<std::int64_t>(fs::file_size(file)));
    }
    TAILOR_CHECK(*std::max_element(sizes.begin(), sizes.end()) >= kExtent, "a store that large");
    std::size_t file = 0;
    std::int64_t offset = 0;
    const auto submit = [&](std::uint64_t slot) {
      while (offset + kExtent > sizes[file]) {
        file = (file + 1) % sizes.size();
        offset = 0;
      }
      reader->submit({static_cast<int>(file), offset, kExtent, kExtent,
                      memory.data() + static_cast<std::int64_t>(slot) * kExtent, slot});
      offset += kExtent;
    };
    for (std::uint64_t slot = 0; slot < kExtents; ++slot) submit(slot);
    while (!stop_) {
      const BlockDone done = reader->wait();
      bytes_ += done.bytes_read;
      submit(done.tag);
    }
  }

  std::vector<fs::path> files_;
  std::atomic<bool> stop_ = false;
  std::int64_t bytes_ = 0;
  std::thread thread_;
};

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values.empty() ? 0 : values[values.size() / 2];
}

int run(const Options& options) {
  const auto store = std::make_shared<const Store>(Store::open(options.store));
  StreamOptions from_disk;
  from_disk.device_bytes = 0;
  from_disk.host_bytes = options.budget;
  from_disk.ring_bytes = options.ring;
  from_disk.reader = options.reader;
  auto streamed_weights = StoreWeights::open(store, at::kBFloat16, from_disk);
  StoreWeights& stream = *streamed_weights;
  const StreamFacts facts = stream.facts();
  const auto streamed = Decoder::create(std::move(streamed_weights), at::kBFloat16);
  std::unique_ptr<Decoder> resident;
  if (!options.against.empty()) {
    const ModelSpec spec = read_model_spec(options.against);
    resident = Decoder::create(
        resident_weights(spec,
                         load_weights(Checkpoint::open(options.against), spec, at::kBFloat16)),
        at::kBFloat16);
  } else if (!options.streamed_only) {
    resident = Decoder::create(StoreWeights::open(store, at::kBFloat16, {}), at::kBFloat16);
  }

  LoraOptions lora;
  lora.rank = 8;
  lora.alpha = 16;
  lora.expert_rank = options.expert_rank;
  lora.expert_alpha = 2 * static_cast<double>(options.expert_rank);
  lora.targets = {"attention", "dense_mlp"};
  if (store->spec().experts > 0) {
    lora.targets.push_back("shared_expert");
    lora.targets.push_back("experts");
  }
  const Adapter adapter = Adapter::create(store->spec(), lora, 1);
  const at::Tensor gradients = at::zeros({adapter.parameter_count()}, at::kFloat);
  const Step step = make_step(options, store->spec().vocab);
  streamed->set_adapter(&adapter);
  if (resident) resident->set_adapter(&adapter);
  const Activations keep = options.kept ? Activations::kept : Activations::recomputed;
  const auto pass =
      options.kept ? FrozenWeights::Pass::train_kept : FrozenWeights::Pass::train_recompute;
  double loss[2] = {0, 0};
  const auto seconds_of = [&](Decoder& decoder, double& sum) {
    const double began = seconds_now();
    for (int s = 0; s < options.steps; ++s) {
      TrainPass how;
      how.gradient_scale = 1.0 / static_cast<double>(options.tokens);
      how.keep = keep;
      how.another_follows = s + 1 < options.steps;
      sum = decoder.forward_backward(step.input(), how, gradients).loss_sum;
    }
    return (seconds_now() - began) / options.steps;
  };
  std::printf(
      "%lld tokens a step, %.2f GB read forward and %.2f GB backward, resident %.0f MB, ring %.0f "
      "MB, %lld factors, %s\n",
      static_cast<long long>(options.tokens), static_cast<double>(facts.streamed.forward) / 1e9,
      static_cast<double>(facts.streamed.forward - facts.streamed.head) / 1e9,
      static_cast<double>(facts.resident_bytes) / 1e6, static_cast<double>(facts.ring_bytes) / 1e6,
      static_cast<long long>(adapter.parameter_count()), name_of(facts.reader.engine));
  std::vector<double> computing, reading, both, ratio;
  for (int round = 0; round <= options.rounds; ++round) {  // the first one warms up
    double compute = 0;
    if (resident) compute = seconds_of(*resident, loss[0]);
    if (resident && options.control) {
      OtherReader other(*store);
      const double seconds = seconds_of(*resident, loss[0]);
      const double bytes = static_cast<double>(other.stop());
      std::printf(
          "  control: compute only beside another reader %.2f s, %.3f x alone; it read %.2f GB/s\n",
          seconds, seconds / compute, bytes / (seconds * static_cast<double>(options.steps)) / 1e9);
    }
    const std::int64_t disk_before = proc_number("io", "read_bytes:");
    const RingCounters before = stream.counters();
    const double step_seconds = seconds_of(*streamed, loss[1]);
    const RingCounters after = stream.counters();
    const std::int64_t disk = proc_number("io", "read_bytes:") - disk_before;
    const std::int64_t counted = after.streamed_bytes - before.streamed_bytes;
    const double began = seconds_now();
    for (int s = 0; s < options.steps; ++s) stream.read_through(pass);
    const double read = (seconds_now() - began) / options.steps;
    const double limit = std::max(compute, read);
    std::printf(
        "  %s compute only %.2f s, read only %.2f s (%.2f GB/s), step %.2f s: %.3f x the "
        "longer; stalled %.2f s; /proc/self/io %s (%lld of %lld bytes)\n",
        round == 0 ? "warm-up" : "round  ", compute, read,
        static_cast<double>(facts.streamed.step()) / read / 1e9, step_seconds, step_seconds / limit,
        (after.stall_seconds - before.stall_seconds) / options.steps,
        disk == counted ? "agrees" : "DISAGREES", static_cast<long long>(disk),
        static_cast<long long>(counted));
    std::fflush(stdout);
    if (round == 0) continue;
    computing.push_back(compute);
    reading.push_back(read);
    both.push_back(step_seconds);
    ratio.push_back(step_seconds / limit);
  }
  const double tokens = static_cast<double>(options.tokens);
  std::printf("medians: compute %.2f s, read %.2f s, step %.2f s (%.0f tokens/s), ratio %.3f",
              median(computing), median(reading), median(both), tokens / median(both),
              median(ratio));
  if (resident) {
    std::printf(", %.3f x resident speed; losses %s", median(computing) / median(both),
                loss[0] == loss[1] ? "equal to the bit" : "differ");
  }
  std::printf("; peak RSS %.2f GB\n",
              static_cast<double>(proc_number("status", "VmHWM:")) * 1024 / 1e9);
  return 0;
}

}  // namespace
}  // namespace tailor

int main(int argc, char** argv) {
  try {
    return tailor::run(tailor::read_options(argc, argv));
  } catch (const tailor::Error& error) {
    std::fprintf(stderr, "%s", tailor::to_text(error).c_str());
    return error.exit_code();
  }
}
