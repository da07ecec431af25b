#include "data/gguf_export/export_gguf.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <exception>
#include <map>
#include <mutex>
#include <thread>

#include "base/clock.h"
#include "base/error.h"
#include "base/text.h"
#include "base/units.h"
#include "data/checkpoint/checkpoint.h"
#include "data/gguf/metadata.h"
#include "data/gguf/tensors.h"
#include "data/gguf/vocabulary.h"
#include "data/gguf_export/staging_file.h"
#include "data/gguf_export/tokenizer_values.h"
#include "data/store/source.h"
#include "data/store/store.h"

namespace tailor {
namespace {

constexpr std::int64_t kElementsAtOnce = std::int64_t{1} << 20U;

/// llama.cpp's number for a file mostly of this type (llama.h, enum llama_ftype).
std::int64_t file_type_of(GgmlType type) {
  switch (type) {
    case GgmlType::f32:
      return 0;
    case GgmlType::f16:
      return 1;
    case GgmlType::q8_0:
      return 7;
    case GgmlType::bf16:
      return 32;
    default:
      TAILOR_CHECK(false, "a type that is written");
  }
}

/// "models/mine/" is called mine.
std::string name_of(const fs::path& model) {
  return (model.has_filename() ? model : model.parent_path()).filename().string();
}

/// Rows [begin, end) of `count` matrices that are read one after the other by one thread.
struct Piece {
  std::size_t matrix, count;
  std::int64_t begin, end;
};

class Exporter {
 public:
  Exporter(const fs::path& model, const fs::path& to, const GgufExportOptions& options)
      : model_(model), options_(options), spec_(read_model_spec(model)), staging_(to) {
    if (Store::is_store(model)) {
      throw Error(Fault::usage, {"the model is a store", model.string(),
                                 "Write it as a checkpoint first: tailor model export " +
                                     model.string() + " --to DIR --dtype bfloat16."});
    }
    values_ = gguf_model_values(spec_, options.name.empty() ? name_of(model) : options.name,
                                file_type_of(options.type));
    checkpoint_ = Checkpoint::open(model);
    matrices_ = gguf_matrices(spec_, experts_are_fused(spec_, [&](const std::string& name) {
                                return checkpoint_.has(name);
                              }));
    // Everything that is missing or of another shape is known before anything is written.
    for (const GgufMatrix& matrix : matrices_) {
      static_cast<void>(find_source(checkpoint_, matrix.matrix));
    }
    add_tokenizer_values(model_, spec_.vocab, values_, report_.notes);
    make_tensors();
    make_notes();
  }

  GgufExportReport go() {
    const double began = seconds_now();
    std::int64_t bytes = 0;
    const std::string header = gguf_header_bytes(values_, tensors_, bytes);
    staging_.reserve(bytes);
    staging_.write(0, reinterpret_cast<const std::byte*>(header.data()),
                   narrow<std::int64_t>(header.size()));
    write_factors();
    make_pieces();
    total_bytes_ = bytes;
    run(began);
    staging_.publish();
    report_.bytes = bytes;
    report_.tensors = narrow<std::int64_t>(tensors_.size());
    report_.seconds = seconds_now() - began;
    report_.architecture = gguf_architecture(spec_.family);
    return std::move(report_);
  }

 private:
  GgmlType type_of(const GgufPlace& place) const {
    if (place.float32) return GgmlType::f32;
    const GgmlLayout& layout = ggml_layout(options_.type);
    return place.shape.back() % layout.block == 0 ? options_.type : GgmlType::f16;
  }

  void add_tensor(const std::string& name, GgmlType type, std::vector<std::int64_t> shape) {
    if (!index_.emplace(name, tensors_.size()).second) return;  // another expert's
    tensors_.push_back({name, type, std::move(shape)});
  }

  void make_tensors() {
    factors_ = rope_frequency_factors(spec_);
    if (!factors_.empty()) {
      add_tensor("rope_freqs.weight", GgmlType::f32, {narrow<std::int64_t>(factors_.size())});
    }
    for (const GgufMatrix& matrix : matrices_) {
      for (const GgufPlace& place : matrix.places) {
        add_tensor(place.tensor, type_of(place), place.shape);
      }
    }
  }

  void make_notes() {
    if (!checkpoint_.prefix().empty()) {
      report_.notes.push_back(
          "the vision tower and projector are left out: llama.cpp reads them "
          "from a file of their own (mmproj)");
    }
    if (spec_.prediction_layers > 0) {
      report_.notes.push_back("the multi-token-prediction layers are left out");
    }
    const auto half = std::count_if(tensors_.begin(), tensors_.end(), [&](const auto& tensor) {
      return options_.type == GgmlType::q8_0 && tensor.type == GgmlType::f16;
    });
    if (half > 0) {
      report_.notes.push_back(count_text(half) +
                              " tensors are F16: their rows are no whole blocks "
                              "of 32");
    }
  }

  void write_factors() const {
    if (factors_.empty()) return;
    const GgufTensorToWrite& tensor = tensors_.front();
    staging_.write(tensor.offset, reinterpret_cast<const std::byte*>(factors_.data()),
                   tensor.bytes);
  }

  void make_pieces() {
    for (std::size_t i = 0; i < matrices_.size();) {
      const PublishedMatrix& matrix = matrices_[i].matrix;
      if (matrix.fused) {  // gate, up and down of an expert: gate and up are read together
        pieces_.push_back({i, 3, 0, 0});
        i += 3;
        continue;
      }
      std::int64_t step = std::max<std::int64_t>(1, kElementsAtOnce / matrix.columns);
      step = align_up(step, row_unit(matrices_[i]));
      for (std::int64_t r = 0; r < matrix.rows; r += step) {
        pieces_.push_back({i, 1, r, std::min(matrix.rows, r + step)});
      }
      ++i;
    }
  }

  /// Rows that have to be read together: a head's where it is turned, 128 for blocks of fp8.
  std::int64_t row_unit(const GgufMatrix& matrix) const {
    const GgufPlace& place = matrix.places.front();
    if (place.heads > 0) return matrix.matrix.rows / place.heads;
    return 128;
  }

  /// One thread's reader and buffers.
  struct Worker {
    explicit Worker(const Checkpoint& checkpoint) : reader(checkpoint) {}
    SourceReader reader;
    std::vector<float> rows, turned;
    std::vector<std::byte> bytes;
  };

  void run(double began) {
    std::atomic<std::size_t> next{0};
    std::atomic<std::int64_t> done{0}, read{0};
    std::atomic<bool> failed{false}, stopped{false};
    std::exception_ptr error;
    std::mutex mutex;
    double told = 0;
    const auto work = [&] {
      try {
        Worker worker(checkpoint_);
        while (!failed && !stopped) {
          const std::size_t i = next++;
          if (i >= pieces_.size()) break;
          done += write_piece(pieces_[i], worker);
          const std::lock_guard lock(mutex);
          if (options_.stop && options_.stop()) stopped = true;
          const double now = seconds_now();
          if (!options_.progress || now - told < 0.2) continue;
          told = now;
          options_.progress(done, total_bytes_, now - began);
        }
        read += worker.reader.bytes_read();
      } catch (...) {
        const std::lock_guard lock(mutex);
        if (!failed) error = std::current_exception();
        failed = true;
      }
    };
    std::vector<std::thread> threads;
    for (int t = 1; t < options_.threads; ++t) threads.emplace_back(work);
    work();
    for (std::thread& thread : threads) thread.join();
    if (error) std::rethrow_exception(error);
    if (stopped) {
      throw Error(Fault::stopped, {"interrupted while writing a GGUF file", model_.string(),
                                   "Nothing was left behind. Run the same command again."});
    }
    report_.source_bytes_read = read;
  }

  std::int64_t write_piece(const Piece& piece, Worker& worker) const {
    std::int64_t bytes = 0;
    for (std::size_t i = piece.matrix; i < piece.matrix + piece.count; ++i) {
      const GgufMatrix& matrix = matrices_[i];
      if (piece.count == 1) {
        bytes += write_rows(matrix, piece.begin, piece.end, worker);
        continue;
      }
      const std::int64_t rows = matrix.matrix.rows, columns = matrix.matrix.columns;
      const std::int64_t step =
          align_up(std::max<std::int64_t>(1, kElementsAtOnce / columns), row_unit(matrix));
      for (std::int64_t r = 0; r < rows; r += step) {
        bytes += write_rows(matrix, r, std::min(rows, r + step), worker);
      }
    }
    return bytes;
  }

  std::int64_t write_rows(const GgufMatrix& matrix, std::int64_t begin, std::int64_t end,
                          Worker& worker) const {
    const std::int64_t columns = matrix.matrix.columns;
    const auto count = static_cast<std::size_t>((end - begin) * columns);
    worker.rows.resize(count);
    worker.reader.read_rows(matrix.matrix, begin, end, worker.rows.data());
    std::int64_t bytes = 0;
    for (const GgufPlace& place : matrix.places) {
      switch (place.form) {
        case GgufForm::plain:
          bytes += put(matrix, place, place.first + begin * columns, worker.rows, worker);
          break;
        case GgufForm::rotary_pairs: {
          const std::int64_t width = matrix.matrix.rows / place.heads;
          worker.turned.resize(count);
          for (std::int64_t r = 0; r < end - begin; ++r) {
            const std::int64_t from = r - r % width + unpaired_row(r % width, width);
            std::copy_n(worker.rows.begin() + from * columns, columns,
                        worker.turned.begin() + r * columns);
          }
          bytes += put(matrix, place, begin * columns, worker.turned, worker);
          break;
        }
        case GgufForm::latent_keys:
        case GgufForm::latent_values:
          bytes += put_latent(matrix, place, begin, end, worker);
          break;
      }
    }
    return bytes;
  }

  std::int64_t put_latent(const GgufMatrix& matrix, const GgufPlace& place, std::int64_t begin,
                          std::int64_t end, Worker& worker) const {
    const std::int64_t nope = spec_.latent.nope_dim, columns = matrix.matrix.columns;
    const std::int64_t width = matrix.matrix.rows / place.heads;
    const bool keys = place.form == GgufForm::latent_keys;
    const std::int64_t rows = keys ? nope : width - nope, heads = (end - begin) / width;
    worker.turned.resize(static_cast<std::size_t>(heads * rows * columns));
    float* out = worker.turned.data();
    for (std::int64_t h = 0; h < heads; ++h, out += rows * columns) {
      const float* from = worker.rows.data() + (h * width + (keys ? 0 : nope)) * columns;
      if (!keys) {
        std::copy_n(from, rows * columns, out);
        continue;
      }
      for (std::int64_t r = 0; r < rows; ++r) {
        for (std::int64_t c = 0; c < columns; ++c) out[c * rows + r] = from[r * columns + c];
      }
    }
    return put(matrix, place, begin / width * rows * columns, worker.turned, worker);
  }

  /// Writes numbers at element `first` of the place's tensor.
  std::int64_t put(const GgufMatrix& matrix, const GgufPlace& place, std::int64_t first,
                   const std::vector<float>& values, Worker& worker) const {
    const GgufTensorToWrite& tensor = tensors_[index_.find(place.tensor)->second];
    const GgmlLayout& layout = ggml_layout(tensor.type);
    const auto count = narrow<std::int64_t>(values.size());
    const std::int64_t bytes = count / layout.block * layout.bytes;
    worker.bytes.resize(static_cast<std::size_t>(bytes));
    std::int64_t bad = 0;
    if (!quantise(tensor.type, values.data(), count, worker.bytes.data(), bad)) {
      const float value = values[static_cast<std::size_t>(bad)];
      const bool finite = std::isfinite(value);
      throw Error(Fault::bad_file,
                  {finite ? "a weight is " + number_text(static_cast<double>(value)) + ", which " +
                                std::string(layout.name) + " cannot hold"
                          : std::string("a weight is infinite or not a number"),
                   model_.string() + ", tensor " + matrix.matrix.name + " (" + place.tensor +
                       ", number " + count_text(first + bad) + ")",
                   finite ? "Use --dtype bf16."
                          : "The checkpoint is damaged or its training diverged. Download it "
                            "again, and check it with the program that wrote it."});
    }
    staging_.write(tensor.offset + first / layout.block * layout.bytes, worker.bytes.data(), bytes);
    return bytes;
  }

  fs::path model_;
  const GgufExportOptions& options_;
  ModelSpec spec_;
  StagingFile staging_;
  Checkpoint checkpoint_;
  std::vector<std::pair<std::string, GgufValue>> values_;
  std::vector<GgufMatrix> matrices_;
  std::vector<GgufTensorToWrite> tensors_;
  std::map<std::string, std::size_t, std::less<>> index_;  ///< tensor -> place in tensors_
  std::vector<float> factors_;
  std::vector<Piece> pieces_;
  std::int64_t total_bytes_ = 0;
  GgufExportReport report_;
};

}  // namespace

GgufExportReport export_gguf(const fs::path& model, const fs::path& to,
                             const GgufExportOptions& options) {
  return Exporter(model, to, options).go();
}

}  // namespace tailor
