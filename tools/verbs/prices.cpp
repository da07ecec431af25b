#include <iostream>

#include "base/clock.h"
#include "base/error.h"
#include "base/json.h"
#include "base/text.h"
#include "data/runs/table.h"
#include "recipes/machine.h"
#include "recipes/price_book.h"
#include "recipes/read.h"
#include "recipes/shipped.h"
#include "tools/paths.h"
#include "tools/planning.h"
#include "tools/verbs.h"

namespace tailor {
namespace {

std::string day(std::int64_t unix_ms) { return utc_text(unix_ms).substr(0, 10); }

Json price_json(const Price& price) {
  return {{"id", price.id},
          {"provider", price.provider},
          {"sku", price.sku},
          {"tier", price.tier},
          {"variant", price.variant},
          {"region", price.region},
          {"unit", price.unit},
          {"gpus", price.gpus},
          {"usd", static_cast<double>(price.usd_micros) / 1e6},
          {"from", day(price.from_ms)},
          {"to", price.to_ms ? Json(day(*price.to_ms)) : Json()},
          {"step_s", price.step_s},
          {"source", price.source},
          {"book", price.book}};
}

}  // namespace

int run_prices_list(const PricesListArguments& arguments) {
  const PriceBook book = price_books();
  const std::int64_t now = RealClock().unix_ms();
  std::vector<std::string> skus;
  Json rows = Json::array();
  TextTable table({"id", "sku", "tier", ">USD", "per", "from", "source"});
  for (const Price& price : book.prices()) {
    skus.push_back(price.sku);
    if (!arguments.all && !price.in_force(now)) continue;
    if (!arguments.sku.empty() && price.sku != arguments.sku) continue;
    rows.push_back(price_json(price));
    table.add({price.id, price.sku, price.tier, usd_text(price.usd_micros), price.unit,
               day(price.from_ms), price.source});
  }
  if (rows.empty() && !arguments.sku.empty()) {
    const std::string near = nearest_name(arguments.sku, skus);
    throw Error(Fault::usage, {"no price for '" + arguments.sku + "'", book.name(),
                               near.empty() ? "`tailor prices ls` lists what there is."
                                            : "Did you mean " + near + "?"});
  }
  std::cout << (arguments.json ? rows.dump(2) + "\n" : table.text());
  return 0;
}

int run_prices_check(const PricesCheckArguments& arguments) {
  const PriceBook book = arguments.file.empty() ? price_books() : PriceBook::read(arguments.file);
  const std::int64_t now = RealClock().unix_ms();
  std::size_t in_force = 0;
  for (const Price& price : book.prices())
    if (price.in_force(now)) ++in_force;
  Json recipes = Json::array();
  TextTable table({"recipe", ">a device hour", "price"});
  for (const ShippedRecipe& shipped : shipped_recipes(recipes_folder())) {
    const Recipe recipe = read_recipe(shipped.path).recipe;
    Machine machine;
    if (recipe.machine.profile) {
      machine = find_machine(*recipe.machine.profile, recipes_folder() / "machines");
    } else {
      machine = this_machine(".");
    }
    const PriceQuote found = quote(book, recipe.cost.price, machine.sku, machine.tier, now);
    const auto& rate = found.usd_micros_per_device_hour;
    recipes.push_back({{"recipe", shipped.name},
                       {"usd_per_gpu_hour", rate ? Json(static_cast<double>(*rate) / 1e6) : Json()},
                       {"price_id", found.id},
                       {"reason", found.reason}});
    table.add({shipped.name, usd_or_unknown(rate), rate ? found.id : found.reason});
  }
  if (arguments.json) {
    std::cout << Json{{"valid", true},
                      {"file", book.name()},
                      {"prices", book.prices().size()},
                      {"in_force", in_force},
                      {"recipes", recipes}}
                     .dump(2)
              << "\n";
  } else {
    std::cout << book.name() << ": " << book.prices().size() << " prices, " << in_force
              << " in force today\n"
              << table.text("  ");
  }
  return 0;
}

}  // namespace tailor
