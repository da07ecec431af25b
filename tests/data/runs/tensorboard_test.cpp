#include "data/runs/tensorboard.h"

#include "tests/data/runs/runs_fixture.h"

namespace tailor {
namespace {

using TensorboardTest = RunsTest;

class ZeroClock final : public Clock {
 public:
  std::int64_t unix_ms() const override { return 0; }
  std::int64_t steady_ms() const override { return 0; }
};

std::string hex(std::string_view bytes) {
  constexpr std::string_view kHex = "0123456789abcdef";
  std::string out;
  for (const char c : bytes) {
    out += kHex[static_cast<unsigned char>(c) >> 4U];
    out += kHex[static_cast<unsigned char>(c) & 15U];
  }
  return out;
}

TEST_F(TensorboardTest, checksum_gives_the_published_values) {  // RFC 3720, B.4
  EXPECT_EQ(crc32c("123456789"), 0xE3069283U);
  EXPECT_EQ(crc32c(std::string(32, '\0')), 0x8A9136AAU);
  EXPECT_EQ(crc32c(std::string(32, '\xff')), 0x62A8AB43U);
  EXPECT_EQ(crc32c(""), 0U);
}

TEST_F(TensorboardTest, bytes_are_those_tensorflow_writes) {
  const ZeroClock clock;
  TensorboardWriter writer(folder_, clock);
  writer.scalar("a", 1.0, 300);
  writer.flush();
  const std::string bytes = read_text(writer.path());
  // Every event file of TensorFlow begins with this length and its checksum.
  EXPECT_EQ(hex(bytes.substr(0, 12)), "1800000000000000a37f4b22");
  EXPECT_EQ(hex(bytes.substr(12, 24)),
            "090000000000000000"  // wall_time 0.0
            "1a0d" +
                hex("brain.Event:2"));  // file_version
  EXPECT_EQ(hex(bytes.substr(40 + 12, bytes.size() - 40 - 16)),
            "090000000000000000"  // wall_time
            "10ac02"              // step 300
            "2a0a"                // summary
            "0a08"                // value
            "0a0161"              // tag "a"
            "150000803f");        // simple_value 1.0f
  // The frame's second checksum is of the payload.
  EXPECT_EQ(hex(bytes.substr(bytes.size() - 4)), hex([&] {
              const std::uint32_t crc = masked_crc32c(bytes.substr(52, bytes.size() - 56));
              std::string out;
              for (int i = 0; i < 4; ++i) out += static_cast<char>(crc >> (8 * i));
              return out;
            }()));
}

TEST_F(TensorboardTest, files_of_one_process_have_names_of_their_own) {
  const TensorboardWriter a(folder_, clock_);
  const TensorboardWriter b(folder_, clock_, 10);
  EXPECT_NE(a.path(), b.path());
  EXPECT_TRUE(a.path().filename().string().starts_with("events.out.tfevents.1795474800."));
  EXPECT_GT(read_text(b.path()).size(), read_text(a.path()).size());
}

}  // namespace
}  // namespace tailor
