// What must not change a result, and finite differences in float64 as the judge of every gradient.

#include <gtest/gtest.h>

#include <cmath>

#include "base/random.h"
#include "tests/support/fixture.h"
#include "trainer/filled_batch.h"
#include "trainer/optim/adamw.h"

namespace tailor {
namespace {

using namespace testing_support;

LoraOptions every_target() {
  LoraOptions options;
  options.rank = 3;
  options.alpha = 5;
  options.expert_rank = 2;
  options.expert_alpha = 3;
  options.targets = {"all"};
  return options;
}

/// Factors away from zero, so that A has gradients too.
Adapter random_adapter(const ModelSpec& spec, LoraOptions options = every_target()) {
  Adapter adapter = Adapter::create(spec, options, 7);
  for (std::size_t i = 0; i < adapter.factors().size(); ++i) {
    adapter.factors()[i] = static_cast<float>(0.4 * random_unit(11, RandomStream::sample, i) - 0.2);
  }
  return adapter;
}

/// Documents of uneven lengths over and under the fixtures' chunk of 8; every token but the first
/// of a document is trained, except in document 1.
Tokens random_documents(std::int64_t vocab, std::initializer_list<int> lengths,
                        std::initializer_list<int> per_micro_batch) {
  Tokens tokens;
  auto ends = per_micro_batch.begin();
  int in_batch = 0, number = 0;
  for (const int length : lengths) {
    std::vector<std::int32_t> ids;
    std::vector<std::int64_t> labels;
    for (int i = 0; i < length; ++i) {
      ids.push_back(static_cast<std::int32_t>(random_bits(3, RandomStream::sample,
                                                          static_cast<std::uint64_t>(number),
                                                          static_cast<std::uint64_t>(i)) %
                                              static_cast<std::uint64_t>(vocab)));
      labels.push_back(number == 1 && i % 3 != 0 ? -100 : ids.back());
    }
    tokens.add_document(ids, labels);
    ++number;
    if (++in_batch == *ends) {
      tokens.end_micro_batch();
      in_batch = 0;
      if (ends + 1 != per_micro_batch.end()) ++ends;
    }
  }
  return tokens;
}

struct Pass {
  LossResult loss;
  at::Tensor gradients;
};

Pass run_pass(Decoder& decoder, const Adapter& adapter, const Tokens& tokens, TrainPass pass = {}) {
  decoder.set_adapter(&adapter);
  const bool wide = decoder.factors().scalar_type() == at::kDouble;
  Pass out{{}, at::zeros({adapter.parameter_count()}, wide ? at::kDouble : at::kFloat)};
  pass.gradient_scale = 1 / static_cast<double>(tokens.trained);
  out.loss = decoder.forward_backward(tokens.input(), pass, out.gradients);
  return out;
}

class EveryModel : public testing::TestWithParam<std::string> {
 protected:
  fs::path folder() const { return golden(GetParam()) / "model"; }
};
INSTANTIATE_TEST_SUITE_P(Models, EveryModel,
                         testing::Values("llama_tiny", "qwen2_tiny", "llama4_maverick_tiny",
                                         "llama4_scout_tiny", "deepseek_v3_tiny"),
                         [](const auto& parameter) { return parameter.param; });

/// What fills micro-batches up changes no loss, no gradient and no count.
TEST_P(EveryModel, filled_micro_batches_train_as_they_are) {
  TinyModel model = load_tiny(folder(), at::kDouble);
  const Adapter adapter = random_adapter(model.spec);
  const Tokens tokens = random_documents(model.spec.vocab, {13, 9, 5, 18}, {1, 2, 1});
  const Batch batch{tokens.ids,
                    tokens.position,
                    tokens.target,
                    tokens.document_start,
                    tokens.micro_batch_start,
                    tokens.token_id,
                    4,
                    tokens.trained};
  const FilledBatch filled(batch);
  ASSERT_GT(filled.input().ids.size(), tokens.ids.size());
  model.decoder->set_adapter(&adapter);
  const auto pass_of = [&](const TokenInput& input, std::vector<std::int64_t>& rows) {
    Pass out{{}, at::zeros({adapter.parameter_count()}, at::kDouble)};
    TrainPass pass;
    pass.dropout = 0.2;
    pass.gradient_scale = 1 / static_cast<double>(tokens.trained);
    pass.expert_rows = &rows;
    out.loss = model.decoder->forward_backward(input, pass, out.gradients);
    return out;
  };
  std::vector<std::int64_t> rows, filled_rows;
  const Pass plain = pass_of(tokens.input(), rows), full = pass_of(filled.input(), filled_rows);
  EXPECT_EQ(filled_rows, rows);
  EXPECT_EQ(rows.empty(), model.spec.experts == 0);
  ASSERT_EQ(full.loss.losses.size(), plain.loss.losses.size());
  for (std::size_t i = 0; i < plain.loss.losses.size(); ++i) {
    EXPECT_NEAR(full.loss.losses[i], plain.loss.losses[i], 1e-12);
  }
  EXPECT_LT(relative_norm(full.gradients, plain.gradients), 1e-12);
}

TEST_P(EveryModel, gradients_agree_with_finite_differences_in_float64) {
  TinyModel model = load_tiny(folder(), at::kDouble);
  const Adapter adapter = random_adapter(model.spec);
  const Tokens tokens = random_documents(model.spec.vocab, {13, 9, 5, 18}, {1, 2, 1});
  const Pass pass = run_pass(*model.decoder, adapter, tokens);
  const at::Tensor factors = model.decoder->factors();
  const auto mean_loss = [&] {
    const LossResult loss = model.decoder->evaluate(tokens.input());
    return loss.loss_sum / static_cast<double>(loss.tokens);
  };
  // One random direction a factor: directional derivative against a central difference.
  for (const LoraSite& site : adapter.sites()) {
    for (const auto& [offset, size] :
         {std::pair(site.a_offset, site.a_size()), std::pair(site.b_offset, site.b_size())}) {
      at::Tensor direction = at::zeros_like(factors);
      for (std::int64_t i = offset; i < offset + size; ++i) {
        direction.data_ptr<double>()[i] =
            2 * random_unit(5, RandomStream::sample, static_cast<std::uint64_t>(i)) - 1;
      }
      constexpr double kStep = 1e-5;
      factors.add_(direction, kStep);
      const double above = mean_loss();
      factors.sub_(direction, 2 * kStep);
      const double below = mean_loss();
      factors.add_(direction, kStep);
      const double numeric = (above - below) / (2 * kStep);
      const double analytic = at::dot(direction, pass.gradients).item<double>();
      // Central differences err by step^2 in truth and by epsilon / step in rounding: 1e-10 /
      // 1e-11.
      EXPECT_NEAR(analytic, numeric, 1e-6 * std::abs(numeric) + 2e-9)
          << site.module << " " << projection_name(site.projection);
    }
  }
}

TEST_P(EveryModel, packed_documents_do_not_see_each_other) {
  TinyModel model = load_tiny(folder(), at::kFloat);
  const Adapter adapter = random_adapter(model.spec);
  model.decoder->set_adapter(&adapter);
  const Tokens packed = random_documents(model.spec.vocab, {13, 9, 5, 18}, {4});
  const std::vector<double> together = model.decoder->evaluate(packed.input()).losses;
  std::vector<double> apart;
  for (std::size_t d = 0; d + 1 < packed.document_start.size(); ++d) {
    const auto begin = static_cast<std::size_t>(packed.document_start[d]),
               end = static_cast<std::size_t>(packed.document_start[d + 1]);
    const std::vector<std::int32_t> starts = {0, static_cast<std::int32_t>(end - begin)};
    const TokenInput alone{std::span(packed.ids).subspan(begin, end - begin),
                           std::span(packed.position).subspan(begin, end - begin),
                           std::span(packed.target).subspan(begin, end - begin),
                           starts,
                           starts,
                           {}};
    const LossResult loss = model.decoder->evaluate(alone);
    apart.insert(apart.end(), loss.losses.begin(), loss.losses.end());
  }
  ASSERT_EQ(together.size(), apart.size());
  for (std::size_t i = 0; i < apart.size(); ++i) EXPECT_NEAR(together[i], apart[i], 2e-5) << i;
}

TEST_P(EveryModel, generating_token_by_token_equals_one_pass) {
  TinyModel model = load_tiny(folder(), at::kFloat);
  const Adapter adapter = random_adapter(model.spec);
  model.decoder->set_adapter(&adapter);
  const Tokens document = random_documents(model.spec.vocab, {21}, {1});
  const at::Tensor want = model.decoder->trace(document.input()).logits_TV;
  GenerationState state = model.decoder->start_generation(21);
  const std::span<const std::int32_t> ids(document.ids);
  at::Tensor logits = model.decoder->next_logits(state, ids.subspan(0, 6));
  for (std::size_t t = 6; t < ids.size(); ++t) {
    EXPECT_LE((logits - want[static_cast<std::int64_t>(t) - 1]).abs().max().item<double>(), 2e-5)
        << t;
    logits = model.decoder->next_logits(state, ids.subspan(t, 1));
  }
  EXPECT_LE((logits - want[20]).abs().max().item<double>(), 2e-5);
}

TEST_P(EveryModel, a_rerun_gives_the_same_bits) {
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
    TinyModel model = load_tiny(folder(), dtype);
    const Adapter adapter = random_adapter(model.spec);
    const Tokens tokens = random_documents(model.spec.vocab, {13, 9, 5, 18}, {2, 2});
    const Pass first = run_pass(*model.decoder, adapter, tokens),
               second = run_pass(*model.decoder, adapter, tokens);
    EXPECT_EQ(first.loss.losses, second.loss.losses);
    EXPECT_TRUE(at::equal(first.gradients, second.gradients));
  }
}

TEST_P(EveryModel, passes_of_one_shape_take_no_more_memory_and_recomputing_less) {
  const TinyModel model = load_tiny(folder(), at::kFloat);
  const Adapter adapter = random_adapter(model.spec);
  const Tokens tokens = random_documents(model.spec.vocab, {13, 9, 5, 18}, {2, 2});
  TrainPass pass;
  pass.keep = Activations::recomputed;
  run_pass(*model.decoder, adapter, tokens, pass);
  const std::int64_t recomputed = model.decoder->pass_bytes_peak();
  run_pass(*model.decoder, adapter, tokens, pass);
  EXPECT_EQ(model.decoder->pass_bytes_peak(), recomputed);
  pass.keep = Activations::kept;
  run_pass(*model.decoder, adapter, tokens, pass);
  const std::int64_t kept = model.decoder->pass_bytes_peak();
  EXPECT_GT(kept, recomputed);
  model.decoder->evaluate(tokens.input());
  run_pass(*model.decoder, adapter, tokens, pass);
  EXPECT_EQ(model.decoder->pass_bytes_peak(), kept);
}

TEST_P(EveryModel, dropout_is_the_same_recomputed_and_for_any_micro_batches) {
  TinyModel model = load_tiny(folder(), at::kDouble);
  const Adapter adapter = random_adapter(model.spec);
  TrainPass pass;
  pass.dropout = 0.1;
  pass.seed = 42;
  pass.step = 3;
  const Tokens two = random_documents(model.spec.vocab, {13, 9, 5, 18}, {2, 2});
  const Tokens one = random_documents(model.spec.vocab, {13, 9, 5, 18}, {4});
  const Pass kept = run_pass(*model.decoder, adapter, two, pass);
  pass.keep = Activations::recomputed;
  const Pass again = run_pass(*model.decoder, adapter, two, pass);
  EXPECT_TRUE(at::equal(kept.gradients, again.gradients));
  const Pass merged = run_pass(*model.decoder, adapter, one, pass);
  EXPECT_LE(relative_norm(merged.gradients, kept.gradients), 1e-10);
  EXPECT_NEAR(merged.loss.loss_sum, kept.loss.loss_sum, 1e-9);
  pass.step = 4;
  EXPECT_GT(relative_norm(run_pass(*model.decoder, adapter, two, pass).gradients, kept.gradients),
            1e-3);
  const Pass without = run_pass(*model.decoder, adapter, two);
  EXPECT_GT(relative_norm(without.gradients, kept.gradients), 1e-3);
}

TEST(Experts, those_that_received_tokens_are_trained_and_the_others_are_not) {
  TinyModel model = load_tiny(golden("llama4_maverick_tiny") / "model", at::kFloat);
  LoraOptions options = every_target();
  options.targets = {"experts"};
  Adapter adapter = Adapter::create(model.spec, options, 1);
  const Tokens tokens = random_documents(model.spec.vocab, {13}, {1});
  model.decoder->set_adapter(&adapter);
  const Trace trace = model.decoder->trace(tokens.input());
  const std::vector<float> before(adapter.factors().begin(), adapter.factors().end());
  AdamW optimizer(adapter, {});
  for (int step = 0; step < 2;
       ++step) {  // the first step moves B only: A's gradient is zero while B is
    const Pass pass = run_pass(*model.decoder, adapter, tokens);
    optimizer.step(adapter.factors(), {pass.gradients.data_ptr<float>(), before.size()}, 1e-3, 1);
  }
  int trained = 0, idle = 0;
  for (const LoraSite& site : adapter.sites()) {
    // The last token of a document predicts nothing and is seen by nobody: it trains no expert.
    std::vector<std::int32_t> chosen = trace.expert[static_cast<std::size_t>(site.layer)];
    chosen.pop_back();
    for (std::int64_t e = 0; e < site.experts; ++e) {
      const bool received =
          std::find(chosen.begin(), chosen.end(), static_cast<std::int32_t>(e)) != chosen.end();
      for (const auto& [offset, size] : {std::pair(site.a_offset, site.rank * site.in),
                                         std::pair(site.b_offset, site.rank * site.out)}) {
        const auto begin = static_cast<std::size_t>(offset + e * size),
                   end = begin + static_cast<std::size_t>(size);
        const bool changed =
            !std::equal(before.begin() + static_cast<std::ptrdiff_t>(begin),
                        before.begin() + static_cast<std::ptrdiff_t>(end),
                        adapter.factors().begin() + static_cast<std::ptrdiff_t>(begin));
        EXPECT_EQ(changed, received) << site.module << " expert " << e;
      }
      (received ? trained : idle) += 1;
    }
  }
  EXPECT_GT(trained, 0);
  EXPECT_GT(idle, 0);
}

}  // namespace
}  // namespace tailor
