#[=[
Finds the headers of CUDA, those of its C++ library (CCCL) included; no compiler is needed. In this
order:

1. CUDAToolkit_ROOT, a CMake or environment variable, or CUDA_PATH or CUDA_HOME of the environment;
2. the toolkit of the CUDA compiler in use, else of the nvcc on PATH;
3. the PyPI wheels nvidia-cuda-runtime, nvidia-cuda-crt and nvidia-cuda-cccl, in the Python of
   Python_EXECUTABLE, else the first on PATH.

Sets CUDAHeaders_FOUND, CUDAHeaders_VERSION (read from cuda_runtime_api.h) and
CUDAHeaders_INCLUDE_DIRS.
]=]

include(FindPackageHandleStandardArgs)

# Not cached: a changed variable or Python environment counts at the next configure.
set(CUDAHeaders_INCLUDE_DIR "CUDAHeaders_INCLUDE_DIR-NOTFOUND")
unset(CUDAHeaders_INCLUDE_DIRS)
unset(CUDAHeaders_VERSION)

set(_cuda_candidates)
foreach(_cuda_root IN ITEMS "${CUDAToolkit_ROOT}" "$ENV{CUDAToolkit_ROOT}" "$ENV{CUDA_PATH}"
                            "$ENV{CUDA_HOME}")
  if(_cuda_root)
    list(APPEND _cuda_candidates "${_cuda_root}/include" "${_cuda_root}")
  endif()
endforeach()

if(CMAKE_CUDA_COMPILER)
  set(_cuda_nvcc "${CMAKE_CUDA_COMPILER}")
else()
  find_program(CUDAHeaders_NVCC NAMES nvcc DOC "nvcc whose toolkit's headers the emulator may use")
  mark_as_advanced(CUDAHeaders_NVCC)
  set(_cuda_nvcc "${CUDAHeaders_NVCC}")
endif()
if(_cuda_nvcc)
  # nvcc may be a link or a script, so it is asked for its toolkit. The file need not exist.
  execute_process(
    COMMAND "${_cuda_nvcc}" --dryrun nothing.cu
    OUTPUT_VARIABLE _cuda_output
    ERROR_VARIABLE _cuda_output)
  if(_cuda_output MATCHES "#\\$ TOP=([^\r\n]+)")
    list(APPEND _cuda_candidates "${CMAKE_MATCH_1}/include")
  endif()
endif()

if(Python_EXECUTABLE)
  set(_cuda_python "${Python_EXECUTABLE}")
else()
  find_program(CUDAHeaders_PYTHON NAMES python3 python DOC "Python to look for CUDA headers in")
  mark_as_advanced(CUDAHeaders_PYTHON)
  set(_cuda_python "${CUDAHeaders_PYTHON}")
endif()
if(_cuda_python)
  execute_process(
    COMMAND
      "${_cuda_python}" -c
      "from importlib.util import find_spec; spec = find_spec('nvidia'); print(';'.join(spec.submodule_search_locations or ()) if spec else '')"
    OUTPUT_VARIABLE _cuda_packages
    OUTPUT_STRIP_TRAILING_WHITESPACE
    ERROR_QUIET)
  foreach(_cuda_package IN LISTS _cuda_packages)
    file(GLOB _cuda_wheels "${_cuda_package}/cu[0-9]*/include")
    list(APPEND _cuda_candidates ${_cuda_wheels})
  endforeach()
endif()

foreach(_cuda_candidate IN LISTS _cuda_candidates)
  # Since CUDA 13, CCCL has a folder of its own.
  foreach(_cuda_cccl IN ITEMS "${_cuda_candidate}/cccl" "${_cuda_candidate}")
    if(EXISTS "${_cuda_candidate}/cuda_runtime_api.h"
       AND EXISTS "${_cuda_candidate}/crt/host_defines.h"
       AND EXISTS "${_cuda_cccl}/cuda/std/cstdint")
      get_filename_component(CUDAHeaders_INCLUDE_DIR "${_cuda_candidate}" ABSOLUTE)
      get_filename_component(_cuda_cccl "${_cuda_cccl}" ABSOLUTE)
      set(CUDAHeaders_INCLUDE_DIRS "${CUDAHeaders_INCLUDE_DIR}" "${_cuda_cccl}")
      list(REMOVE_DUPLICATES CUDAHeaders_INCLUDE_DIRS)
      file(STRINGS "${CUDAHeaders_INCLUDE_DIR}/cuda_runtime_api.h" _cuda_line
           REGEX "^#define CUDART_VERSION +[0-9]+")
      if(_cuda_line MATCHES "([0-9]+)0([0-9])0")
        set(CUDAHeaders_VERSION "${CMAKE_MATCH_1}.${CMAKE_MATCH_2}")
      endif()
      break()
    endif()
  endforeach()
  if(CUDAHeaders_INCLUDE_DIR)
    break()
  endif()
endforeach()

find_package_handle_standard_args(
  CUDAHeaders
  REQUIRED_VARS CUDAHeaders_INCLUDE_DIR
  VERSION_VAR CUDAHeaders_VERSION)
