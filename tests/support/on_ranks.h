#pragma once

#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "base/error.h"
#include "trainer/ranks/ranks.h"

namespace tailor {

/// Runs `body` on every rank of a group, each a thread of its own, and rethrows what the first rank
/// that failed threw, not what others threw because that one was gone; a rank that fails ends the
/// conversation, so that no other waits for it.
inline void on_ranks(int count, const std::function<void(Ranks&)>& body, int per_node = 0) {
  auto ranks = thread_ranks(count, per_node);
  std::exception_ptr first;
  bool second_hand = false;
  std::mutex mutex;
  std::vector<std::thread> threads;
  for (auto& rank : ranks) {
    threads.emplace_back([&] {
      try {
        body(*rank);
      } catch (const Error& error) {
        const std::lock_guard lock(mutex);
        if (!first || (second_hand && error.fault() != Fault::device)) {
          first = std::current_exception();
          second_hand = error.fault() == Fault::device;
        }
        rank->abort();
      } catch (...) {
        const std::lock_guard lock(mutex);
        if (!first || second_hand) first = std::current_exception();
        second_hand = false;
        rank->abort();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  if (first) std::rethrow_exception(first);
}

}  // namespace tailor
