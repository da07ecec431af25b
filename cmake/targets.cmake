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
  add_executable(test_${name} ${sources})
  target_link_libraries(test_${name} PRIVATE ${ARG_LINK} tailor::warnings GTest::gmock GTest::gtest_main)
  target_compile_definitions(test_${name} PRIVATE
    TAILOR_SOURCE_DIR="${CMAKE_SOURCE_DIR}" TAILOR_BIN_DIR="${CMAKE_RUNTIME_OUTPUT_DIRECTORY}"
    TAILOR_PYTHON="${TAILOR_VENV}/bin/python")
  gtest_discover_tests(test_${name} DISCOVERY_MODE PRE_TEST
    PROPERTIES LABELS "${ARG_LABEL}" TIMEOUT ${ARG_TIMEOUT}
    # Tests run side by side: a thread that spins at a barrier takes the core from whom it waits for.
    ENVIRONMENT GOMP_SPINCOUNT=0)
endfunction()
