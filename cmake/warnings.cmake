# Interface target tailor::warnings: what every file of ours is compiled with.
add_library(tailor_warnings INTERFACE)
add_library(tailor::warnings ALIAS tailor_warnings)
target_compile_options(tailor_warnings INTERFACE
  $<$<COMPILE_LANGUAGE:CXX>:-Wno-restrict>  # GCC 12 bug 105651: false alarms in std::string::insert
  "$<$<COMPILE_LANGUAGE:CXX>:-Wall;-Wextra;-Wpedantic;-Wshadow;-Wconversion;-Wsign-conversion;-Wnon-virtual-dtor;-Wold-style-cast>"
  "$<$<AND:$<COMPILE_LANGUAGE:CXX>,$<BOOL:${TAILOR_WERROR}>>:-Werror>"
  "$<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Wall,-Wextra>"
  "$<$<AND:$<COMPILE_LANGUAGE:CUDA>,$<BOOL:${TAILOR_WERROR}>>:-Werror=all-warnings>")
