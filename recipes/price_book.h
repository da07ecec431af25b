#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/file.h"
#include "recipes/recipe.h"

namespace tailor {

/// One row of a price book: what a unit costs, from when to when, and who says so.
struct Price {
  std::string id;        ///< "runpod/h100-80gb/on-demand/2026-03"
  std::string provider;  ///< runpod, api, example, ...
  std::string sku;       ///< h100-80gb-sxm
  std::string tier;      ///< spot, on-demand, reserved, owned, list
  std::string unit;      ///< gpu_hour, node_hour, mtok_in, mtok_out, mtok_cached, gb_month, kwh
  std::string variant, region;
  std::int64_t gpus = 1;              ///< devices the amount pays for
  std::int64_t usd_micros = 0;        ///< per unit
  std::int64_t from_ms = 0;           ///< first millisecond it holds, UTC
  std::optional<std::int64_t> to_ms;  ///< first one it does not hold; null: still in force
  std::int64_t step_s = 1;            ///< billing goes by whole steps of this many seconds
  std::string source;                 ///< where the amount was read
  std::string book{};                 ///< the file it stands in

  bool in_force(std::int64_t unix_ms) const {
    return unix_ms >= from_ms && (!to_ms || unix_ms < *to_ms);
  }
  /// Micro-dollars of one device for an hour.
  std::int64_t usd_micros_per_device_hour() const { return (usd_micros + gpus / 2) / gpus; }
};

/// Prices as read from prices.yaml. Rows are never edited, only closed and followed by a new one.
class PriceBook {
 public:
  PriceBook() = default;

  /// Reads a price book strictly. Amounts are decimal strings, taken exactly. Throws
  /// Error{bad_file} with every problem: unknown keys, duplicate ids, amounts that are no decimals,
  /// impossible dates, periods of the same product that overlap.
  static PriceBook read(const fs::path& path);
  static PriceBook read_text(std::string_view text, const std::string& name);
  /// Several books as one; of prices that would do equally, those of an earlier book come first.
  /// Throws Error{bad_file} also where they share an id, or periods of the same product overlap.
  static PriceBook join(const std::vector<PriceBook>& books);

  const std::vector<Price>& prices() const noexcept { return prices_; }
  const std::string& sha256() const noexcept { return sha256_; }  ///< of the file, or of all
  const std::string& name() const noexcept { return name_; }      ///< of the file, or the files
  const Price* find(std::string_view id) const;

  /// Device-hour prices of `sku` in force at `unix_ms`, in the book's order.
  std::vector<const Price*> find_sku(std::string_view sku, std::int64_t unix_ms) const;

 private:
  std::vector<Price> prices_;
  std::string name_, sha256_;
};

/// What a device hour costs a run, or why that is not known.
struct PriceQuote {
  std::optional<std::int64_t> usd_micros_per_device_hour;
  std::string reason;  ///< why there is none: "no price for sku 'cpu-8core' in the price book"
  std::string id, kind, source;  ///< kind: the tier, or "recipe"
};

/// The price of `choice` at a date. Automatic: by `sku`, the tier `tier` first, then on-demand,
/// then what there is. Throws Error{usage} for an id that is not in the book (nearest named) or not
/// in force.
PriceQuote quote(const PriceBook& book, const PriceChoice& choice, const std::string& sku,
                 const std::string& tier, std::int64_t unix_ms);

/// Start of a day, "2026-03-01", UTC, in milliseconds; nothing when it is no date.
std::optional<std::int64_t> date_ms(std::string_view text);

}  // namespace tailor
