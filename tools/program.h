#pragma once

#include <functional>

namespace tailor {

/// What `main` of both programs does around its work: starts the log, turns every exception into
/// the three-part text on stderr and its exit code, and notices when stdout could not be written.
int run_program(const std::function<int()>& work);

}  // namespace tailor
