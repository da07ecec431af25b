#include "tools/paths.h"

#include <cstdlib>

#include "base/error.h"

namespace tailor {

fs::path own_program() {
  std::error_code error;
  fs::path program = fs::read_symlink("/proc/self/exe", error);
  if (error) throw io_error(error.value(), "cannot find the running program", "/proc/self/exe");
  return program;
}

fs::path sibling_program(const std::string& name) {
  const fs::path program = own_program().parent_path() / name;
  std::error_code error;
  if (fs::exists(program, error)) return program;
  throw Error(Fault::usage,
              {"the program " + name + " is not installed", program.string(),
               "Build it beside tailor: cmake --build BUILD_FOLDER --target " + name +
                   ", or start Tailor with ./tools/tailor, which builds what is missing."});
}

fs::path recipes_folder() {
  if (const char* value = std::getenv("TAILOR_RECIPES"); value != nullptr && *value != '\0') {
    return value;
  }
  std::error_code error;
  const fs::path source = fs::path(TAILOR_SOURCE_DIR) / "recipes";
  if (fs::exists(source / "prices.yaml", error)) return source;
  return own_program().parent_path().parent_path() / "share/tailor/recipes";
}

fs::path config_folder() {
  const auto set = [](const char* name) -> fs::path {
    const char* value = std::getenv(name);
    return value != nullptr ? value : "";
  };
  if (!set("TAILOR_CONFIG").empty()) return set("TAILOR_CONFIG");
  if (!set("XDG_CONFIG_HOME").empty()) return set("XDG_CONFIG_HOME") / "tailor";
  return set("HOME") / ".config/tailor";
}

std::string file_stamp(const fs::path& path) {
  std::error_code error;
  const auto size = fs::file_size(path, error);
  if (error) return "";
  const auto time = fs::last_write_time(path, error).time_since_epoch().count();
  return fs::weakly_canonical(path, error).string() + " " + std::to_string(size) + " " +
         std::to_string(time) + "\n";
}

}  // namespace tailor
