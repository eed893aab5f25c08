// What a C++ test needs and no more: checks that report and count, and an exit status. Where there
// is a variable RETENTION_STOP_AT_FAILURE in the environment, the first check that fails ends the
// program.
//
//   RETENTION_TEST(name) { ... }  // main.cpp runs those that its arguments name

#pragma once

#include <cstdlib>
#include <iostream>
#include <vector>

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

inline void stop_at_failure(bool passed) {
  if (!passed && std::getenv("RETENTION_STOP_AT_FAILURE") != nullptr) {
    std::exit(1);
  }
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

struct Test {
  char const* name;
  void (*run)();
};

/// Of this program. Not in a function: the emulator answers no calls for the guard of a static.
inline std::vector<Test> tests;

struct RegisterTest {
  RegisterTest(char const* name, void (*run)()) { tests.push_back({name, run}); }
};

// A test that checked nothing has not passed.
inline int finish() {
  std::cout << checks << " checks, " << failures << " failed\n";
  return failures == 0 && checks > 0 ? 0 : 1;
}

}  // namespace retention::test

#define RETENTION_TEST(name)                                                        \
  static void run_##name();                                                         \
  static ::retention::test::RegisterTest const register_##name{#name, &run_##name}; \
  static void run_##name()

#define RETENTION_CHECK(condition) \
  ::retention::test::check((condition), #condition, __FILE__, __LINE__)
#define RETENTION_CHECK_EQUAL(actual, expected) \
  ::retention::test::check_equal((actual), (expected), #actual " == " #expected, __FILE__, __LINE__)
