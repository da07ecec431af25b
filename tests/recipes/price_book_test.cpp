#include "recipes/price_book.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "base/error.h"
#include "recipes/scalars.h"

namespace tailor {
namespace {

const std::string kHead = "version: 1\ncurrency: USD\nprices:\n";

std::string row(const std::string& id, const std::string& price, const std::string& dates,
                const std::string& more = "") {
  return "  - {id: " + id +
         ", provider: p, sku: s, gpus: 1, tier: spot, unit: gpu_hour, price: " + price + ", " +
         dates + more + ", source: test}\n";
}

std::string error_of(const std::string& text) {
  try {
    PriceBook::read_text(text, "prices.yaml");
  } catch (const Error& error) {
    EXPECT_EQ(error.exit_code(), 65);
    return to_text(error);
  }
  return "no error";
}

TEST(Micros, are_exact) {
  EXPECT_EQ(parse_micros("1.19"), 1'190'000);
  EXPECT_EQ(parse_micros("0.000001"), 1);
  EXPECT_EQ(parse_micros("0.1"), 100'000);
  EXPECT_EQ(parse_micros("1000000000"), 1'000'000'000'000'000);
  EXPECT_EQ(parse_micros("0"), 0);
  for (const char* bad :
       {"", ".5", "1.", "1.1234567", "-1", "+1", "1e3", "01", "1,000", "1000000001", "1 ", "$1"}) {
    EXPECT_FALSE(parse_micros(bad).has_value()) << bad;
  }
  for (const std::int64_t micros : {0LL, 1LL, 1'190'000LL, 100'000LL, 123'456'789LL}) {
    EXPECT_EQ(parse_micros(micros_text(micros)), micros);
  }
}

TEST(PriceBook, that_is_shipped_prices_the_profiles) {
  const PriceBook book = PriceBook::read(fs::path(TAILOR_SOURCE_DIR) / "recipes/prices.yaml");
  const std::int64_t march = *date_ms("2026-03-15");
  const PriceQuote a100 = quote(book, {}, "a100-40gb-pcie", "spot", march);
  EXPECT_EQ(a100.usd_micros_per_device_hour, 1'190'000);
  EXPECT_EQ(a100.kind, "spot");
  EXPECT_EQ(quote(book, {}, "h100-80gb-sxm", "spot", march).usd_micros_per_device_hour, 2'690'000);
  EXPECT_EQ(quote(book, {}, "h100-80gb-sxm", "", march).usd_micros_per_device_hour, 4'760'000);
  EXPECT_EQ(quote(book, {}, "cpu-2core", "", march).usd_micros_per_device_hour, 100'000);
  const PriceQuote none = quote(book, {}, "h200-141gb-sxm", "", march);
  EXPECT_FALSE(none.usd_micros_per_device_hour.has_value());
  EXPECT_THAT(none.reason, testing::HasSubstr("h200-141gb-sxm"));
}

TEST(PriceBook, changes_price_on_the_day) {
  const PriceBook book =
      PriceBook::read_text(kHead + row("old", "\"1.00\"", "from: 2026-01-01, to: 2026-02-01") +
                               row("new", "\"2.00\"", "from: 2026-02-01"),
                           "prices.yaml");
  const std::int64_t february = *date_ms("2026-02-01");
  EXPECT_EQ(quote(book, {}, "s", "spot", february - 1).id, "old");
  EXPECT_EQ(quote(book, {}, "s", "spot", february).id, "new");
  EXPECT_FALSE(
      quote(book, {}, "s", "spot", *date_ms("2025-12-31")).usd_micros_per_device_hour.has_value());
  EXPECT_THROW(quote(book, {PriceChoice::Kind::id, "old", 0}, "", "", february), Error);
  EXPECT_THROW(quote(book, {PriceChoice::Kind::id, "odl", 0}, "", "", february), Error);
}

TEST(PriceBook, splits_a_node_price_over_its_devices) {
  const PriceBook book =
      PriceBook::read_text(kHead +
                               "  - {id: node, provider: p, sku: s, gpus: 8, tier: spot, unit: "
                               "gpu_hour, price: \"9.52\", from: 2026-01-01, "
                               "source: t}\n",
                           "p");
  EXPECT_EQ(quote(book, {}, "s", "", *date_ms("2026-03-01")).usd_micros_per_device_hour, 1'190'000);
}

TEST(PriceBook, joined_with_the_users_prefers_theirs_and_refuses_contradictions) {
  const std::int64_t day = *date_ms("2026-03-05");
  const PriceBook ours =
      PriceBook::read_text(kHead + row("shipped", "\"2.00\"", "from: 2026-01-01"), "ours.yaml");
  const std::string mine =
      "{id: mine, provider: me, sku: x, tier: spot, unit: gpu_hour, price: "
      "\"1.50\", from: 2026-02-01, source: s}";
  const PriceBook theirs = PriceBook::read_text(kHead + "  - " + mine + "\n", "mine.yaml");
  const std::string sku = ours.prices()[0].sku;
  EXPECT_EQ(PriceBook::join({theirs, ours}).find("mine")->book, "mine.yaml");
  EXPECT_EQ(PriceBook::join({theirs, ours}).prices().size(), 2U);
  EXPECT_NE(PriceBook::join({theirs, ours}).sha256(), ours.sha256());
  EXPECT_EQ(quote(PriceBook::join({theirs, ours}), {}, "x", "spot", day).id, "mine");
  const PriceBook owned = PriceBook::read_text(
      kHead + "  - {id: own, provider: me, sku: " + sku +
          ", tier: owned, unit: gpu_hour, price: \"0.03\", from: 2026-02-01, source: s}\n",
      "own.yaml");
  EXPECT_EQ(quote(PriceBook::join({owned, ours}), {}, sku, "spot", day).id, "own");
  EXPECT_EQ(quote(PriceBook::join({ours, owned}), {}, sku, "spot", day).id, "shipped");
  try {
    PriceBook::join({ours, PriceBook::read_text(
                               kHead + row("other", "\"3.00\"", "from: 2026-02-01") +
                                   row("shipped", "\"3.00\"", "from: 2025-01-01, to: 2025-02-01"),
                               "mine.yaml")});
    FAIL();
  } catch (const Error& error) {
    EXPECT_EQ(error.fault(), Fault::bad_file);
    EXPECT_EQ(error.parts().what, "price books contradict each other in 2 prices");
    EXPECT_NE(error.parts().where.find("other of mine.yaml overlaps with shipped of ours.yaml"),
              std::string::npos);
    EXPECT_NE(error.parts().where.find("shipped of mine.yaml is an id of ours.yaml"),
              std::string::npos);
  }
  // Why there is no price: almost that name, or other days.
  EXPECT_NE(quote(theirs, {}, "y", "spot", day).reason.find("the nearest is 'x'"),
            std::string::npos);
  EXPECT_NE(quote(ours, {}, sku, "spot", *date_ms("2025-03-05")).reason.find("from 2026-01-01"),
            std::string::npos);
}

TEST(PriceBook, refuses_overlaps_duplicates_and_loose_amounts) {
  EXPECT_THAT(error_of(kHead + row("a", "\"1\"", "from: 2026-01-01") +
                       row("b", "\"2\"", "from: 2026-02-01")),
              testing::HasSubstr("b overlaps with a of line 4"));
  EXPECT_THAT(error_of(kHead + row("a", "\"1\"", "from: 2026-01-01, to: 2026-01-02") +
                       row("a", "\"2\"", "from: 2026-02-01")),
              testing::HasSubstr("duplicate id 'a'"));
  EXPECT_THAT(error_of(kHead + row("a", "1.19", "from: 2026-01-01")),
              testing::HasSubstr("in quotes"));
  EXPECT_THAT(error_of(kHead + row("a", "\"1.1234567\"", "from: 2026-01-01")),
              testing::HasSubstr("six behind"));
  EXPECT_THAT(error_of(kHead + row("a", "\"1\"", "from: 2026-02-30")),
              testing::HasSubstr("a day is needed"));
  EXPECT_THAT(error_of(kHead + row("a", "\"1\"", "from: 2026-02-02, to: 2026-02-02")),
              testing::HasSubstr("not after its start"));
  EXPECT_THAT(error_of(kHead + row("a", "\"1\"", "from: 2026-02-02", ", prise: 1")),
              testing::HasSubstr("Did you mean price?"));
  EXPECT_THAT(error_of("version: 2\nprices: []\n"), testing::HasSubstr("version must be 1"));
}

TEST(Dates, are_days_that_exist) {
  EXPECT_EQ(date_ms("1970-01-02"), 86'400'000);
  for (const char* bad :
       {"2026-02-29", "2026-13-01", "2026-1-1", "26-01-01", "2026-01-01T00", "", "2026/01/01"}) {
    EXPECT_FALSE(date_ms(bad).has_value()) << bad;
  }
}

}  // namespace
}  // namespace tailor
