// Peak memory of packing experts of Maverick's true shape: files of zeros that take no disk space.

#include <sys/resource.h>
#include <sys/wait.h>

#include <cstdio>
#include <regex>

#include "base/text.h"
#include "tests/data/store/store_fixture.h"

namespace tailor::testing_support {
namespace {

constexpr std::int64_t kGiB = std::int64_t{1} << 30;

/// One layer of Llama 4 Maverick, its experts fused in bfloat16 as published, all zero.
class TrueShape : public StoreTest {
 protected:
  void make(std::int64_t experts) {
    constexpr std::int64_t kHidden = 5120, kWidth = 8192, kVocab = 1024;
    TinyModel shape;
    shape.hidden = kHidden;
    shape.heads = 40;
    shape.kv_heads = 8;
    shape.head_dim = 128;
    shape.vocab = kVocab;
    shape.dense_width = 16384;
    shape.expert_width = kWidth;
    shape.experts = experts;
    shape.layers = 1;
    Json config = shape.config();
    config["interleave_moe_layer_step"] = 1;
    make_folders(model());
    write_atomically(model() / "config.json", config.dump());
    const ModelSpec spec = model_spec_from_config(config, "test");
    std::vector<PublishedMatrix> matrices = {embedding_matrix(spec), head_matrix(spec),
                                             final_norm_matrix(spec)};
    for (const auto& list : {attention_matrices(spec, 0), feed_forward_matrices(spec, 0)}) {
      matrices.insert(matrices.end(), list.begin(), list.end());
    }
    Json header = Json::object();
    std::int64_t offset = 0;
    const auto add = [&](const std::string& name, const std::vector<std::int64_t>& sides) {
      std::int64_t bytes = 2;
      for (const std::int64_t side : sides) bytes *= side;
      header[name] = {
          {"dtype", "BF16"}, {"shape", sides}, {"data_offsets", {offset, offset + bytes}}};
      offset += bytes;
    };
    for (const PublishedMatrix& matrix : matrices) add(matrix.name, {matrix.rows, matrix.columns});
    const std::string base = "model.layers.0.feed_forward.experts.";
    add(base + "gate_up_proj", {experts, kHidden, 2 * kWidth});
    add(base + "down_proj", {experts, kWidth, kHidden});
    std::string text = header.dump();
    text.resize((text.size() + 7) / 8 * 8, ' ');
    const fs::path path = model() / "model.safetensors";
    FileWriter writer(path);
    const std::uint64_t length = text.size();
    writer.write(std::as_bytes(std::span(&length, 1)));
    writer.write(text);
    writer.close();
    fs::resize_file(path, 8 + length + static_cast<std::uintmax_t>(offset));
  }

  struct Outcome {
    int code = -1;
    std::int64_t peak_bytes = 0;
    double seconds = 0;
    std::string err;
  };
  /// `tailor model pack` as a process of its own.
  Outcome pack(const std::string& format, const std::string& memory, const std::string& threads) {
    fs::remove_all(store());
    const fs::path err = folder_ / "err";
    std::fflush(stdout);  // or the child prints it once more
    const pid_t child = ::fork();
    if (child == 0) {
      static_cast<void>(std::freopen("/dev/null", "w", stdout));
      static_cast<void>(std::freopen(err.c_str(), "w", stderr));
      const std::string program = std::string(TAILOR_BIN_DIR) + "/tailor";
      ::execl(program.c_str(), "tailor", "model", "pack", model().c_str(), "--to", store().c_str(),
              "--format", format.c_str(), "--non-expert-format", format.c_str(), "--max-ram",
              memory.c_str(), "--threads", threads.c_str(), nullptr);
      ::_exit(126);
    }
    int status = 0;
    struct rusage usage {};
    ::wait4(child, &status, 0, &usage);
    Outcome out;
    out.code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
    out.peak_bytes = usage.ru_maxrss * 1024;
    out.err = read_text(err);
    return out;
  }
};

TEST_F(TrueShape, sixty_four_experts_pack_in_a_gibibyte) {
  if (fs::space(folder_).available < 8 * static_cast<std::uintmax_t>(kGiB)) {
    GTEST_SKIP() << "8 GiB of disk are needed for the store";
  }
  make(64);
  EXPECT_GT(fs::file_size(model() / "model.safetensors"), 16'000'000'000U);
  const Outcome outcome = pack("int4", "1GiB", "2");
  EXPECT_EQ(outcome.code, 0) << outcome.err;
  EXPECT_LE(outcome.peak_bytes, kGiB);
  std::printf("int4 of 64 experts: peak %s\n", bytes_text(outcome.peak_bytes).c_str());
}

TEST_F(TrueShape, every_format_and_any_number_of_threads_keep_to_the_limit) {
  if (fs::space(folder_).available < 4 * static_cast<std::uintmax_t>(kGiB)) {
    GTEST_SKIP() << "4 GiB of disk are needed for the store";
  }
  make(3);
  for (const char* format : {"int4", "nf4", "fp8", "bf16", "as_is"}) {
    for (const char* threads : {"1", "2", "8"}) {
      const Outcome outcome = pack(format, "1GiB", threads);
      EXPECT_EQ(outcome.code, 0) << outcome.err;
      EXPECT_LE(outcome.peak_bytes, kGiB) << format << ", " << threads << " threads";
      std::printf("%s, %s threads: peak %s\n", format, threads,
                  bytes_text(outcome.peak_bytes).c_str());
    }
  }
}

TEST_F(TrueShape, the_least_memory_is_named_and_enough) {
  make(2);
  for (const char* format : {"int4", "bf16"}) {
    const Outcome refused = pack(format, "100MB", "4");
    EXPECT_EQ(refused.code, 66);
    EXPECT_FALSE(fs::exists(store()));
    std::smatch found;
    ASSERT_TRUE(std::regex_search(refused.err, found, std::regex("--max-ram to (\\d+)B or more")))
        << refused.err;
    const std::int64_t least = std::stoll(found[1]);
    const Outcome enough = pack(format, found[1].str() + "B", "4");
    EXPECT_EQ(enough.code, 0) << enough.err;
    EXPECT_LE(enough.peak_bytes, least);
    EXPECT_LT(least, kGiB);
    std::printf("%s: least %s, peak with it %s\n", format, bytes_text(least).c_str(),
                bytes_text(enough.peak_bytes).c_str());
  }
}

}  // namespace
}  // namespace tailor::testing_support
