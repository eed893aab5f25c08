// Runs the tests of this program that its arguments name; all of them where there are none.

#include <algorithm>
#include <string>

#include "check.hpp"

int main(int count, char** arguments) {
  std::vector<std::string> const wanted(arguments + 1, arguments + count);
  for (std::string const& name : wanted) {
    auto const& all = retention::test::tests;
    bool const known =
        std::any_of(all.begin(), all.end(), [&](auto const& test) { return name == test.name; });
    RETENTION_CHECK_EQUAL(known ? "" : name, std::string());
  }
  for (retention::test::Test const& test : retention::test::tests) {
    if (wanted.empty() || std::find(wanted.begin(), wanted.end(), test.name) != wanted.end()) {
      test.run();
    }
  }
  return retention::test::finish();
}
