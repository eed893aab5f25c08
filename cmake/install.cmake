# What `cmake --install` and the wheel lay out: the library, the headers and a CMake package. Included
# by src/CMakeLists.txt, which knows what was compiled.

include(CMakePackageConfigHelpers)
if(RETENTION_PYTHON)
  # The Python module looks for the library there.
  set(CMAKE_INSTALL_LIBDIR lib)
  set(CMAKE_INSTALL_INCLUDEDIR include)
else()
  include(GNUInstallDirs)
  # Not in a wheel, where the links to a name with a version would become copies.
  set_target_properties(retention_library PROPERTIES SOVERSION
                        ${PROJECT_VERSION_MAJOR}.${PROJECT_VERSION_MINOR})
endif()
set(package_dir "${CMAKE_INSTALL_LIBDIR}/cmake/retention")

install(
  TARGETS retention_headers retention_library
  EXPORT retention-targets
  RUNTIME DESTINATION "${CMAKE_INSTALL_BINDIR}" COMPONENT library
  LIBRARY DESTINATION "${CMAKE_INSTALL_LIBDIR}" COMPONENT library
  ARCHIVE DESTINATION "${CMAKE_INSTALL_LIBDIR}" COMPONENT library
  INCLUDES DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}")
# A set of its own: it names CUTLASS, which only those who compile kernels have.
install(TARGETS retention_kernels EXPORT retention-kernels)
foreach(set IN ITEMS targets kernels)
  install(
    EXPORT retention-${set}
    NAMESPACE retention::
    DESTINATION "${package_dir}"
    COMPONENT development)
endforeach()

install(
  DIRECTORY "${PROJECT_SOURCE_DIR}/include/retention"
  DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}"
  COMPONENT development
  FILES_MATCHING
  PATTERN "*.hpp")

set(package_configurations)
foreach(configuration IN LISTS compiled)
  separate_arguments(configuration)
  list(GET configuration -1 name)
  list(APPEND package_configurations "${name}")
endforeach()
string(REPLACE "," ";" package_architectures "${architectures}")
set(package_needs_cuda FALSE)
if(RETENTION_WITH_CUDA AND NOT BUILD_SHARED_LIBS)
  set(package_needs_cuda TRUE)
endif()
configure_package_config_file(
  "${PROJECT_SOURCE_DIR}/cmake/retention-config.cmake.in" retention-config.cmake
  INSTALL_DESTINATION "${package_dir}"
  NO_SET_AND_CHECK_MACRO)
write_basic_package_version_file(retention-config-version.cmake COMPATIBILITY SameMinorVersion)
install(
  FILES "${CMAKE_CURRENT_BINARY_DIR}/retention-config.cmake"
        "${CMAKE_CURRENT_BINARY_DIR}/retention-config-version.cmake"
        "${PROJECT_SOURCE_DIR}/third_party/FindCUTLASS.cmake"
  DESTINATION "${package_dir}"
  COMPONENT development)
