#include <algorithm>
#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <thread>

#include "adapters/merge/journal.h"
#include "adapters/merge/receipt.h"
#include "base/clock.h"
#include "base/error.h"
#include "base/units.h"
#include "data/checkpoint/safetensors.h"

namespace tailor {
namespace {

/// A tensor to look at: where it should lie, and what its digest should be.
struct Expected {
  std::string name, file, digest;
  TensorPieces pieces;
};

class Verifier {
 public:
  Verifier(const fs::path& folder, const VerifyMergeOptions& options)
      : folder_(folder), options_(options), began_(seconds_now()) {}

  MergeVerification go() {
    const fs::path path = folder_ / kReceiptName;
    std::error_code error;
    if (!fs::is_regular_file(path, error)) {
      throw Error(Fault::bad_file, {"there is no " + std::string(kReceiptName), folder_.string(),
                                    "Name a folder that `tailor merge` wrote."});
    }
    receipt_ = read_json(path);
    const JsonReader reader(receipt_, path.string());
    if (reader.text("format", "") != "tailor-merge" || reader.integer("version", 0) != 1) {
      throw Error(Fault::bad_file, {"the receipt is of another kind or version", path.string(),
                                    "Check it with the Tailor that wrote it."});
    }
    check_files(JsonReader(reader.at("output"), path.string() + ", output").at("files"));
    std::vector<Expected> merged, base;
    for (const Json& entry : reader.at("tensors")) read_entry(entry, path, merged, base);
    look_at(folder_, merged, "");
    check_extra(merged);
    if (!options_.base.empty()) look_at(options_.base, base, "base: ");
    check_adapters(reader.at("adapters"));
    run();
    out_.seconds = seconds_now() - began_;
    std::sort(out_.problems.begin(), out_.problems.end());
    return std::move(out_);
  }

 private:
  struct Job {
    Expected expected;
    std::string label;
    std::shared_ptr<const SliceSource> source;
    TensorInfo info;
  };

  static TensorPieces read_pieces(const JsonReader& reader, const fs::path& path) {
    const Json& pieces = reader.at("pieces");
    const bool good = pieces.is_array() && pieces.size() == 2 && pieces[0].is_number_integer() &&
                      pieces[1].is_number_integer();
    const TensorPieces out =
        good ? TensorPieces{pieces[0].get<std::int64_t>(), pieces[1].get<std::int64_t>()}
             : TensorPieces{};
    if (!good || out.slice_bytes < 0 || out.piece_bytes < 0) {
      throw Error(Fault::bad_file, {"pieces of a tensor are not two sizes", path.string(),
                                    "The receipt is damaged."});
    }
    return out;
  }

  static void read_entry(const Json& entry, const fs::path& path, std::vector<Expected>& merged,
                         std::vector<Expected>& base) {
    const JsonReader reader(entry, path.string() + ", tensors");
    Expected one{reader.text("name"), reader.text("file"), reader.text("digest", ""),
                 read_pieces(reader, path)};
    merged.push_back(one);
    if (!reader.has("base")) {
      base.push_back(std::move(one));
      return;
    }
    const JsonReader from(reader.at("base"), path.string() + ", tensors, " + one.name);
    base.push_back(
        {from.text("name"), from.text("file"), from.text("digest", ""), read_pieces(from, path)});
  }

  void check_files(const Json& files) {
    for (const auto& [name, digest] : files.items()) {
      ++out_.files;
      std::error_code error;
      const fs::path path = inside_folder(folder_, name);
      if (!fs::is_regular_file(path, error)) {
        out_.problems.push_back(name + " is missing");
      } else if (!digest.is_string() || sha256_file(path) != digest.get<std::string>()) {
        out_.problems.push_back(name + " is not as it was written");
      }
    }
  }

  void check_adapters(const Json& adapters) {
    if (options_.adapters.empty()) return;
    if (!adapters.is_array() || adapters.size() != options_.adapters.size()) {
      out_.problems.push_back("adapters: the receipt names " + std::to_string(adapters.size()) +
                              ", given were " + std::to_string(options_.adapters.size()));
      return;
    }
    for (std::size_t i = 0; i < adapters.size(); ++i) {
      for (const char* name : {"adapter_model.safetensors", "adapter_config.json"}) {
        const fs::path path = options_.adapters[i] / name;
        std::error_code error;
        if (adapters[i].is_object() && adapters[i].contains(name) &&
            fs::is_regular_file(path, error) && adapters[i][name] == sha256_file(path))
          continue;
        out_.problems.push_back("adapter: " + path.string() + " is not what was merged");
      }
    }
  }

  void look_at(const fs::path& folder, const std::vector<Expected>& tensors,
               const std::string& label) {
    struct File {
      std::shared_ptr<const SliceSource> source;
      SafetensorsHeader header;
    };
    std::map<std::string, File> files;
    for (const Expected& expected : tensors) {
      auto found = files.find(expected.file);
      if (found == files.end()) {
        File file;
        const fs::path path = inside_folder(folder, expected.file);
        try {
          const MappedFile mapped(path);
          file.header = parse_safetensors_header(mapped.bytes(), path);
          file.source = std::make_shared<const SliceSource>(path);
        } catch (const Error& reason) {
          out_.problems.push_back(label + expected.file + ": " + reason.parts().what);
        }
        found = files.emplace(expected.file, std::move(file)).first;
      }
      if (!found->second.source) continue;  // told once
      const auto tensor = found->second.header.tensors.find(expected.name);
      if (tensor == found->second.header.tensors.end()) {
        out_.problems.push_back(label + expected.file + " lacks " + expected.name);
        continue;
      }
      jobs_.push_back({expected, label, found->second.source, tensor->second});
      bytes_ += tensor->second.bytes;
      ++out_.tensors;
    }
  }

  /// Weights that the receipt does not know.
  void check_extra(const std::vector<Expected>& tensors) {
    std::set<std::string> known;
    for (const Expected& tensor : tensors) known.insert(tensor.file);
    for (const auto& entry : fs::directory_iterator(folder_)) {
      const std::string name = entry.path().filename();
      if (entry.path().extension() == ".safetensors" && known.count(name) == 0) {
        out_.problems.push_back(name + " is not of this merge");
      }
    }
  }

  void run() {
    std::vector<std::thread> threads;
    for (int i = 0; i < std::max(1, options_.threads); ++i)
      threads.emplace_back([this] { work(); });
    for (std::thread& thread : threads) thread.join();
    if (failure_) std::rethrow_exception(failure_);
    out_.bytes = bytes_;
  }

  void work() {
    AlignedMemory memory;
    try {
      for (std::size_t i; (i = next_.fetch_add(1)) < jobs_.size();) check(jobs_[i], memory);
    } catch (...) {
      const std::lock_guard lock(mutex_);
      if (!failure_) failure_ = std::current_exception();
      next_ = jobs_.size();
    }
  }

  void check(const Job& job, AlignedMemory& memory) {
    const TensorPieces& pieces = job.expected.pieces;
    std::vector<PieceDigest> digests;
    const bool cut = pieces.slice_bytes > 0 && pieces.piece_bytes > 0 &&
                     job.info.bytes % pieces.slice_bytes == 0;
    for (std::int64_t slice = 0; cut && slice < job.info.bytes; slice += pieces.slice_bytes) {
      for (std::int64_t at = 0; at < pieces.slice_bytes; at += pieces.piece_bytes) {
        if (options_.stop && options_.stop()) {
          throw Error(Fault::stopped, {"interrupted while verifying", folder_.string(),
                                       "Run the same command again."});
        }
        const std::int64_t bytes = std::min(pieces.piece_bytes, pieces.slice_bytes - at);
        const std::byte* from = job.source->read(job.info.offset + slice + at, bytes, memory);
        digests.push_back(piece_digest({from, static_cast<std::size_t>(bytes)}));
        tell(bytes);
      }
    }
    if (digest_text(tensor_digest(digests)) == job.expected.digest) return;
    const std::lock_guard lock(mutex_);
    out_.problems.push_back(job.label + job.expected.file + ": " + job.expected.name +
                            " is not as it was written");
  }

  void tell(std::int64_t bytes) {
    const std::lock_guard lock(mutex_);
    done_ += bytes;
    const double now = seconds_now();
    if (!options_.progress || now - told_ < 0.5) return;
    told_ = now;
    options_.progress(done_, bytes_, now - began_);
  }

  const fs::path folder_;
  const VerifyMergeOptions& options_;
  const double began_;
  Json receipt_;
  std::vector<Job> jobs_;
  std::atomic<std::size_t> next_{0};
  std::mutex mutex_;
  std::int64_t bytes_ = 0, done_ = 0;
  double told_ = 0;
  std::exception_ptr failure_;
  MergeVerification out_;
};

}  // namespace

MergeVerification verify_merge(const fs::path& folder, const VerifyMergeOptions& options) {
  return Verifier(folder, options).go();
}

}  // namespace tailor
