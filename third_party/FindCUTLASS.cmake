#[=[
Finds the headers of CUTLASS, in this order:

1. the target nvidia::cutlass::cutlass, where a parent project or CUTLASS's own package defined it;
2. CUTLASS_ROOT, a CMake or environment variable: a checkout of CUTLASS, or its include folder;
3. the PyPI wheel nvidia-cutlass, in the Python of Python_EXECUTABLE, else the first on PATH.

Sets CUTLASS_FOUND, CUTLASS_VERSION (read from cutlass/version.h) and CUTLASS_INCLUDE_DIR, and
defines the target nvidia::cutlass::cutlass. A CUTLASS_ROOT without the headers is not passed over
in favour of the wheel: whoever set it meant it.
]=]

include(FindPackageHandleStandardArgs)

# Not cached: a changed CUTLASS_ROOT or Python environment counts at the next configure.
set(CUTLASS_INCLUDE_DIR "CUTLASS_INCLUDE_DIR-NOTFOUND")
unset(CUTLASS_VERSION)
set(_cutlass_candidates)
set(_cutlass_reason "")

if(TARGET nvidia::cutlass::cutlass)
  get_target_property(_cutlass_candidates nvidia::cutlass::cutlass INTERFACE_INCLUDE_DIRECTORIES)
  string(REGEX REPLACE "\\$<(BUILD_INTERFACE|INSTALL_INTERFACE):([^>]*)>" "\\2"
                       _cutlass_candidates "${_cutlass_candidates}")
  set(_cutlass_reason "the existing target nvidia::cutlass::cutlass has no folder with "
                      "cutlass/version.h")
elseif(CUTLASS_ROOT OR NOT "$ENV{CUTLASS_ROOT}" STREQUAL "")
  if(CUTLASS_ROOT)
    set(_cutlass_root "${CUTLASS_ROOT}")
  else()
    set(_cutlass_root "$ENV{CUTLASS_ROOT}")
  endif()
  set(_cutlass_candidates "${_cutlass_root}/include" "${_cutlass_root}")
  set(_cutlass_reason "CUTLASS_ROOT is '${_cutlass_root}', which has neither "
                      "include/cutlass/version.h nor cutlass/version.h")
else()
  if(Python_EXECUTABLE)
    set(_cutlass_python "${Python_EXECUTABLE}")
  else()
    find_program(CUTLASS_PYTHON NAMES python3 python DOC "Python to look for nvidia-cutlass in")
    mark_as_advanced(CUTLASS_PYTHON)
    set(_cutlass_python "${CUTLASS_PYTHON}")
  endif()
  set(_cutlass_reason "give CUTLASS_ROOT, or install the wheel nvidia-cutlass for the Python "
                      "'${_cutlass_python}'")
  if(_cutlass_python)
    # find_spec looks the package up; importing it would run its kernel generators.
    execute_process(
      COMMAND
        "${_cutlass_python}" -c
        "from importlib.util import find_spec; spec = find_spec('cutlass_library'); print(';'.join(spec.submodule_search_locations or ()) if spec else '')"
      OUTPUT_VARIABLE _cutlass_packages
      OUTPUT_STRIP_TRAILING_WHITESPACE
      ERROR_QUIET)
    foreach(_cutlass_package IN LISTS _cutlass_packages)
      list(APPEND _cutlass_candidates "${_cutlass_package}/source/include")
    endforeach()
  endif()
endif()
list(JOIN _cutlass_reason "" _cutlass_reason)

foreach(_cutlass_candidate IN LISTS _cutlass_candidates)
  if(EXISTS "${_cutlass_candidate}/cutlass/version.h")
    get_filename_component(CUTLASS_INCLUDE_DIR "${_cutlass_candidate}" ABSOLUTE)
    set(_cutlass_numbers)
    foreach(_cutlass_part IN ITEMS MAJOR MINOR PATCH)
      file(STRINGS "${CUTLASS_INCLUDE_DIR}/cutlass/version.h" _cutlass_line
           REGEX "^#define CUTLASS_${_cutlass_part} +[0-9]+")
      string(REGEX REPLACE "^#define CUTLASS_${_cutlass_part} +([0-9]+).*$" "\\1" _cutlass_line
                           "${_cutlass_line}")
      list(APPEND _cutlass_numbers "${_cutlass_line}")
    endforeach()
    list(JOIN _cutlass_numbers "." CUTLASS_VERSION)
    break()
  endif()
endforeach()

find_package_handle_standard_args(
  CUTLASS
  REQUIRED_VARS CUTLASS_INCLUDE_DIR
  VERSION_VAR CUTLASS_VERSION
  REASON_FAILURE_MESSAGE "${_cutlass_reason}")

if(CUTLASS_FOUND)
  if(NOT TARGET nvidia::cutlass::cutlass)
    # Global, for who links retention::kernels in a folder above this one.
    add_library(nvidia::cutlass::cutlass INTERFACE IMPORTED GLOBAL)
    set_target_properties(nvidia::cutlass::cutlass PROPERTIES INTERFACE_INCLUDE_DIRECTORIES
                                                              "${CUTLASS_INCLUDE_DIR}")
  endif()
else()
  unset(CUTLASS_VERSION)
endif()
