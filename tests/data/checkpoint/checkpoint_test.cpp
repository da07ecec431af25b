#include "data/checkpoint/checkpoint.h"

#include <gmock/gmock.h>

#include <cstdlib>

#include "tests/data/checkpoint/folder_fixture.h"

namespace tailor {
namespace {

using testing::HasSubstr;
using testing_support::error_of;
using testing_support::FolderTest;

fs::path golden(const std::string& name) {
  return fs::path(TAILOR_SOURCE_DIR) / "tests/golden" / name;
}

class CheckpointTest : public FolderTest {
 protected:
  void write_index(const Json& weight_map) {
    write_atomically(folder_ / "model.safetensors.index.json",
                     Json({{"metadata", Json::object()}, {"weight_map", weight_map}}).dump());
  }
  std::string open_error() {
    return error_of([&] { Checkpoint::open(folder_); }, folder_);
  }
};

TEST_F(CheckpointTest, tensors_of_several_shards_by_name) {
  write_ones(folder_ / "m-1.safetensors", {"a", "b"});
  write_ones(folder_ / "m-2.safetensors", {"c"}, {4});
  write_index({{"a", "m-1.safetensors"}, {"b", "m-1.safetensors"}, {"c", "m-2.safetensors"}});
  const Checkpoint checkpoint = Checkpoint::open(folder_);
  EXPECT_EQ(checkpoint.tensors().size(), 3U);
  EXPECT_EQ(checkpoint.total_bytes(), 2 * 24 + 16);
  EXPECT_EQ(checkpoint.prefix(), "");
  EXPECT_FALSE(checkpoint.has("d"));
  const Checkpoint::Tensor& c = checkpoint.find("c", std::vector<std::int64_t>{4});
  EXPECT_EQ(checkpoint.where(c), (folder_ / "m-2.safetensors").string() + ", tensor c");
  float first = 0;
  std::memcpy(&first, checkpoint.bytes(c).data(), sizeof first);
  EXPECT_EQ(first, 1.0F);
  checkpoint.drop(c);
  std::memcpy(&first, checkpoint.bytes(c).data(), sizeof first);
  EXPECT_EQ(first, 1.0F) << "dropped pages come back from the file";
}

TEST_F(CheckpointTest, a_wrapper_s_language_model) {
  write_ones(folder_ / "model.safetensors",
             {"language_model.model.norm.weight", "vision_model.x", "multi_modal_projector.y"});
  const Checkpoint checkpoint = Checkpoint::open(folder_);
  EXPECT_EQ(checkpoint.prefix(), "language_model.");
  ASSERT_EQ(checkpoint.tensors().size(), 1U);
  EXPECT_EQ(checkpoint.find("model.norm.weight").stored_name, "language_model.model.norm.weight");
}

TEST_F(CheckpointTest, the_wrapper_fixture_equals_the_plain_one_bit_for_bit) {
  const Checkpoint plain = Checkpoint::open(golden("llama4_maverick_tiny/model"));
  const Checkpoint wrapped = Checkpoint::open(golden("llama4_conditional_tiny/model"));
  ASSERT_EQ(plain.tensors().size(), wrapped.tensors().size());
  for (const auto& [name, tensor] : plain.tensors()) {
    const auto a = plain.bytes(tensor), b = wrapped.bytes(wrapped.find(name, tensor.info.shape));
    EXPECT_TRUE(std::equal(a.begin(), a.end(), b.begin(), b.end())) << name;
  }
}

TEST_F(CheckpointTest, a_missing_shard) {
  write_ones(folder_ / "m-1.safetensors", {"a"});
  write_index({{"a", "m-1.safetensors"}, {"b", "m-2.safetensors"}});
  EXPECT_EQ(open_error(),
            "error: shard m-2.safetensors is missing\n"
            "  where: DIR\n"
            "  mend:  Finish the download: the index names this file, the folder lacks it.\n");
}

TEST_F(CheckpointTest, an_index_and_shards_that_disagree) {
  write_ones(folder_ / "m-1.safetensors", {"a"});
  write_ones(folder_ / "m-2.safetensors", {"b"});
  write_index({{"a", "m-1.safetensors"}, {"c", "m-1.safetensors"}, {"b", "m-2.safetensors"}});
  EXPECT_EQ(open_error(),
            "error: shard m-1.safetensors lacks tensor 'c', which the index says it holds\n"
            "  where: DIR/model.safetensors.index.json\n"
            "  mend:  Index and shards are of different downloads: fetch the folder again.\n");
  write_index({{"a", "m-2.safetensors"}, {"b", "m-1.safetensors"}});
  EXPECT_THAT(open_error(), HasSubstr("m-2.safetensors lacks tensor 'a'"));
  write_ones(folder_ / "m-2.safetensors", {"a"});
  write_index({{"a", "m-1.safetensors"}, {"b", "m-2.safetensors"}});
  EXPECT_THAT(open_error(), HasSubstr("tensor 'a' is in two shards"));
}

TEST_F(CheckpointTest, an_index_that_names_files_elsewhere) {
  write_ones(folder_ / "x.safetensors", {"a"});
  make_folders(folder_ / "model");
  folder_ /= "model";
  for (const char* name : {"../x.safetensors", "/etc/passwd", "sub/../../x.safetensors"}) {
    write_index({{"a", name}});
    EXPECT_THAT(open_error(), HasSubstr("A model or dataset may only name files in its own folder"))
        << name;
  }
  fs::create_symlink(folder_ / "../x.safetensors", folder_ / "link.safetensors");
  write_index({{"a", "link.safetensors"}});
  EXPECT_THAT(open_error(), HasSubstr("is a link that leads out of its folder"));
  write_index({{"a", 3}});
  EXPECT_THAT(open_error(), HasSubstr("gives tensor 'a' no file name"));
  write_atomically(folder_ / "model.safetensors.index.json", "{}");
  EXPECT_THAT(open_error(), HasSubstr("key 'weight_map' is missing"));
  folder_ = folder_.parent_path();
}

TEST_F(CheckpointTest, pickle_files_only) {
  write_atomically(folder_ / "pytorch_model.bin", "x");
  EXPECT_EQ(open_error(),
            "error: the model's weights are pickle files, which Tailor does not open\n"
            "  where: DIR/pytorch_model.bin\n"
            "  mend:  Pickle files can run code when they are loaded. Convert them with "
            "transformers on a machine you trust: AutoModelForCausalLM.from_pretrained(DIR)"
            ".save_pretrained(OUT, safe_serialization=True).\n");
  fs::remove(folder_ / "pytorch_model.bin");
  EXPECT_EQ(open_error(),
            "error: no model.safetensors and no model.safetensors.index.json\n"
            "  where: DIR\n"
            "  mend:  Name the folder that holds the model's config.json and safetensors files.\n");
}

TEST_F(CheckpointTest, a_tensor_of_another_shape_or_name) {
  write_ones(folder_ / "model.safetensors", {"model.norm.weight"});
  const Checkpoint checkpoint = Checkpoint::open(folder_);
  EXPECT_EQ(error_of([&] { checkpoint.find("model.norm.weight", std::vector<std::int64_t>{6}); },
                     folder_),
            "error: shape of 'model.norm.weight' is [2, 3], config.json asks for [6]\n"
            "  where: DIR/model.safetensors, tensor model.norm.weight\n"
            "  mend:  Check that config.json belongs to these weights.\n");
  EXPECT_EQ(error_of([&] { checkpoint.find("model.norms.weight"); }, folder_),
            "error: tensor 'model.norms.weight' is missing from the model\n"
            "  where: DIR\n"
            "  mend:  The nearest name there is 'model.norm.weight'. Check that config.json "
            "belongs to these weights and that every shard is complete.\n");
}

/// The cache of Hugging Face's hub as it lies on disk, with no other cache set.
class HubCache : public FolderTest {
 protected:
  void SetUp() override {
    FolderTest::SetUp();
    for (const char* name : kNames) {
      const char* value = std::getenv(name);
      saved_.push_back(value == nullptr ? std::nullopt : std::optional<std::string>(value));
      ::unsetenv(name);
    }
    ::setenv("HF_HOME", folder_.c_str(), 1);
    make_folders(repository() / "refs");
    make_folders(repository() / "blobs");
  }
  void TearDown() override {
    for (std::size_t i = 0; i < saved_.size(); ++i) {
      if (saved_[i]) {
        ::setenv(kNames[i], saved_[i]->c_str(), 1);
      } else {
        ::unsetenv(kNames[i]);
      }
    }
    FolderTest::TearDown();
  }
  fs::path repository() const { return folder_ / "hub/models--some--model"; }
  fs::path snapshot(const std::string& commit) {
    make_folders(repository() / "snapshots" / commit);
    return repository() / "snapshots" / commit;
  }

  static constexpr const char* kNames[] = {"HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME"};
  std::vector<std::optional<std::string>> saved_;
};

TEST_F(HubCache, the_snapshot_that_main_names) {
  const fs::path old = snapshot("aaaa"), other = snapshot("bbbb");
  fs::last_write_time(old, fs::last_write_time(other) - std::chrono::hours(1));
  EXPECT_EQ(find_model_folder("some/model"), other) << "without refs/main the newest";
  write_atomically(repository() / "refs/main", "aaaa\n");
  EXPECT_EQ(find_model_folder("some/model"), old);
  write_atomically(repository() / "refs/main", "cccc");  // a download that was broken off
  EXPECT_EQ(find_model_folder("some/model"), other);
  write_atomically(repository() / "refs/main", "../../../..");
  EXPECT_EQ(find_model_folder("some/model"), other);
  ::setenv("HF_HUB_CACHE", (folder_ / "hub").c_str(), 1);
  ::setenv("HF_HOME", "/nowhere", 1);
  EXPECT_EQ(find_model_folder("some/model"), other);
}

TEST_F(HubCache, a_snapshot_s_links_into_blobs_are_followed) {
  write_ones(repository() / "blobs/1234", {"a"});
  fs::create_symlink("../../blobs/1234", snapshot("aaaa") / "model.safetensors");
  EXPECT_TRUE(Checkpoint::open(find_model_folder("some/model")).has("a"));
}

TEST_F(HubCache, a_folder_is_itself) { EXPECT_EQ(find_model_folder(folder_.string()), folder_); }

TEST_F(HubCache, no_such_model) {
  const auto refusal = [&](const std::string& name) {
    return error_of([&] { find_model_folder(name); }, folder_, Fault::usage);
  };
  EXPECT_EQ(refusal("other/model"),
            "error: no such model: 'other/model'\n"
            "  where: looked for a folder of that name, then in DIR/hub\n"
            "  mend:  Download it first: pip install huggingface_hub && hf download other/model\n");
  EXPECT_EQ(refusal("some/model"),
            "error: no such model: 'some/model'\n"
            "  where: looked for a folder of that name, then in DIR/hub\n"
            "  mend:  Download it first: pip install huggingface_hub && hf download some/model\n")
      << "a repository without a snapshot";
  const std::string folder_advice =
      "  where: looked for a folder of that name\n"
      "  mend:  Give a folder with config.json and safetensors files, a GGUF file, or a Hugging "
      "Face "
      "repository name such as HuggingFaceTB/SmolLM2-135M-Instruct, downloaded with: "
      "hf download NAME\n";
  for (const char* name : {"", "nowhere", "./no/model", "/no/model", "a/b/c"}) {
    EXPECT_EQ(refusal(name), "error: no such model: '" + std::string(name) + "'\n" + folder_advice);
  }
}

}  // namespace
}  // namespace tailor
