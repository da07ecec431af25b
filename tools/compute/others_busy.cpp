#include "tools/compute/others_busy.h"

#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <string>

#include "base/processor_time.h"

namespace tailor {

OthersBusy::Times OthersBusy::now() {
  std::ifstream stat("/proc/stat");
  std::string label;
  double user = 0, nice = 0, system = 0, idle = 0, io = 0;
  stat >> label >> user >> nice >> system >> idle >> io;
  const auto ticks = static_cast<double>(std::max(1L, ::sysconf(_SC_CLK_TCK)));
  const double busy = (user + nice + system) / ticks;
  return {busy, busy + (idle + io) / ticks, processor_seconds()};
}

OthersBusy::OthersBusy() : began_(now()) {}

double OthersBusy::share() const {
  const Times at = now();
  const double all = at.all - began_.all;
  if (all <= 0) return 0;
  return std::clamp((at.busy - began_.busy - (at.own - began_.own)) / all, 0.0, 1.0);
}

}  // namespace tailor
