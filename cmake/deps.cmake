# Every outside library, found once; a missing one is named with the package that brings it.
find_package(PkgConfig REQUIRED)
set(CMAKE_FIND_PACKAGE_PREFER_CONFIG OFF)

function(tailor_require found package)
  if(NOT ${found})
    message(FATAL_ERROR "Tailor needs Debian's package ${package}. Run tools/setup, or: apt-get install ${package}")
  endif()
endfunction()

function(tailor_pkg name module package)
  pkg_check_modules(${name} QUIET IMPORTED_TARGET ${module})
  tailor_require(${name}_FOUND ${package})
endfunction()

tailor_pkg(SPDLOG spdlog libspdlog-dev)
tailor_pkg(YAMLCPP yaml-cpp libyaml-cpp-dev)
tailor_pkg(ONIG oniguruma libonig-dev)
tailor_pkg(SQLITE sqlite3 libsqlite3-dev)
tailor_pkg(PQ libpq libpq-dev)
tailor_pkg(CURL libcurl libcurl4-openssl-dev)
tailor_pkg(HDF5 hdf5 libhdf5-dev)
tailor_pkg(CRYPTO libcrypto libssl-dev)
tailor_pkg(XXHASH libxxhash libxxhash-dev)
tailor_pkg(URING liburing liburing-dev)

find_path(NLOHMANN_INCLUDE nlohmann/json.hpp)
tailor_require(NLOHMANN_INCLUDE nlohmann-json3-dev)
find_path(GLOO_INCLUDE gloo/algorithm.h)
tailor_require(GLOO_INCLUDE libgloo-dev)
find_path(CLI11_INCLUDE CLI/CLI.hpp)
tailor_require(CLI11_INCLUDE libcli11-dev)

find_package(GTest QUIET)
tailor_require(GTest_FOUND libgtest-dev)
find_package(benchmark QUIET)
tailor_require(benchmark_FOUND libbenchmark-dev)
find_package(Threads REQUIRED)

# llama.cpp's Jinja engine, from the llama-cpp-python source distribution: arbitrary chat templates.
if(NOT EXISTS "${TAILOR_JINJA}/common/jinja/runtime.cpp")
  message(FATAL_ERROR "The Jinja engine is not at TAILOR_JINJA='${TAILOR_JINJA}'. Run tools/setup.")
endif()
