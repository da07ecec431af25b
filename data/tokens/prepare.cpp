#include "data/tokens/prepare.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <limits>
#include <memory>
#include <thread>
#include <utility>

#include "base/error.h"
#include "base/file_lock.h"
#include "base/log.h"
#include "base/text.h"
#include "data/tokens/document_spill.h"
#include "data/tokens/encode_record.h"
#include "data/tokens/packer.h"

namespace tailor {
namespace {

/// Part of the digest: raised when the same input would give another store.
constexpr int kCodeVersion = 1;

struct InputFile {
  fs::path path;
  double weight = 1;
  RecordFormat format = RecordFormat::automatic;
  std::string sha256;
  std::int64_t bytes = 0;
};

std::vector<InputFile> list_files(const std::vector<DataFile>& files, RecordFormat format) {
  std::vector<InputFile> out;
  for (const DataFile& file : files) {
    if (!(file.weight > 0) || file.weight > 1000) {
      throw Error(Fault::usage,
                  {"weight must be above 0 and at most 1000, found " + exact_text(file.weight),
                   "data.train (" + file.path + ")", "Set weight: 1 to take each document once."});
    }
    for (const fs::path& path : expand_files(file.path)) {
      out.push_back({path, file.weight, file.format.value_or(format), sha256_file(path),
                     static_cast<std::int64_t>(fs::file_size(path))});
    }
  }
  return out;
}

Json describe(const std::vector<InputFile>& files) {
  Json out = Json::array();
  for (const InputFile& file : files) {
    out.push_back({{"sha256", file.sha256},
                   {"weight", file.weight},
                   {"format", std::string(record_format_name(file.format))}});
  }
  return out;
}

Json paths_of(const std::vector<InputFile>& files) {
  Json out = Json::array();
  for (const InputFile& file : files) {
    out.push_back({{"path", file.path.string()}, {"sha256", file.sha256}});
  }
  return out;
}

/// Tokenises records on several threads and hands the documents on in the order of the file.
class EncodePool {
 public:
  explicit EncodePool(const RecordEncoder& encoder)
      : encoder_(encoder), threads_(std::clamp(std::thread::hardware_concurrency(), 1U, 16U)) {}

  std::vector<TokenDocument> encode(const std::vector<Record>& records) const {
    std::vector<TokenDocument> out(records.size());
    std::vector<std::exception_ptr> errors(records.size());
    std::atomic<std::size_t> next{0};
    const auto work = [&] {
      for (std::size_t i = next++; i < records.size(); i = next++) {
        try {
          out[i] = encoder_.encode(records[i]);
        } catch (const Error& error) {
          Error::Parts parts = error.parts();
          if (parts.where.empty()) parts.where = records[i].where;
          errors[i] = std::make_exception_ptr(Error(error.fault(), std::move(parts)));
        } catch (...) {
          errors[i] = std::current_exception();
        }
      }
    };
    {
      std::vector<std::jthread> helpers;
      for (unsigned i = 1; i < threads_ && i < records.size(); ++i) helpers.emplace_back(work);
      work();
    }
    for (const std::exception_ptr& error : errors) {  // the first line's, whichever came first
      if (error) std::rethrow_exception(error);
    }
    return out;
  }

 private:
  const RecordEncoder& encoder_;
  unsigned threads_;
};

bool teaches(std::span<const std::uint8_t> trained) {
  return trained.size() > 1 && std::find(trained.begin() + 1, trained.end(), 1) != trained.end();
}

/// Reads all files of one side into `spill`.
class Ingest {
 public:
  Ingest(const DataOptions& options, const Tokenizer* tokenizer, RecordEncoder& encoder,
         DocumentSpill& spill, SplitReport& report)
      : options_(options),
        tokenizer_(tokenizer),
        encoder_(encoder),
        spill_(spill),
        report_(report) {}

  void read(const std::vector<InputFile>& files,
            const std::function<void(std::int64_t)>& progress) {
    const EncodePool pool(encoder_);
    for (std::size_t index = 0; index < files.size(); ++index) {
      RecordReader reader(files[index].path, files[index].format,
                          tokenizer_ != nullptr ? tokenizer_->vocab_size() : 0);
      std::vector<Record> batch;
      const auto flush = [&] {
        const std::vector<TokenDocument> documents = pool.encode(batch);
        for (std::size_t i = 0; i < batch.size(); ++i) {
          add(documents[i], batch[i], static_cast<std::int32_t>(index), files[index].weight);
        }
        batch.clear();
        if (progress) progress(reader.bytes_read());
      };
      while (std::optional<Record> record = reader.next()) {
        ++report_.records;
        if (std::holds_alternative<Conversation>(record->content)) encoder_.load_template();
        batch.push_back(std::move(*record));
        if (batch.size() == 512) flush();
      }
      flush();
    }
  }

 private:
  void add(const TokenDocument& document, const Record& record, std::int32_t file, double weight) {
    const std::span<const std::int32_t> ids = document.ids;
    const std::span<const std::uint8_t> trained = document.trained;
    const auto limit = static_cast<std::size_t>(options_.sequence_len);
    if (!teaches(trained)) {
      ++report_.dropped_untrained;
      return;
    }
    if (ids.size() <= limit) {
      spill_.add(ids, trained, file, record.line, weight);
      return;
    }
    switch (options_.too_long) {
      case TooLong::truncate:
        ++report_.truncated;
        report_.truncated_tokens += static_cast<std::int64_t>(ids.size() - limit);
        if (teaches(trained.first(limit))) {
          spill_.add(ids.first(limit), trained.first(limit), file, record.line, weight);
        } else {
          ++report_.dropped_untrained;
        }
        return;
      case TooLong::drop:
        ++report_.dropped_too_long;
        return;
      case TooLong::split:
        ++report_.split;
        for (std::size_t at = 0; at < ids.size(); at += limit) {
          const std::size_t size = std::min(limit, ids.size() - at);
          if (teaches(trained.subspan(at, size))) {
            spill_.add(ids.subspan(at, size), trained.subspan(at, size), file, record.line, weight);
          }
        }
        return;
      case TooLong::error:
        throw Error(Fault::bad_file,
                    {"the document has " + count_text(static_cast<std::int64_t>(ids.size())) +
                         " tokens, a row holds " + count_text(options_.sequence_len),
                     record.where,
                     "Raise data.sequence_len, or set data.too_long: truncate, drop or split."});
    }
  }

  const DataOptions& options_;
  const Tokenizer* tokenizer_;
  RecordEncoder& encoder_;
  DocumentSpill& spill_;
  SplitReport& report_;
};

/// Documents of `spill` that `belongs` takes, repeats in later rounds so that they lie apart.
std::vector<std::int64_t> choose(const DocumentSpill& spill,
                                 const std::function<bool(std::uint64_t)>& belongs) {
  std::vector<std::int64_t> out;
  for (std::int32_t round = 0;; ++round) {
    bool any = false;
    for (std::size_t i = 0; i < spill.entries().size(); ++i) {
      const DocumentSpill::Entry& entry = spill.entries()[i];
      if (entry.copies <= round || !belongs(entry.hash)) continue;
      out.push_back(static_cast<std::int64_t>(i));
      any = true;
    }
    if (!any) return out;
  }
}

void write_side(const DataOptions& options, const DocumentSpill& spill,
                const std::vector<std::int64_t>& chosen, const Json& manifest,
                SplitReport& report) {
  std::vector<std::int64_t> lengths;
  lengths.reserve(chosen.size());
  for (const std::int64_t i : chosen)
    lengths.push_back(spill.entries()[static_cast<std::size_t>(i)].size);
  TokenStoreContent content;
  content.rows = options.packing ? pack_documents(lengths, options.sequence_len)
                                 : one_document_a_row(static_cast<std::int64_t>(chosen.size()));
  content.document = [&](std::int64_t document) {
    const auto entry = static_cast<std::size_t>(chosen[static_cast<std::size_t>(document)]);
    return spill.document(spill.entries()[entry]);
  };
  content.sequence_len = options.sequence_len;
  report.documents = static_cast<std::int64_t>(chosen.size());
  report.rows = static_cast<std::int64_t>(content.rows.size());
  for (const std::int64_t i : chosen) {
    const auto document = spill.document(spill.entries()[static_cast<std::size_t>(i)]);
    report.tokens += static_cast<std::int64_t>(document.ids.size());
    report.trained_tokens += std::count(document.trained.begin() + 1, document.trained.end(), 1);
  }
  report.fill = static_cast<double>(report.tokens) /
                (static_cast<double>(report.rows) * static_cast<double>(options.sequence_len));
  content.manifest = manifest;
  content.manifest["report"] = report.to_json();
  write_token_store(report.store, content);
}

[[noreturn]] void nothing_to_learn(const std::string& side, const SplitReport& report,
                                   const std::string& where) {
  throw Error(
      Fault::bad_file,
      {"no token of the " + side + " data carries loss: " + count_text(report.records) +
           " records, " + count_text(report.dropped_untrained) + " without a trained token, " +
           count_text(report.dropped_too_long) + " too long, " +
           count_text(report.dropped_by_weight) + " left out by their weight",
       where,
       "Look at data.train_on, data.sequence_len and data.too_long, and at the labels of "
       "tokenized data."});
}

std::optional<SplitReport> reuse(const fs::path& store, const std::string& digest) {
  if (!fs::exists(store) || !fs::exists(TokenStore::manifest_path(store))) return std::nullopt;
  try {
    const TokenStore found = TokenStore::open(store);
    const JsonReader manifest(found.manifest(), store.string());
    if (manifest.text("digest", "") != digest) return std::nullopt;
    SplitReport report = SplitReport::from_json(manifest.at("report"), store.string());
    report.store = store;
    return report;
  } catch (const Error& error) {
    if (error.fault() != Fault::bad_file) throw;
    log_warning("making " + store.string() + " again: " + error.parts().what);
    return std::nullopt;
  }
}

fs::path validation_path(const fs::path& train) {
  fs::path out = train;
  out.replace_extension();
  out += ".validation";
  out += train.extension();
  return out;
}

}  // namespace

TooLong too_long_from_name(const std::string& name) {
  const std::vector<std::string> names = {"truncate", "drop", "split", "error"};
  for (std::size_t i = 0; i < names.size(); ++i) {
    if (names[i] == name) return static_cast<TooLong>(i);
  }
  throw Error(Fault::usage, {"unknown value '" + name + "'", "data.too_long",
                             "Use one of: " + join(names, ", ") + "."});
}

std::string_view too_long_name(TooLong too_long) {
  switch (too_long) {
    case TooLong::truncate:
      return "truncate";
    case TooLong::drop:
      return "drop";
    case TooLong::split:
      return "split";
    case TooLong::error:
      return "error";
  }
  return "?";
}

Json SplitReport::to_json() const {
  return {{"records", records},
          {"documents", documents},
          {"rows", rows},
          {"tokens", tokens},
          {"trained_tokens", trained_tokens},
          {"fill", fill},
          {"truncated", truncated},
          {"truncated_tokens", truncated_tokens},
          {"split", split},
          {"dropped_too_long", dropped_too_long},
          {"dropped_untrained", dropped_untrained},
          {"dropped_by_weight", dropped_by_weight}};
}

SplitReport SplitReport::from_json(const Json& json, const std::string& where) {
  const JsonReader reader(json, where);
  SplitReport out;
  out.records = reader.integer("records");
  out.documents = reader.integer("documents");
  out.rows = reader.integer("rows");
  out.tokens = reader.integer("tokens");
  out.trained_tokens = reader.integer("trained_tokens");
  out.fill = reader.number("fill");
  out.truncated = reader.integer("truncated");
  out.truncated_tokens = reader.integer("truncated_tokens");
  out.split = reader.integer("split");
  out.dropped_too_long = reader.integer("dropped_too_long");
  out.dropped_untrained = reader.integer("dropped_untrained");
  out.dropped_by_weight = reader.integer("dropped_by_weight");
  return out;
}

PrepareReport prepare(const DataOptions& options, const Tokenizer* tokenizer,
                      const PrepareProgress& progress) {
  const auto usage = [](const std::string& what, const std::string& where,
                        const std::string& mend) {
    throw Error(Fault::usage, {what, where, mend});
  };
  if (options.train.empty()) usage("no training data", "data.train", "Name a JSON lines file.");
  if (options.sequence_len < 2 || options.sequence_len > (1 << 30)) {
    usage(
        "sequence_len must be from 2 to 1073741824, found " + std::to_string(options.sequence_len),
        "data.sequence_len", "Set data.sequence_len: 2048, for instance.");
  }
  if (!(options.validation_split >= 0 && options.validation_split < 1)) {
    usage("the validation split must be from 0 to below 1, found " +
              exact_text(options.validation_split),
          "data.validation.split", "Set data.validation: {split: 0.01}, for instance.");
  }
  const bool splits = options.validation_split > 0;
  if (splits && !options.validation.empty()) {
    usage("validation files and a split are both given", "data.validation", "Keep one of them.");
  }

  const std::vector<InputFile> train_files = list_files(options.train, options.format);
  const std::vector<InputFile> validation_files = list_files(options.validation, options.format);
  RecordEncoder encoder(tokenizer, options.chat_template, options.train_on);
  // The template is part of the digest. Data without conversations need none, so its lack is no
  // error before the first conversation.
  std::string template_digest;
  try {
    encoder.load_template();
    if (encoder.chat_template()) template_digest = encoder.chat_template()->digest();
  } catch (const Error&) {
    template_digest = "none";
  }
  Json key = {{"code", kCodeVersion},
              {"train", describe(train_files)},
              {"validation", describe(validation_files)},
              {"validation_split", options.validation_split},
              {"tokenizer", tokenizer != nullptr ? tokenizer->digest() : ""},
              {"chat_template", template_digest},
              {"train_on", options.train_on.text()},
              {"sequence_len", options.sequence_len},
              {"packing", options.packing},
              {"too_long", std::string(too_long_name(options.too_long))}};
  if (tokenizer != nullptr) {
    key["special"] = {{"bos", tokenizer->special_text("bos_token")},
                      {"bos_id", tokenizer->bos().value_or(-1)},
                      {"eos_id", tokenizer->eos().value_or(-1)},
                      {"adds_bos", tokenizer->adds_bos()}};
  }

  PrepareReport out;
  out.digest = sha256_hex(key.dump());
  const fs::path store =
      options.store.value_or(options.cache / "tokens" / (out.digest.substr(0, 32) + ".h5"));
  if (store.has_parent_path()) make_folders(store.parent_path());
  const bool has_validation = splits || !validation_files.empty();
  const FileLock lock(store.string() + ".lock");

  if (auto train = reuse(store, out.digest)) {
    std::optional<SplitReport> validation;
    if (has_validation) validation = reuse(validation_path(store), out.digest);
    if (!has_validation || validation) {
      out.train = std::move(*train);
      out.validation = std::move(validation);
      out.reused = true;
      return out;
    }
  }
  for (const fs::path& path : {store, validation_path(store)}) {
    if (fs::exists(path) && !fs::exists(TokenStore::manifest_path(path)) && options.store) {
      usage("the file is there and is no token store of Tailor's", path.string(),
            "Set data.store to another path, or take this file away.");
    }
  }

  std::int64_t bytes_total = 0;
  for (const auto* files : {&train_files, &validation_files}) {
    for (const InputFile& file : *files) bytes_total += file.bytes;
  }
  const fs::path scratch = store.string() + ".work." + std::to_string(::getpid());
  const auto ingest = [&](const std::vector<InputFile>& files, DocumentSpill& spill,
                          SplitReport& report) {
    std::int64_t bytes_before = 0;
    std::int64_t last = 0;
    Ingest(options, tokenizer, encoder, spill, report).read(files, [&](std::int64_t bytes) {
      if (bytes < last) bytes_before += last;
      last = bytes;
      if (progress)
        progress(report.records, std::min(bytes_before + bytes, bytes_total), bytes_total);
    });
    spill.seal();
    report.dropped_by_weight = std::count_if(spill.entries().begin(), spill.entries().end(),
                                             [](const auto& entry) { return entry.copies == 0; });
  };
  const auto manifest_of = [&](const std::vector<InputFile>& files, const char* side) {
    return Json{
        {"digest", out.digest}, {"side", side}, {"files", paths_of(files)}, {"made_from", key}};
  };

  DocumentSpill spill(scratch.string() + ".train");
  out.train.store = store;
  ingest(train_files, spill, out.train);
  const std::string where = train_files.front().path.string();
  const auto anything = [](std::uint64_t) { return true; };
  std::vector<std::int64_t> train_side;
  if (splits) {
    // The share is a promise about many documents; of few, the one with the smallest number goes,
    // so that there is something to validate on.
    double smallest = 1;
    for (const auto& entry : spill.entries()) {
      if (entry.copies > 0) smallest = std::min(smallest, hash_unit(entry.hash, 2));
    }
    const auto held = [&](std::uint64_t hash) {
      const double number = hash_unit(hash, 2);
      return number < options.validation_split || number == smallest;
    };
    train_side = choose(spill, [&](std::uint64_t hash) { return !held(hash); });
    std::vector<std::int64_t> validation_side = choose(spill, held);
    if (train_side.empty() && validation_side.empty())
      nothing_to_learn("training", out.train, where);
    if (train_side.empty()) {
      throw Error(Fault::bad_file,
                  {"too few different documents to split: " +
                       count_text(static_cast<std::int64_t>(validation_side.size())) + " in all",
                   where, "Take data.validation away, or give more data."});
    }
    out.validation.emplace();
    out.validation->store = validation_path(store);
    write_side(options, spill, validation_side, manifest_of(train_files, "validation"),
               *out.validation);
  } else {
    train_side = choose(spill, anything);
    if (train_side.empty()) nothing_to_learn("training", out.train, where);
  }
  write_side(options, spill, train_side, manifest_of(train_files, "train"), out.train);

  if (!validation_files.empty()) {
    DocumentSpill validation_spill(scratch.string() + ".validation");
    out.validation.emplace();
    out.validation->store = validation_path(store);
    ingest(validation_files, validation_spill, *out.validation);
    const auto side = choose(validation_spill, anything);
    if (side.empty()) {
      nothing_to_learn("validation", *out.validation, validation_files.front().path.string());
    }
    write_side(options, validation_spill, side, manifest_of(validation_files, "validation"),
               *out.validation);
  }
  if (out.train.dropped_untrained > 0) {
    log_warning(count_text(out.train.dropped_untrained) + " of " + count_text(out.train.records) +
                " records carry no loss and are left out");
  }
  return out;
}

}  // namespace tailor
