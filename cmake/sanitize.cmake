if(TAILOR_SANITIZE)
  # GCC takes the instrumented moves of std::function and std::regex for uses of unset memory.
  add_compile_options($<$<COMPILE_LANGUAGE:CXX>:-fsanitize=${TAILOR_SANITIZE}>
    $<$<COMPILE_LANGUAGE:CXX>:-fno-omit-frame-pointer> $<$<COMPILE_LANGUAGE:CXX>:-g>
    $<$<COMPILE_LANGUAGE:CXX>:-Wno-maybe-uninitialized>)
  add_link_options(-fsanitize=${TAILOR_SANITIZE})
endif()
