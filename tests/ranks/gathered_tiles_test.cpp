#include "trainer/stream/gathered_tiles.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstring>
#include <fstream>
#include <numeric>

#include "base/error.h"
#include "base/file.h"
#include "base/random.h"
#include "base/units.h"
#include "tests/support/faulty_reader.h"
#include "tests/support/on_ranks.h"

namespace tailor {
namespace {

constexpr std::int64_t kBlock = kBlockBytes;

TEST(TileShare, covers_a_tile_once_in_whole_blocks) {
  for (const std::int64_t blocks : {1, 2, 3, 5, 8, 97}) {
    for (int N = 1; N <= 5; ++N) {
      std::int64_t at = 0;
      for (int r = 0; r < N; ++r) {
        const TileShare share = tile_share(blocks * kBlock, r, N);
        EXPECT_EQ(share.part_bytes, (blocks + N - 1) / N * kBlock);
        EXPECT_EQ(share.offset, std::min(at, blocks * kBlock));
        EXPECT_GE(share.bytes, 0);
        EXPECT_EQ(share.bytes % kBlock, 0);
        at += share.bytes;
      }
      EXPECT_EQ(at, blocks * kBlock);
    }
  }
}

/// Tiles of 1 to 9 blocks in a file of random bytes.
class Gathered : public ::testing::TestWithParam<int> {
 protected:
  void SetUp() override {
    path_ = fs::path(testing::TempDir()) / ("gathered_" + std::to_string(::getpid()));
    std::int64_t at = 0;
    for (int t = 0; t < 24; ++t) {
      RingTile tile;
      tile.offset = at;
      tile.bytes = (1 + (t * 5) % 9) * kBlock;
      tile.pool = t % 3 == 0 ? 1 : 0;
      at += tile.bytes;
      tiles_.push_back(tile);
    }
    bytes_.resize(static_cast<std::size_t>(at));
    for (std::size_t i = 0; i < bytes_.size(); ++i) {
      bytes_[i] = std::byte(random_bits(1, RandomStream::sample, i, 0));
    }
    std::ofstream(path_, std::ios::binary).write(reinterpret_cast<const char*>(bytes_.data()), at);
  }
  void TearDown() override { fs::remove(path_); }

  struct Setting {
    int resident_of = 0;  ///< every so many tiles' parts stay in memory; 0: none
    int slots = 3;
    std::optional<testing_support::Faults> faults{};
    std::function<void(int, const std::byte*)> check{};
  };

  std::unique_ptr<GatheredTiles> open(Ranks& ranks, const Setting& setting) const {
    std::vector<RingTile> parts;
    std::vector<int> part_of;
    for (std::size_t t = 0; t < tiles_.size(); ++t) {
      const TileShare share = tile_share(tiles_[t].bytes, ranks.rank(), ranks.size());
      part_of.push_back(share.bytes == 0 ? -1 : static_cast<int>(parts.size()));
      if (share.bytes == 0) continue;
      RingTile part = tiles_[t];
      part.offset += share.offset;
      part.bytes = share.bytes;
      if (setting.resident_of > 0 && static_cast<int>(t) % setting.resident_of == 0) {
        part.home = TileHome::host;
      }
      parts.push_back(part);
    }
    auto reader = BlockReader::create({});
    reader->add_file(path_);
    if (setting.faults) {
      reader = std::make_unique<testing_support::FaultyReader>(std::move(reader), *setting.faults);
    }
    const std::vector<RingPool> pools = {{9 * kBlock, setting.slots}, {9 * kBlock, setting.slots}};
    const TileRing::Checks checks{
        {}, [](int, const BlockDone&) {
          return std::make_exception_ptr(Error(Fault::io, {"a part is lost", "", ""}));
        }};
    return std::make_unique<GatheredTiles>(
        tiles_, part_of, pools, std::make_unique<TileRing>(parts, pools, std::move(reader), checks),
        ranks.channel("tiles"), setting.check);
  }

  void use(GatheredTiles& source, const std::vector<int>& order, std::size_t count) const {
    for (std::size_t i = 0; i < count; ++i) {
      const auto lease = source.acquire(order[i]);
      const RingTile& tile = tiles_[static_cast<std::size_t>(order[i])];
      EXPECT_EQ(std::memcmp(lease.bytes(), bytes_.data() + tile.offset,
                            static_cast<std::size_t>(tile.bytes)),
                0)
          << "tile " << order[i];
    }
  }

  std::int64_t share_bytes(int rank, int N) const {
    std::int64_t sum = 0;
    for (const RingTile& tile : tiles_) sum += tile_share(tile.bytes, rank, N).bytes;
    return sum;
  }

  fs::path path_;
  std::vector<RingTile> tiles_;
  std::vector<std::byte> bytes_;
};

testing_support::Faults late(std::uint64_t seed, std::size_t held_back, int delay_us_max) {
  testing_support::Faults out;
  out.seed = seed;
  out.held_back = held_back;
  out.delay_us_max = delay_us_max;
  return out;
}

std::vector<int> up_and_down(int count) {
  std::vector<int> order(static_cast<std::size_t>(count));
  std::iota(order.begin(), order.end(), 0);
  for (int t = count - 1; t >= 0; --t) order.push_back(t);
  return order;
}

TEST_P(Gathered, every_rank_sees_every_tile_whole_and_reads_its_part_alone) {
  const int N = GetParam();
  on_ranks(N, [&](Ranks& ranks) {
    const auto source = open(ranks, {});
    const std::vector<int> order = up_and_down(24);
    for (int pass = 0; pass < 3; ++pass) {
      source->begin(order);
      if (pass < 2) source->expect(order);
      use(*source, order, order.size());
    }
    const RingCounters counters = source->counters();
    EXPECT_EQ(counters.streamed_bytes, 6 * share_bytes(ranks.rank(), N));
    EXPECT_EQ(counters.gathered_bytes,
              6 * (static_cast<std::int64_t>(bytes_.size()) - share_bytes(ranks.rank(), N)));
  });
}

TEST_P(Gathered, parts_in_memory_are_read_once_and_take_their_share) {
  const int N = GetParam();
  on_ranks(N, [&](Ranks& ranks) {
    Setting setting;
    setting.resident_of = 1;
    const auto source = open(ranks, setting);
    const std::vector<int> order = up_and_down(24);
    source->begin(order);
    use(*source, order, order.size());
    EXPECT_EQ(source->counters().streamed_bytes, 0);
    // Three slots of the largest tile of each pool, and its part's own ring.
    const std::int64_t slots =
        3 * N * (tile_share(9 * kBlock, 0, N).part_bytes + tile_share(7 * kBlock, 0, N).part_bytes);
    EXPECT_EQ(source->memory_bytes(), share_bytes(ranks.rank(), N) + slots + 6 * 9 * kBlock);
  });
}

TEST_P(Gathered, what_was_read_ahead_for_another_pass_is_dropped_by_all) {
  const int N = GetParam();
  for (int slots = 1; slots <= 4; ++slots) {
    on_ranks(N, [&](Ranks& ranks) {
      Setting setting;
      setting.slots = slots;
      setting.resident_of = 2;
      // Ranks at their own pace.
      setting.faults = late(static_cast<std::uint64_t>(ranks.rank()), 0, 200 * ranks.rank());
      const auto source = open(ranks, setting);
      const std::vector<int> order = up_and_down(24), other = {5, 3, 3, 20, 1};
      source->begin(order);
      source->expect(order);
      use(*source, order, 10);  // stopped in the middle
      source->begin(other);
      source->expect(order);
      use(*source, other, other.size());
      source->begin(other);  // not what was expected
      use(*source, other, other.size());
      source->begin(order);
      source->expect(other);
      use(*source, order, order.size());
      source->begin(other);
      use(*source, other, 2);
    });
  }
}

TEST_P(Gathered, random_walks_see_the_right_bytes) {
  const int N = GetParam();
  for (std::uint64_t seed = 0; seed < 30; ++seed) {
    on_ranks(N, [&](Ranks& ranks) {
      const auto draw = [&](std::uint64_t a, std::uint64_t b, std::uint64_t below) {
        return random_bits(seed, RandomStream::sample, a, b) % below;
      };
      Setting setting;
      setting.slots = static_cast<int>(1 + draw(0, 0, 4));
      setting.resident_of = static_cast<int>(draw(0, 1, 4));
      setting.faults =
          late(seed * 7 + static_cast<std::uint64_t>(ranks.rank()), draw(0, 2, 3), 100);
      const auto source = open(ranks, setting);
      std::vector<int> expected;
      for (std::uint64_t pass = 1; pass < 6; ++pass) {
        std::vector<int> order;
        if (!expected.empty() && draw(pass, 1000, 3) > 0) {
          order = expected;
        } else {
          for (std::uint64_t i = 0; i < 1 + draw(pass, 1001, 20); ++i) {
            order.push_back(static_cast<int>(draw(pass, i, 24)));
          }
        }
        source->begin(order);
        expected.clear();
        if (draw(pass, 1002, 2) == 0) {
          for (std::uint64_t i = 0; i < 1 + draw(pass, 1003, 20); ++i) {
            expected.push_back(static_cast<int>(draw(pass, 100 + i, 24)));
          }
          source->expect(expected);
        }
        const bool whole = draw(pass, 1004, 4) > 0;
        use(*source, order, whole ? order.size() : draw(pass, 1005, order.size() + 1));
        if (!whole) expected.clear();
      }
    });
  }
}

TEST_P(Gathered, a_part_that_cannot_be_read_ends_all_ranks) {
  const int N = GetParam();
  std::atomic<int> ended{0};
  try {
    on_ranks(N, [&](Ranks& ranks) {
      Setting setting;
      if (ranks.rank() == 0) {
        setting.faults = testing_support::Faults{};
        setting.faults->fail = 11;
      }
      const auto source = open(ranks, setting);
      const std::vector<int> order = up_and_down(24);
      source->begin(order);
      try {
        use(*source, order, order.size());
      } catch (...) {
        ++ended;
        EXPECT_THROW(source->begin(order), Error);
        throw;
      }
    });
    FAIL() << "read what is not there";
  } catch (const Error& error) {
    EXPECT_EQ(error.fault(), Fault::io);
  }
  EXPECT_EQ(ended, N);
}

TEST_P(Gathered, a_check_that_fails_ends_the_rank_that_made_it) {
  const int N = GetParam();
  EXPECT_THROW(on_ranks(N,
                        [&](Ranks& ranks) {
                          Setting setting;
                          setting.check = [&](int tile, const std::byte* bytes) {
                            const RingTile& t = tiles_[static_cast<std::size_t>(tile)];
                            EXPECT_EQ(std::memcmp(bytes, bytes_.data() + t.offset,
                                                  static_cast<std::size_t>(t.bytes)),
                                      0);
                            if (tile == 7) throw Error(Fault::bad_file, {"damaged", "", ""});
                          };
                          const auto source = open(ranks, setting);
                          const std::vector<int> order = up_and_down(24);
                          source->begin(order);
                          use(*source, order, order.size());
                        }),
               Error);
}

INSTANTIATE_TEST_SUITE_P(Ranks, Gathered, ::testing::Values(1, 2, 3, 4));

}  // namespace
}  // namespace tailor
