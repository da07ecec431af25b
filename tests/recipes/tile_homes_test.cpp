#include "recipes/tile_homes.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <numeric>
#include <random>

#include "recipes/read.h"
#include "recipes/ring.h"
#include "recipes/stream_model.h"

namespace tailor {
namespace {

TileHomes homes_of(const std::vector<PassTile>& tiles, std::int64_t device, std::int64_t host = 0,
                   TilePlacement placement = TilePlacement::even) {
  return std::get<TileHomes>(choose_homes(tiles, device, host, placement));
}

/// `d`, `h` and `.` for device, host and disk.
std::string picture(const TileHomes& homes) {
  std::string out;
  for (const TileHome home : homes.homes)
    out += home == TileHome::device ? 'd' : home == TileHome::host ? 'h' : '.';
  return out;
}

std::vector<PassTile> alike(std::size_t count, std::int64_t bytes = 100, double forward = 1,
                            double backward = 2) {
  return std::vector<PassTile>(count, {bytes, forward, backward});
}

std::int64_t bytes_of(const std::vector<PassTile>& tiles) {
  return std::accumulate(tiles.begin(), tiles.end(), std::int64_t{0},
                         [](std::int64_t sum, const PassTile& tile) { return sum + tile.bytes; });
}

TEST(TileHomes, are_spread_over_the_pass) {
  EXPECT_EQ(picture(homes_of(alike(8), 400)), "d.d.d.d.");
  EXPECT_EQ(picture(homes_of(alike(12), 300)), ".d...d...d..");
  EXPECT_EQ(picture(homes_of(alike(8), 400, 0, TilePlacement::turn)), "....dddd");
}

TEST(TileHomes, in_ram_are_spread_over_what_streams) {
  EXPECT_EQ(picture(homes_of(alike(8), 400, 200)), "dhd.dhd.");
  EXPECT_EQ(picture(homes_of(alike(8), 200, 200, TilePlacement::turn)), "....hhdd");
  const TileHomes homes = homes_of(alike(8), 400, 200);
  EXPECT_EQ(homes.device_bytes, 400);
  EXPECT_EQ(homes.host_bytes, 200);
  EXPECT_EQ(homes.disk_bytes, 200);
  EXPECT_EQ(homes.streamed_bytes(), 400);
}

TEST(TileHomes, what_a_step_needs_once_is_kept_last) {
  std::vector<PassTile> tiles = alike(8);
  for (std::size_t i = 6; i < 8; ++i) tiles[i].once = true;
  const TileHomes few = homes_of(tiles, 300);
  EXPECT_EQ(picture(few), "d.d.d...");
  EXPECT_EQ(few.disk_bytes, 500);
  EXPECT_EQ(few.disk_once_bytes, 200);
  const TileHomes most = homes_of(tiles, 400, 300);
  EXPECT_EQ(picture(most), "dhddhdh.");
  EXPECT_EQ(most.disk_once_bytes, 100);
  // Nothing of it crosses the link on the way back.
  const std::vector<PassTile> head = {{100, 0, 0, true}};
  EXPECT_DOUBLE_EQ(simulate_pass(head, {TileHome::host}, 100, 100), 1);
}

TEST(TileHomes, a_budget_of_all_streams_nothing_and_none_streams_all) {
  for (const TilePlacement placement : {TilePlacement::even, TilePlacement::turn}) {
    EXPECT_EQ(picture(homes_of(alike(5), 500, 0, placement)), "ddddd");
    EXPECT_EQ(picture(homes_of(alike(5), 900, 900, placement)), "ddddd");
    EXPECT_EQ(picture(homes_of(alike(5), 0, 0, placement)), ".....");
    EXPECT_EQ(picture(homes_of(alike(5), 0, 500, placement)), "hhhhh");
  }
  EXPECT_EQ(picture(homes_of({}, 10)), "");
}

TEST(TileHomes, computing_without_weights_needs_no_home) {
  const std::vector<PassTile> tiles = {{0, 5, 5}, {100, 1, 2}, {0, 5, 5}, {100, 1, 2}};
  EXPECT_EQ(picture(homes_of(tiles, 100)), "ddd.");
  EXPECT_EQ(homes_of(tiles, 100).device_bytes, 100);
}

TEST(TileHomes, a_budget_below_the_smallest_tile_names_the_smallest_that_works) {
  const std::vector<PassTile> tiles = {{300, 1, 1}, {70, 1, 1}, {500, 1, 1}};
  const auto device = std::get<BudgetTooSmall>(choose_homes(tiles, 69, 0));
  EXPECT_EQ(device.home, TileHome::device);
  EXPECT_EQ(device.smallest_bytes, 70);
  EXPECT_EQ(device.parts().what,
            "base.device_memory of 69 bytes holds no tile of weights, the smallest has 70 bytes");
  EXPECT_EQ(device.parts().mend,
            "Set base.device_memory: 70 or more, or 0 to keep no tiles there.");
  EXPECT_TRUE(std::holds_alternative<TileHomes>(choose_homes(tiles, 70, 0)));
  // The 70 bytes are on the device then: RAM's smallest is 300.
  const auto host = std::get<BudgetTooSmall>(choose_homes(tiles, 70, 299));
  EXPECT_EQ(host.home, TileHome::host);
  EXPECT_EQ(host.smallest_bytes, 300);
  EXPECT_THAT(host.parts().mend, testing::StartsWith("Set base.host_memory: 300 or more"));
  // With nothing left over RAM has nothing to hold, whatever its budget.
  EXPECT_TRUE(std::holds_alternative<TileHomes>(choose_homes(tiles, 870, 1)));
}

/// Tiles as a model has them: a few sizes, in a repeating order; or anything.
std::vector<PassTile> random_tiles(std::mt19937& random) {
  const auto pick = [&](std::int64_t low, std::int64_t high) {
    return std::uniform_int_distribution<std::int64_t>(low, high)(random);
  };
  const auto count = static_cast<std::size_t>(pick(1, 60));
  const int kind = static_cast<int>(pick(0, 2));
  const std::int64_t size = pick(1, 1000), other = pick(1, 1000);
  std::vector<PassTile> tiles(count);
  for (std::size_t i = 0; i < count; ++i) {
    tiles[i].bytes = kind == 0 ? size : kind == 1 ? (i % 5 == 0 ? other : size) : pick(1, 1000);
    tiles[i].forward_seconds = tiles[i].backward_seconds = 1;
  }
  return tiles;
}

TEST(TileHomes, keep_to_their_budgets_use_them_and_never_stream_more_for_a_larger_one) {
  std::mt19937 random(7);
  for (int round = 0; round < 3000; ++round) {
    const std::vector<PassTile> tiles = random_tiles(random);
    const std::int64_t all = bytes_of(tiles);
    const auto [smallest, largest] =
        std::minmax_element(tiles.begin(), tiles.end(),
                            [](const PassTile& a, const PassTile& b) { return a.bytes < b.bytes; });
    const auto budget = [&] {
      return std::uniform_int_distribution<std::int64_t>(largest->bytes,
                                                         std::max(all, largest->bytes))(random);
    };
    const std::int64_t small = budget(), more = std::max(small, budget()), host = budget();
    for (const TilePlacement placement : {TilePlacement::even, TilePlacement::turn}) {
      const TileHomes homes = homes_of(tiles, small, host, placement);
      EXPECT_LE(homes.device_bytes, small);
      EXPECT_LE(homes.host_bytes, host);
      EXPECT_EQ(homes.device_bytes + homes.streamed_bytes(), all);
      for (std::size_t i = 0; i < tiles.size(); ++i) {
        if (homes.homes[i] != TileHome::device) {
          EXPECT_GT(tiles[i].bytes, small - homes.device_bytes);
        }
        if (homes.homes[i] == TileHome::disk) {
          EXPECT_GT(tiles[i].bytes, host - homes.host_bytes);
        }
      }
      EXPECT_LE(homes_of(tiles, more, 0, placement).streamed_bytes(),
                homes_of(tiles, small, 0, placement).streamed_bytes() + largest->bytes);
    }
    EXPECT_EQ(homes_of(tiles, all).streamed_bytes(), 0);
    EXPECT_EQ(homes_of(tiles, 0).streamed_bytes(), all);
    if (smallest->bytes > 1) {
      EXPECT_TRUE(std::holds_alternative<BudgetTooSmall>(choose_homes(tiles, 1, 0)));
    }
  }
}

TEST(TileHomes, of_tiles_alike_stream_within_a_tile_of_even_everywhere) {
  for (std::size_t count = 1; count <= 40; ++count) {
    for (std::size_t kept = 1; kept <= count; ++kept) {
      const std::vector<PassTile> tiles = alike(count);
      const auto budget = static_cast<std::int64_t>(100 * kept);
      const TileHomes homes = homes_of(tiles, budget);
      EXPECT_EQ(homes.device_bytes, budget);
      double streamed = 0;
      for (std::size_t i = 0; i < count; ++i) {
        if (homes.homes[i] != TileHome::device) streamed += 100;
        const double even =
            100.0 * static_cast<double>((i + 1) * (count - kept)) / static_cast<double>(count);
        EXPECT_LE(std::abs(streamed - even), 100) << count << " " << kept << " " << i;
      }
    }
  }
}

TEST(TileHomes, of_tiles_that_differ_stream_within_the_largest_of_even) {
  // A layer of a store: two small pieces, then experts.
  std::vector<PassTile> tiles;
  for (int layer = 0; layer < 24; ++layer) {
    tiles.push_back({40, 1, 2});
    tiles.push_back({90, 1, 2});
    for (int expert = 0; expert < 16; ++expert) tiles.push_back({65, 1, 2});
  }
  const std::int64_t all = bytes_of(tiles);
  for (const double share : {0.05, 0.12, 0.3, 0.5, 0.77, 0.95}) {
    const auto budget = static_cast<std::int64_t>(share * static_cast<double>(all));
    const TileHomes homes = homes_of(tiles, budget);
    EXPECT_GT(homes.device_bytes, budget - 40);
    double streamed = 0, passed = 0;
    for (std::size_t i = 0; i < tiles.size(); ++i) {
      const auto bytes = static_cast<double>(tiles[i].bytes);
      passed += bytes;
      if (homes.homes[i] != TileHome::device) streamed += bytes;
      EXPECT_LE(std::abs(streamed - passed * (1 - share)), 2 * 90) << share << " " << i;
    }
  }
}

// ------------------------------------------------------------------ the simulated step

// ------------------------------------------------------------------ the ring's share of a budget

TEST(BudgetShare, gives_slots_a_quarter_at_most_and_what_streams_of_a_layer) {
  constexpr std::int64_t kGiB = std::int64_t{1} << 30;
  // All from disk: what comes on top in any case.
  EXPECT_EQ(share_budget(0, 200 * kGiB, 8 * kGiB).ring_bytes, kRingBytes);
  EXPECT_EQ(share_budget(0, 200 * kGiB, 8 * kGiB).resident_bytes, 0);
  // All of it held: nothing is taken.
  EXPECT_EQ(share_budget(200 * kGiB, 200 * kGiB, 8 * kGiB).resident_bytes, 200 * kGiB);
  // A quarter.
  const BudgetShare quarter = share_budget(8 * kGiB, 200 * kGiB, 8 * kGiB);
  EXPECT_EQ(quarter.ring_bytes, 2 * kGiB);
  EXPECT_EQ(quarter.ring_bytes + quarter.resident_bytes, 8 * kGiB + kRingBytes);
  // What streams of a layer: half of 8 GiB.
  const BudgetShare layer = share_budget(100 * kGiB, 200 * kGiB, 8 * kGiB);
  EXPECT_EQ(layer.ring_bytes, 4 * kGiB);
  EXPECT_EQ(layer.resident_bytes, 96 * kGiB + kRingBytes);
  // Where nearly all is held there is little to even out.
  const BudgetShare nearly = share_budget(196 * kGiB, 200 * kGiB, 8 * kGiB);
  EXPECT_EQ(nearly.ring_bytes, kRingBytes);
  EXPECT_EQ(nearly.resident_bytes, 196 * kGiB);
}

TEST(BudgetShare, never_takes_more_than_it_gives) {
  for (std::int64_t budget = 0; budget < 40'000; budget += 997) {
    for (const std::int64_t layer : {0, 500, 9'000}) {
      constexpr std::int64_t kMB = 1'000'000;
      const BudgetShare share = share_budget(budget * kMB, 30'000 * kMB, layer * kMB);
      EXPECT_EQ(share.resident_bytes, budget * kMB - (share.ring_bytes - kRingBytes));
      EXPECT_GE(share.ring_bytes, kRingBytes);
      EXPECT_GE(share.resident_bytes, budget * kMB / 4 * 3);
    }
  }
}

TEST(SimulatePass, follows_the_ring_by_hand) {
  // Two tiles of 10 s on the link, a ring of one: copies wait until the tile before is used up.
  const std::vector<PassTile> tiles = alike(2, 100, 1, 2);
  const std::vector<TileHome> streamed(2, TileHome::disk);
  // Forward: 0-10 copy, 10-11 compute; 11-21, 21-22. Backward: 22-32, 32-34; 34-44, 44-46.
  EXPECT_DOUBLE_EQ(simulate_pass(tiles, streamed, 10, 100), 46);
  // A ring of two: the second copy begins at 10, ends at 20; the third waits for the first slot,
  // free at 11, so it follows at 20; the fourth follows at 30 and is used until 42.
  EXPECT_DOUBLE_EQ(simulate_pass(tiles, streamed, 10, 200), 42);
  EXPECT_DOUBLE_EQ(simulate_pass(tiles, {TileHome::device, TileHome::device}, 10, 0), 6);
}

struct Case {
  const char* name;
  double link_over_compute;  ///< seconds of copying half of the tiles, over computing, both passes
};

TEST(SimulatePass, even_homes_beat_the_turn_where_link_and_compute_balance) {
  // 64 tiles, half of them resident, a backward pass that computes twice as long.
  const std::vector<PassTile> tiles = alike(64, 100, 1, 2);
  const TileHomes even = homes_of(tiles, 3200),
                  turn = homes_of(tiles, 3200, 0, TilePlacement::turn);
  ASSERT_EQ(even.streamed_bytes(), turn.streamed_bytes());
  const double compute = 64 * 3;
  for (const Case& at : {Case{"compute-bound", 0.25}, Case{"balanced", 1}, Case{"link-bound", 4}}) {
    const double link = at.link_over_compute * compute;
    for (const std::int64_t ring_tiles : {2, 8, 32}) {
      const auto seconds = [&](const TileHomes& homes) {
        return simulate_pass(tiles, homes.homes, 2 * 3200 / link, ring_tiles * 100);
      };
      const double by_even = seconds(even), by_turn = seconds(turn);
      if (std::getenv("TAILOR_SHOW") != nullptr) {
        std::printf("%-13s ring %2d tiles: even %.3f, turn %.3f of max(compute, link)\n", at.name,
                    static_cast<int>(ring_tiles), by_even / std::max(compute, link),
                    by_turn / std::max(compute, link));
      }
      EXPECT_GE(by_even, std::max(compute, link) * (1 - 1e-9));
      // A ring that holds half of the pass hides the placement where nothing but the link counts.
      EXPECT_LE(by_even, by_turn * (ring_tiles < 32 ? 1 + 1e-9 : 1.005))
          << at.name << " " << ring_tiles;
      if (at.link_over_compute == 1) {
        EXPECT_GT(by_turn / by_even, ring_tiles == 2 ? 1.25 : 1.1);
      }
    }
  }
}

/// Maverick's step on an A100 40 GB: in every MoE layer attention and dense MLPs, then 128 experts.
struct Maverick {
  std::vector<PassTile> tiles;
  StreamEstimate time;
  double expert_bytes = 0;
};
Maverick maverick(double tokens, int ring_slots) {
  const fs::path recipes = fs::path(TAILOR_SOURCE_DIR) / "recipes";
  const ModelFacts model =
      read_model_facts("meta-llama/Llama-4-Maverick-17B-128E-Instruct", recipes / "models");
  RecipeFile file = read_recipe(recipes / "maverick-a100.yaml", {});
  resolve(file, model.traits());
  const Geometry geometry = stream_geometry(file.recipe, model, StepSchedule{}, 1);
  const Node node = stream_node(find_machine("a100-40gb", recipes / "machines"), 1);
  StepOptions options;
  options.tokens = tokens;
  options.micro_tokens = 4096;
  options.ring_slots = ring_slots;
  Maverick out;
  out.time = estimate(geometry, node, options);
  out.expert_bytes = geometry.base.expert + 2 * static_cast<double>(geometry.lora.per_expert);
  const auto layers = static_cast<double>(model.moe_layers);
  const double experts = layers * static_cast<double>(model.experts);
  const double seconds = tokens / node.flops_per_second;
  const double forward = geometry.flops.forward_other * seconds,
               backward = geometry.flops.backward_other * seconds;
  for (std::int64_t layer = 0; layer < model.moe_layers; ++layer) {
    out.tiles.push_back({0, forward / layers, backward / layers});
    for (std::int64_t expert = 0; expert < model.experts; ++expert) {
      out.tiles.push_back({std::llround(out.expert_bytes),
                           (out.time.compute_forward - forward) / experts,
                           (out.time.compute_backward - backward) / experts});
    }
  }
  return out;
}

TEST(SimulatePass, a_layers_attention_needs_a_ring_that_holds_what_comes_meanwhile) {
  // estimate() lets the link run all the time. While a layer computes what is no expert the link
  // fills the ring and stops, so a ring of 16 experts falls short; a larger one costs resident
  // experts and still wins.
  for (const double tokens : {8192.0, 32'768.0, 65'536.0}) {
    std::map<int, double> took;
    double unhindered = 0;
    for (const int slots : {4, 16, 32, 64, 96, 128}) {
      const Maverick step = maverick(tokens, slots);
      const auto budget = static_cast<std::int64_t>(step.time.resident_fraction *
                                                    static_cast<double>(bytes_of(step.tiles)));
      const TileHomes even = homes_of(step.tiles, budget),
                      turn = homes_of(step.tiles, budget, 0, TilePlacement::turn);
      const double link = static_cast<double>(even.streamed_bytes()) / 25e9;
      if (slots == 16) {
        unhindered =
            std::max(link, step.time.compute_forward) + std::max(link, step.time.compute_backward);
      }
      const auto ring = static_cast<std::int64_t>(slots * (step.expert_bytes + 1));
      took[slots] = simulate_pass(step.tiles, even.homes, 25e9, ring);
      const double by_turn = simulate_pass(step.tiles, turn.homes, 25e9, ring);
      EXPECT_LE(took[slots], by_turn * 1.001);
      if (std::getenv("TAILOR_SHOW") != nullptr) {
        std::printf(
            "%6.0f tokens, ring %3d experts (%.2f GB), %4.1f %% resident: even %.2f s, turn "
            "%.2f s; link %.2f s a pass, compute %.2f + %.2f s\n",
            tokens, slots, static_cast<double>(ring) / 1e9, 100 * step.time.resident_fraction,
            took[slots], by_turn, link, step.time.compute_forward, step.time.compute_backward);
      }
    }
    EXPECT_GT(took[16], 1.09 * unhindered) << tokens;
    EXPECT_LT(took[96], 1.05 * unhindered) << tokens;
  }
}

}  // namespace
}  // namespace tailor
