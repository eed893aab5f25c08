# Runs PROGRAM, a test of a kernel with a mistake in it, and succeeds if the test fails as it
# should: it ends by itself with status 1, and says one of CAUGHT_AS (kinds with `|` between). A
# program that crashes or hangs has caught nothing.

cmake_policy(VERSION 3.24)

set(ENV{RETENTION_STOP_AT_FAILURE} 1)  # one is enough
execute_process(
  COMMAND "${PROGRAM}"
  TIMEOUT 200
  RESULT_VARIABLE result
  OUTPUT_VARIABLE output
  ERROR_VARIABLE output)

# Checks print what the emulator reported as the value that should have been empty.
set(faults "out of bounds|misaligned|uninitialized|cp\\.async pending|wgmma pending|no proxy fence"
           "race|divergence|deadlock|crash")
list(JOIN faults "|" faults)
string(REGEX MATCHALL "\n  actual (${faults}): " reports "${output}")
list(REMOVE_DUPLICATES reports)
list(TRANSFORM reports REPLACE "\n  actual (.*): " "\\1")
if(NOT reports AND output MATCHES ": failed: ")
  set(reports "wrong result")
endif()

string(REPLACE "." "\\." caught_as "${CAUGHT_AS}")
list(JOIN reports ", " seen)
list(FILTER reports INCLUDE REGEX "^(${caught_as})$")
if(NOT result STREQUAL "1" OR NOT reports)
  message("${output}")
  message(FATAL_ERROR "The mistake was not caught: the test must end with status 1 and report "
                      "\"${CAUGHT_AS}\", but ended with \"${result}\" and reported \"${seen}\"")
endif()
message(STATUS "Caught as: ${seen}")
