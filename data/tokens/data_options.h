#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "base/file.h"
#include "data/text/conversation.h"
#include "data/text/records.h"

namespace tailor {

/// What to do with a document longer than a row (data.too_long).
enum class TooLong {
  truncate,  ///< keep the first sequence_len tokens
  drop,      ///< leave the document out, counted
  split,     ///< cut into pieces of sequence_len; each is a document of its own
  error,     ///< refuse, naming the line
};
/// Throws Error{usage} for another name.
TooLong too_long_from_name(const std::string& name);
std::string_view too_long_name(TooLong too_long);

/// One entry of data.train or data.validation.
struct DataFile {
  std::string path;  ///< a file or a glob
  /// How often a document is taken: 2 twice, 0.5 every second one (chosen by its content).
  double weight = 1.0;
  std::optional<RecordFormat> format;  ///< default: DataOptions::format
};

/// The `data:` block of a recipe, as the data layer needs it.
struct DataOptions {
  std::vector<DataFile> train;
  std::vector<DataFile> validation;
  /// Share of the train documents that goes to validation, chosen by content hash, so that equal
  /// documents never stand on both sides. 0: none. Not together with `validation`.
  double validation_split = 0;
  RecordFormat format = RecordFormat::automatic;
  std::string chat_template = "model";
  TrainOn train_on;
  std::int64_t sequence_len = 2048;
  bool packing = true;
  TooLong too_long = TooLong::truncate;
  /// The train store; its validation store stands beside it. Default: <cache>/tokens/<digest>.h5.
  std::optional<fs::path> store;
  fs::path cache;  ///< Tailor's cache folder
};

}  // namespace tailor
