// Merging into fused fp8 experts that lie inputs first with a scale for every output, as
// transformers and vLLM read them of Llama 4; and into fp8 whose scales are bfloat16.

#include <gmock/gmock.h>

#include <atomic>

#include "adapters/merge/receipt.h"
#include "merge_support.h"
#include "tests/data/store/store_fixture.h"

namespace tailor {
namespace {

using namespace testing_support;
using testing::HasSubstr;
using testing::IsEmpty;

const std::string kExperts = "model.layers.1.feed_forward.experts.";

/// What every e4m3 code stands for.
float e4m3_value(std::uint8_t code) {
  const float size = e4m3_magnitude(code & 127U);
  return (code & 128U) != 0 ? -size : size;
}

/// The code nearest to x: of two that are, the one with the even mantissa.
std::uint8_t nearest_e4m3(float x) {
  std::uint8_t best = 0;
  double least = std::numeric_limits<double>::infinity();
  for (unsigned code = 0; code < 127; ++code) {
    const double off =
        std::fabs(static_cast<double>(e4m3_magnitude(static_cast<std::uint8_t>(code))) -
                  std::fabs(static_cast<double>(x)));
    if (off < least || (off == least && code % 2 == 0)) {
      best = static_cast<std::uint8_t>(code);
      least = off;
    }
  }
  return static_cast<std::uint8_t>(best | (std::signbit(x) ? 128U : 0U));
}

/// Codes [slices, rows, columns] under scales [slices, columns].
std::vector<float> decoded(const Stored& codes, const Stored& scales) {
  const auto columns = static_cast<std::size_t>(codes.shape[2]);
  const std::size_t slice = static_cast<std::size_t>(codes.shape[1]) * columns;
  const std::vector<float> by_column = scales.floats();
  std::vector<float> out;
  for (std::size_t i = 0; i < codes.bytes.size(); ++i) {
    out.push_back(e4m3_value(std::to_integer<std::uint8_t>(codes.bytes[i])) *
                  by_column[i / slice * columns + i % columns]);
  }
  return out;
}

struct Form {
  const char* name;
  bool bf16;         ///< the scales
  std::size_t axis;  ///< of the outputs' among the scales' sizes
  std::size_t axes;
};
void PrintTo(const Form& form, std::ostream* out) { *out << form.name; }

class Fp8Columns : public testing::Test {
 protected:
  /// Sizes [experts, inputs, outputs] that are all different: a mistaken axis does not fit.
  static TinyModel tiny(bool bf16_scales = false) {
    TinyModel model;
    model.experts_as = Published::fp8_rows;
    model.narrow_scales = bf16_scales;
    return model;
  }
  fs::path write(const TinyModel& tiny, const std::function<void(ModelMaker&)>& change = {}) {
    ModelMaker maker(tiny);
    if (change) change(maker);
    maker.write(box_ / "model");
    Json config = read_json(box_ / "model" / "config.json");
    config["quantization_config"] = {{"quant_method", "fbgemm_fp8"}};
    write_atomically(box_ / "model" / "config.json", config.dump(1));
    return box_ / "model";
  }
  fs::path adapter(const fs::path& model, double size = 0.05, const ChosenByLayer& chosen = {}) {
    make_adapter(box_ / "adapter", read_model_spec(model), {"experts", "q_proj"}, size, 1, chosen);
    return box_ / "adapter";
  }
  MergeReport merge(const fs::path& model, const std::string& name,
                    MergeDtype dtype = MergeDtype::as_base) {
    return merge_adapters(model, box_ / name, one_adapter(box_ / "adapter", dtype));
  }
  TemporaryFolder box_;
};

class Fp8Forms : public Fp8Columns, public testing::WithParamInterface<Form> {};

TEST_P(Fp8Forms, new_codes_and_scales_are_those_of_a_plain_loop) {
  const Form& form = GetParam();
  const TinyModel sizes = tiny(form.bf16);
  const fs::path model = write(sizes, [&](ModelMaker& maker) {
    for (const char* name : {"gate_up_proj", "down_proj"}) {
      auto& shape = maker.tensor(kExperts + name + "_scale").shape;
      const std::int64_t outputs = shape[2];
      shape.assign(form.axes, 1);
      shape[0] = sizes.experts;
      shape[form.axis] = outputs;
    }
  });
  adapter(model);
  const MergeReport report = merge(model, "out");
  merge(model, "wide", MergeDtype::float32);
  const auto base = load_folder(model), merged = load_folder(box_ / "out"),
             wide = load_folder(box_ / "wide");
  ASSERT_EQ(base.size(), merged.size());
  for (const auto& [name, tensor] : base) {  // every server reads it as it read the base
    EXPECT_EQ(merged.at(name).dtype, tensor.dtype) << name;
    EXPECT_EQ(merged.at(name).shape, tensor.shape) << name;
  }
  EXPECT_EQ(read_text(box_ / "out" / "config.json"), read_text(model / "config.json"));
  const Json receipt = read_json(box_ / "out" / kReceiptName);
  for (const char* part : {"gate_up_proj", "down_proj"}) {
    const std::string name = kExperts + part;
    const Stored &codes = merged.at(name), &scales = merged.at(name + "_scale");
    EXPECT_EQ(scales.dtype, form.bf16 ? Dtype::bf16 : Dtype::f32);
    const std::vector<float> target = wide.at(name).floats(), found = scales.floats(),
                             before = decoded(base.at(name), base.at(name + "_scale")),
                             after = decoded(codes, scales);
    const auto rows = static_cast<std::size_t>(codes.shape[1]),
               columns = static_cast<std::size_t>(codes.shape[2]);
    for (std::size_t e = 0; e < static_cast<std::size_t>(sizes.experts); ++e) {
      for (std::size_t c = 0; c < columns; ++c) {
        float largest = 0;
        for (std::size_t r = 0; r < rows; ++r) {
          largest = std::max(largest, std::fabs(target[(e * rows + r) * columns + c]));
        }
        float scale = largest / 448;
        if (form.bf16) scale = bf16_to_float(bf16_from_float(scale));
        ASSERT_EQ(found[e * columns + c], scale) << name << " " << e << " " << c;
        for (std::size_t r = 0; r < rows; ++r) {
          const std::size_t at = (e * rows + r) * columns + c;
          ASSERT_EQ(std::to_integer<std::uint8_t>(codes.bytes[at]),
                    nearest_e4m3(target[at] / scale))
              << name << " " << e << " " << r << " " << c;
        }
      }
    }
    double kept = 0, change = 0, error = 0, squares = 0;
    for (std::size_t i = 0; i < target.size(); ++i) {
      const double delta = static_cast<double>(target[i]) - static_cast<double>(before[i]);
      kept += (static_cast<double>(after[i]) - static_cast<double>(before[i])) * delta;
      change += delta * delta;
      error += std::pow(static_cast<double>(after[i]) - static_cast<double>(target[i]), 2);
      squares += std::pow(static_cast<double>(before[i]), 2);
    }
    int told = 0;
    for (const Json& tensor : receipt["tensors"]) {
      if (tensor["name"] != name) continue;
      ++told;
      EXPECT_NEAR(tensor["kept"], kept / change, 1e-3 * kept / change);
      EXPECT_NEAR(tensor["relative_change"], std::sqrt(change / squares),
                  1e-3 * std::sqrt(change / squares));
      EXPECT_NEAR(tensor["error"], std::sqrt(error / squares), 1e-3 * std::sqrt(error / squares));
      EXPECT_TRUE(tensor.contains("base"));
    }
    EXPECT_EQ(told, 1);
  }
  EXPECT_TRUE(report.quantised);
  VerifyMergeOptions all;
  all.base = model;
  all.adapters = {box_ / "adapter"};
  EXPECT_THAT(verify_merge(box_ / "out", all).problems, IsEmpty());
}

INSTANTIATE_TEST_SUITE_P(, Fp8Forms,
                         testing::Values(Form{"transformers_gate_up", false, 2, 3},
                                         Form{"transformers_down", false, 1, 3},
                                         Form{"no_third_size", false, 1, 2},
                                         Form{"bfloat16_scales", true, 2, 3}),
                         [](const auto& param) { return std::string(param.param.name); });

TEST_F(Fp8Columns, sums_are_the_dequantised_base_and_the_change) {
  const fs::path model = write(tiny());
  const ModelSpec spec = read_model_spec(model);
  const Adapter factors = read_peft_adapter(adapter(model), spec);
  merge(model, "wide", MergeDtype::float32);
  merge(model, "bf16", MergeDtype::bfloat16);
  const auto base = load_folder(model), wide = load_folder(box_ / "wide"),
             narrow = load_folder(box_ / "bf16");
  EXPECT_FALSE(read_json(box_ / "bf16" / "config.json").contains("quantization_config"));
  for (const auto& [name, tensor] : narrow) {
    EXPECT_THAT(name, testing::Not(HasSubstr("_scale")));
    const auto sums = wide.at(name).floats(), rounded = tensor.floats();
    for (std::size_t i = 0; i < sums.size(); ++i) {
      ASSERT_EQ(rounded[i], bf16_to_float(bf16_from_float(sums[i]))) << name;
    }
  }
  int sites = 0;
  for (const LoraSite& site : factors.sites()) {
    if (!site.is_experts()) continue;
    ++sites;
    const std::string name =
        kExperts + (site.projection == Projection::experts_down ? "down_proj" : "gate_up_proj");
    const auto before = decoded(base.at(name), base.at(name + "_scale")),
               after = wide.at(name).floats();
    const auto a = factors.a_of(site), b = factors.b_of(site);
    for (std::int64_t e = 0; e < site.experts; ++e) {
      for (std::int64_t i = 0; i < site.in; ++i) {
        for (std::int64_t o = 0; o < site.out; ++o) {
          double delta = 0;
          for (std::int64_t r = 0; r < site.rank; ++r) {
            const std::int64_t row = e * site.rank + r;
            delta += static_cast<double>(b[static_cast<std::size_t>(row * site.out + o)]) *
                     static_cast<double>(a[static_cast<std::size_t>(row * site.in + i)]);
          }
          const auto at = static_cast<std::size_t>((e * site.in + i) * site.out + o);
          ASSERT_NEAR(static_cast<double>(after[at]),
                      static_cast<double>(before[at]) + site.scale * delta, 1e-6)
              << name;
        }
      }
    }
  }
  EXPECT_EQ(sites, 2);
}

TEST_F(Fp8Columns, experts_without_factors_keep_codes_and_scales) {
  const fs::path model = write(tiny());
  adapter(model, 0.05, std::map<int, std::vector<std::int32_t>>{{1, {2}}});
  merge(model, "out");
  const auto base = load_folder(model), merged = load_folder(box_ / "out");
  for (const char* part : {"gate_up_proj", "gate_up_proj_scale", "down_proj", "down_proj_scale"}) {
    const auto &before = base.at(kExperts + part).bytes, &after = merged.at(kExperts + part).bytes;
    const auto each = static_cast<std::ptrdiff_t>(before.size() / 3);
    EXPECT_TRUE(std::equal(before.begin(), before.begin() + 2 * each, after.begin())) << part;
    EXPECT_FALSE(std::equal(before.begin() + 2 * each, before.end(), after.begin() + 2 * each))
        << part;
  }
}

/// A slice is more than a piece of 4 MiB and many strips of 1 MiB of floats.
class Fp8Wide : public Fp8Columns {
 protected:
  static TinyModel wide() {
    TinyModel model = tiny();
    model.hidden = 1500;
    model.expert_width = 1412;
    model.experts = 2;
    return model;
  }
};

TEST_F(Fp8Wide, goes_on_to_the_same_bytes_on_any_number_of_threads) {
  const fs::path model = write(wide());
  adapter(model);
  merge(model, "whole");
  merge(model, "wide", MergeDtype::float32);
  const auto merged = load_folder(box_ / "whole"), sums = load_folder(box_ / "wide");
  for (const char* part : {"gate_up_proj", "down_proj"}) {
    const Stored& codes = merged.at(kExperts + part);
    const auto target = sums.at(kExperts + part).floats(),
               found = decoded(codes, merged.at(kExperts + part + std::string("_scale")));
    ASSERT_EQ(target.size(), found.size());
    for (std::size_t i = 0; i < target.size(); ++i) {
      ASSERT_LE(std::fabs(found[i] - target[i]), std::max(std::fabs(target[i]) / 15, 1e-5F))
          << part << " " << i;
    }
  }
  MergeOptions options = one_adapter(box_ / "adapter");
  options.threads = 1;
  std::atomic<int> asked = 0;
  options.stop = [&] { return ++asked > 12; };  // pieces, and looks of the thread that waits
  try {
    merge_adapters(model, box_ / "out", options);
    ADD_FAILURE() << "was not stopped";
  } catch (const Error& error) {
    EXPECT_EQ(error.fault(), Fault::stopped);
  }
  options.stop = nullptr;
  options.threads = 3;
  const MergeReport report = merge_adapters(model, box_ / "out", options);
  EXPECT_GT(report.jobs_before, 0);
  EXPECT_EQ(merged_files(box_ / "out"), merged_files(box_ / "whole"));
  Json ours = read_json(box_ / "out" / kReceiptName),
       theirs = read_json(box_ / "whole" / kReceiptName);
  ours.erase("run");
  theirs.erase("run");
  EXPECT_EQ(ours, theirs);
}

TEST_F(Fp8Wide, memory_is_a_slice_a_thread_and_too_little_is_refused_by_number) {
  const fs::path model = write(wide());
  adapter(model);
  MergeOptions options = one_adapter(box_ / "adapter");
  options.memory_bytes_max = std::int64_t{66} << 20;
  try {
    merge_adapters(model, box_ / "out", options);
    ADD_FAILURE() << "fits";
  } catch (const Error& error) {
    EXPECT_EQ(error.fault(), Fault::does_not_fit);
    EXPECT_THAT(error.parts().mend, HasSubstr("--max-ram"));
  }
  EXPECT_FALSE(fs::exists(box_ / "out"));
}

TEST_F(Fp8Columns, a_nan_code_and_a_nan_scale_are_told_by_place) {
  const fs::path model = write(tiny(), [](ModelMaker& maker) {
    // Expert 1, input 3, output 5 of [3, 72, 272].
    maker.tensor(kExperts + "gate_up_proj").bytes[(1 * 72 + 3) * 272 + 5] = std::byte{0x7F};
  });
  adapter(model);
  try {
    merge(model, "out");
    ADD_FAILURE() << "was merged";
  } catch (const Error& error) {
    EXPECT_EQ(error.fault(), Fault::bad_file);
    EXPECT_THAT(error.parts().where, HasSubstr("gate_up_proj, slice 1, row 3, column 5"));
  }
  EXPECT_FALSE(fs::exists(box_ / "out"));
}

TEST_F(Fp8Columns, forms_that_were_not_seen_are_refused_by_name) {
  struct Case {
    std::function<void(ModelMaker&)> change;
    const char* what;
  };
  const Case cases[] = {
      {[](ModelMaker& maker) {  // a scale for every input
         maker.tensor(kExperts + "down_proj_scale").shape = {3, 136, 1};
         maker.tensor(kExperts + "down_proj_scale").bytes.resize(3 * 136 * 4);
       },
       "fp8 scales of shape [3, 136, 1] are not one for every output"},
      {[](ModelMaker& maker) {  // a scale an expert
         maker.tensor(kExperts + "down_proj_scale").shape = {3};
         maker.tensor(kExperts + "down_proj_scale").bytes.resize(3 * 4);
       },
       "fp8 scales of shape [3] are not one for every output"},
      {[](ModelMaker& maker) {
         maker.rename(kExperts + "down_proj_scale", kExperts + "down_proj_weight_scale");
       },
       "ModelOpt"},
  };
  for (const Case& one : cases) {
    const fs::path model = write(tiny(), one.change);
    adapter(model);
    for (const MergeDtype dtype : {MergeDtype::as_base, MergeDtype::bfloat16}) {
      try {
        merge(model, "out", dtype);
        ADD_FAILURE() << one.what;
      } catch (const Error& error) {
        EXPECT_EQ(error.fault(), Fault::bad_file);
        EXPECT_THAT(error.parts().what, HasSubstr(one.what));
      }
      EXPECT_FALSE(fs::exists(box_ / "out"));
    }
    fs::remove_all(box_ / "model");
    fs::remove_all(box_ / "adapter");
  }
}

/// Experts one by one, outputs first, with bfloat16 scales: what compressed-tensors writes.
TEST_F(Fp8Columns, bfloat16_scales_of_rows_and_blocks_are_written_again) {
  for (const Published as : {Published::fp8_rows, Published::fp8_blocks}) {
    TinyModel sizes = tiny(true);
    sizes.fused = false;
    sizes.experts_as = sizes.others_as = as;
    const fs::path model = write(sizes);
    adapter(model);
    merge(model, "out");
    merge(model, "wide", MergeDtype::float32);
    const auto base = load_folder(model), merged = load_folder(box_ / "out"),
               wide = load_folder(box_ / "wide");
    int seen = 0;
    for (const auto& [name, tensor] : base) {
      ASSERT_EQ(merged.at(name).dtype, tensor.dtype) << name;
      ASSERT_EQ(merged.at(name).shape, tensor.shape) << name;
      if (tensor.dtype != Dtype::f8_e4m3 || merged.at(name).bytes == tensor.bytes) continue;
      ++seen;
      const bool rows = as == Published::fp8_rows;
      const Stored& codes = merged.at(name);
      const Stored& scales = merged.at(name + (rows ? "_scale" : "_scale_inv"));
      EXPECT_EQ(scales.dtype, Dtype::bf16);
      const auto target = wide.at(name).floats(), each = scales.floats();
      const std::int64_t height = rows ? 1 : 128, width = rows ? codes.shape[1] : 128;
      const std::int64_t across = div_ceil(codes.shape[1], width);
      std::vector<float> largest(each.size());
      const auto block = [&](std::size_t i) {
        const auto r = static_cast<std::int64_t>(i) / codes.shape[1],
                   c = static_cast<std::int64_t>(i) % codes.shape[1];
        return static_cast<std::size_t>(r / height * across + c / width);
      };
      for (std::size_t i = 0; i < target.size(); ++i) {
        largest[block(i)] = std::max(largest[block(i)], std::fabs(target[i]));
      }
      for (std::size_t i = 0; i < target.size(); ++i) {
        const float scale = bf16_to_float(bf16_from_float(largest[block(i)] / 448));
        ASSERT_EQ(each[block(i)], scale) << name;
        ASSERT_EQ(std::to_integer<std::uint8_t>(codes.bytes[i]), nearest_e4m3(target[i] / scale))
            << name << " " << i;
      }
    }
    EXPECT_EQ(seen, 3 * 3 + 2) << "experts, and q_proj of two layers";
    EXPECT_THAT(verify_merge(box_ / "out", {}).problems, IsEmpty());
    for (const char* folder : {"model", "adapter", "out", "wide"}) fs::remove_all(box_ / folder);
  }
}

}  // namespace
}  // namespace tailor
