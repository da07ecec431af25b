#include "trainer/ranks/gloo_exchange.h"

#include <ATen/ops/from_blob.h>

#include <algorithm>
#include <cstdlib>
#include <exception>
#include <stdexcept>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>

#include "base/clock.h"
#include "base/error.h"
#include "trainer/ranks/c10d_store.h"

namespace tailor {
namespace {

using Gloo = c10d::ProcessGroupGloo;

at::Tensor bytes_tensor(const void* data, std::size_t bytes) {
  return at::from_blob(const_cast<void*>(data), {static_cast<std::int64_t>(bytes)},
                       at::TensorOptions(at::kByte));
}

c10::intrusive_ptr<Gloo> open_gloo(GlooShared& shared, const std::string& prefix,
                                   const std::vector<int>& members, int place) {
  const RankPeer& me =
      shared.peers[static_cast<std::size_t>(members[static_cast<std::size_t>(place)])];
  const auto milliseconds = std::chrono::milliseconds(
      static_cast<std::int64_t>(1000 * std::max(1.0, shared.connect_timeout_s)));
  auto options = Gloo::Options::create(milliseconds);
  // Nothing runs on c10d's own threads: sends and receives are the device thread's work.
  options->threads = 1;
  const char* const interface = std::getenv("GLOO_SOCKET_IFNAME");
  const bool named = interface != nullptr && *interface != '\0';
  try {
    // One device, that is one thread, for each communicator: they do not wait for each other.
    options->devices.push_back(named ? Gloo::createDeviceForInterface(interface)
                                     : Gloo::createDeviceForHostname(me.address));
    return c10::make_intrusive<Gloo>(
        c10::make_intrusive<c10d::PrefixStore>(prefix, c10d_store(*shared.store)), place,
        static_cast<int>(members.size()), options);
  } catch (const std::exception& fault) {
    throw Error(
        Fault::device,
        {"Gloo cannot connect the ranks: " + first_line(fault.what()),
         peer_text(me) + ", " +
             (named ? std::string("GLOO_SOCKET_IFNAME=") + interface : "address " + me.address),
         "Set GLOO_SOCKET_IFNAME to the network interface by which the hosts reach each "
         "other (`ip -br addr`), and let no firewall stand between them."});
  }
}

}  // namespace

/// What end_calls() reaches.
struct GlooExchange::InFlight {
  explicit InFlight(GlooExchange& of) : of_(of) {}
  InFlight(const InFlight&) = delete;
  InFlight& operator=(const InFlight&) = delete;
  ~InFlight() {
    const std::lock_guard lock(of_.mutex_);
    of_.works_.clear();
  }
  GlooExchange& of_;
};

GlooExchange::GlooExchange(std::shared_ptr<GlooShared> shared, const std::string& prefix,
                           std::vector<int> members, int place)
    : shared_(std::move(shared)), members_(std::move(members)) {
  if (members_.size() < 2) return;
  try {
    group_ = open_gloo(*shared_, prefix, members_, place);
  } catch (const Error& fault) {
    throw watch().explain(fault);
  }
}

template <class Body>
void GlooExchange::guarded(const std::string& doing, int peer, const Body& body) {
  std::string fault;
  const double began = seconds_now();
  try {
    {
      const std::lock_guard lock(mutex_);
      if (aborted_) throw std::runtime_error("aborted");
    }
    body();
    return;
  } catch (const std::exception& error) {
    fault = first_line(error.what());
  }
  bool aborted = false;
  {
    const std::lock_guard lock(mutex_);
    aborted = std::exchange(aborted_, true);
  }
  if (aborted) throw watch().explain(-1, fault);
  if (seconds_now() - began >= watch().call_limit_s()) {
    throw watch().too_slow(doing);
  }
  throw watch().explain(rank_of(peer), fault);
}

void GlooExchange::exchange(RankWatch::Call& call, const std::string& doing,
                            const std::vector<Piece>& sends, const std::vector<Piece>& receives,
                            const std::function<void(std::size_t)>& received) {
  const int tag = static_cast<int>(++exchanges_ & 0x3FFFFFFF);
  std::vector<WorkPointer> posted_receives(receives.size()), posted_sends(sends.size());
  const auto post = [&](const std::vector<Piece>& pieces, std::vector<WorkPointer>& posted,
                        auto&& how) {
    for (std::size_t i = 0; i < pieces.size(); ++i) {
      if (pieces[i].bytes == 0) continue;
      guarded(doing, pieces[i].peer, [&] {
        std::vector<at::Tensor> tensor = {bytes_tensor(pieces[i].data, pieces[i].bytes)};
        posted[i] = how(tensor, pieces[i].peer);
        const std::lock_guard lock(mutex_);
        works_.push_back(posted[i]);
      });
    }
  };
  const InFlight in_flight(*this);
  post(receives, posted_receives,
       [&](std::vector<at::Tensor>& tensor, int peer) { return group_->recv(tensor, peer, tag); });
  post(sends, posted_sends,
       [&](std::vector<at::Tensor>& tensor, int peer) { return group_->send(tensor, peer, tag); });
  for (std::size_t i = 0; i < receives.size(); ++i) {
    wait(call, doing, posted_receives[i], receives[i].peer);
    if (received) received(i);
  }
  for (std::size_t i = 0; i < sends.size(); ++i) wait(call, doing, posted_sends[i], sends[i].peer);
}

void GlooExchange::wait(RankWatch::Call& call, const std::string& doing, const WorkPointer& work,
                        int peer) {
  if (!work) return;
  call.wait_for(rank_of(peer));
  guarded(doing, peer, [&] {
    const double limit = watch().call_limit_s();
    if (!work->wait(std::chrono::milliseconds(static_cast<std::int64_t>(limit * 1000)))) {
      throw std::runtime_error("aborted");
    }
  });
}

void GlooExchange::end_calls() noexcept {
  const std::lock_guard lock(mutex_);
  aborted_ = true;
  for (const WorkPointer& work : works_) {
    try {
      work->abort();
    } catch (...) {
      // It has ended by itself.
    }
  }
}

}  // namespace tailor
