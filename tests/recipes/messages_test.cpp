// Wording is behaviour: every tests/messages/NAME.yaml must fail with exactly the text in NAME.txt.
// A case is added by dropping in the two files. Lines `# override: key=value` at the top are
// applied. TAILOR_WRITE_MESSAGES=1 writes missing and changed texts, to be read before they are
// committed.

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>

#include "base/error.h"
#include "base/file.h"
#include "base/text.h"
#include "recipes/read.h"

namespace tailor {
namespace {

const fs::path kFolder = fs::path(TAILOR_SOURCE_DIR) / "tests/messages";

std::vector<std::string> case_names() {
  std::vector<std::string> names;
  for (const auto& entry : fs::directory_iterator(kFolder)) {
    if (entry.path().extension() == ".yaml") names.push_back(entry.path().stem().string());
  }
  std::sort(names.begin(), names.end());
  return names;
}

std::string message_of(const std::string& name) {
  const std::string text = read_text(kFolder / (name + ".yaml"));
  std::vector<std::string> overrides;
  for (const std::string& line : split(text, '\n')) {
    constexpr std::string_view kMark = "# override: ";
    if (line.starts_with(kMark)) overrides.push_back(line.substr(kMark.size()));
  }
  try {
    read_recipe_text(text, name + ".yaml", overrides);
  } catch (const Error& error) {
    EXPECT_EQ(error.fault(), Fault::usage);
    return to_text(error);
  }
  return "no error\n";
}

class Messages : public testing::TestWithParam<std::string> {};

TEST_P(Messages, are_word_for_word_as_agreed) {
  const fs::path expected = kFolder / (GetParam() + ".txt");
  const std::string found = message_of(GetParam());
  if (std::getenv("TAILOR_WRITE_MESSAGES") != nullptr) write_atomically(expected, found);
  ASSERT_TRUE(fs::exists(expected)) << "missing " << expected << "; the message now:\n" << found;
  EXPECT_EQ(found, read_text(expected));
}

INSTANTIATE_TEST_SUITE_P(Case, Messages, testing::ValuesIn(case_names()),
                         [](const auto& entry) { return entry.param; });

TEST(MessageCases, are_many) { EXPECT_GE(case_names().size(), 20U); }

}  // namespace
}  // namespace tailor
