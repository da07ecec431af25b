#include "trainer/ranks/device_ranks.h"

#include <dlfcn.h>

#include <atomic>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <thread>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>

#include "base/clock.h"
#include "trainer/ranks/c10d_store.h"
#include "trainer/ranks/device_collectives.h"

namespace tailor {
namespace {

/// The library stays loaded to the end of the process: LibTorch's does not unload either.
OpenDeviceCollectives nccl_library() {
  std::error_code fault;
  const auto beside = std::filesystem::read_symlink("/proc/self/exe", fault).parent_path();
  const std::string path = (beside / "libtailor-nccl.so").string();
  void* const library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  void* const open = library == nullptr ? nullptr : dlsym(library, "tailor_open_nccl");
  if (open == nullptr) {
    const char* const why = dlerror();
    throw Error(
        Fault::usage,
        {std::string("backend nccl cannot be loaded: ") + (why == nullptr ? "" : why), path,
         "Build Tailor where a CUDA toolkit is found (`tailor doctor` says whether it was), "
         "or use backend: gloo with device: cpu."});
  }
  OpenDeviceCollectives out = nullptr;
  std::memcpy(&out, &open, sizeof out);
  return out;
}

class DeviceRanks final : public WatchedRanks {
 public:
  /// `owner`: the first communicator of the process, with which the run ends.
  DeviceRanks(std::unique_ptr<WatchedRanks> host, RankStore& store, const std::string& prefix,
              bool owner)
      : host_(std::move(host)), store_(store), prefix_(prefix), owner_(owner) {
    const auto limit = static_cast<long>(1000 * watch()->call_limit_s());
    const auto own = c10::make_intrusive<c10d::PrefixStore>(prefix + "/nccl", c10d_store(store));
    try {
      device_.reset(nccl_library()(own.get(), host_->rank(), host_->size(), limit));
    } catch (const Error&) {
      throw;
    } catch (const std::exception& fault) {
      throw failed(fault.what());
    }
    on_death_ = watch()->on_death([this] { end_calls(); });
  }
  ~DeviceRanks() override {
    if (owner_) watch()->close();  // all are done with each other before communicators end
    watch()->forget(on_death_);
  }

  RankWatch* watch() const override { return host_->watch(); }
  int rank() const override { return host_->rank(); }
  int size() const override { return host_->size(); }

  void all_gather(std::span<const std::byte> mine, std::span<std::byte> all) override {
    if (!on_device(all.data())) return host_->all_gather(mine, all);
    TAILOR_CHECK(all.size() == mine.size() * count());
    talk(Collective::all_gather, parts_sent(mine.size()),
         [&] { device_->all_gather(mine.data(), all.data(), mine.size()); });
  }
  void reduce_scatter(std::span<float> all, std::span<float> mine) override {
    if (!on_device(all.data())) return host_->reduce_scatter(all, mine);
    TAILOR_CHECK(all.size() == mine.size() * count());
    talk(Collective::reduce_scatter, parts_sent(mine.size_bytes()),
         [&] { device_->reduce_scatter(all.data(), mine.data(), mine.size()); });
  }
  void broadcast(std::span<std::byte> bytes, int root) override {
    if (!on_device(bytes.data())) return host_->broadcast(bytes, root);
    talk(Collective::broadcast, rank() == root ? parts_sent(bytes.size()) : 0,
         [&] { device_->broadcast(bytes.data(), bytes.size(), root); });
  }
  // Numbers and words: host memory.
  void all_reduce(std::span<double> values, Reduce how) override { host_->all_reduce(values, how); }
  void gather(std::span<const std::byte> mine, std::span<std::byte> all, int root) override {
    TAILOR_CHECK(!on_device(mine.data()), "gather() is for host memory");
    host_->gather(mine, all, root);
  }
  void barrier() override { host_->barrier(); }

  std::unique_ptr<Ranks> channel(const std::string& name) override {
    return part(host_->channel(name), std::to_string(++parts_) + " " + name);
  }
  std::unique_ptr<Ranks> node_channel(const std::string& name) override {
    std::unique_ptr<Ranks> node = host_->node_channel(name);
    // Nodes have one name, and stores of their own: by their first rank.
    int first = rank();
    node->broadcast(std::as_writable_bytes(std::span(&first, 1)), 0);
    return part(std::move(node),
                std::to_string(++parts_) + " " + name + " from " + std::to_string(first));
  }
  void abort() noexcept override {
    host_->abort();
    end_calls();
  }

  RankTraffic traffic() const override {
    RankTraffic out = host_->traffic();
    for (std::size_t i = 0; i < out.lines.size(); ++i) {
      out.lines[i].calls += traffic_.lines[i].calls;
      out.lines[i].payload_bytes += traffic_.lines[i].payload_bytes;
      out.lines[i].seconds += traffic_.lines[i].seconds;
    }
    return out;
  }

 private:
  std::size_t count() const { return static_cast<std::size_t>(size()); }
  bool on_device(const void* memory) const {
    return memory != nullptr && device_->on_device(memory);
  }
  std::int64_t parts_sent(std::size_t part_bytes) const {
    return static_cast<std::int64_t>(part_bytes * (count() - 1));
  }

  std::unique_ptr<Ranks> part(std::unique_ptr<Ranks> host, const std::string& name) {
    auto* const watched = dynamic_cast<WatchedRanks*>(host.release());
    TAILOR_CHECK(watched != nullptr);
    return std::make_unique<DeviceRanks>(std::unique_ptr<WatchedRanks>(watched), store_,
                                         prefix_ + "/" + name, false);
  }

  void end_calls() noexcept {
    aborted_ = true;
    if (device_) device_->abort();
  }

  Error failed(const std::string& fault) const {
    return {Fault::device,
            {"NCCL: " + first_line(fault), "rank " + std::to_string(rank()),
             "Run with NCCL_DEBUG=WARN to see more; then start again with --resume."}};
  }

  template <class Start>
  void talk(Collective what, std::int64_t payload_bytes, const Start& start) {
    const double began = seconds_now();
    const std::string doing =
        std::string(collective_name(what)) + " " + std::to_string(++calls_) + " on the device";
    const RankWatch::Call call(*watch(), doing);
    try {
      start();
      while (!aborted_ && !device_->done()) {
        const double waited = seconds_now() - began;
        if (waited > watch()->call_limit_s()) throw watch()->too_slow(doing);
        // Short calls are polled closely; long ones need not burn a core.
        if (waited > 1e-3) std::this_thread::sleep_for(std::chrono::microseconds(100));
      }
    } catch (const Error&) {
      throw;
    } catch (const std::exception& fault) {
      if (!aborted_) throw watch()->explain(failed(fault.what()));
    }
    if (aborted_) throw watch()->explain(-1, "aborted");
    RankTraffic::Line& line = traffic_.of(what);
    ++line.calls;
    line.payload_bytes += payload_bytes;
    line.seconds += seconds_now() - began;
  }

  std::unique_ptr<WatchedRanks> host_;
  RankStore& store_;
  std::string prefix_;
  bool owner_;
  std::unique_ptr<DeviceCollectives> device_;
  std::atomic<bool> aborted_ = false;
  int on_death_ = 0, parts_ = 0;
  std::int64_t calls_ = 0;
  RankTraffic traffic_;
};

}  // namespace

std::unique_ptr<Ranks> device_ranks(std::unique_ptr<WatchedRanks> host, RankStore& store,
                                    const std::string& prefix) {
  return std::make_unique<DeviceRanks>(std::move(host), store, prefix, true);
}

}  // namespace tailor
