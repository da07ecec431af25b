#pragma once

#include <cstdint>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

namespace tailor {

/// What a run has cost and may cost; what is not known is left out.
struct LiveMoney {
  double gpu_hours = 0;                    ///< the run so far, all attempts
  std::string hours_word = "GPU-hours";    ///< or device-hours
  std::optional<double> usd{};             ///< the run so far; nothing where no price is known
  std::optional<double> usd_per_second{};  ///< of all devices
  std::optional<double> usd_budget{}, gpu_hours_budget{};  ///< the run's own
  double devices = 1;
  /// The budget that all runs of a project share, and what the others have used of it.
  struct Shared {
    std::string project{};
    std::optional<double> usd_budget{}, gpu_hours_budget{};
    double others_usd = 0, others_gpu_hours = 0;
  } shared{};
};

/// What a run's live block shows.
struct LiveFigures : LiveMoney {
  std::int64_t step = 0, steps_total = 0;
  std::string doing;  ///< "evaluating"; empty: training
  double loss = 0;
  std::optional<double> held_out_loss;
  std::int64_t held_out_step = 0;
  double tokens_per_second = 0;
  double stall_share = 0;              ///< of the steps' time, waiting for weights
  std::string exchange;                ///< "12 MB, 0.1 s exposed"; empty: one rank
  std::optional<double> seconds_left;  ///< to the last step, evaluations and saving included

  std::optional<double> usd_at_end() const;
  double gpu_hours_at_end() const;  ///< so far where the time left is not known
};

struct LiveStyle {
  int columns = 80;
  bool colour = false;
  bool utf8 = true;
};

/// The block's lines, each shorter than style.columns.
std::vector<std::string> live_lines(const LiveFigures& figures, const LiveStyle& style);
/// The same in one line, for logs.
std::string live_line(const LiveFigures& figures);

/// Lines at the bottom of a terminal that overwrite themselves. Takes the terminal's size before
/// each drawing, so that a window may be resized. Messages of base/log.h come above the block.
/// Thread-safe.
class LiveBlock {
 public:
  explicit LiveBlock(int descriptor);
  /// Leaves the block where it is.
  ~LiveBlock();
  LiveBlock(const LiveBlock&) = delete;
  LiveBlock& operator=(const LiveBlock&) = delete;

  /// Whether `descriptor` is a terminal that can move its cursor; if not, draw nothing.
  bool possible() const noexcept { return possible_; }
  /// As the terminal is now.
  LiveStyle style() const;
  void draw(const std::vector<std::string>& lines);
  /// Takes the block away; the next drawing starts where the cursor then is.
  void clear();

 private:
  std::string take_away(int columns) const;
  void send(const std::string& text) const;

  int descriptor_;
  bool possible_;
  std::mutex mutex_;
  std::vector<std::string> shown_;
};

/// Characters that `text` takes on a terminal, colours apart.
std::size_t shown_width(const std::string& text);

}  // namespace tailor
