#pragma once

#include "base/file.h"

namespace tailor {

/// The running program's file, links resolved.
fs::path own_program();

/// A program of ours beside the running one ("tailor-compute"). Throws Error{usage} with the
/// command that builds it when it is not there.
fs::path sibling_program(const std::string& name);

/// Shipped recipes, with machines/, models/ and prices.yaml: $TAILOR_RECIPES, else the source tree
/// this program was built from, else ../share/tailor/recipes beside the program.
fs::path recipes_folder();

/// The user's settings (price books): $TAILOR_CONFIG, else $XDG_CONFIG_HOME/tailor, else
/// ~/.config/tailor.
fs::path config_folder();

/// Path, size and time of a file, as a line of the key of what is kept about it; empty where it is
/// not there.
std::string file_stamp(const fs::path& path);

}  // namespace tailor
