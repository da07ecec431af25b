#include <algorithm>
#include <cmath>
#include <cstdio>

#include "base/clock.h"
#include "base/error.h"
#include "base/log.h"
#include "base/memory.h"
#include "base/text.h"
#include "data/tokens/token_store.h"
#include "tools/compute/setup.h"
#include "tools/compute_verbs.h"
#include "tools/recipe_inputs.h"
#include "trainer/filled_batch.h"
#include "trainer/trainer.h"

namespace tailor {
namespace {

struct RowScore {
  std::int64_t line = 0, tokens = 0, correct = 0;
  double loss_sum = 0;
};

/// Splits a batch's losses over its documents.
void score_rows(const Batch& batch, const LossResult& result, std::vector<RowScore>& rows) {
  std::size_t next = 0;
  for (std::size_t d = 0; d + 1 < batch.document_start.size(); ++d) {
    RowScore row;
    for (auto t = static_cast<std::size_t>(batch.document_start[d]);
         t < static_cast<std::size_t>(batch.document_start[d + 1]); ++t) {
      if (batch.target[t] < 0) continue;
      row.loss_sum += result.losses[next];
      row.correct += result.hits[next];
      ++row.tokens;
      ++next;
    }
    rows.push_back(row);
  }
}

}  // namespace

int run_eval(const EvalArguments& arguments) {
  require_cpu(arguments.device, "--device");
  const at::ScalarType dtype = compute_type(arguments.dtype);
  set_threads(arguments.threads);
  const fs::path folder = find_model_folder(arguments.model);
  const ModelSpec spec = read_model_spec(folder);

  DataOptions data;
  for (const std::string& path : arguments.data) data.train.push_back({path, 1.0, std::nullopt});
  data.format = record_format_from_name(arguments.format);
  data.chat_template = arguments.chat_template;
  data.train_on = TrainOn::from_name(arguments.train_on);
  data.sequence_len = arguments.sequence_len;
  data.packing = false;  // one document a row, in file order: losses belong to lines
  data.cache = cache_folder();
  const PrepareReport prepared =
      prepare_data(data, model_tokenizer(folder, spec.vocab), spec.vocab);
  release_free_memory();
  const auto store = std::make_shared<const TokenStore>(TokenStore::open(prepared.train.store));

  OpenedModel model = open_model(folder, dtype);
  std::optional<Adapter> adapter;
  if (!arguments.adapter.empty()) {
    adapter = open_adapter(arguments.adapter, model);
    model.decoder->set_adapter(&*adapter);
  }
  const std::int64_t wanted = std::min(store->rows(), arguments.limit.value_or(store->rows()));
  const double mean_tokens =
      static_cast<double>(store->tokens()) / static_cast<double>(store->rows());
  const auto rows_per_pass = std::max<std::int64_t>(
      1, static_cast<std::int64_t>(static_cast<double>(arguments.batch_tokens) / mean_tokens));
  const EvaluationSource source(store, rows_per_pass, rows_per_pass);

  const double began = seconds_now();
  std::vector<RowScore> rows;
  double said = began;
  for (std::int64_t s = 0; s < source.steps() && static_cast<std::int64_t>(rows.size()) < wanted;
       ++s) {
    const Batch batch = source.batch_at(s, 0, 1);
    const FilledBatch filled(batch);
    score_rows(batch, model.decoder->evaluate(filled.input()), rows);
    if (seconds_now() - said > 10) {
      said = seconds_now();
      log_info("evaluated " +
               count_text(std::min<std::int64_t>(wanted, static_cast<std::int64_t>(rows.size()))) +
               " of " + count_text(wanted) + " rows");
    }
  }
  rows.resize(static_cast<std::size_t>(
      std::min<std::int64_t>(wanted, static_cast<std::int64_t>(rows.size()))));
  double sum = 0;
  std::int64_t tokens = 0, correct = 0, exact = 0;
  for (std::size_t i = 0; i < rows.size(); ++i) {
    rows[i].line = store->document_line()[i];
    sum += rows[i].loss_sum;
    tokens += rows[i].tokens;
    correct += rows[i].correct;
    exact += rows[i].correct == rows[i].tokens ? 1 : 0;
  }
  const double loss = sum / static_cast<double>(tokens),
               accuracy = static_cast<double>(correct) / static_cast<double>(tokens);
  const double exact_share = static_cast<double>(exact) / static_cast<double>(rows.size());
  const double seconds = seconds_now() - began;
  if (arguments.json) {
    Json out = {{"loss", loss},
                {"perplexity", std::exp(loss)},
                {"tokens", tokens},
                {"token_accuracy", accuracy},
                {"exact_match", exact_share},
                {"rows", rows.size()},
                {"model", folder.string()},
                {"adapter", arguments.adapter.empty() ? Json() : Json(arguments.adapter)},
                {"dtype", arguments.dtype},
                {"seconds", seconds}};
    if (arguments.per_row) {
      out["per_row"] = Json::array();
      for (const RowScore& row : rows) {
        out["per_row"].push_back({{"line", row.line},
                                  {"loss", row.loss_sum / static_cast<double>(row.tokens)},
                                  {"tokens", row.tokens},
                                  {"correct", row.correct}});
      }
    }
    std::printf("%s\n", out.dump().c_str());
    return 0;
  }
  std::printf(
      "loss            %s\nperplexity      %s\ntoken accuracy  %.1f %%   (%s of %s tokens)\nexact "
      "rows      %.1f %%   (%s of %s rows)\ntime            %s\n",
      number_text(loss).c_str(), number_text(std::exp(loss)).c_str(), 100 * accuracy,
      count_text(correct).c_str(), count_text(tokens).c_str(), 100 * exact_share,
      count_text(exact).c_str(), count_text(static_cast<std::int64_t>(rows.size())).c_str(),
      seconds_text(seconds).c_str());
  if (arguments.per_row) {
    for (const RowScore& row : rows) {
      std::printf("line %-8lld loss %s\n", static_cast<long long>(row.line),
                  number_text(row.loss_sum / static_cast<double>(row.tokens)).c_str());
    }
  }
  return 0;
}

}  // namespace tailor
