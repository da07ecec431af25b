// What the sanitizers are told in every test program and in tailor-compute, built with
// TAILOR_SANITIZE (presets asan and tsan). LibTorch and OpenMP come as wheels that are not
// instrumented: an order they make (a barrier of OpenMP, a counter of references) the thread
// sanitizer does not see. Only frames inside of them are suppressed here, nothing of ours.

extern "C" {

const char* __tsan_default_suppressions() {
  return
      // A region's threads and its barriers: the sanitizer takes two iterations for unordered.
      "race:libgomp.so\n"
      // What LibTorch frees and locks by itself.
      "called_from_lib:libtorch_cpu.so\n"
      "called_from_lib:libc10.so\n";
}

const char* __lsan_default_suppressions() {
  return
      // Tables that are made once and kept until the end.
      "leak:libtorch_cpu.so\n"
      "leak:libc10.so\n"
      "leak:libgomp.so\n";
}

const char* __tsan_default_options() {
  return "halt_on_error=0:second_deadlock_stack=1:history_size=4";
}

const char* __ubsan_default_options() { return "print_stacktrace=1:halt_on_error=1"; }
}
