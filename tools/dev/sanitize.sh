#!/usr/bin/env bash
# Tests of rings, ranks, store and books under the sanitizers.
# usage: tools/dev/sanitize.sh asan|tsan [test program...]
# Builds the programs (all below unless named; the first ones in minutes, those with LibTorch in ten)
# and runs them; a finding is an error. What is left out, and why: tests/support/sanitizers.cpp.
set -u
root=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../.." && pwd) || exit 70
preset=${1:-}
shift
case $preset in
  asan | tsan) ;;
  *) sed -n '2,5s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac
programs=("$@")
[ ${#programs[@]} -gt 0 ] || programs=(test_ranks test_base test_cuda test_store test_runs test_launch test_live
  test_rank_processes test_trainer)
. "$root/tools/setup" || exit 70
. "$root/tools/dev/build.sh"
targets=("${programs[@]}")
tailor_build "$root" "$preset" "${targets[@]}" || exit $?
cd "$root" || exit 70

# Under the thread sanitizer these take a quarter of an hour and have one thread, or start other programs.
filter() {
  case $preset.$1 in
    tsan.test_store) echo '-Damage.*' ;;
    *.test_trainer) echo 'Sharded.*:Stream.*:Paged*' ;;
    *) echo '*' ;;
  esac
}
# One thread of OpenMP: its barriers cannot be seen.
export GOMP_SPINCOUNT=0 OMP_NUM_THREADS=1
failed=()
for program in "${programs[@]}"; do
  echo "== $program" >&2
  "build/$preset/bin/$program" --gtest_brief=1 --gtest_filter="$(filter "$program")" || failed+=("$program")
done
[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]}" >&2; exit 1; }
