#include "data/store/synthetic_matrix.h"

#include <gmock/gmock.h>

#include <cmath>

#include "data/quant/codec.h"

namespace tailor {
namespace {

constexpr std::uint64_t kSeed = 11;

const std::vector<WeightFormat>& all_formats() {
  static const std::vector<WeightFormat> formats = {WeightFormat::int4(128), WeightFormat::nf4(),
                                                    WeightFormat::fp8_blocks(),
                                                    WeightFormat::bf16()};
  return formats;
}

/// A matrix of its own in a unit of its own.
struct Drawn {
  std::vector<MatrixPlace> places;
  std::vector<std::byte> unit;

  Drawn(const WeightFormat& format, std::int64_t rows, std::int64_t columns,
        const UnitId& id = {UnitKind::expert, 1, 3}, MatrixRole role = MatrixRole::up,
        std::uint64_t seed = kSeed) {
    MatrixPlace place{};
    place.role = role;
    place.format = format;
    place.rows = rows;
    place.columns = columns;
    places.push_back(place);
    unit.resize(static_cast<std::size_t>(place_matrices(places)));
    const SyntheticMatrix matrix(id, places[0], seed);
    matrix.draw_codes(0, codes());
    matrix.draw_scales(0, scales());
  }
  std::span<std::byte> codes() {
    return std::span(unit).subspan(static_cast<std::size_t>(places[0].codes_offset),
                                   static_cast<std::size_t>(places[0].codes_bytes));
  }
  std::span<std::byte> scales() {
    return std::span(unit).subspan(static_cast<std::size_t>(places[0].scales_offset),
                                   static_cast<std::size_t>(places[0].scales_bytes));
  }
  std::vector<float> decoded() const {
    const MatrixPlace& place = places[0];
    std::vector<float> out(static_cast<std::size_t>(place.rows * place.columns));
    decode_rows(place.in(unit.data()), 0, place.rows, out.data());
    return out;
  }
};

TEST(SyntheticMatrix, DecodesToANormalDistributionOfOneOverColumns) {
  constexpr std::int64_t kRows = 1024, kColumns = 2048;
  for (const WeightFormat& format : all_formats()) {
    SCOPED_TRACE(format_text(format));
    const std::vector<float> values = Drawn(format, kRows, kColumns).decoded();
    const double count = static_cast<double>(values.size()),
                 sigma = 1 / std::sqrt(double{kColumns});
    double sum = 0, squares = 0, fourth = 0, beyond = 0, neighbours = 0, far = 0;
    for (std::size_t i = 0; i < values.size(); ++i) {
      const double value = double{values[i]} / sigma;
      sum += value;
      squares += value * value;
      fourth += value * value * value * value;
      if (std::abs(value) > 2) ++beyond;
      if (i > 0) neighbours += value * double{values[i - 1]} / sigma;
      if (i >= kColumns) far += value * double{values[i - kColumns]} / sigma;
    }
    EXPECT_NEAR(sum / count, 0, 0.01);
    EXPECT_NEAR(squares / count, 1, 0.03);
    // 3 of a normal distribution; four bits cut the tails off.
    EXPECT_GT(fourth / count, 2.6);
    EXPECT_LT(fourth / count, 3.2);
    EXPECT_NEAR(beyond / count, 0.0455, 0.015);
    EXPECT_NEAR(neighbours / count, 0, 0.01);
    EXPECT_NEAR(far / count, 0, 0.005);
  }
}

TEST(SyntheticMatrix, Int4AndNf4UseEveryCodeAndScalesVary) {
  for (const WeightFormat& format : {WeightFormat::int4(128), WeightFormat::nf4()}) {
    SCOPED_TRACE(format_text(format));
    Drawn drawn(format, 256, 256);
    std::vector<int> counts(16), scale_bytes(256);
    for (const std::byte byte : drawn.codes()) {
      ++counts[std::to_integer<std::size_t>(byte & std::byte{15})];
      ++counts[std::to_integer<std::size_t>(byte >> 4U)];
    }
    EXPECT_THAT(counts, testing::Each(testing::Gt(0)));
    for (const std::byte byte : drawn.scales()) ++scale_bytes[std::to_integer<std::size_t>(byte)];
    EXPECT_GT(std::count_if(scale_bytes.begin(), scale_bytes.end(), [](int n) { return n > 0; }),
              30);
  }
}

TEST(SyntheticMatrix, PiecesAreTheWhole) {
  for (const WeightFormat& format : all_formats()) {
    for (const auto& [rows, columns] : {std::pair{33, 65}, {64, 200}, {7, 20}}) {
      SCOPED_TRACE(format_text(format) + " " + std::to_string(rows) + " x " +
                   std::to_string(columns));
      Drawn whole(format, rows, columns);
      const SyntheticMatrix matrix({UnitKind::expert, 1, 3}, whole.places[0], kSeed);
      const auto pieces = [&](std::span<std::byte> wanted, std::size_t step, auto draw) {
        std::vector<std::byte> found(wanted.size());
        for (std::size_t at = 0; at < found.size(); at += step) {
          draw(static_cast<std::int64_t>(at),
               std::span(found).subspan(at, std::min(step, found.size() - at)));
        }
        EXPECT_THAT(found, testing::ElementsAreArray(wanted.begin(), wanted.end()));
      };
      for (const std::size_t step : {std::size_t{64}, std::size_t{192}}) {
        pieces(whole.codes(), step, [&](std::int64_t begin, std::span<std::byte> out) {
          matrix.draw_codes(begin, out);
        });
        pieces(whole.scales(), step, [&](std::int64_t begin, std::span<std::byte> out) {
          matrix.draw_scales(begin, out);
        });
      }
    }
  }
}

TEST(SyntheticMatrix, UnusedBitsAreAsTheFormatsWantThem) {
  Drawn int4(WeightFormat::int4(32), 5, 45);  // 6 words a row, 5 codes in the last
  std::size_t used = 0;
  for (std::size_t row = 0; row < 5; ++row) {
    std::uint32_t last;
    std::memcpy(&last, int4.codes().data() + (row * 6 + 5) * 4, sizeof last);
    EXPECT_EQ(last >> 20U, 0U);
    used += (last & 0xFFFFFU) != 0 ? 1U : 0U;
  }
  EXPECT_EQ(used, 5U);
  Drawn nf4(WeightFormat::nf4(), 5, 45);
  EXPECT_EQ(nf4.codes().back() & std::byte{15}, std::byte{7});
}

TEST(SyntheticMatrix, EveryNameHasNumbersOfItsOwn) {
  const WeightFormat format = WeightFormat::int4(128);
  Drawn drawn(format, 16, 128);
  const UnitId same{UnitKind::expert, 1, 3};
  Drawn again(format, 16, 128);
  EXPECT_EQ(drawn.unit, again.unit);
  std::vector<Drawn> others = {
      Drawn(format, 16, 128, {UnitKind::expert, 1, 4}),
      Drawn(format, 16, 128, {UnitKind::expert, 2, 3}),
      Drawn(format, 16, 128, {UnitKind::feed_forward, 1, 3}),
      Drawn(format, 16, 128, same, MatrixRole::gate),
      Drawn(format, 16, 128, same, MatrixRole::up, kSeed + 1),
      Drawn(format, 16, 128, same, MatrixRole::up, kSeed + (std::uint64_t{1} << 32U))};
  for (Drawn& other : others) {
    std::size_t equal = 0;
    for (std::size_t i = 0; i < drawn.codes().size(); ++i) {
      equal += drawn.codes()[i] == other.codes()[i] ? 1U : 0U;
    }
    EXPECT_LT(equal, drawn.codes().size() / 8);
  }
}

TEST(SyntheticMatrix, NormsAreOne) {
  for (const MatrixRole role :
       {MatrixRole::input_norm, MatrixRole::post_norm, MatrixRole::final_norm}) {
    const Drawn drawn(WeightFormat::bf16(), 1, 100, {UnitKind::attention, 0, 0}, role);
    EXPECT_THAT(drawn.decoded(), testing::Each(1.0F));
  }
}

}  // namespace
}  // namespace tailor
