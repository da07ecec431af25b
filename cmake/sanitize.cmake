# What they leave out, in every program that loads LibTorch and every test.
set(TAILOR_SANITIZER_WORDS "")
if(TAILOR_SANITIZE)
  set(TAILOR_SANITIZER_WORDS ${CMAKE_SOURCE_DIR}/tests/support/sanitizers.cpp)
  # GCC takes the instrumented moves of std::function and std::regex for uses of unset memory.
  add_compile_options($<$<COMPILE_LANGUAGE:CXX>:-fsanitize=${TAILOR_SANITIZE}>
    $<$<COMPILE_LANGUAGE:CXX>:-fno-omit-frame-pointer> $<$<COMPILE_LANGUAGE:CXX>:-g>
    $<$<COMPILE_LANGUAGE:CXX>:-Wno-maybe-uninitialized>)
  add_link_options(-fsanitize=${TAILOR_SANITIZE})
endif()
