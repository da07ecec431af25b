#include "tools/launch/job.h"

#include <algorithm>
#include <charconv>

#include "base/error.h"
#include "base/text.h"

namespace tailor {
namespace {

constexpr std::size_t kNameMax = 50;  // a pod's name adds an index and five letters to it, of 63

bool plain(char letter) {
  return (letter >= 'a' && letter <= 'z') || (letter >= 'A' && letter <= 'Z') ||
         (letter >= '0' && letter <= '9') ||
         std::string_view("_./-+:@%,").find(letter) != std::string_view::npos;
}

}  // namespace

std::vector<std::string> LaunchJob::train_command() const {
  std::vector<std::string> out = {program, "train", recipe};
  out.insert(out.end(), overrides.begin(), overrides.end());
  out.emplace_back("--resume");
  return out;
}

void check_places(const LaunchJob& job) {
  const auto refuse = [](const std::string& what, const std::string& mend) {
    throw Error(Fault::usage, {what, "machine.ranks, --nodes and --gpus-per-node", mend});
  };
  const std::string ranks = std::to_string(job.ranks);
  if (job.nodes < 1 || job.ranks % job.nodes != 0) {
    refuse(ranks + " ranks do not spread evenly over " + std::to_string(job.nodes) + " nodes",
           "Give --nodes a number that divides machine.ranks.");
  }
  if (job.gpus_per_node > 0 && job.gpus_per_node < job.ranks_per_node()) {
    refuse(std::to_string(job.ranks_per_node()) +
               " ranks a node need as many GPUs, given: " + std::to_string(job.gpus_per_node),
           "Raise --gpus-per-node or --nodes, or lower machine.ranks.");
  }
}

std::string job_name(const std::string& name) {
  std::string out;
  for (const char letter : lower(name)) {
    const bool fits = (letter >= 'a' && letter <= 'z') || (letter >= '0' && letter <= '9');
    if (fits) {
      out += letter;
    } else if (!out.empty() && out.back() != '-') {
      out += '-';
    }
    if (out.size() == kNameMax) break;
  }
  while (!out.empty() && out.back() == '-') out.pop_back();
  // A service's name begins with a letter.
  if (out.empty()) return "tailor";
  return out.front() >= 'a' ? out : "t-" + out;
}

std::string shell_word(const std::string& word) {
  if (word.find('\0') != std::string::npos) {
    throw Error(Fault::usage, {"a NUL character in '" + std::string(word.c_str()) + "'",
                               "the command line", "Leave it out."});
  }
  if (!word.empty() && std::all_of(word.begin(), word.end(), plain)) return word;
  std::string out = "'";
  for (const char letter : word) {
    if (letter == '\'') {
      out += "'\\''";
    } else {
      out += letter;
    }
  }
  return out + "'";
}

std::string shell_words(const std::vector<std::string>& words) {
  std::vector<std::string> quoted;
  for (const std::string& word : words) quoted.push_back(shell_word(word));
  return join(quoted, " ");
}

std::int64_t time_limit_seconds(const std::string& text) {
  const auto refuse = [&]() -> std::int64_t {
    throw Error(Fault::usage, {"'" + text + "' is no time limit", "--time",
                               "Write minutes (90), hours:minutes:seconds (1:30:00) or "
                               "days-hours (2-12)."});
  };
  const auto number = [&](const std::string& digits) -> std::int64_t {
    std::int64_t out = 0;
    const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), out);
    if (error != std::errc() || end != digits.data() + digits.size() || digits.empty() ||
        digits.front() == '-' || out > 1'000'000) {
      refuse();
    }
    return out;
  };
  const std::size_t dash = text.find('-');
  std::vector<std::int64_t> parts;
  const std::string clock = dash == std::string::npos ? text : text.substr(dash + 1);
  for (const std::string& part : split(clock, ':')) parts.push_back(number(part));
  std::int64_t seconds = 0;
  if (dash != std::string::npos) {
    constexpr std::int64_t kUnits[] = {3600, 60, 1};
    if (parts.size() > 3) return refuse();
    seconds = number(text.substr(0, dash)) * 86'400;
    for (std::size_t i = 0; i < parts.size(); ++i) seconds += parts[i] * kUnits[i];
  } else if (parts.size() == 1) {
    seconds = parts[0] * 60;
  } else if (parts.size() == 2) {
    seconds = parts[0] * 60 + parts[1];
  } else if (parts.size() == 3) {
    seconds = parts[0] * 3600 + parts[1] * 60 + parts[2];
  } else {
    return refuse();
  }
  return seconds > 0 ? seconds : refuse();
}

}  // namespace tailor
