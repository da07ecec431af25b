# tailor_library(NAME [FOLDER sub] LINK lib...): a static library of every .cpp in a folder.
# New files are picked up by themselves, so that adding one is a change to one file.
function(tailor_library name)
  cmake_parse_arguments(ARG "" "FOLDER" "LINK" ${ARGN})
  file(GLOB sources CONFIGURE_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/${ARG_FOLDER}/*.cpp)
  add_library(tailor_${name} STATIC ${sources})
  add_library(tailor::${name} ALIAS tailor_${name})
  target_include_directories(tailor_${name} PUBLIC ${CMAKE_SOURCE_DIR})
  target_link_libraries(tailor_${name} PUBLIC ${ARG_LINK} PRIVATE tailor::warnings)
endfunction()

# tailor_levels(PREFIX SOURCE CONSTANT CONTRACT off|fast LEVELS "NAME ARCH..."...): one source of inner loops,
# compiled for several instruction-set levels, of which one is chosen at run time: object libraries PREFIX_NAME with
# TAILOR_LEVEL = CONSTANT followed by NAME, and all their objects in the variable PREFIX_OBJECTS. Always optimised,
# also in debug builds: unoptimised inline functions of one level could otherwise be shared with another by the
# linker. -Wno-psabi: vectors never cross a file.
function(tailor_levels prefix source constant)
  cmake_parse_arguments(ARG "" "CONTRACT" "LEVELS" ${ARGN})
  foreach(level ${ARG_LEVELS})
    separate_arguments(level UNIX_COMMAND "${level}")
    list(GET level 0 name)
    list(SUBLIST level 1 -1 arch)
    add_library(${prefix}_${name} OBJECT ${source})
    target_include_directories(${prefix}_${name} PRIVATE ${CMAKE_SOURCE_DIR})
    target_compile_definitions(${prefix}_${name} PRIVATE TAILOR_LEVEL=${constant}${name})
    target_compile_options(${prefix}_${name} PRIVATE -O3 -march=${arch} -mtune=generic
      -mprefer-vector-width=512 -ffp-contract=${ARG_CONTRACT} -fno-math-errno -fno-trapping-math -Wno-psabi)
    target_link_libraries(${prefix}_${name} PRIVATE tailor::warnings)
    list(APPEND objects $<TARGET_OBJECTS:${prefix}_${name}>)
  endforeach()
  set(${prefix}_OBJECTS ${objects} PARENT_SCOPE)
endfunction()

# tailor_test(NAME FOLDER sub LABEL label LINK lib...): one test program of every .cpp in a folder.
function(tailor_test name)
  cmake_parse_arguments(ARG "" "FOLDER;LABEL;TIMEOUT" "LINK" ${ARGN})
  file(GLOB sources CONFIGURE_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/${ARG_FOLDER}/*.cpp)
  if(NOT sources)
    return()
  endif()
  if(NOT ARG_TIMEOUT)
    set(ARG_TIMEOUT 120)
  endif()
  add_executable(test_${name} ${sources} ${TAILOR_SANITIZER_WORDS})
  target_link_libraries(test_${name} PRIVATE ${ARG_LINK} tailor::warnings GTest::gmock GTest::gtest_main)
  target_compile_definitions(test_${name} PRIVATE
    TAILOR_SOURCE_DIR="${CMAKE_SOURCE_DIR}" TAILOR_BIN_DIR="${CMAKE_RUNTIME_OUTPUT_DIRECTORY}"
    TAILOR_PYTHON="${TAILOR_VENV}/bin/python")
  gtest_discover_tests(test_${name} DISCOVERY_MODE PRE_TEST
    PROPERTIES LABELS "${ARG_LABEL}" TIMEOUT ${ARG_TIMEOUT}
    # Tests run side by side: a thread that spins at a barrier takes the core from whom it waits for.
    ENVIRONMENT GOMP_SPINCOUNT=0)
endfunction()
