#include "data/store/export.h"

#include <iostream>

#include "base/error.h"
#include "base/json.h"
#include "base/text.h"
#include "data/checkpoint/checkpoint.h"
#include "recipes/scalars.h"
#include "tools/interrupt.h"
#include "tools/table.h"
#include "tools/terminal.h"
#include "tools/verbs.h"

namespace tailor {

int run_model_export(const ModelExportArguments& arguments) {
  const auto shard_bytes = parse_bytes(arguments.max_shard_size);
  if (!shard_bytes || *shard_bytes <= 0) {
    throw Error(Fault::usage,
                {"'" + arguments.max_shard_size + "' is not a size", "--max-shard-size",
                 "Write bytes with a unit, such as 5GB or 800MB."});
  }
  const Store store = Store::open(arguments.store);
  const Interrupt interrupt;
  ProgressLine line;
  ExportOptions options;
  options.bfloat16 = arguments.dtype == "bfloat16";
  if (!arguments.towers_from.empty()) {
    options.towers_from = find_model_folder(arguments.towers_from);
  }
  options.shard_bytes_max = *shard_bytes;
  options.stop = [&] { return interrupt.asked(); };
  options.progress = [&](std::int64_t done, std::int64_t bytes, double seconds) {
    line.show(progress_text("exporting", done, 0, bytes, seconds));
  };
  const ExportReport report = export_store(store, arguments.to, options);
  line.show("");
  if (arguments.json) {
    std::cout << Json{{"folder", arguments.to},
                      {"store", arguments.store},
                      {"quantization", report.format.empty() ? Json() : Json(report.format)},
                      {"tensors", report.tensors},
                      {"shards", report.shards},
                      {"bytes", report.bytes},
                      {"seconds", report.seconds},
                      {"notes", report.notes}}
                     .dump(2)
              << "\n";
    return 0;
  }
  std::cout << heading("Exported") << " " << bytes_text(report.bytes) << " into " << arguments.to
            << " in " << seconds_text(report.seconds) << ": " << count_text(report.tensors)
            << " tensors in " << count_text(report.shards)
            << (report.shards == 1 ? " file, " : " files, ")
            << (report.format.empty() ? "not quantised" : report.format) << "\n";
  for (const std::string& note : report.notes) std::cout << "  " << note << "\n";
  return 0;
}

}  // namespace tailor
