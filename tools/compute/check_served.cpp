#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <numeric>

#include "base/clock.h"
#include "base/error.h"
#include "base/log.h"
#include "base/text.h"
#include "data/tokens/token_store.h"
#include "tools/compute/served_model.h"
#include "tools/compute/setup.h"
#include "tools/compute_verbs.h"
#include "tools/recipe_inputs.h"
#include "trainer/trainer.h"

namespace tailor {
namespace {

/// Below this root mean square an adapter's effect drowns in the rounding of bfloat16.
constexpr double kEffectMin = 0.02;
/// Share of the effect by which a served or an ignored adapter may be off.
constexpr double kShareMax = 0.35;
/// Below this the server's base may be ours in another arithmetic.
constexpr double kBaseApartMin = 0.25;

struct Row {
  std::int64_t line = 0;
  std::vector<std::int32_t> ids;
};
/// By row, then by token from the second on.
using LogProbabilities = std::vector<std::vector<double>>;

std::vector<Row> read_rows(const CheckServedArguments& arguments, const fs::path& folder,
                           const ModelSpec& spec) {
  DataOptions data;
  for (const std::string& path : arguments.data) data.train.push_back({path, 1.0, std::nullopt});
  data.format = record_format_from_name(arguments.format);
  data.chat_template = arguments.chat_template;
  data.train_on = TrainOn::from_name("all");
  data.sequence_len = arguments.sequence_len;
  data.packing = false;  // one document a row, in file order
  data.cache = cache_folder();
  const PrepareReport prepared =
      prepare_data(data, model_tokenizer(folder, spec.vocab), spec.vocab);
  const auto store = std::make_shared<const TokenStore>(TokenStore::open(prepared.train.store));
  const EvaluationSource source(store, 1, 1);
  std::vector<Row> rows;
  for (std::int64_t s = 0;
       s < source.steps() && static_cast<std::int64_t>(rows.size()) < arguments.rows; ++s) {
    const Batch batch = source.batch_at(s, 0, 1);
    if (batch.ids.size() < 2) continue;
    rows.push_back({store->document_line()[static_cast<std::size_t>(s)], batch.ids});
  }
  if (rows.empty()) {
    throw Error(Fault::bad_file, {"no row has two tokens", join(arguments.data, ", "),
                                  "Name a file with rows that say something."});
  }
  return rows;
}

LogProbabilities ours(Decoder& decoder, const std::vector<Row>& rows) {
  LogProbabilities out;
  for (const Row& row : rows) {
    const std::size_t n = row.ids.size();
    std::vector<std::int32_t> position(n), target(row.ids.begin() + 1, row.ids.end());
    std::iota(position.begin(), position.end(), 0);
    target.push_back(-1);
    const std::vector<std::int32_t> borders = {0, static_cast<std::int32_t>(n)};
    const std::vector<std::uint64_t> token_id(n, 0);
    const LossResult result =
        decoder.evaluate({row.ids, position, target, borders, borders, token_id});
    out.emplace_back();
    for (const double loss : result.losses) out.back().push_back(-loss);
  }
  return out;
}

LogProbabilities theirs(const ServedModel& served, const std::string& name,
                        const std::vector<Row>& rows) {
  LogProbabilities out;
  for (const Row& row : rows) out.push_back(served.log_probabilities(name, row.ids));
  return out;
}

LogProbabilities minus(const LogProbabilities& x, const LogProbabilities& y) {
  LogProbabilities out = x;
  for (std::size_t r = 0; r < x.size(); ++r) {
    TAILOR_CHECK(x[r].size() == y[r].size());
    for (std::size_t t = 0; t < x[r].size(); ++t) out[r][t] -= y[r][t];
  }
  return out;
}

double mean_product(const LogProbabilities& x, const LogProbabilities& y) {
  double sum = 0;
  std::size_t count = 0;
  for (std::size_t r = 0; r < x.size(); ++r) {
    for (std::size_t t = 0; t < x[r].size(); ++t) sum += x[r][t] * y[r][t];
    count += x[r].size();
  }
  return sum / static_cast<double>(count);
}
double rms(const LogProbabilities& x) { return std::sqrt(mean_product(x, x)); }
/// The largest difference of a token.
double largest_apart(const LogProbabilities& x, const LogProbabilities& y) {
  double out = 0;
  for (std::size_t r = 0; r < x.size(); ++r) {
    for (std::size_t t = 0; t < x[r].size(); ++t) out = std::max(out, std::fabs(x[r][t] - y[r][t]));
  }
  return out;
}
double mean(const LogProbabilities& x) {
  double sum = 0;
  std::size_t count = 0;
  for (const auto& row : x) {
    for (const double value : row) sum += value;
    count += row.size();
  }
  return sum / static_cast<double>(count);
}

/// The served names of what is checked and of its base; the base's may be empty.
struct ServedNames {
  std::string model, base;
};
ServedNames served_names(const CheckServedArguments& arguments, const ServedModel& served) {
  const std::vector<ServedModel::Name> names = served.names();
  std::vector<std::string> ids;
  for (const ServedModel::Name& name : names) ids.push_back(name.id);
  const auto need = [&](const std::string& id, const char* flag) {
    if (std::find(ids.begin(), ids.end(), id) != ids.end()) return;
    const std::string near = nearest_name(id, ids);
    throw Error(Fault::usage, {"the server has no model '" + id + "'", served.url() + ", " + flag,
                               (near.empty() ? "" : "Did you mean " + near + "? ") +
                                   "It serves: " + join(ids, ", ") + "."});
  };
  ServedNames out{arguments.served_model, arguments.base_served};
  if (out.model.empty()) {
    std::vector<std::string> fitting;
    for (const ServedModel::Name& name : names) {
      if (arguments.adapter.empty() || !name.parent.empty()) fitting.push_back(name.id);
    }
    if (fitting.size() != 1) {
      throw Error(Fault::usage,
                  {"which of the server's models is meant cannot be told", served.url(),
                   "Name it with --served-model. It serves: " + join(ids, ", ") + "."});
    }
    out.model = fitting.front();
  }
  need(out.model, "--served-model");
  if (!out.base.empty()) {
    need(out.base, "--base-served");
  } else if (!arguments.adapter.empty()) {
    for (const ServedModel::Name& name : names) {
      if (name.id != out.model) continue;
      const auto parent = std::find(ids.begin(), ids.end(), name.parent);
      if (parent != ids.end()) out.base = *parent;
    }
  }
  return out;
}

}  // namespace

int run_check_served(const CheckServedArguments& arguments) {
  require_cpu(arguments.device, "--device");
  const at::ScalarType dtype = compute_type(arguments.dtype);
  if (arguments.adapter.empty() == arguments.base.empty()) {
    throw Error(Fault::usage,
                {arguments.adapter.empty() ? "neither --adapter nor --base is given"
                                           : "--adapter and --base are both given",
                 "the command line of tailor adapter check-served",
                 "For a served adapter give --model (the base) and --adapter; for a merged model "
                 "--model (the merged one) and --base, which it must differ from."});
  }
  const char* key = std::getenv("TAILOR_API_KEY");
  const ServedModel served(arguments.url, key != nullptr ? key : "", arguments.timeout_s);
  const ServedNames names = served_names(arguments, served);
  set_threads(arguments.threads);
  const fs::path folder = find_model_folder(arguments.model);
  const std::vector<Row> rows = read_rows(arguments, folder, read_model_spec(folder));

  const double began = seconds_now();
  LogProbabilities with, without;
  {
    OpenedModel model = open_model(folder, dtype);
    std::optional<Adapter> adapter;
    if (arguments.adapter.empty()) {
      with = ours(*model.decoder, rows);
    } else {
      without = ours(*model.decoder, rows);
      adapter = open_adapter(arguments.adapter, model);
      model.decoder->set_adapter(&*adapter);
      with = ours(*model.decoder, rows);
    }
  }
  if (arguments.adapter.empty()) {
    OpenedModel base = open_model(find_model_folder(arguments.base), dtype);
    without = ours(*base.decoder, rows);
  }
  const LogProbabilities effect = minus(with, without);
  const double effect_rms = rms(effect);
  if (!(effect_rms >= kEffectMin)) {
    throw Error(Fault::bad_file,
                {"the adapter moves log-probabilities by " + number_text(effect_rms, 2) +
                     " on these rows: too little to tell whether it is served",
                 arguments.adapter.empty() ? arguments.model : arguments.adapter,
                 "Give rows like those it was trained on with --data, or more with --rows."});
  }
  const LogProbabilities got = theirs(served, names.model, rows);
  std::optional<LogProbabilities> got_base;
  if (!names.base.empty()) got_base = theirs(served, names.base, rows);
  // The server's own base cancels what its arithmetic does otherwise than ours.
  const LogProbabilities moved = minus(got, got_base ? *got_base : without);
  const double share = mean_product(moved, effect) / (effect_rms * effect_rms);
  const double apart = rms(minus(moved, effect)) / effect_rms, size = rms(moved) / effect_rms;
  const double base_apart = got_base ? rms(minus(*got_base, without)) : 0;
  const bool other_base = base_apart > std::max(kShareMax * effect_rms, kBaseApartMin);
  const std::string verdict = other_base           ? "differs"
                              : apart <= kShareMax ? "served"
                              : size <= kShareMax  ? "ignored"
                                                   : "differs";
  std::int64_t tokens = 0;
  for (const auto& row : with) tokens += static_cast<std::int64_t>(row.size());
  if (arguments.json) {
    Json per_row = Json::array();
    for (std::size_t r = 0; r < rows.size(); ++r) {
      per_row.push_back({{"line", rows[r].line},
                         {"tokens", with[r].size()},
                         {"ours", mean({with[r]})},
                         {"ours_base", mean({without[r]})},
                         {"served", mean({got[r]})},
                         {"served_base", got_base ? Json(mean({(*got_base)[r]})) : Json()}});
    }
    std::printf("%s\n", Json{{"verdict", verdict},
                             {"served_model", names.model},
                             {"base_served", names.base.empty() ? Json() : Json(names.base)},
                             {"url", served.url()},
                             {"rows", rows.size()},
                             {"tokens", tokens},
                             {"effect", effect_rms},
                             {"share", share},
                             {"apart", apart},
                             {"moved", size},
                             {"token_apart_max", largest_apart(got, with)},
                             {"ours", mean(with)},
                             {"ours_base", mean(without)},
                             {"served", mean(got)},
                             {"served_base", got_base ? Json(mean(*got_base)) : Json()},
                             {"base_apart", got_base ? Json(base_apart) : Json()},
                             {"per_row", per_row},
                             {"seconds", seconds_now() - began}}
                            .dump()
                            .c_str());
  } else {
    std::printf("%s: '%s' at %s\n\n", verdict.c_str(), names.model.c_str(), served.url().c_str());
    std::printf("mean log-probability of %s tokens in %s rows\n", count_text(tokens).c_str(),
                count_text(static_cast<std::int64_t>(rows.size())).c_str());
    std::printf("              ours      served\n");
    std::printf("  with it   %8.4f    %8.4f\n", mean(with), mean(got));
    if (got_base) {
      std::printf("  without   %8.4f    %8.4f\n", mean(without), mean(*got_base));
    } else {
      std::printf("  without   %8.4f\n", mean(without));
    }
    std::printf(
        "its effect here is %s (root mean square); there %s %% of it is found, and the rest of "
        "what "
        "there is differs by %s %%\n",
        number_text(effect_rms, 3).c_str(), number_text(100 * share, 3).c_str(),
        number_text(100 * apart, 3).c_str());
    std::printf("with it, no token's log-probability is further from ours than %s\n",
                number_text(largest_apart(got, with), 3).c_str());
    if (other_base) {
      std::printf("the server's base is not ours: they differ by %s\n",
                  number_text(base_apart, 3).c_str());
    }
  }
  if (verdict == "served") return 0;
  std::fflush(stdout);
  throw Error(
      Fault::bad_file,
      {verdict == "ignored"
           ? "the server answers as if the adapter were not there"
           : "the server's answers are neither those with the adapter nor those without",
       served.url() + ", model " + names.model,
       verdict == "ignored"
           ? "Export it for this server: tailor adapter export --for vllm|sglang. Where that "
             "refuses, merge it: tailor merge."
           : "See that the server has this base and this adapter; export it for the server "
             "(tailor adapter export), or merge it: tailor merge."});
}

}  // namespace tailor
