// Which matrices a recipe's targets mean, and what factors start from.

#include "adapters/lora.h"

#include <gmock/gmock.h>

#include <cmath>
#include <set>

#include "base/error.h"
#include "recipes/model_facts.h"

namespace tailor {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

ModelSpec spec_of(const std::string& fixture) {
  return read_model_spec(fs::path(TAILOR_SOURCE_DIR) / "tests/golden" / fixture / "model");
}
Adapter create(const ModelSpec& spec, const std::vector<std::string>& targets,
               std::uint64_t seed = 7) {
  LoraOptions options;
  options.rank = 4;
  options.expert_rank = 3;
  options.expert_alpha = 6;
  options.targets = targets;
  return Adapter::create(spec, options, seed);
}
/// "1 q_proj", layer and projection of every site.
std::vector<std::string> names(const Adapter& adapter) {
  std::vector<std::string> out;
  for (const LoraSite& site : adapter.sites()) {
    out.push_back(std::to_string(site.layer) + " " + std::string(projection_name(site.projection)));
  }
  return out;
}

TEST(LoraTargets, groups) {
  const ModelSpec spec = spec_of("llama4_maverick_tiny");  // layers 1 and 3 are mixtures
  EXPECT_THAT(names(create(spec, {"dense_mlp"})),
              ElementsAre("0 gate_proj", "0 up_proj", "0 down_proj", "2 gate_proj", "2 up_proj",
                          "2 down_proj"));
  EXPECT_THAT(names(create(spec, {"experts"})),
              ElementsAre("1 experts.gate_up_proj", "1 experts.down_proj", "3 experts.gate_up_proj",
                          "3 experts.down_proj"));
  EXPECT_THAT(names(create(spec, {"router"})), ElementsAre("1 router", "3 router"));
  EXPECT_EQ(create(spec, {"attention"}).sites().size(), 16U);
  EXPECT_EQ(create(spec, {"shared_expert"}).sites().size(), 6U);
  EXPECT_EQ(create(spec, {"all"}).sites().size(), all_sites(spec).size());
  EXPECT_EQ(create(spec, {"attention", "all"}).sites().size(), all_sites(spec).size());
}

/// Parameters of the sites that training makes, gate and up of experts with an A each, as plans and
/// servers have them.
std::int64_t trained(const ModelSpec& spec, const LoraOptions& options) {
  std::int64_t total = 0;
  for (const LoraSite& site : choose_sites(spec, options)) {
    const std::int64_t parts = site.projection == Projection::experts_gate_up ? 2 : 1;
    total += site.slots() * site.rank * (parts * site.in + site.out);
  }
  return total;
}

TEST(LoraTargets, plan_counts_the_factors_that_training_makes) {
  const fs::path shipped = fs::path(TAILOR_SOURCE_DIR) / "recipes/models";
  std::vector<ModelSpec> specs = {spec_of("llama4_maverick_tiny"), spec_of("deepseek_v3_tiny"),
                                  spec_of("llama_tiny"), spec_of("qwen2_tiny")};
  for (const char* name :
       {"deepseek-ai--DeepSeek-R1", "meta-llama--Llama-4-Maverick-17B-128E-Instruct"}) {
    specs.push_back(model_spec_from_config(read_json(shipped / (name + std::string(".json"))), ""));
  }
  const std::vector<std::vector<std::string>> all_targets = {
      {"gate_proj"},
      {"up_proj", "down_proj"},
      {"gate_proj", "up_proj", "down_proj", "q_proj"},
      {"gate_proj", "experts.down_proj"},
      {"experts.gate_up_proj"},
      {"experts.down_proj"},
      {"shared_expert.gate_proj"},
      {"shared_experts.gate_proj"},
      {"mlp.gate_proj"},
      {"gate"},
      {"router"},
      {"mlp.gate", "o_proj"},
      {"kv_b_proj"},
      {"q_a_proj", "self_attn.q_b_proj", "kv_a_proj_with_mqa"},
      {"model.layers.1.self_attn.o_proj"},
      {"layers.3.self_attn.o_proj", "layers.1.mlp.shared_experts.up_proj"},
      {"model.layers.1.feed_forward.experts.down_proj"},
      {"attention", "gate_proj"},
      {"experts", "down_proj"}};
  int compared = 0;
  for (const ModelSpec& spec : specs) {
    const ModelFacts facts = model_facts(spec, spec.architecture);
    for (const std::vector<std::string>& targets : all_targets) {
      LoraOptions options;
      options.rank = 4;
      options.expert_rank = 3;
      options.targets = targets;
      Recipe recipe;
      recipe.lora.rank = 4;
      recipe.lora.expert_rank = 3;
      recipe.lora.targets = {false, false, false, false, false, {}};
      for (const std::string& target : targets) {
        if (target == "attention") {
          recipe.lora.targets.attention = true;
        } else if (target == "experts") {
          recipe.lora.targets.experts = true;
        } else {
          recipe.lora.targets.modules.push_back(target);
        }
      }
      std::int64_t want = 0;
      try {
        want = trained(spec, options);
      } catch (const Error&) {
        continue;  // a target that this model does not have: training refuses it
      }
      EXPECT_EQ(count_lora(recipe, facts).total(), want)
          << spec.architecture << ": " << testing::PrintToString(targets);
      ++compared;
    }
  }
  EXPECT_GT(compared, 45);
  // The bare name of an MLP's matrix is not the routed experts'.
  const ModelFacts deepseek = model_facts(spec_of("deepseek_v3_tiny"), "tiny");
  Recipe recipe;
  recipe.lora.expert_rank = 3;
  recipe.lora.targets = {false, false, false, false, false, {"gate_proj"}};
  EXPECT_EQ(count_lora(recipe, deepseek).experts, 0);
  EXPECT_GT(count_lora(recipe, deepseek).shared_expert, 0);
}

TEST(LoraTargets, module_names_as_peft_matches_them) {
  const ModelSpec spec = spec_of("llama4_maverick_tiny");
  EXPECT_EQ(create(spec, {"q_proj", "v_proj"}).sites().size(), 8U);
  // "gate_proj" is the last part of the dense and of the shared expert's name.
  EXPECT_THAT(names(create(spec, {"gate_proj"})),
              ElementsAre("0 gate_proj", "1 gate_proj", "2 gate_proj", "3 gate_proj"));
  EXPECT_THAT(names(create(spec, {"shared_expert.gate_proj"})),
              ElementsAre("1 gate_proj", "3 gate_proj"));
  EXPECT_THAT(names(create(spec, {"layers.2.self_attn.q_proj"})), ElementsAre("2 q_proj"));
  EXPECT_THAT(names(create(spec, {"model.layers.2.self_attn.q_proj"})), ElementsAre("2 q_proj"));
  EXPECT_THAT(names(create(spec, {"model.layers.3.feed_forward.experts.down_proj"})),
              ElementsAre("3 experts.down_proj"));
  EXPECT_THAT(names(create(spec, {"experts.down_proj"})),
              ElementsAre("1 experts.down_proj", "3 experts.down_proj"));
}

TEST(LoraTargets, one_that_matches_nothing) {
  for (const char* target : {"q_pro", "proj", "_proj", "self_attn", "", ".q_proj", "mlp.q_proj"}) {
    try {
      create(spec_of("llama_tiny"), {"q_proj", target});
      ADD_FAILURE() << target;
    } catch (const Error& error) {
      EXPECT_EQ(error.fault(), Fault::usage);
      EXPECT_EQ(error.parts().what,
                "LoRA target '" + std::string(target) + "' matches no matrix of this model");
      EXPECT_THAT(error.parts().mend,
                  HasSubstr("This model has: attention, dense_mlp, down_proj, gate_proj, k_proj, "
                            "o_proj, q_proj, up_proj, v_proj."));
    }
  }
  EXPECT_THROW(create(spec_of("llama_tiny"), {"experts"}), Error) << "a dense model has none";
}

TEST(LoraSites, shapes_ranks_and_scales) {
  LoraOptions options;
  options.rank = 4;
  options.alpha = 8;
  options.expert_rank = 9;
  options.expert_alpha = 6;
  options.targets = {"all"};
  for (const bool rslora : {false, true}) {
    options.rslora = rslora;
    const Adapter adapter = Adapter::create(spec_of("llama4_maverick_tiny"), options, 1);
    const LoraSite& k = *adapter.find(2, Projection::k_proj);
    EXPECT_EQ(k.in, 64);
    EXPECT_EQ(k.out, 32);
    EXPECT_EQ(k.experts, 1);
    EXPECT_DOUBLE_EQ(k.scale, rslora ? 4 : 2);
    const LoraSite& gate_up = *adapter.find(1, Projection::experts_gate_up);
    EXPECT_EQ(gate_up.in, 64);
    EXPECT_EQ(gate_up.out, 96);
    EXPECT_EQ(gate_up.experts, 8);
    EXPECT_EQ(gate_up.rank, 9);
    EXPECT_DOUBLE_EQ(gate_up.scale, rslora ? 2 : 6.0 / 9);
    EXPECT_EQ(adapter.find(0, Projection::experts_down), nullptr);
    EXPECT_EQ(adapter.find(99, Projection::q_proj), nullptr);
    std::int64_t total = 0;
    for (const LoraSite& site : adapter.sites()) {
      total += site.experts * site.rank * (site.in + site.out);
    }
    EXPECT_EQ(adapter.parameter_count(), total);
  }
}

TEST(LoraSites, lie_in_the_arena_side_by_side_and_once) {
  const Adapter adapter = create(spec_of("llama4_maverick_tiny"), {"all"});
  std::vector<int> owners(adapter.factors().size());
  for (const LoraSite& site : adapter.sites()) {
    for (const auto& [offset, size] :
         {std::pair(site.a_offset, site.a_size()), std::pair(site.b_offset, site.b_size())}) {
      for (std::int64_t i = 0; i < size; ++i) ++owners[static_cast<std::size_t>(offset + i)];
    }
  }
  EXPECT_THAT(owners, testing::Each(1));
  // One pass over the input serves q, k and v: their A follow each other.
  const LoraSite &q = *adapter.find(0, Projection::q_proj),
                 &k = *adapter.find(0, Projection::k_proj),
                 &v = *adapter.find(0, Projection::v_proj);
  EXPECT_EQ(k.a_offset, q.a_offset + q.a_size());
  EXPECT_EQ(v.a_offset, k.a_offset + k.a_size());
}

TEST(LoraSites, a_layer_s_experts_are_one_range_behind_the_rest_of_it) {
  for (const std::vector<std::string>& targets : std::vector<std::vector<std::string>>{
           {"all"}, {"experts"}, {"q_proj", "experts.down_proj"}}) {
    const Adapter adapter = create(spec_of("llama4_maverick_tiny"), targets);
    EXPECT_THAT(adapter.expert_layers(), ElementsAre(1, 3));
    std::int64_t in_ranges = 0, experts = 0;
    for (const int layer : adapter.expert_layers()) {
      const FactorRange range = adapter.experts_of(layer);
      in_ranges += range.size();
      for (const LoraSite& site : adapter.sites()) {
        const bool inside = site.layer == layer && site.is_experts();
        for (const auto& [offset, size] :
             {std::pair(site.a_offset, site.a_size()), std::pair(site.b_offset, site.b_size())}) {
          EXPECT_EQ(range.begin <= offset && offset + size <= range.end, inside) << site.module;
          EXPECT_TRUE(inside || offset + size <= range.begin || range.end <= offset);
        }
      }
    }
    for (const LoraSite& site : adapter.sites()) {
      if (site.is_experts()) experts += site.a_size() + site.b_size();
    }
    EXPECT_EQ(in_ranges, experts);
  }
  const Adapter dense = create(spec_of("llama_tiny"), {"all"});
  EXPECT_TRUE(dense.expert_layers().empty());
  EXPECT_TRUE(dense.experts_of(0).empty());
  EXPECT_TRUE(dense.experts_of(99).empty());
}

TEST(LoraStart, is_the_same_in_a_file) {
  const ModelSpec spec = spec_of("llama4_maverick_tiny");
  LoraOptions options;
  options.targets = {"all"};
  const Adapter memory = Adapter::create(spec, options, 3);
  const Adapter file = Adapter::create(spec, options, 3, {fs::path(testing::TempDir())});
  EXPECT_FALSE(memory.arena().on_disk());
  EXPECT_TRUE(file.arena().on_disk());
  EXPECT_TRUE(std::ranges::equal(memory.factors(), file.factors()));
  const Adapter copy = file;
  EXPECT_TRUE(std::ranges::equal(memory.factors(), copy.factors()));
}

TEST(LoraStart, b_is_zero_and_a_uniform) {
  const Adapter adapter = create(spec_of("llama4_maverick_tiny"), {"all"});
  for (const LoraSite& site : adapter.sites()) {
    EXPECT_THAT(adapter.b_of(site), testing::Each(0.0F));
    const double bound = 1 / std::sqrt(static_cast<double>(site.in));
    double sum = 0, squares = 0;
    for (const float a : adapter.a_of(site)) {
      ASSERT_LE(std::fabs(a), bound);
      sum += a;
      squares += static_cast<double>(a) * a;
    }
    const auto n = static_cast<double>(site.a_size());
    // Mean 0 and variance bound^2 / 3 (that of the squares: 4/45 bound^4), to five deviations.
    EXPECT_NEAR(sum / n, 0, 5 * bound / std::sqrt(3 * n)) << site.module;
    EXPECT_NEAR(squares / n, bound * bound / 3, 5 * bound * bound * std::sqrt(4.0 / 45 / n));
  }
}

TEST(LoraStart, a_site_s_start_depends_on_seed_and_name_alone) {
  const ModelSpec spec = spec_of("llama4_maverick_tiny");
  const Adapter all = create(spec, {"all"}), again = create(spec, {"all"});
  EXPECT_TRUE(std::ranges::equal(all.factors(), again.factors()));
  std::set<float> first_numbers;
  for (const LoraSite& site : all.sites()) {
    std::string target = site.module;
    if (site.projection == Projection::experts_gate_up) target += ".gate_up_proj";
    if (site.projection == Projection::experts_down) target += ".down_proj";
    const Adapter one = create(spec, {target});
    ASSERT_EQ(one.sites().size(), 1U) << target;
    EXPECT_TRUE(std::ranges::equal(one.a_of(one.sites()[0]), all.a_of(site))) << target;
    first_numbers.insert(all.a_of(site)[0]);
  }
  EXPECT_EQ(first_numbers.size(), all.sites().size()) << "no two sites share their numbers";
  const Adapter other = create(spec, {"all"}, 8);
  EXPECT_NE(all.factors()[0], other.factors()[0]);
}

Adapter create_chosen(const ModelSpec& spec, const ChosenByLayer& chosen) {
  LoraOptions options;
  options.rank = 4;
  options.expert_rank = 3;
  options.targets = {"q_proj", "experts"};
  options.chosen_experts = chosen;
  return Adapter::create(spec, options, 7);
}

TEST(ChosenExperts, have_slots_and_the_others_have_nothing) {
  const ModelSpec spec = spec_of("llama4_maverick_tiny");
  const Adapter some = create_chosen(spec, {{{1, {1, 4, 7}}}});  // layer 3 is not named
  const LoraSite* down = some.find(1, Projection::experts_down);
  ASSERT_NE(down, nullptr);
  EXPECT_EQ(down->experts, 8);
  EXPECT_EQ(down->slots(), 3);
  EXPECT_THAT(down->chosen(), ElementsAre(1, 4, 7));
  EXPECT_EQ(down->slot(4), 1);
  EXPECT_EQ(down->slot(5), -1);
  EXPECT_EQ(down->a_size(), 3 * 3 * spec.expert_width);
  const LoraSite* none = some.find(3, Projection::experts_gate_up);
  ASSERT_NE(none, nullptr) << "its zeros are written for servers";
  EXPECT_EQ(none->slots(), 0);
  EXPECT_EQ(none->a_size() + none->b_size(), 0);
  EXPECT_TRUE(some.experts_of(3).empty());
  EXPECT_THAT(some.expert_layers(), ElementsAre(1));
  // Every element of the arena belongs to one site, as among all experts.
  std::int64_t sum = 0;
  for (const LoraSite& site : some.sites()) sum += site.a_size() + site.b_size();
  EXPECT_EQ(sum, some.parameter_count());
}

TEST(ChosenExperts, start_as_they_do_among_all) {
  const ModelSpec spec = spec_of("llama4_maverick_tiny");
  const Adapter all = create_chosen(spec, {}),
                some = create_chosen(spec, {{{1, {2}}, {3, {0, 6}}}});
  for (const LoraSite& site : some.sites()) {
    const LoraSite* whole = all.find(site.layer, site.projection);
    const auto each = static_cast<std::size_t>(site.rank * site.in);
    for (const std::int32_t e : site.chosen()) {
      const auto got = some.a_of(site).subspan(static_cast<std::size_t>(site.slot(e)) * each, each);
      const auto want = all.a_of(*whole).subspan(static_cast<std::size_t>(e) * each, each);
      EXPECT_TRUE(std::ranges::equal(got, want)) << site.module << " expert " << e;
    }
  }
}

TEST(ChosenExperts, all_of_them_are_not_a_choice) {
  const ModelSpec spec = spec_of("llama4_maverick_tiny");
  const std::vector<std::int32_t> every = {0, 1, 2, 3, 4, 5, 6, 7};
  const Adapter chosen = create_chosen(spec, {{{1, every}, {3, every}}});
  EXPECT_TRUE(std::ranges::equal(chosen.factors(), create_chosen(spec, {}).factors()));
  EXPECT_TRUE(chosen.find(1, Projection::experts_down)->slot_of.empty());
}

TEST(DescribeSites, says_how_many_experts_are_chosen) {
  const ModelSpec spec = spec_of("llama4_maverick_tiny");
  EXPECT_THAT(describe_sites(create_chosen(spec, {{{1, {1, 4, 7}}, {3, {0, 5}}}})),
              ElementsAre("attention: q_proj in 4 layers, rank 4, 2,048 parameters",
                          "experts: experts.gate_up_proj, experts.down_proj in 2 layers, 2.5 of 8 "
                          "experts on average, rank 3, 4,080 parameters"));
}

TEST(DescribeSites, a_line_a_group) {
  EXPECT_THAT(describe_sites(create(spec_of("llama4_maverick_tiny"), {"q_proj", "experts"})),
              ElementsAre("attention: q_proj in 4 layers, rank 4, 2,048 parameters",
                          "experts: experts.gate_up_proj, experts.down_proj in 2 layers of 8 "
                          "experts, rank 3, 13,056 parameters"));
}

}  // namespace
}  // namespace tailor
