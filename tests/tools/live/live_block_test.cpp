#include "tools/live_block.h"

#include <gmock/gmock.h>
#include <poll.h>
#include <pty.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <cstdlib>

#include "base/log.h"
#include "base/text.h"
#include "tests/tools/live/screen.h"

namespace tailor {
namespace {

using testing::Contains;
using testing::ElementsAre;
using testing::EndsWith;
using testing::HasSubstr;
using testing::Not;
using testing::StartsWith;
using testing_support::Screen;

LiveFigures figures() {
  LiveFigures out;
  out.step = 1'234;
  out.steps_total = 10'000;
  out.loss = 1.23456;
  out.held_out_loss = 1.301;
  out.held_out_step = 1'000;
  out.tokens_per_second = 1'552;
  out.stall_share = 0.031;
  out.seconds_left = 7'620;
  out.gpu_hours = 0.35;
  out.usd = 0.42;
  out.usd_per_second = 0.000'33;
  out.usd_budget = 60;
  return out;
}

TEST(LiveBlock, says_where_a_run_stands_and_what_it_will_cost) {
  EXPECT_THAT(live_lines(figures(), {100, false, false}),
              ElementsAre("step 1,234/10,000   12.3 %   #####-----------------------------------   "
                          "ETA 2 h 07 min",
                          "loss 1.235   held-out 1.301 at step 1,000   1552 tokens/s   stall 3.1 %",
                          "$0.42 so far   $2.93 at the end   $59.58 of $60.00 left"));
  LiveFigures dear = figures();
  dear.usd_budget = 2.5;
  dear.doing = "evaluating";
  const auto lines = live_lines(dear, {100, false, true});
  EXPECT_THAT(lines[0], HasSubstr("evaluating, ETA 2 h 07 min"));
  EXPECT_THAT(lines[2], HasSubstr("budget $2.50 will not do, short $0.43"));
  LiveFigures unpriced = figures();
  unpriced.usd.reset();
  unpriced.gpu_hours_budget = 8;
  unpriced.devices = 4;
  EXPECT_EQ(
      live_lines(unpriced, {100, false, true})[2],
      "0.350 GPU-hours so far   8.82 at the end   budget 8.00 GPU-hours will not do, short 0.817 "
      "GPU-hours");
  EXPECT_EQ(
      live_line(figures()),
      "step 1234/10000  loss 1.235  held-out 1.301 at step 1,000  1552 tokens/s  stall 3.1 %  "
      "ETA 2 h 07 min  $0.42 so far  $2.93 at the end  $59.58 of $60.00 left");
  LiveFigures team = figures();
  team.shared = {"support-bot", 500, 200, 87.5, 12};
  EXPECT_THAT(live_line(team), EndsWith("$59.58 of $60.00 left  $412.08 of $500.00 of project "
                                        "support-bot left  188 GPU-hours of 200 GPU-hours of "
                                        "project support-bot left"));
  team.shared.others_usd = 499;
  EXPECT_THAT(live_line(team),
              HasSubstr("budget $500.00 of project support-bot will not do, short $1.93"));
  LiveFigures nearly = figures();
  nearly.step = 9'999;
  EXPECT_THAT(live_lines(nearly, {100, false, true})[0], HasSubstr("99.9 %"));
  nearly.step = 10'000;
  nearly.seconds_left = 0;
  EXPECT_THAT(live_lines(nearly, {100, false, true})[0], EndsWith("   done"));
  nearly.doing = "saving";
  EXPECT_THAT(live_lines(nearly, {100, false, true})[0], HasSubstr("   saving, ETA 0.0 s"));
}

TEST(LiveBlock, every_line_is_narrower_than_the_terminal) {
  for (int columns = 1; columns <= 200; ++columns) {
    for (const bool colour : {false, true}) {
      for (const std::string& line : live_lines(figures(), {columns, colour, true})) {
        EXPECT_LT(shown_width(line), std::max(2, columns)) << columns << ": " << line;
        EXPECT_TRUE(is_utf8(line));
      }
    }
  }
  EXPECT_THAT(live_lines(figures(), {100, true, true})[0], HasSubstr("\033["));
  EXPECT_THAT(live_lines(figures(), {100, false, true})[0], Not(HasSubstr("\033[")));
}

/// A pseudo-terminal with a block on it.
class OnTerminal : public testing::Test {
 protected:
  void SetUp() override {
    ::setenv("TERM", "xterm-256color", 1);
    ::unsetenv("NO_COLOR");
    ::setenv("LC_ALL", "C.UTF-8", 1);
    ASSERT_EQ(::openpty(&master_, &slave_, nullptr, nullptr, nullptr), 0);
    resize(100, 30);
  }
  void TearDown() override {
    ::close(slave_);
    ::close(master_);
  }

  void resize(unsigned short columns, unsigned short rows) {
    winsize size{};
    size.ws_col = columns;
    size.ws_row = rows;
    ASSERT_EQ(::ioctl(slave_, TIOCSWINSZ, &size), 0);
    screen_.resize(columns);
  }

  /// What the block wrote, onto the screen.
  void look() {
    pollfd ready{master_, POLLIN, 0};
    while (::poll(&ready, 1, 50) == 1) {
      char buffer[4096];
      const ssize_t count = ::read(master_, buffer, sizeof buffer);
      if (count <= 0) break;
      std::string text(buffer, static_cast<std::size_t>(count));
      screen_.feed(text);
    }
  }

  int master_ = -1, slave_ = -1;
  Screen screen_{100};
};

TEST_F(OnTerminal, redraws_in_place_and_messages_go_above) {
  LiveBlock block(slave_);
  ASSERT_TRUE(block.possible());
  EXPECT_EQ(block.style().columns, 100);
  EXPECT_TRUE(block.style().colour);
  EXPECT_TRUE(block.style().utf8);
  LiveFigures now = figures();
  for (int s = 1; s <= 20; ++s) {
    now.step = s;
    block.draw(live_lines(now, block.style()));
    look();
  }
  ASSERT_EQ(screen_.lines().size(), 3U);
  EXPECT_THAT(screen_.lines()[0], StartsWith("step 20/10,000"));
  block.clear();
  const std::string message = "evaluation after step 20: loss 1.3\n";
  ASSERT_EQ(::write(slave_, message.data(), message.size()), static_cast<ssize_t>(message.size()));
  now.step = 21;
  block.draw(live_lines(now, block.style()));
  look();
  EXPECT_EQ(screen_.problem, "");
  EXPECT_GT(screen_.colours, 0);
  ASSERT_EQ(screen_.lines().size(), 4U);
  EXPECT_EQ(screen_.lines()[0] + "\n", message);
  EXPECT_THAT(screen_.lines()[1], StartsWith("step 21/10,000"));
}

TEST_F(OnTerminal, is_redrawn_whole_when_the_window_changes) {
  LiveBlock block(slave_);
  ASSERT_EQ(::write(slave_, "before\n", 7), 7);
  for (const int columns : {100, 60, 30, 13, 44, 7, 160, 100}) {
    resize(static_cast<unsigned short>(columns), 40);
    block.draw(live_lines(figures(), block.style()));
    look();
    const auto lines = screen_.lines();
    ASSERT_GE(lines.size(), 4U) << columns;
    EXPECT_EQ(lines[0], "before") << columns;
    EXPECT_EQ(lines.size(), 1 + live_lines(figures(), block.style()).size()) << columns;
    for (std::size_t i = 1; i < lines.size(); ++i) {
      EXPECT_LT(shown_width(lines[i]), static_cast<std::size_t>(columns)) << lines[i];
    }
  }
  EXPECT_EQ(screen_.problem, "");
}

TEST_F(OnTerminal, is_no_taller_than_the_window) {
  LiveBlock block(slave_);
  resize(20, 4);
  ASSERT_GT(live_lines(figures(), block.style()).size(), 4U);
  for (int i = 0; i < 3; ++i) block.draw(live_lines(figures(), block.style()));
  look();
  EXPECT_EQ(screen_.lines().size(), 3U);
}

TEST_F(OnTerminal, no_colour_and_plain_terminals_are_respected) {
  ::setenv("NO_COLOR", "1", 1);
  {
    LiveBlock block(slave_);
    EXPECT_TRUE(block.possible());
    EXPECT_FALSE(block.style().colour);
    block.draw(live_lines(figures(), block.style()));
    look();
    EXPECT_EQ(screen_.colours, 0);
    EXPECT_THAT(screen_.lines(), Contains(StartsWith("loss 1.235")));
  }
  ::setenv("LC_ALL", "C", 1);
  ::setenv("TERM", "dumb", 1);
  const LiveBlock block(slave_);
  EXPECT_FALSE(block.possible());
  EXPECT_FALSE(block.style().utf8);
  int ends[2];
  ASSERT_EQ(::pipe(ends), 0);
  ::setenv("TERM", "xterm", 1);
  LiveBlock piped(ends[1]);
  EXPECT_FALSE(piped.possible());
  piped.draw({"nothing"});
  piped.clear();
  ::close(ends[1]);
  char byte = 0;
  EXPECT_EQ(::read(ends[0], &byte, 1), 0);
  ::close(ends[0]);
}

TEST_F(OnTerminal, messages_of_the_log_take_the_block_away_first) {
  LiveBlock block(slave_);
  block.draw({"one", "two"});
  log_warning("something");  // to stderr, which is not this terminal
  look();
  EXPECT_TRUE(screen_.lines().empty());
}

}  // namespace
}  // namespace tailor
