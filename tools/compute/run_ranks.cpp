#include "tools/compute/run_ranks.h"

#include <sched.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "base/log.h"

namespace tailor {

ConnectOptions rank_options(const EnvLookup& lookup) {
  const Environment env(lookup);
  ConnectOptions out;
  out.backend = rank_backend(env.text_or("TAILOR_RANK_BACKEND", "auto"));
  const std::string mend = "Give seconds, or unset it.";
  WatchOptions& watch = out.watch;
  watch.timeout_s = env.positive("TAILOR_RANK_TIMEOUT", mend).value_or(watch.timeout_s);
  watch.collective_timeout_s =
      env.positive("TAILOR_COLLECTIVE_TIMEOUT", mend).value_or(watch.collective_timeout_s);
  return out;
}

RunRanks::RunRanks() {
  const std::optional<RankEnv> env = read_rank_env();
  const ConnectOptions options = rank_options(process_env());
  require_backend(options);
  ranks_ = env && env->world_size > 1 ? connect_ranks(*env, options) : single_rank();
  if (ranks_->alone()) return;
  if (!first()) start_log(LogLevel::warning);
  node_ = ranks_->node_channel("node");
  place_on_node_ = node_->rank();
  on_this_node_ = node_->size();
  // Ranks bound to cores of their own, as srun and taskset do it, share them with nobody.
  cpu_set_t cores;
  std::string mask;
  if (::sched_getaffinity(0, sizeof cores, &cores) == 0) {
    for (std::size_t c = 0; c < CPU_SETSIZE; ++c) mask += CPU_ISSET(c, &cores) ? '1' : '0';
  }
  const std::vector<std::string> masks = all_texts(*node_, mask);
  sharing_cores_ = static_cast<int>(std::count(masks.begin(), masks.end(), mask));
  nodes_ = static_cast<int>(sum_over_ranks(*ranks_, place_on_node_ == 0 ? 1 : 0));
  nodes_alike_ = !any_rank(*ranks_, on_this_node_ * nodes_ != ranks_->size());
}

Ranks* RunRanks::sharing_weights() {
  return nodes_ > 1 && nodes_alike_ && on_this_node_ > 1 ? node_.get() : others();
}

std::string RunRanks::name() const { return "rank " + std::to_string(ranks_->rank()); }

void RunRanks::doing(const std::string& what) {
  if (RankWatch* watch = watch_of(*ranks_)) watch->set_phase(what);
}

void RunRanks::in_turns(const std::string& what, const std::function<void()>& make) {
  const int turn = first() ? 0 : place_on_node_ == 0 ? 1 : 2;
  // Who waits for a model to be packed waits for hours.
  const RankWatch::Patience patience(watch_of(*ranks_));
  for (int t = 0; t < 3; ++t) {
    together(*ranks_, what, [&] {
      if (t == turn) make();
    });
  }
}

int RunRanks::run(const std::function<int()>& body) {
  int code = 0;
  with_watch(watch_of(*ranks_), [&] { code = body(); });
  return code;
}

}  // namespace tailor
