#pragma once

// For the .cpp files that see c10d only.

#include <memory>
#include <string>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>

#include "trainer/ranks/rank_store.h"

namespace tailor {

/// A store of ours over a connection to c10d's; `prefix` stands before every key, `place` is where
/// it is, for messages.
std::unique_ptr<RankStore> rank_store(c10::intrusive_ptr<c10d::TCPStore> connection,
                                      std::string prefix, std::string place);

/// The c10d store below it, its keys under the run's prefix.
c10::intrusive_ptr<c10d::Store> c10d_store(RankStore& store);

/// Of what c10d throws: a stack trace follows.
inline std::string first_line(const std::string& text) { return text.substr(0, text.find('\n')); }

}  // namespace tailor
