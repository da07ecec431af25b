#include "recipes/price_book.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <memory>
#include <tuple>

#include "base/clock.h"
#include "base/text.h"
#include "recipes/fields.h"
#include "recipes/yaml.h"

namespace tailor {
namespace {

const std::vector<std::string> kKeys = {"id",     "provider", "sku",   "gpus", "tier",
                                        "unit",   "price",    "from",  "to",   "step_s",
                                        "source", "variant",  "region"};
const std::vector<std::string> kTiers = {"spot", "on-demand", "reserved", "owned", "list"};
const std::vector<std::string> kUnits = {"gpu_hour",    "node_hour", "mtok_in", "mtok_out",
                                         "mtok_cached", "gb_month",  "kwh"};

std::string day_text(std::int64_t unix_ms) { return utc_text(unix_ms).substr(0, 10); }

class RowReader {
 public:
  RowReader(const YamlNode& row, Problems& problems) : row_(row), problems_(problems) {}

  std::string text(const std::string& key, bool required) {
    const YamlNode* node = find(key, required);
    return node == nullptr ? "" : read_string(*node, key, problems_).value_or("");
  }
  std::string word(const std::string& key, const std::vector<std::string>& words) {
    const YamlNode* node = find(key, true);
    if (node == nullptr) return "";
    const auto index = read_word(*node, key, words, problems_);
    return index ? words[*index] : "";
  }
  std::int64_t integer(const std::string& key, std::int64_t fallback) {
    const YamlNode* node = find(key, false);
    constexpr std::int64_t kMost = 1'000'000;
    return node == nullptr ? fallback
                           : read_integer(*node, key, 1, kMost, problems_).value_or(fallback);
  }
  std::int64_t amount() {
    const YamlNode* node = find("price", true);
    if (node == nullptr) return 0;
    if (!node->quoted) {
      problems_.add("price is " + node->shown() + ", an amount in quotes is needed", node->place,
                    "price",
                    "Write price: \"" + node->text + "\": amounts are read digit by digit.");
      return 0;
    }
    return read_usd(*node, "price", true, problems_).value_or(0);
  }
  std::optional<std::int64_t> date(const std::string& key, bool required) {
    const YamlNode* node = find(key, required);
    if (node == nullptr) return std::nullopt;
    const auto day = node->kind == YamlNode::Kind::scalar ? date_ms(node->text) : std::nullopt;
    if (!day) {
      problems_.add(key + " is " + node->shown() + ", a day is needed", node->place, key,
                    "Write it as 2026-03-01.");
    }
    return day;
  }

 private:
  const YamlNode* find(const std::string& key, bool required) {
    const YamlNode* node = row_.find(key);
    if (required && node == nullptr) {
      problems_.add("a price without " + key, row_.place, key, "Add " + key + ": ... to this row.");
    }
    return !required && node != nullptr && node->is_null() ? nullptr : node;
  }
  const YamlNode& row_;
  Problems& problems_;
};

Price read_row(const YamlNode& row, Problems& problems) {
  Price price;
  if (!row.is_map()) {
    problems.add("a price is a map, found " + row.shown(), row.place, "",
                 "Write {id: ..., sku: ..., ...}.");
    return price;
  }
  refuse_unknown_keys(row, "prices", kKeys, problems);
  RowReader read(row, problems);
  price.id = read.text("id", true);
  price.provider = read.text("provider", true);
  price.sku = read.text("sku", true);
  price.tier = read.word("tier", kTiers);
  price.unit = read.word("unit", kUnits);
  price.variant = read.text("variant", false);
  price.region = read.text("region", false);
  price.gpus = read.integer("gpus", 1);
  price.usd_micros = read.amount();
  const auto from = read.date("from", true);
  price.from_ms = from.value_or(0);
  price.to_ms = read.date("to", false);
  price.step_s = read.integer("step_s", 1);
  price.source = read.text("source", true);
  if (from && price.to_ms && *price.to_ms <= *from) {
    problems.add(
        "the price ends on " + day_text(*price.to_ms) + ", not after its start " + day_text(*from),
        row.place, price.id,
        "Write a later day for `to`: the first one on which it no longer holds.");
  }
  return price;
}

bool overlap(const Price& a, const Price& b) {
  const auto product = [](const Price& p) {
    return std::tie(p.provider, p.sku, p.tier, p.unit, p.variant, p.region);
  };
  return product(a) == product(b) && (!a.to_ms || b.from_ms < *a.to_ms) &&
         (!b.to_ms || a.from_ms < *b.to_ms);
}

}  // namespace

std::optional<std::int64_t> date_ms(std::string_view text) {
  if (text.size() != 10 || text[4] != '-' || text[7] != '-') return std::nullopt;
  std::array<int, 3> parts{};
  constexpr std::array<std::array<std::size_t, 2>, 3> kSpans = {{{0, 4}, {5, 2}, {8, 2}}};
  for (std::size_t i = 0; i < 3; ++i) {
    for (const char c : text.substr(kSpans[i][0], kSpans[i][1])) {
      if (c < '0' || c > '9') return std::nullopt;
      parts[i] = parts[i] * 10 + (c - '0');
    }
  }
  const std::chrono::year_month_day day{std::chrono::year{parts[0]},
                                        std::chrono::month{static_cast<unsigned>(parts[1])},
                                        std::chrono::day{static_cast<unsigned>(parts[2])}};
  if (!day.ok() || parts[0] < 1970) return std::nullopt;
  return std::chrono::sys_days{day}.time_since_epoch().count() * std::int64_t{86'400'000};
}

PriceBook PriceBook::read(const fs::path& path) {
  return read_text(read_source(path.string(), "price book")->text, path.string());
}

PriceBook PriceBook::read_text(std::string_view text, const std::string& name) {
  auto source = std::make_shared<TextSource>(TextSource{name, std::string(text), false});
  Problems problems;
  PriceBook book;
  book.name_ = name;
  book.sha256_ = sha256_hex(text);
  const std::optional<YamlNode> root = parse_yaml(source, problems);
  std::vector<Place> places;
  if (root && !root->is_map()) {
    problems.add("a price book is a map of keys, found " + root->shown(), root->place, "",
                 "Write version, currency and prices.");
  } else if (root) {
    refuse_unknown_keys(*root, "", {"version", "currency", "prices"}, problems);
    const YamlNode* version = root->find("version");
    if (version == nullptr || !is_word(*version, "1")) {
      problems.add("version must be 1", version != nullptr ? version->place : root->place,
                   "version", "Write version: 1.");
    }
    const YamlNode* currency = root->find("currency");
    if (currency == nullptr || currency->text != "USD") {
      problems.add("currency must be USD", currency != nullptr ? currency->place : root->place,
                   "currency", "Write currency: USD, and amounts in it.");
    }
    const YamlNode* rows = root->find("prices");
    if (rows == nullptr || rows->kind != YamlNode::Kind::sequence) {
      problems.add("prices must be a list", rows != nullptr ? rows->place : root->place, "prices",
                   "Write one row a price below `prices:`.");
    } else {
      for (const YamlNode& row : rows->items) {
        book.prices_.push_back(read_row(row, problems));
        book.prices_.back().book = name;
        places.push_back(row.place);
      }
    }
  }
  for (std::size_t i = 0; i < book.prices_.size() && !problems.any(); ++i) {
    for (std::size_t k = 0; k < i; ++k) {
      const Price& price = book.prices_[i];
      const Price& other = book.prices_[k];
      if (price.id == other.id) {
        problems.add("duplicate id '" + price.id + "'", places[i], "id",
                     "It stands on line " + std::to_string(places[k].line) +
                         " already; close that row with `to` and give this one its own id.");
      } else if (overlap(price, other)) {
        problems.add(
            price.id + " overlaps with " + other.id + " of line " + std::to_string(places[k].line),
            places[i], price.id,
            "Close the older row: to: " + day_text(std::max(price.from_ms, other.from_ms)) + ".");
      }
    }
  }
  problems.throw_if_any(Fault::bad_file, "price book " + name,
                        "Mend them all; `tailor prices check` reads the book again.");
  return book;
}

PriceBook PriceBook::join(const std::vector<PriceBook>& books) {
  if (books.size() == 1) return books.front();
  PriceBook out;
  std::string digests;
  std::string problems;
  int count = 0;
  for (const PriceBook& book : books) {
    for (const Price& price : book.prices_) {
      for (const Price& other : out.prices_) {
        const bool same_id = price.id == other.id;
        if (other.book == price.book || (!same_id && !overlap(price, other))) continue;
        ++count;
        problems += (problems.empty() ? "" : "\n") + price.id + " of " + price.book +
                    (same_id ? " is an id of " : " overlaps with " + other.id + " of ") +
                    other.book;
      }
    }
    out.prices_.insert(out.prices_.end(), book.prices_.begin(), book.prices_.end());
    out.name_ += (out.name_.empty() ? "" : ", ") + book.name_;
    digests += book.sha256_;
  }
  if (count > 0) {
    throw Error(Fault::bad_file,
                {"price books contradict each other in " + std::to_string(count) +
                     (count == 1 ? " price" : " prices"),
                 problems,
                 "Give your prices ids and a provider of your own (provider: my-company); the "
                 "automatic choice prefers your book."});
  }
  out.sha256_ = sha256_hex(digests);
  return out;
}

const Price* PriceBook::find(std::string_view id) const {
  for (const Price& price : prices_) {
    if (price.id == id) return &price;
  }
  return nullptr;
}

std::vector<const Price*> PriceBook::find_sku(std::string_view sku, std::int64_t unix_ms) const {
  std::vector<const Price*> found;
  for (const Price& price : prices_) {
    if (price.sku == sku && price.unit == "gpu_hour" && price.in_force(unix_ms))
      found.push_back(&price);
  }
  return found;
}

namespace {

/// What comes closest: the days on which the SKU has prices, or SKUs of almost that name.
std::string near_price(const PriceBook& book, const std::string& sku) {
  std::vector<std::string> skus;
  std::string days;
  for (const Price& price : book.prices()) {
    if (price.unit != "gpu_hour") continue;
    skus.push_back(price.sku);
    if (price.sku != sku) continue;
    days += (days.empty() ? " (it has one from " : ", from ") + day_text(price.from_ms);
    if (price.to_ms) days += " until " + day_text(*price.to_ms);
  }
  if (!days.empty()) return days + ")";
  const std::string near = nearest_name(sku, skus);
  return near.empty() ? "" : " (the nearest is '" + near + "')";
}

}  // namespace

PriceQuote quote(const PriceBook& book, const PriceChoice& choice, const std::string& sku,
                 const std::string& tier, std::int64_t unix_ms) {
  if (choice.kind == PriceChoice::Kind::usd) {
    return {choice.usd_micros_per_gpu_hour, "", "recipe", "recipe", "cost.price of the recipe"};
  }
  const auto of = [](const Price& price) {
    return PriceQuote{price.usd_micros_per_device_hour(), "", price.id, price.tier, price.source};
  };
  if (choice.kind == PriceChoice::Kind::id) {
    const Price* price = book.find(choice.id);
    if (price == nullptr) {
      std::vector<std::string> ids;
      for (const Price& known : book.prices()) ids.push_back(known.id);
      const std::string near = nearest_name(choice.id, ids);
      throw Error(
          Fault::usage,
          {"no price '" + choice.id + "' in the price book", "cost.price",
           near.empty() ? "`tailor prices ls` lists them; or write {usd_per_gpu_hour: 1.19}."
                        : "Did you mean " + near + "? `tailor prices ls` lists them."});
    }
    if (price->unit != "gpu_hour") {
      throw Error(Fault::usage,
                  {"price " + price->id + " is per " + price->unit + ", per gpu_hour is needed",
                   "cost.price", "Name a price of a device hour; `tailor prices ls` lists them."});
    }
    if (!price->in_force(unix_ms)) {
      throw Error(Fault::usage,
                  {"price " + price->id + " holds from " + day_text(price->from_ms) +
                       (price->to_ms ? " until " + day_text(*price->to_ms) : "") + ", not on " +
                       day_text(unix_ms),
                   "cost.price", "Name a price in force, or write {usd_per_gpu_hour: 1.19}."});
    }
    return of(*price);
  }
  std::vector<const Price*> found = book.find_sku(sku, unix_ms);
  // The first book that knows the product: the user's, whatever tiers others have.
  const std::string first = found.empty() ? "" : found.front()->book;
  std::erase_if(found, [&](const Price* price) { return price->book != first; });
  for (const std::string& wanted : {tier, std::string("on-demand")}) {
    for (const Price* price : found) {
      if (price->tier == wanted) return of(*price);
    }
  }
  if (!found.empty()) return of(*found.front());
  PriceQuote none;
  none.reason = sku.empty() ? "the machine has no SKU to find a price by; set cost.price"
                            : "no price for sku '" + sku + "' on " + day_text(unix_ms) +
                                  " in the price book" + near_price(book, sku) + "; set cost.price";
  return none;
}

}  // namespace tailor
