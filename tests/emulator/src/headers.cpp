// Nothing: CMake compiles headers.hpp for a target that has sources.
