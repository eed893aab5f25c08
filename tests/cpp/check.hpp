// What a C++ test needs and no more: checks that report and count, and an exit status. With
// RETENTION_STOP_AT_FAILURE a test ends at the first check that fails.

#pragma once

#include <cstdlib>
#include <iostream>

namespace retention::test {

inline int failures = 0;
inline int checks = 0;

inline void report(bool passed, char const* what, char const* file, int line) {
  ++checks;
  if (!passed) {
    ++failures;
    std::cerr << file << ':' << line << ": failed: " << what << '\n';
  }
}

inline void stop_at_failure([[maybe_unused]] bool passed) {
#ifdef RETENTION_STOP_AT_FAILURE
  if (!passed) {
    std::exit(1);
  }
#endif
}

inline void check(bool passed, char const* what, char const* file, int line) {
  report(passed, what, file, line);
  stop_at_failure(passed);
}

template <class A, class B>
void check_equal(A const& actual, B const& expected, char const* what, char const* file, int line) {
  bool const passed = actual == expected;
  report(passed, what, file, line);
  if (!passed) {
    std::cerr << "  actual " << actual << ", expected " << expected << '\n';
  }
  stop_at_failure(passed);
}

// A test that checked nothing has not passed.
inline int finish() {
  std::cout << checks << " checks, " << failures << " failed\n";
  return failures == 0 && checks > 0 ? 0 : 1;
}

}  // namespace retention::test

#define RETENTION_CHECK(condition) \
  ::retention::test::check((condition), #condition, __FILE__, __LINE__)
#define RETENTION_CHECK_EQUAL(actual, expected) \
  ::retention::test::check_equal((actual), (expected), #actual " == " #expected, __FILE__, __LINE__)
