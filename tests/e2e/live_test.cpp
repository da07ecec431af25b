// What a user sees of a run: the live block on a terminal, plain lines in a pipe, the page after
// it.

#include <gmock/gmock.h>
#include <pty.h>
#include <sys/ioctl.h>

#include <algorithm>
#include <set>

#include "tests/e2e/train_program.h"
#include "tests/support/page_check.h"
#include "tests/tools/live/screen.h"

namespace tailor {
namespace {

using namespace testing_support;
using testing::HasSubstr;
using testing::IsEmpty;
using testing::Not;

TEST_F(TrainProgram, on_a_terminal_there_is_one_block_that_stays_in_place) {
  winsize size{};
  size.ws_col = 72;
  size.ws_row = 30;
  int terminal = -1;
  const pid_t child = ::forkpty(&terminal, nullptr, nullptr, &size);
  if (child == 0) {
    ::setenv("TAILOR_CACHE", (work_ / "cache").c_str(), 1);
    ::setenv("TAILOR_DATA", (work_ / "data").c_str(), 1);
    ::setenv("TERM", "xterm", 1);
    ::setenv("LC_ALL", "C.UTF-8", 1);
    ::unsetenv("NO_COLOR");
    ::execl(TAILOR_BIN_DIR "/tailor", "tailor", "train", recipe().c_str(), "budget.usd=1", nullptr);
    ::_exit(127);
  }
  Screen screen(72);
  std::size_t drawn = 0;
  char buffer[4096];
  for (ssize_t count = 0; (count = ::read(terminal, buffer, sizeof buffer)) > 0;) {
    const std::string text(buffer, static_cast<std::size_t>(count));
    drawn += static_cast<std::size_t>(std::count(text.begin(), text.end(), 'J'));
    screen.feed(text);
  }
  int status = 0;
  ::waitpid(child, &status, 0);
  ::close(terminal);
  EXPECT_EQ(status, 0);
  EXPECT_EQ(screen.problem, "");
  EXPECT_GT(drawn, 1U);
  EXPECT_GT(screen.colours, 0);
  std::string all;
  int steps = 0, blocks = 0;
  for (const std::string& line : screen.lines()) {
    all += line + "\n";
    steps += line.starts_with("step ") ? 1 : 0;
    blocks += line.find("so far") != std::string::npos ? 1 : 0;
  }
  // Of all the drawings one is left, the last; the table follows it.
  EXPECT_EQ(steps, 1) << all;
  EXPECT_EQ(blocks, 1) << all;
  EXPECT_THAT(all, HasSubstr("step 12/12   100 %"));
  EXPECT_THAT(all, HasSubstr("   done\n"));
  EXPECT_THAT(all, HasSubstr("evaluation after step 5: loss "));
  EXPECT_THAT(all, HasSubstr("at the end"));
  EXPECT_THAT(all, HasSubstr("of $1.00 left"));
  EXPECT_LT(all.find("so far"), all.rfind("device-hours"));
}

TEST_F(TrainProgram, in_a_pipe_there_are_plain_lines_and_a_page_with_expert_load_afterwards) {
  const Finished done = run({"train", recipe()});
  ASSERT_EQ(done.code, 0) << done.err;
  EXPECT_THAT(done.err, Not(HasSubstr("\033")));
  EXPECT_THAT(done.err, HasSubstr("step 12/12  loss "));
  EXPECT_THAT(done.err, HasSubstr("ETA "));
  std::set<std::int64_t> sampled;
  for (const std::string& line : split(read_text(work_ / "run/metrics.jsonl"), '\n')) {
    if (line.empty()) continue;
    const Json json = parse_json(line, "metrics.jsonl");
    if (json.contains("loss")) {
      EXPECT_GT(json.at("host_bytes_peak").get<double>(), 1e6);
    }
    if (!json.contains("expert_rows")) continue;
    sampled.insert(json.at("step").get<std::int64_t>());
    for (const auto& [layer, rows] : json.at("expert_rows").items()) {
      std::int64_t sum = 0;
      for (const Json& count : rows) sum += count.get<std::int64_t>();
      EXPECT_GT(sum, 0) << layer;
    }
  }
  EXPECT_EQ(sampled.size(), 12U);
  const std::string html = read_text(work_ / "run/report.html");
  const PageCheck page(html);
  EXPECT_THAT(page.problems, IsEmpty());
  EXPECT_THAT(page.text, HasSubstr("load of the routed experts"));
  EXPECT_THAT(page.text, HasSubstr("12 sampled steps"));
  const Finished shown =
      run({"runs", "show", (work_ / "run").string(), "--ledger", (work_ / "ledger.db").string()});
  EXPECT_EQ(shown.code, 0) << shown.err;
  EXPECT_THAT(shown.out, HasSubstr("peak host memory"));
  EXPECT_THAT(shown.out, HasSubstr("energy  not measured"));
  const Finished again =
      run({"runs", "report", (work_ / "run").string(), "--ledger", (work_ / "ledger.db").string(),
           "--html", (work_ / "page.html").string()});
  EXPECT_EQ(again.code, 0) << again.err;
  EXPECT_EQ(read_text(work_ / "page.html"), html);
}

}  // namespace
}  // namespace tailor
