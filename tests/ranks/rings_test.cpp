// The rings by themselves, under orders nobody planned, late and failing readers and a device that
// is late and unordered. No LibTorch: these run under the thread and address sanitizers in seconds.

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <fstream>

#include "base/error.h"
#include "base/random.h"
#include "base/units.h"
#include "tests/support/fake_device.h"
#include "tests/support/faulty_reader.h"
#include "trainer/stream/device_ring.h"

namespace tailor {
namespace {

constexpr std::int64_t kBlock = kBlockBytes;
constexpr std::uint64_t kTiles = 20;

class Rings : public ::testing::Test {
 protected:
  void SetUp() override {
    path_ = fs::path(testing::TempDir()) / ("rings_" + std::to_string(::getpid()));
    std::int64_t at = 0;
    for (std::uint64_t t = 0; t < kTiles; ++t) {
      RingTile tile;
      tile.offset = at;
      tile.bytes = static_cast<std::int64_t>(1 + (t * 5) % 7) * kBlock;
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

  /// All choices of one walk, from its seed.
  struct Draw {
    std::uint64_t seed;
    std::uint64_t operator()(std::uint64_t a, std::uint64_t b, std::uint64_t below) const {
      return random_bits(seed, RandomStream::sample, a, b) % below;
    }
  };

  std::vector<RingTile> tiles(const Draw& draw, bool device) const {
    std::vector<RingTile> out = tiles_;
    for (std::size_t t = 0; t < out.size(); ++t) {
      const std::uint64_t home = draw(1, t, 4);
      if (home == 0) out[t].home = TileHome::host;
      if (home == 1 && device) out[t].home = TileHome::device;
    }
    return out;
  }
  std::unique_ptr<BlockReader> reader(const Draw& draw) const {
    auto within = BlockReader::create({});
    within->add_file(path_);
    testing_support::Faults faults;
    faults.seed = draw.seed;
    faults.held_back = draw(2, 0, 3);
    faults.delay_us_max = static_cast<int>(draw(2, 1, 100));
    if (draw(2, 2, 2) == 0) faults.fail = draw(2, 3, 40);
    return std::make_unique<testing_support::FaultyReader>(std::move(within), faults);
  }
  static std::vector<RingPool> pools(const Draw& draw) {
    return {{7 * kBlock, static_cast<int>(1 + draw(3, 0, 4))},
            {7 * kBlock, static_cast<int>(1 + draw(3, 1, 3))}};
  }
  TileRing::Checks checks() const {
    return {[this](int tile, const std::byte* at) { EXPECT_TRUE(is(tile, at)); },
            [](int, const BlockDone&) {
              return std::make_exception_ptr(Error(Fault::io, {"the disk fails", "", ""}));
            }};
  }
  bool is(int tile, const std::byte* at) const {
    const RingTile& of = tiles_[static_cast<std::size_t>(tile)];
    return std::memcmp(at, bytes_.data() + of.offset, static_cast<std::size_t>(of.bytes)) == 0;
  }

  /// Passes that are kept to, changed, left early and begun again after an error. `use` looks at a
  /// tile while its lease lives. Says how many passes ended with an error.
  int walk(TileSource& source, const Draw& draw,
           const std::function<void(int, const std::byte*)>& use) const {
    int failed = 0;
    std::vector<int> expected;
    for (std::uint64_t pass = 10; pass < 18; ++pass) {
      std::vector<int> order;
      if (!expected.empty() && draw(pass, 100, 3) > 0) {
        order = expected;
      } else {
        const std::uint64_t count = draw(pass, 101, 24);
        for (std::uint64_t i = 0; i < count; ++i) {
          order.push_back(static_cast<int>(draw(pass, i, kTiles)));
        }
      }
      source.begin(order);
      expected.clear();
      if (draw(pass, 102, 2) == 0) {
        const std::uint64_t count = 1 + draw(pass, 103, 24);
        for (std::uint64_t i = 0; i < count; ++i) {
          expected.push_back(static_cast<int>(draw(pass, 200 + i, kTiles)));
        }
        source.expect(expected);
      }
      std::size_t end = order.size();
      if (draw(pass, 104, 4) == 0) end = draw(pass, 105, end + 1);
      if (end < order.size()) expected.clear();
      try {
        for (std::size_t i = 0; i < end; ++i) {
          const auto lease = source.acquire(order[i]);
          use(order[i], lease.bytes());
        }
      } catch (const Error& error) {
        EXPECT_EQ(error.parts().what, "the disk fails");
        ++failed;
        expected.clear();
      }
    }
    return failed;
  }

  fs::path path_;
  std::vector<RingTile> tiles_;
  std::vector<std::byte> bytes_;
};

/// Makes a ring; null where its very loading failed, as a failing reader has it.
template <class Make>
auto made(const Make& make) -> decltype(make()) {
  try {
    return make();
  } catch (const Error& error) {
    EXPECT_EQ(error.parts().what, "the disk fails");
    return nullptr;
  }
}

TEST_F(Rings, random_walks_from_disk_see_the_right_bytes_or_the_error) {
  int failed = 0, unmade = 0;
  for (std::uint64_t seed = 0; seed < 120; ++seed) {
    const Draw draw{seed};
    const auto ring = made([&] {
      return std::make_unique<TileRing>(tiles(draw, false), pools(draw), reader(draw), checks());
    });
    unmade += ring == nullptr ? 1 : 0;
    if (ring == nullptr) continue;
    failed += walk(*ring, draw, [&](int tile, const std::byte* at) { EXPECT_TRUE(is(tile, at)); });
  }
  EXPECT_GT(failed, 5);
  EXPECT_GT(unmade, 1);
}

TEST_F(Rings, random_walks_through_a_late_device_see_the_right_bytes_in_their_stream) {
  int failed = 0;
  std::atomic<int> seen{0};
  for (std::uint64_t seed = 0; seed < 120; ++seed) {
    const Draw draw{seed + 1000};
    FakeDevice device(static_cast<std::uint32_t>(seed + 1));
    {
      const Stream compute(device);
      DeviceRing::Options options;
      const bool in_stream = draw(4, 0, 2) == 0;
      if (in_stream) options.compute = compute;
      options.poison_released = true;
      const auto ring = made([&] {
        return std::make_unique<DeviceRing>(device, tiles(draw, true), pools(draw), pools(draw),
                                            reader(draw), checks(), options);
      });
      if (ring == nullptr) continue;
      failed += walk(*ring, draw, [&](int tile, const std::byte* at) {
        const std::int64_t count = tiles_[static_cast<std::size_t>(tile)].bytes;
        if (!in_stream) {
          device.expect_readable(at, count);
          EXPECT_TRUE(is(tile, at));
          ++seen;
          return;
        }
        // A kernel, which looks long after the lease has ended.
        device.run_async(
            {{at, count}}, {}, [&, tile, at] { seen += is(tile, at) ? 1 : 100'000; }, compute);
      });
      device.synchronise(compute);
    }
    EXPECT_THAT(device.violations(), testing::IsEmpty()) << "seed " << seed;
  }
  EXPECT_GT(failed, 5);
  EXPECT_GT(seen, 1000);
  EXPECT_LT(seen, 100'000) << "a kernel saw other bytes";
}

}  // namespace
}  // namespace tailor
