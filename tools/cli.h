#pragma once

#include <string>
#include <variant>

#include "tools/compute_verbs.h"
#include "tools/verbs.h"

namespace tailor {

/// The answer to --help or --version.
struct ShowText {
  std::string text;
};

/// One verb with its arguments, as read from a command line.
using Command =
    std::variant<ShowText, RecipeListArguments, RecipeShowArguments, RecipeCopyArguments,
                 RecipeValidateArguments, PlanArguments, DataPrepareArguments, DataInspectArguments,
                 DataTokenizeArguments, ModelInspectArguments, ModelPackArguments,
                 ModelVerifyArguments, ModelSynthesiseArguments, ModelExportArguments,
                 AdapterInspectArguments, MergeArguments, RunsListArguments, RunsShowArguments,
                 RunsReportArguments, RunsExportArguments, RunsReplayArguments, RunsBudgetArguments,
                 PricesListArguments, PricesCheckArguments, DoctorArguments, TrainArguments,
                 LaunchLocalArguments, LaunchJobArguments, LaunchStatusArguments, EvalArguments,
                 GenerateArguments, ExpertsScanArguments, CalibrateArguments>;

/// Reads a command line. Throws Error{usage} in three parts, naming the nearest verb or flag.
Command parse_command_line(int argc, const char* const* argv);

/// A function object of several lambdas, for std::visit.
template <class... F>
struct Overloaded : F... {
  using F::operator()...;
};
template <class... F>
Overloaded(F...) -> Overloaded<F...>;

}  // namespace tailor
