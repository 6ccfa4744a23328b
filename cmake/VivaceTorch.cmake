# Finds the torch of a Python and offers two targets:
#   vivace::torch_stable  headers and libtorch.so for the operator library (stable ABI; runs with torch 2.10 and newer)
#   vivace::torch         full LibTorch for the host (tied to this torch version)
# find_package(Torch) is not used: it rewrites CMAKE_CUDA_FLAGS and CMAKE_CUDA_ARCHITECTURES, and needs nvcc for plain C++.
set(VIVACE_TORCH_DIR "" CACHE PATH "torch package directory (holds include/ and lib/); empty: ask Python")
if(NOT VIVACE_TORCH_DIR)
  find_package(Python3 COMPONENTS Interpreter REQUIRED)
  execute_process(
    COMMAND ${Python3_EXECUTABLE} -c "import importlib.util as u; print(u.find_spec('torch').submodule_search_locations[0])"
    OUTPUT_VARIABLE torch_dir OUTPUT_STRIP_TRAILING_WHITESPACE RESULT_VARIABLE failed ERROR_QUIET)
  if(failed)
    message(FATAL_ERROR "vivace: ${Python3_EXECUTABLE} has no torch; pip install torch, or set VIVACE_TORCH_DIR")
  endif()
  set(VIVACE_TORCH_DIR "${torch_dir}" CACHE PATH "" FORCE)
endif()
file(READ "${VIVACE_TORCH_DIR}/version.py" torch_version_py)
string(REGEX MATCH "__version__ = '([^']+)'" _ "${torch_version_py}")
set(VIVACE_TORCH_VERSION "${CMAKE_MATCH_1}")
message(STATUS "vivace: torch ${VIVACE_TORCH_VERSION} in ${VIVACE_TORCH_DIR}")

set(torch_lib "${VIVACE_TORCH_DIR}/lib")

# libtorch.so alone: it brings libtorch_cuda.so where there is one, and loads where there is none.
add_library(vivace_torch_stable INTERFACE)
add_library(vivace::torch_stable ALIAS vivace_torch_stable)
target_include_directories(vivace_torch_stable SYSTEM INTERFACE "${VIVACE_TORCH_DIR}/include")
target_compile_definitions(vivace_torch_stable INTERFACE TORCH_TARGET_VERSION=0x020a000000000000 TORCH_STABLE_ONLY)
target_link_libraries(vivace_torch_stable INTERFACE
  -Wl,--no-as-needed "${torch_lib}/libtorch.so" -Wl,--as-needed "${torch_lib}/libtorch_cpu.so")
target_link_options(vivace_torch_stable INTERFACE -Wl,--allow-shlib-undefined)

# torch ships fmt and pybind11 headers of its own: -idirafter lets the system's win.
add_library(vivace_torch INTERFACE)
add_library(vivace::torch ALIAS vivace_torch)
target_compile_options(vivace_torch INTERFACE
  "SHELL:-idirafter ${VIVACE_TORCH_DIR}/include" "SHELL:-idirafter ${VIVACE_TORCH_DIR}/include/torch/csrc/api/include")
target_link_libraries(vivace_torch INTERFACE
  -Wl,--no-as-needed "${torch_lib}/libtorch.so" "${torch_lib}/libtorch_cpu.so" "${torch_lib}/libc10.so" -Wl,--as-needed)
target_link_options(vivace_torch INTERFACE -Wl,--allow-shlib-undefined)
set(VIVACE_TORCH_HAS_CUDA OFF)
if(VIVACE_WITH_CUDA AND EXISTS "${torch_lib}/libtorch_cuda.so")
  set(VIVACE_TORCH_HAS_CUDA ON)
  target_link_libraries(vivace_torch INTERFACE
    -Wl,--no-as-needed "${torch_lib}/libtorch_cuda.so" "${torch_lib}/libc10_cuda.so" -Wl,--as-needed CUDA::cudart_static)
  target_compile_definitions(vivace_torch INTERFACE VIVACE_WITH_CUDA=1)
endif()
set(VIVACE_TORCH_RPATH "${torch_lib}")
