// The library libtailor-nccl.so: device_collectives.h over c10d's ProcessGroupNCCL.

#include <ATen/ops/empty_like.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>

#include <atomic>
#include <chrono>
#include <optional>
#include <stdexcept>
#include <string>
#include <torch/csrc/distributed/c10d/ProcessGroupNCCL.hpp>
#include <vector>

#include "trainer/ranks/device_collectives.h"

namespace tailor {
namespace {

class NcclCollectives final : public DeviceCollectives {
 public:
  NcclCollectives(c10d::Store* store, int rank, int size, std::chrono::milliseconds timeout)
      : rank_(rank), size_(size) {
    auto options = c10d::ProcessGroupNCCL::Options::create();
    options->timeout = timeout;
    group_ = c10::make_intrusive<c10d::ProcessGroupNCCL>(
        c10::intrusive_ptr<c10d::Store>::reclaim_copy(store), rank, size, options);
    int device = 0;
    if (cudaGetDevice(&device) != cudaSuccess) throw std::runtime_error("no CUDA device");
    device_ = static_cast<c10::DeviceIndex>(device);
    stream_.emplace(c10::cuda::getStreamFromPool(false, device_));
  }
  ~NcclCollectives() override {
    if (!aborted_) group_->shutdown();
  }

  bool on_device(const void* memory) const override {
    cudaPointerAttributes found{};
    if (cudaPointerGetAttributes(&found, memory) != cudaSuccess) {
      cudaGetLastError();
      return false;
    }
    return found.type == cudaMemoryTypeDevice || found.type == cudaMemoryTypeManaged;
  }

  void all_gather(const void* mine, void* all, std::size_t part_bytes) override {
    const c10::cuda::CUDAStreamGuard guard(*stream_);
    at::Tensor in = tensor(mine, part_bytes, at::kByte);
    at::Tensor out = tensor(all, part_bytes * count(), at::kByte);
    begin(group_->_allgather_base(out, in));
  }

  void reduce_scatter(const float* all, float* mine, std::size_t part_count) override {
    const c10::cuda::CUDAStreamGuard guard(*stream_);
    at::Tensor in = tensor(all, part_count * count(), at::kFloat);
    parts_ = at::empty_like(in);
    std::vector<std::int64_t> equal;
    begin(group_->alltoall_base(parts_, in, equal, equal));
    sum_to_ = mine;
    part_count_ = part_count;
  }

  void broadcast(void* bytes, std::size_t n, int root) override {
    const c10::cuda::CUDAStreamGuard guard(*stream_);
    std::vector<at::Tensor> tensors = {tensor(bytes, n, at::kByte)};
    c10d::BroadcastOptions options;
    options.rootRank = root;
    begin(group_->broadcast(tensors, options));
  }

  bool done() override {
    if (work_) {
      if (!work_->isCompleted()) return false;
      if (const std::exception_ptr fault = work_->exception()) std::rethrow_exception(fault);
      const c10::cuda::CUDAStreamGuard guard(*stream_);
      work_->synchronize();
      work_.reset();
      if (sum_to_ != nullptr) add_parts();
    }
    return stream_->query();
  }

  void abort() noexcept override {
    aborted_ = true;
    try {
      group_->abort();
    } catch (const std::exception&) {
      // It has ended by itself.
    }
  }

 private:
  std::size_t count() const { return static_cast<std::size_t>(size_); }
  at::Tensor tensor(const void* data, std::size_t n, at::ScalarType type) const {
    return at::from_blob(const_cast<void*>(data), {static_cast<std::int64_t>(n)},
                         at::TensorOptions(type).device(at::kCUDA, device_));
  }
  void begin(c10::intrusive_ptr<c10d::Work> work) {
    work_ = std::move(work);
    sum_to_ = nullptr;
  }
  void add_parts() {
    at::Tensor sum = at::zeros({static_cast<std::int64_t>(part_count_)}, parts_.options());
    for (std::int64_t r = 0; r < size_; ++r) {
      sum.add_(parts_.narrow(0, r * sum.numel(), sum.numel()));
    }
    tensor(sum_to_, part_count_, at::kFloat).copy_(sum);
    sum_to_ = nullptr;
  }

  int rank_, size_;
  c10::DeviceIndex device_ = 0;
  c10::intrusive_ptr<c10d::ProcessGroupNCCL> group_;
  std::optional<c10::cuda::CUDAStream> stream_;
  c10::intrusive_ptr<c10d::Work> work_;
  at::Tensor parts_;
  float* sum_to_ = nullptr;
  std::size_t part_count_ = 0;
  std::atomic<bool> aborted_ = false;
};

}  // namespace
}  // namespace tailor

extern "C" __attribute__((visibility("default"))) tailor::DeviceCollectives* tailor_open_nccl(
    c10d::Store* store, int rank, int size, long timeout_ms) {
  return new tailor::NcclCollectives(store, rank, size, std::chrono::milliseconds(timeout_ms));
}
