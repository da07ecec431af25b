#pragma once

#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "trainer/ranks/ranks.h"

namespace tailor {

/// Runs `body` on every rank of a group, each a thread of its own, and rethrows what the first rank
/// that failed threw; a rank that fails ends the conversation, so that no other waits for it.
inline void on_ranks(int count, const std::function<void(Ranks&)>& body, int per_node = 0) {
  auto ranks = thread_ranks(count, per_node);
  std::exception_ptr first;
  std::mutex mutex;
  std::vector<std::thread> threads;
  for (auto& rank : ranks) {
    threads.emplace_back([&] {
      try {
        body(*rank);
      } catch (...) {
        const std::lock_guard lock(mutex);
        if (!first) first = std::current_exception();
        rank->abort();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  if (first) std::rethrow_exception(first);
}

}  // namespace tailor
