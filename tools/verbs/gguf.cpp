#include <iostream>

#include "base/cores.h"
#include "base/error.h"
#include "base/json.h"
#include "base/text.h"
#include "data/checkpoint/checkpoint.h"
#include "data/gguf_export/export_gguf.h"
#include "tools/interrupt.h"
#include "tools/table.h"
#include "tools/terminal.h"
#include "tools/verbs.h"

namespace tailor {
namespace {

GgmlType type_of(const std::string& name) {
  if (name == "f32") return GgmlType::f32;
  if (name == "bf16") return GgmlType::bf16;
  return name == "q8_0" ? GgmlType::q8_0 : GgmlType::f16;
}

}  // namespace

int run_model_gguf(const ModelGgufArguments& arguments) {
  const fs::path model = find_model_folder(arguments.model);
  const Interrupt interrupt;
  ProgressLine line(true);
  GgufExportOptions options;
  options.type = type_of(arguments.dtype);
  options.name = fs::path(arguments.model).filename().string();  // of "a/b" b
  options.threads = arguments.threads == 0 ? usable_cores() : arguments.threads;
  options.stop = [&] { return interrupt.asked(); };
  options.progress = [&](std::int64_t done, std::int64_t bytes, double seconds) {
    line.show(progress_text("writing", done, 0, bytes, seconds));
  };
  const GgufExportReport report = export_gguf(model, arguments.to, options);
  line.show("");
  if (arguments.json) {
    std::cout << Json{{"file", arguments.to},
                      {"model", arguments.model},
                      {"architecture", report.architecture},
                      {"dtype", arguments.dtype},
                      {"tensors", report.tensors},
                      {"bytes", report.bytes},
                      {"source_bytes_read", report.source_bytes_read},
                      {"seconds", report.seconds},
                      {"notes", report.notes}}
                     .dump(2)
              << "\n";
    return 0;
  }
  std::cout << heading("Written") << " " << bytes_text(report.bytes) << " into " << arguments.to
            << " in " << seconds_text(report.seconds) << ": " << count_text(report.tensors)
            << " tensors, " << report.architecture << ", " << arguments.dtype << "\n";
  for (const std::string& note : report.notes) std::cout << "  " << note << "\n";
  std::cout << "  run it: llama-cli -m " << arguments.to << "\n";
  return 0;
}

}  // namespace tailor
