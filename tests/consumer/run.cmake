# Configures, builds and tests this folder's project:
#
#   cmake -D FOLDER=... -D GENERATOR=... -D COMPILER=... -D CONFIG=... -D VERSION=...
#         [-D CUTLASS_ROOT=...] [-D CUDA_INCLUDE_DIRS=...] (-D INSTALL=... | -D RETENTION=...)
#         -P run.cmake
#
# INSTALL is a build folder of retention: its package is installed and found. RETENTION is a source
# folder, to be a subproject. FOLDER is for what this makes; it is removed first.

set(options "-DCMAKE_CXX_COMPILER=${COMPILER}" "-DCMAKE_BUILD_TYPE=${CONFIG}"
            "-DRETENTION_VERSION=${VERSION}" "-DCUTLASS_ROOT=${CUTLASS_ROOT}")
file(REMOVE_RECURSE "${FOLDER}")

if(INSTALL)
  execute_process(
    COMMAND "${CMAKE_COMMAND}" --install "${INSTALL}" --config "${CONFIG}" --prefix
            "${FOLDER}/staged" COMMAND_ERROR_IS_FATAL ANY
    OUTPUT_QUIET)
  # What is installed can be moved, and names no folder of the build.
  file(RENAME "${FOLDER}/staged" "${FOLDER}/prefix")
  list(APPEND options "-DCMAKE_PREFIX_PATH=${FOLDER}/prefix")
  cmake_path(GET CMAKE_CURRENT_LIST_DIR PARENT_PATH source)
  cmake_path(GET source PARENT_PATH source)
  file(GLOB_RECURSE scripts "${FOLDER}/prefix/*.cmake")
  foreach(script IN LISTS scripts)
    file(READ "${script}" text)
    foreach(path IN ITEMS "${source}" "${INSTALL}" "${FOLDER}")
      string(FIND "${text}" "${path}" position)
      if(position GREATER -1)
        message(FATAL_ERROR "${script} names ${path}, which its users do not have")
      endif()
    endforeach()
  endforeach()

  file(GLOB_RECURSE expected RELATIVE "${source}/include" "${source}/include/*.hpp")
  file(GLOB_RECURSE installed RELATIVE "${FOLDER}/prefix/include" "${FOLDER}/prefix/include/*")
  if(NOT expected STREQUAL installed)
    message(FATAL_ERROR "installed headers: expected\n${expected}\ngot\n${installed}")
  endif()
else()
  # As in another project's wheel, where this project's Python module has no place.
  list(APPEND options "-DRETENTION_SOURCE_DIR=${RETENTION}" -DRETENTION_CUDA=OFF -DSKBUILD=ON)
endif()

execute_process(
  COMMAND
    "${CMAKE_CTEST_COMMAND}" --build-and-test "${CMAKE_CURRENT_LIST_DIR}" "${FOLDER}/build"
    --build-generator "${GENERATOR}" --build-config "${CONFIG}" --build-options ${options}
    "-DCUDA_INCLUDE_DIRS=${CUDA_INCLUDE_DIRS}" --test-command "${CMAKE_CTEST_COMMAND}"
    --output-on-failure --no-tests=error -C "${CONFIG}" COMMAND_ERROR_IS_FATAL ANY)

if(RETENTION)
  execute_process(COMMAND "${CMAKE_COMMAND}" --install "${FOLDER}/build" --config "${CONFIG}"
                          --prefix "${FOLDER}/prefix" COMMAND_ERROR_IS_FATAL ANY)
  if(EXISTS "${FOLDER}/prefix")
    message(FATAL_ERROR "a subproject installed something with the project around it")
  endif()
endif()
