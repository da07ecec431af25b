#include "adapters/merge/merge.h"

#include <iostream>
#include <optional>

#include "adapters/merge/receipt.h"
#include "base/error.h"
#include "base/json.h"
#include "base/text.h"
#include "data/checkpoint/checkpoint.h"
#include "data/store/export.h"
#include "data/store/store.h"
#include "recipes/scalars.h"
#include "tools/interrupt.h"
#include "tools/table.h"
#include "tools/terminal.h"
#include "tools/verbs.h"

namespace tailor {
namespace {

[[noreturn]] void refuse(const std::string& what, const std::string& mend) {
  throw Error(Fault::usage, {what, "the command line", mend});
}

int run_verify(const MergeArguments& arguments) {
  if (!arguments.out.empty()) refuse("--verify writes nothing", "Leave --out away.");
  const Interrupt interrupt;
  ProgressLine line(true);
  VerifyMergeOptions options;
  if (!arguments.base.empty()) options.base = find_model_folder(arguments.base);
  options.adapters.assign(arguments.adapters.begin(), arguments.adapters.end());
  options.threads = arguments.threads > 0 ? arguments.threads : 4;
  options.stop = [&] { return interrupt.asked(); };
  options.progress = [&](std::int64_t done, std::int64_t bytes, double seconds) {
    line.show(progress_text("verifying", done, 0, bytes, seconds));
  };
  const MergeVerification found = verify_merge(arguments.verify, options);
  line.show("");
  if (arguments.json) {
    std::cout << Json{{"folder", arguments.verify}, {"good", found.problems.empty()},
                      {"tensors", found.tensors},   {"files", found.files},
                      {"bytes", found.bytes},       {"seconds", found.seconds},
                      {"problems", found.problems}}
                     .dump(2)
              << "\n";
  } else {
    std::cout << problems_text(found.problems);
  }
  if (!found.problems.empty()) {
    throw Error(Fault::bad_file,
                {count_text(static_cast<std::int64_t>(found.problems.size())) +
                     (found.problems.size() == 1 ? " thing is" : " things are") +
                     " not as the receipt says",
                 arguments.verify, "Check the disk, then merge again into a new folder."});
  }
  if (!arguments.json) {
    std::cout << "All " << count_text(found.tensors) << " tensors (" << bytes_text(found.bytes)
              << ") and " << count_text(found.files) << " files are as they were merged; read in "
              << seconds_text(found.seconds) << "\n";
  }
  return 0;
}

Json report_json(const MergeArguments& arguments, const MergeReport& report) {
  Json out = {{"folder", arguments.out},         {"complete_before", report.was_complete},
              {"base_bytes", report.base_bytes}, {"bytes", report.bytes},
              {"tensors", report.tensors},       {"adapted_tensors", report.adapted}};
  if (report.was_complete) return out;
  out["relative_change"] = report.shares.relative_change;
  out["error"] = report.shares.error;
  out["kept"] = report.shares.kept;
  out["least_kept"] = {{"tensor", report.least_kept_tensor}, {"kept", report.least_kept}};
  out["tensors_below_limit"] = report.below_limit;
  out["pieces"] = report.jobs;
  out["pieces_before"] = report.jobs_before;
  out["peak_rss_bytes"] = report.peak_rss_bytes;
  out["seconds"] = report.seconds;
  out["receipt"] = (fs::path(arguments.out) / kReceiptName).string();
  out["notes"] = report.notes;
  return out;
}

void print_report(const MergeArguments& arguments, const MergeReport& report) {
  if (report.was_complete) {
    std::cout << arguments.out << " holds this very merge already; nothing was done\n";
    return;
  }
  std::cout << heading("Merged") << " " << bytes_text(report.bytes) << " into " << arguments.out
            << " in " << seconds_text(report.seconds) << ": "
            << (arguments.adapters.size() == 1
                    ? std::string("the adapter changed ")
                    : std::to_string(arguments.adapters.size()) + " adapters changed ")
            << count_text(report.adapted) << " of " << count_text(report.tensors) << " tensors\n";
  if (report.jobs_before > 0) {
    std::cout << "  " << count_text(report.jobs_before) << " of " << count_text(report.jobs)
              << " pieces were there from before\n";
  }
  std::cout << "  change " << number_text(100 * report.shares.relative_change, 3)
            << " % of the weights it is added to; rounding "
            << number_text(100 * report.shares.error, 3) << " %; "
            << number_text(100 * report.shares.kept, 4) << " % of the change is in the result\n"
            << "  peak memory " << bytes_text(report.peak_rss_bytes) << "\n"
            << "  receipt: " << (fs::path(arguments.out) / kReceiptName).string()
            << ", checked by: tailor merge --verify " << arguments.out << "\n";
  for (const std::string& note : report.notes) std::cout << "  " << note << "\n";
}

/// A store decoded into a checkpoint beside the output, for as long as the merge takes; one that an
/// earlier attempt made is used again.
class DecodedStore {
 public:
  DecodedStore(const Store& store, const MergeArguments& arguments, const Interrupt& interrupt,
               ProgressLine& line) {
    const fs::path out(arguments.out);
    const fs::path folder = out.has_filename() ? out : out.parent_path();
    // Of this very store in this form: what an attempt from another one left is not used.
    const std::string mark = sha256_hex(store.fingerprint() + hash_text(store.mark()) +
                                        (arguments.dtype != "as_base" ? "decoded" : "as packed"));
    prefix_ = "." + folder.filename().string() + ".tailor-merge-base-";
    path_ = folder.parent_path() / (prefix_ + mark.substr(0, 12));
    std::error_code error;
    if (fs::exists(path_, error)) return;
    ExportOptions options;
    options.bfloat16 = arguments.dtype != "as_base";
    options.stop = [&] { return interrupt.asked(); };
    options.progress = [&](std::int64_t done, std::int64_t bytes, double seconds) {
      line.show(progress_text("reading the store,", done, 0, bytes, seconds));
    };
    static_cast<void>(export_store(store, path_, options));
  }
  const fs::path& path() const { return path_; }
  /// The merge is done: what attempts from other stores left goes too.
  void remove() const {
    std::error_code error;
    const fs::path parent = path_.parent_path().empty() ? fs::path(".") : path_.parent_path();
    std::vector<fs::path> left;
    for (const auto& entry : fs::directory_iterator(parent, error)) {
      if (entry.path().filename().string().starts_with(prefix_)) left.push_back(entry.path());
    }
    for (const fs::path& one : left) fs::remove_all(one, error);
  }

 private:
  std::string prefix_;
  fs::path path_;
};

}  // namespace

int run_merge(const MergeArguments& arguments) {
  if (!arguments.verify.empty()) return run_verify(arguments);
  if (arguments.base.empty()) refuse("no base is given", "Name the model with --base MODEL.");
  if (arguments.adapters.empty()) {
    refuse("no adapter is given", "Name a PEFT folder with --adapter DIR.");
  }
  if (arguments.out.empty()) refuse("no output is given", "Name a new folder with --out DIR.");
  if (!arguments.weights.empty() && arguments.weights.size() != arguments.adapters.size()) {
    refuse(std::to_string(arguments.weights.size()) + " weights are given for " +
               std::to_string(arguments.adapters.size()) + " adapters",
           "Give --weight once for each --adapter, in their order.");
  }
  const auto max_ram = parse_bytes(arguments.max_ram);
  if (!max_ram || *max_ram <= 0) {
    throw Error(Fault::usage, {"'" + arguments.max_ram + "' is not a size", "--max-ram",
                               "Write bytes with a unit, such as 1GiB or 800MB."});
  }
  MergeOptions options;
  for (std::size_t i = 0; i < arguments.adapters.size(); ++i) {
    options.adapters.push_back(
        {arguments.adapters[i], arguments.weights.empty() ? 1 : arguments.weights[i]});
  }
  options.dtype = arguments.dtype == "bfloat16"  ? MergeDtype::bfloat16
                  : arguments.dtype == "float32" ? MergeDtype::float32
                                                 : MergeDtype::as_base;
  options.base_name = arguments.base;
  options.memory_bytes_max = *max_ram;
  options.threads = arguments.threads;
  const Interrupt interrupt;
  ProgressLine line(true);
  options.stop = [&] { return interrupt.asked(); };
  options.progress = [&](const MergeProgress& at) {
    line.show(progress_text("merging", at.bytes_done, at.bytes_before, at.bytes, at.seconds) +
              ", " + std::to_string(at.in_flight) + " pieces in flight");
  };
  if (arguments.onto == "original") options.onto = MergeOptions::Onto::original;
  if (arguments.onto == "trained") options.onto = MergeOptions::Onto::trained;
  fs::path base = find_model_folder(arguments.base);
  std::optional<DecodedStore> decoded;
  if (Store::is_store(base)) {
    if (options.onto != MergeOptions::Onto::trained) {
      throw Error(Fault::usage,
                  {"the base is a store, whose weights are not the published ones", base.string(),
                   "Add --onto trained to merge onto them, or name the published model with "
                   "--base and --onto original."});
    }
    const Store store = Store::open(base);
    options.base_fingerprint = store.fingerprint();
    decoded.emplace(store, arguments, interrupt, line);
    base = decoded->path();
  }
  const MergeReport report = merge_adapters(base, arguments.out, options);
  if (decoded) decoded->remove();
  line.show("");
  if (report.below_limit > 0) {
    line.say("warning: " + count_text(report.below_limit) + " of " + count_text(report.adapted) +
             " adapted tensors kept less than " + number_text(100 * kKeptLimit, 2) +
             " % of their change (least " + number_text(100 * report.least_kept, 3) + " %, " +
             report.least_kept_tensor + "): it is below half a step of their format. " +
             (report.quantised ? "Merge with --dtype bfloat16, or into the model's fp8 form."
                               : "Merge with --dtype float32 to keep all of it."));
  }
  if (arguments.json) {
    std::cout << report_json(arguments, report).dump(2) << "\n";
  } else {
    print_report(arguments, report);
  }
  return 0;
}

}  // namespace tailor
