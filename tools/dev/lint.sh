#!/usr/bin/env bash
# usage: tools/dev/lint.sh          formatting of all tracked C++ files; exits 1 and names them
#        tools/dev/lint.sh --fix    formats them
#        tools/dev/lint.sh --tidy [FILE...]   clang-tidy with the checks of .clang-tidy (slow)
set -u
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../.." || exit 70
mapfile -t files < <(git ls-files '*.h' '*.cpp' '*.cu')
case ${1:-} in
  --fix) exec clang-format -i "${files[@]}" ;;
  --tidy)
    # GCC's precompiled headers and flags of its own mean nothing to clang.
    database=$(mktemp -d) && trap 'rm -rf "$database"' EXIT
    sed -E 's/ -Winvalid-pch| -fpch-preprocess| -Wno-restrict| -Wno-maybe-uninitialized//g; s/ -include [^ ]*cmake_pch[^ ]*//g' \
      build/release/compile_commands.json >"$database/compile_commands.json" || exit 70
    shift
    sources=("$@")
    [ $# -gt 0 ] || mapfile -t sources < <(printf '%s\n' "${files[@]}" | grep -v '^tests/' | grep '\.cpp$' | grep -v no_cuda)
    clang-tidy -p "$database" --quiet "${sources[@]}"
    exit ;;
  '')
    if ! command -v clang-format >/dev/null; then
      echo 'skipped: clang-format is not installed (apt-get install clang-format)'
      exit 77
    fi
    clang-format --version
    clang-format --dry-run -Werror "${files[@]}" 2>&1 | grep ': error:' | cut -d: -f1 | sort | uniq -c
    [ "${PIPESTATUS[0]}" = 0 ] || {
      echo 'error: the files above are not formatted; run: tools/dev/lint.sh --fix'
      exit 1
    } ;;
  *)
    sed -n '2,4s/^# \{0,1\}//p' "$0" >&2
    exit 2 ;;
esac
