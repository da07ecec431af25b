# Sourced by tools/tailor, tools/test and tools/demo. Works in bash.
#
# tailor_build ROOT PRESET TARGET...   installs (tools/setup), configures and builds what is stale.
# Says nothing when there is nothing to do; everything else goes to stderr. Only one process at a
# time builds a folder; others wait.

# The newest thing a build depends on, compared without asking ninja: a list of all sources and the
# time of the youngest. Two hundred files take some milliseconds.
tailor_fingerprint() { # ROOT
  find "$1/CMakeLists.txt" "$1/CMakePresets.json" "$1"/{cmake,base,data,recipes,adapters,trainer,tools,tests} \
    \( -name golden -o -name __pycache__ -o -name messages \) -prune -o \
    \( -name '*.cpp' -o -name '*.h' -o -name '*.inc' -o -name '*.cu' -o -name '*.cmake' -o -name CMakeLists.txt \
       -o -name CMakePresets.json -o -name requirements.txt -o -name setup \) \
    -printf '%p %T@ %s\n' 2>/dev/null | LC_ALL=C sort
}

tailor_build() { # ROOT PRESET TARGET...
  local root=$1 preset=$2 folder found now stamp log
  shift 2
  folder=$root/build/$preset
  stamp=$folder/.built-$(echo "$*" | tr -c 'a-z\n-' '_')
  now=$(tailor_fingerprint "$root"; echo "${TAILOR_CACHE:-} ${XDG_CACHE_HOME:-} $HOME")
  if [ -e "$stamp" ] && [ "$(cat "$stamp")" = "$now" ] && [ -x "$folder/bin/tailor" ] &&
    [ -e "$(sed -n 's/^TAILOR_VENV:PATH=//p' "$folder/CMakeCache.txt")/.complete" ]; then
    return 0
  fi
  . "$root/tools/setup" || return 70
  mkdir -p "$folder" || return 74
  exec 9>"$folder/.lock" || return 74
  flock 9 || return 74
  # Configured for another environment (tools/requirements.txt changed), or never.
  if [ ! -e "$folder/build.ninja" ] ||
    ! grep -q "^TAILOR_VENV:[A-Z]*=$TAILOR_VENV\$" "$folder/CMakeCache.txt" ||
    ! grep -q "^CMAKE_MAKE_PROGRAM:[A-Z]*=$TAILOR_VENV/bin/ninja\$" "$folder/CMakeCache.txt"; then
    echo "tailor: configuring build/$preset" >&2
    (cd "$root" && "$TAILOR_VENV/bin/cmake" --preset "$preset") >"$folder/configure.log" 2>&1 9>&- || {
      tail -n 20 "$folder/configure.log" >&2
      printf 'error: the build could not be configured\n  where: %s\n  mend:  Read the lines above; rm -r %s starts afresh.\n' \
        "$folder/configure.log" "$folder" >&2
      exec 9>&-
      return 70
    }
  fi
  # Only a build with something to do speaks.
  if ! "$TAILOR_VENV/bin/ninja" -C "$folder" -n "$@" 2>/dev/null 9>&- | grep -q 'no work to do'; then
    echo "tailor: building $* in build/$preset" >&2
    if [ -t 2 ]; then
      "$TAILOR_VENV/bin/ninja" -C "$folder" "$@" >&2 9>&-
    else
      log=$folder/build.log
      "$TAILOR_VENV/bin/ninja" -C "$folder" "$@" >"$log" 2>&1 9>&- || { grep -A 20 -m 3 'FAILED' "$log" >&2; false; }
    fi || {
      printf 'error: the build failed\n  where: %s\n  mend:  Mend what the compiler says above and run the command again.\n' \
        "$folder" >&2
      exec 9>&-
      return 70
    }
  fi
  printf '%s\n' "$now" >"$stamp"
  exec 9>&-
}
