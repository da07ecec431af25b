#include "tools/live_block.h"

#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstdlib>
#include <string_view>

#include "base/log.h"
#include "base/text.h"
#include "tools/terminal.h"

namespace tailor {
namespace {

std::string usd_words(double usd) {
  return usd_text(static_cast<std::int64_t>(std::llround(usd * 1e6)));
}

std::string fixed_percent(double share) {
  return number_text(100 * std::floor(1000 * share) / 1000, 3) + " %";  // not 100 before the end
}

std::string percent(double share) { return number_text(100 * share, share < 0.1 ? 2 : 3) + " %"; }

/// What is left of a budget, or by how much it will not do.
std::string budget_words(double spent, double at_end, double budget, bool usd,
                         const std::string& unit, const std::string& whose) {
  const auto words = [&](double value) {
    return usd ? usd_words(value) : number_text(value, 3) + " " + unit;
  };
  if (at_end > budget)
    return "budget " + words(budget) + whose + " will not do, short " + words(at_end - budget);
  return words(std::max(0.0, budget - spent)) + " of " + words(budget) + whose + " left";
}

struct Item {
  std::string text;
  const char* colour = "";  ///< SGR parameters
};

/// One thing after another, as many to a line as fit; what is wider than a line is cut.
void pack(const std::vector<Item>& items, const LiveStyle& style, std::vector<std::string>& lines) {
  constexpr std::string_view kGap = "   ";
  const std::size_t room = static_cast<std::size_t>(std::max(2, style.columns)) - 1;
  std::string line;
  std::size_t used = 0;
  for (const Item& item : items) {
    std::string text = item.text;
    while (shown_width(text) > room) {
      do {
        text.pop_back();
      } while (!text.empty() && !is_utf8(text));
    }
    const std::size_t width = shown_width(text);
    if (used > 0 && used + kGap.size() + width > room) {
      lines.push_back(line);
      line.clear();
      used = 0;
    }
    if (used > 0) {
      line += kGap;
      used += kGap.size();
    }
    const bool coloured = style.colour && *item.colour != '\0';
    line += coloured ? "\033[" + std::string(item.colour) + "m" + text + "\033[0m" : text;
    used += width;
  }
  if (used > 0) lines.push_back(line);
}

std::string bar(double share, std::size_t width, bool utf8) {
  const auto done = static_cast<std::size_t>(
      std::lround(std::clamp(share, 0.0, 1.0) * static_cast<double>(width)));
  std::string out;
  for (std::size_t i = 0; i < width; ++i) {
    out += utf8 ? (i < done ? "\u2501" : "\u2500") : (i < done ? "#" : "-");
  }
  return out;
}

std::vector<Item> money_items(const LiveFigures& figures) {
  std::vector<Item> out;
  if (figures.usd) {
    out.push_back({usd_words(*figures.usd) + " so far", "1"});
  } else {
    out.push_back({number_text(figures.gpu_hours, 3) + " " + figures.hours_word + " so far", "1"});
  }
  const std::optional<double> usd_at_end = figures.usd_at_end();
  if (usd_at_end) out.push_back({usd_words(*usd_at_end) + " at the end"});
  if (!figures.usd && figures.seconds_left) {
    out.push_back({number_text(figures.gpu_hours_at_end(), 3) + " at the end"});
  }
  const auto budgets = [&](const std::optional<double>& usd_limit, double others_usd,
                           const std::optional<double>& hours_limit, double others_hours,
                           const std::string& whose) {
    const auto add = [&](double spent, double at_end, double limit, bool usd) {
      out.push_back({budget_words(spent, at_end, limit, usd, figures.hours_word, whose),
                     at_end > limit ? "31" : ""});
    };
    if (usd_limit && figures.usd) {
      add(*figures.usd + others_usd, usd_at_end.value_or(*figures.usd) + others_usd, *usd_limit,
          true);
    }
    if (hours_limit) {
      add(figures.gpu_hours + others_hours, figures.gpu_hours_at_end() + others_hours, *hours_limit,
          false);
    }
  };
  budgets(figures.usd_budget, 0, figures.gpu_hours_budget, 0, "");
  const LiveMoney::Shared& shared = figures.shared;
  budgets(shared.usd_budget, shared.others_usd, shared.gpu_hours_budget, shared.others_gpu_hours,
          " of project " + shared.project);
  return out;
}

std::vector<Item> training_items(const LiveFigures& figures) {
  std::vector<Item> out = {{"loss " + number_text(figures.loss), "1"}};
  if (figures.held_out_loss) {
    out.push_back({"held-out " + number_text(*figures.held_out_loss) + " at step " +
                   count_text(figures.held_out_step)});
  }
  out.push_back({number_text(figures.tokens_per_second, 3) + " tokens/s"});
  out.push_back({"stall " + percent(figures.stall_share), figures.stall_share > 0.1 ? "33" : ""});
  if (!figures.exchange.empty()) out.push_back({"exchange " + figures.exchange});
  return out;
}

bool utf8_locale() {
  for (const char* name : {"LC_ALL", "LC_CTYPE", "LANG"}) {
    const char* value = std::getenv(name);
    if (value == nullptr || *value == '\0') continue;
    const std::string text = lower(value);
    return text.find("utf-8") != std::string::npos || text.find("utf8") != std::string::npos;
  }
  return false;
}

}  // namespace

std::optional<double> LiveFigures::usd_at_end() const {
  if (!usd || !usd_per_second || !seconds_left) return std::nullopt;
  return *usd + *usd_per_second * *seconds_left;
}

double LiveFigures::gpu_hours_at_end() const {
  return gpu_hours + devices * seconds_left.value_or(0) / 3600;
}

std::vector<std::string> live_lines(const LiveFigures& figures, const LiveStyle& style) {
  const double share = figures.steps_total > 0 ? static_cast<double>(figures.step) /
                                                     static_cast<double>(figures.steps_total)
                                               : 0;
  std::vector<Item> head = {
      {"step " + count_text(figures.step) + "/" + count_text(figures.steps_total), "1"},
      {fixed_percent(share)}};
  std::string right = figures.doing;
  if (right.empty() && figures.step == figures.steps_total) {
    right = "done";
  } else if (figures.seconds_left) {
    right += (right.empty() ? "ETA " : ", ETA ") + seconds_text(*figures.seconds_left);
  }
  // The bar takes what the others leave of the first line.
  std::size_t used = 1;
  for (const Item& item : head) used += shown_width(item.text) + 3;
  used += shown_width(right);
  const std::size_t room = static_cast<std::size_t>(std::max(2, style.columns));
  if (used + 8 <= room)
    head.push_back({bar(share, std::min<std::size_t>(40, room - used), style.utf8), "36"});
  if (!right.empty()) head.push_back({right});

  std::vector<std::string> lines;
  pack(head, style, lines);
  pack(training_items(figures), style, lines);
  pack(money_items(figures), style, lines);
  return lines;
}

std::string live_line(const LiveFigures& figures) {
  std::string out =
      "step " + std::to_string(figures.step) + "/" + std::to_string(figures.steps_total);
  for (const Item& item : training_items(figures)) out += "  " + item.text;
  if (figures.seconds_left) out += "  ETA " + seconds_text(*figures.seconds_left);
  for (const Item& item : money_items(figures)) out += "  " + item.text;
  return out;
}

std::size_t shown_width(const std::string& text) {
  std::size_t width = 0;
  for (std::size_t i = 0; i < text.size(); ++i) {
    if (text[i] == '\033') {
      while (i < text.size() && text[i] != 'm') ++i;
    } else if ((static_cast<unsigned char>(text[i]) & 0xC0U) != 0x80U) {
      ++width;
    }
  }
  return width;
}

LiveBlock::LiveBlock(int descriptor)
    : descriptor_(descriptor), possible_(moves_cursor(descriptor)) {
  if (possible_) before_log([this] { clear(); });
}

LiveBlock::~LiveBlock() {
  if (!possible_) return;
  before_log(nullptr);
  if (!shown_.empty()) send("\n");
}

LiveStyle LiveBlock::style() const {
  LiveStyle out;
  winsize size{};
  if (::ioctl(descriptor_, TIOCGWINSZ, &size) == 0 && size.ws_col > 0) out.columns = size.ws_col;
  out.colour = takes_colour(descriptor_);
  out.utf8 = utf8_locale();
  return out;
}

/// From the end of the block to its beginning. A terminal that became narrower has broken the lines
/// anew, so they are counted by its present width.
std::string LiveBlock::take_away(int columns) const {
  if (shown_.empty()) return {};
  const auto width = static_cast<std::size_t>(std::max(1, columns));
  std::size_t rows = 0;
  for (const std::string& line : shown_) {
    rows += std::max<std::size_t>(1, (shown_width(line) + width - 1) / width);
  }
  return "\r" + (rows > 1 ? "\033[" + std::to_string(rows - 1) + "A" : "") + "\033[J";
}

void LiveBlock::draw(const std::vector<std::string>& lines) {
  if (!possible_) return;
  const std::scoped_lock lock(mutex_);
  winsize size{};
  const bool known = ::ioctl(descriptor_, TIOCGWINSZ, &size) == 0 && size.ws_col > 0;
  std::string text = take_away(known ? size.ws_col : 80);
  shown_ = lines;
  // A block taller than the window could not be taken away again.
  const std::size_t rows = known && size.ws_row > 1 ? size.ws_row - 1U : 23U;
  if (shown_.size() > rows) shown_.resize(rows);
  for (std::size_t i = 0; i < shown_.size(); ++i) text += (i == 0 ? "" : "\n") + shown_[i];
  send(text);
}

void LiveBlock::clear() {
  if (!possible_) return;
  const std::scoped_lock lock(mutex_);
  send(take_away(style().columns));
  shown_.clear();
}

void LiveBlock::send(const std::string& text) const {
  std::string_view rest = text;
  while (!rest.empty()) {
    const ssize_t count = ::write(descriptor_, rest.data(), rest.size());
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) return;  // a terminal that is gone must not stop the run
    rest.remove_prefix(static_cast<std::size_t>(count));
  }
}

}  // namespace tailor
