# What compiles bindings.cpp into a Python module.

find_package(
  Python 3.11 REQUIRED
  COMPONENTS Interpreter Development.Module
  OPTIONAL_COMPONENTS Development.SABIModule)
if(NOT SKBUILD)
  execute_process(
    COMMAND "${Python_EXECUTABLE}" -m nanobind --cmake_dir
    OUTPUT_VARIABLE nanobind_ROOT
    OUTPUT_STRIP_TRAILING_WHITESPACE)
endif()
find_package(nanobind 3 CONFIG REQUIRED)

# retention_add_module(target ...): the Python module _C; what follows goes to nanobind_add_module.
function(retention_add_module target)
  nanobind_add_module(${target} STABLE_ABI NB_STATIC NB_SUPPRESS_WARNINGS ${ARGN}
                      "${PROJECT_SOURCE_DIR}/src/bindings.cpp")
  retention_target(${target})
  set_target_properties(${target} PROPERTIES OUTPUT_NAME _C)
  target_compile_definitions(
    ${target}
    PRIVATE "RETENTION_VERSION=\"${PROJECT_VERSION}\""
            "RETENTION_COMPILER=\"${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}\""
            "RETENTION_CUTLASS_VERSION=\"${CUTLASS_VERSION}\"")
endfunction()
