# Target tailor::torch: LibTorch from the PyPI wheel, headers as system headers, and only the CPU
# libraries: no find_package(Torch), which would want the CUDA toolkit of the wheel's version.
file(GLOB TAILOR_TORCH_DIRS ${TAILOR_VENV}/lib/python3*/site-packages/torch)
list(GET TAILOR_TORCH_DIRS 0 TAILOR_TORCH)
if(NOT EXISTS "${TAILOR_TORCH}/lib/libtorch_cpu.so")
  message(FATAL_ERROR "LibTorch is not in TAILOR_VENV='${TAILOR_VENV}'. Run tools/setup.")
endif()

add_library(tailor_torch INTERFACE)
add_library(tailor::torch ALIAS tailor_torch)
target_include_directories(tailor_torch SYSTEM INTERFACE ${TAILOR_TORCH}/include)
# at::parallel_for is a template that opens an OpenMP region in our own object files. It must meet
# the same OpenMP runtime as LibTorch itself, so the wheel's libgomp is linked, not the system's.
target_compile_options(tailor_torch INTERFACE -fopenmp)
target_link_libraries(tailor_torch INTERFACE
  ${TAILOR_TORCH}/lib/libtorch_cpu.so ${TAILOR_TORCH}/lib/libc10.so ${TAILOR_TORCH}/lib/libgomp.so.1)
target_link_options(tailor_torch INTERFACE -Wl,--allow-shlib-undefined)
