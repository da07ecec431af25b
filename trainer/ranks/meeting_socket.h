#pragma once

#include <string>

#include "base/rank_env.h"

namespace tailor {

bool is_loopback(const std::string& address);
/// This machine's own address on the way to `host`: what a datagram to it would carry. Nothing is
/// sent. Empty when there is no way.
std::string own_address_toward(const std::string& host, int port);
/// Whether something takes connections there; `why` says what stood in the way.
bool answers(const std::string& host, int port, int wait_ms, std::string& why);
/// "host:port" of the meeting point.
std::string place_of(const RankEnv& env);
/// Rank 0's listening socket. Where MASTER_ADDR is this machine alone, nobody else can come in.
/// Throws Error{device}: the port is taken.
int listen_at(const RankEnv& env);

}  // namespace tailor
