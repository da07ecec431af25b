#include "tools/compute/others_busy.h"

#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <string>

namespace tailor {

OthersBusy::Times OthersBusy::now() {
  std::ifstream stat("/proc/stat");
  std::string label;
  double user = 0, nice = 0, system = 0, idle = 0, io = 0;
  stat >> label >> user >> nice >> system >> idle >> io;
  const auto ticks = static_cast<double>(std::max(1L, ::sysconf(_SC_CLK_TCK)));
  const double busy = (user + nice + system) / ticks;
  rusage used{};
  ::getrusage(RUSAGE_SELF, &used);
  const auto seconds = [](const timeval& time) {
    return static_cast<double>(time.tv_sec) + static_cast<double>(time.tv_usec) * 1e-6;
  };
  return {busy, busy + (idle + io) / ticks, seconds(used.ru_utime) + seconds(used.ru_stime)};
}

OthersBusy::OthersBusy() : began_(now()) {}

double OthersBusy::share() const {
  const Times at = now();
  const double all = at.all - began_.all;
  if (all <= 0) return 0;
  return std::clamp((at.busy - began_.busy - (at.own - began_.own)) / all, 0.0, 1.0);
}

}  // namespace tailor
