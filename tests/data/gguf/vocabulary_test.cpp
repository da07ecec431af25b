#include "data/gguf/vocabulary.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "data/checkpoint/checkpoint.h"
#include "data/checkpoint/published.h"
#include "data/checkpoint/safetensors.h"
#include "data/gguf_export/export_gguf.h"
#include "data/text/tokenizer.h"
#include "tests/data/gguf/gguf_files.h"

namespace tailor {
namespace {

using gguf_tests::error_of;
using gguf_tests::golden;
using testing::HasSubstr;

/// A model of one narrow layer with the demo's tokenizer.
class GgufTokenizer : public gguf_tests::ScratchTest {
 protected:
  GgufTokenizer() : model_(folder_ / "model") {
    fs::create_directories(model_);
    for (const char* name : {"tokenizer.json", "tokenizer_config.json"}) {
      fs::copy_file(golden("tokenizer") / name, model_ / name);
    }
    set_vocab(49160);  // some rows without a token
  }
  void set_vocab(std::int64_t vocab) {
    const Json config = {{"architectures", {"LlamaForCausalLM"}},
                         {"model_type", "llama"},
                         {"hidden_size", 8},
                         {"intermediate_size", 8},
                         {"num_hidden_layers", 1},
                         {"num_attention_heads", 2},
                         {"vocab_size", vocab},
                         {"tie_word_embeddings", true}};
    write_atomically(model_ / "config.json", config.dump());
    const ModelSpec spec = read_model_spec(model_);
    std::vector<PublishedMatrix> matrices = attention_matrices(spec, 0);
    for (PublishedMatrix& matrix : feed_forward_matrices(spec, 0)) matrices.push_back(matrix);
    matrices.push_back(embedding_matrix(spec));
    matrices.push_back(final_norm_matrix(spec));
    std::vector<TensorToWrite> tensors;
    for (const PublishedMatrix& matrix : matrices) {
      const auto bytes = static_cast<std::size_t>(2 * matrix.rows * matrix.columns);
      tensors.push_back({matrix.name, Dtype::bf16, matrix.tensor_shape(0), {}, [bytes] {
                           return std::vector<std::byte>(bytes, std::byte{0x3D});
                         }});
    }
    write_safetensors(model_ / "model.safetensors", tensors);
  }
  void change_tokenizer(const std::function<void(nlohmann::json&)>& change) {
    nlohmann::json file = nlohmann::json::parse(read_text(model_ / "tokenizer.json"));
    change(file);
    write_atomically(model_ / "tokenizer.json", file.dump());
  }
  GgufExportReport write(const std::string& name) const {
    return export_gguf(model_, folder_ / name, {});
  }
  fs::path model_;
};

TEST_F(GgufTokenizer, reads_texts_as_before) {
  write("x.gguf");
  const fs::path back = find_model_folder((folder_ / "x.gguf").string());
  const Tokenizer ours = Tokenizer::load(back), theirs = Tokenizer::load(golden("tokenizer"));
  const Json cases = read_json(golden("tokenizer") / "cases.json");
  int texts = 0;
  const std::function<void(const Json&)> look = [&](const Json& value) {
    if (value.is_string()) {
      EXPECT_EQ(ours.encode(value.get<std::string>()), theirs.encode(value.get<std::string>()));
      ++texts;
    }
    if (value.is_structured()) {
      for (const Json& each : value) look(each);
    }
  };
  look(cases);
  EXPECT_GT(texts, 20);
  EXPECT_EQ(ours.bos(), theirs.bos());
  EXPECT_EQ(ours.eos_ids(), theirs.eos_ids());
  EXPECT_EQ(ours.pad(), theirs.pad());
  EXPECT_EQ(ours.adds_bos(), theirs.adds_bos());
  EXPECT_EQ(ours.special_text("unk_token"), theirs.special_text("unk_token"));
  const auto chat = [](const fs::path& folder) {
    return read_json(folder / "tokenizer_config.json")["chat_template"];
  };
  EXPECT_EQ(chat(back), chat(golden("tokenizer")));
}

TEST_F(GgufTokenizer, has_a_name_for_every_row_of_the_vocabulary) {
  write("x.gguf");
  const GgufHeader header = gguf_tests::parse(read_text(folder_ / "x.gguf"));
  const auto& tokens =
      std::get<std::vector<std::string>>(header.values.at("tokenizer.ggml.tokens").value);
  const auto& kinds =
      std::get<std::vector<std::int64_t>>(header.values.at("tokenizer.ggml.token_type").value);
  ASSERT_EQ(tokens.size(), 49160U);
  EXPECT_EQ(tokens[49159], "[PAD49159]");
  EXPECT_EQ(kinds[49159], 5);
  EXPECT_EQ(tokens[1], "<|im_start|>");
  EXPECT_EQ(kinds[1], 3);
  EXPECT_EQ(kinds[5000], 1);
  EXPECT_EQ(std::get<std::string>(header.values.at("tokenizer.ggml.pre").value), "smollm");
}

TEST_F(GgufTokenizer, of_every_known_kind_is_recognised) {
  for (const char* name : {"llama-bpe", "qwen2", "llama4", "deepseek-v3", "smollm", "gpt-2"}) {
    SCOPED_TRACE(name);
    const fs::path file = folder_ / (std::string(name) + ".gguf");
    write("y.gguf");
    GgufHeader header = gguf_tests::parse(read_text(folder_ / "y.gguf"));
    header.values["tokenizer.ggml.pre"] = GgufValue::of_text(name);
    const auto files = tokenizer_files_from_gguf(GgufValues(header, "y.gguf"), 49160);
    write_atomically(model_ / "tokenizer.json", files.at("tokenizer.json"));
    static_cast<void>(Tokenizer::load(model_));  // and its expressions are understood
    const GgufExportReport report = export_gguf(model_, file, {});
    const GgufHeader again = gguf_tests::parse(read_text(file));
    EXPECT_EQ(std::get<std::string>(again.values.at("tokenizer.ggml.pre").value), name);
    EXPECT_EQ(report.notes.size(), std::string(name) == "qwen2" ? 1U : 0U);  // NFC
    fs::remove(folder_ / "y.gguf");
  }
}

TEST_F(GgufTokenizer, that_llama_cpp_has_no_name_for_is_refused) {
  change_tokenizer([](nlohmann::json& file) {
    file["pre_tokenizer"]["pretokenizers"][0]["individual_digits"] = false;
  });
  const Error error = error_of([&] { write("x.gguf"); });
  EXPECT_EQ(error.fault(), Fault::usage);
  EXPECT_THAT(error.parts().what, HasSubstr("no name for the way"));
}

TEST_F(GgufTokenizer, with_ids_past_the_vocabulary_is_refused) {
  set_vocab(49000);
  EXPECT_THAT(error_of([&] { write("x.gguf"); }).parts().what, HasSubstr("has 49000 rows"));
}

/// Metadata of a file that was tampered with.
TEST_F(GgufTokenizer, that_is_damaged_is_refused) {
  write("x.gguf");
  const GgufHeader good = gguf_tests::parse(read_text(folder_ / "x.gguf"));
  const auto what = [&](const std::string& key, GgufValue value) {
    GgufHeader header = good;
    header.values["tokenizer.ggml." + key] = std::move(value);
    return error_of([&] { tokenizer_files_from_gguf(GgufValues(header, "x.gguf"), 49160); })
        .parts()
        .what;
  };
  EXPECT_THAT(what("model", GgufValue::of_text("llama")), HasSubstr("tokenizer 'llama'"));
  EXPECT_THAT(what("pre", GgufValue::of_text("tekken")), HasSubstr("'tekken'"));
  EXPECT_THAT(what("bos_token_id", GgufValue::of_u32(49999)), HasSubstr("49999 is the id of no"));
  EXPECT_THAT(what("eos_token_id", GgufValue::of_u32(49159)), HasSubstr("49159 is the id of no"));
  EXPECT_THAT(what("token_type", GgufValue::of_i32s({1})), HasSubstr("1 kinds of 49160 tokens"));
  EXPECT_THAT(what("merges", GgufValue::of_texts({"nospace"})), HasSubstr("a merge is not two"));
  EXPECT_THAT(what("tokens", GgufValue::of_u32(1)), HasSubstr("not a list of texts"));
  std::vector<std::string> twice(49160, "a");
  EXPECT_THAT(what("tokens", GgufValue::of_texts(twice)), HasSubstr("has two ids"));
}

}  // namespace
}  // namespace tailor
