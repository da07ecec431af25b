#pragma once

#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace tailor {

/// What one process of a run is told, in torchrun's words. Every launcher of ours writes these.
struct RankPlace {
  int rank = 0, world_size = 1;
  int local_rank = 0, local_world_size = 1;  ///< on its machine
  std::string master_addr = "127.0.0.1";     ///< where rank 0 keeps the store
  int master_port = 0;
  int threads = 0;  ///< OMP_NUM_THREADS; 0: as it is
};

/// `before` ("NAME=value" each) with RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR,
/// MASTER_PORT and OMP_NUM_THREADS of `place`. What a torchrun around us left behind
/// (TORCHELASTIC_*, PET_*, GROUP_*, ROLE_*) is taken out: its agent's store is not this run's.
/// CUDA_VISIBLE_DEVICES stays: LOCAL_RANK picks the device among those.
std::vector<std::string> rank_environment(const RankPlace& place,
                                          std::span<const std::string> before);

/// This process's environment as "NAME=value" texts.
std::vector<std::string> own_environment();

/// A free TCP port of this machine that stays ours: the socket is bound and never listens, so the
/// kernel gives the port to nobody else, while rank 0, whose socket sets SO_REUSEADDR as c10d's
/// store does, may bind it and listen.
class ReservedPort {
 public:
  /// Throws Error{io} when no port is free.
  ReservedPort();
  ReservedPort(const ReservedPort&) = delete;
  ReservedPort& operator=(const ReservedPort&) = delete;
  ~ReservedPort();
  int number() const noexcept { return number_; }

 private:
  int socket_ = -1;
  int number_ = 0;
};

}  // namespace tailor
