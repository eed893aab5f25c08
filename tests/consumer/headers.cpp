// retention::headers alone: the order of a state's rows, nothing to link.

#include <cstdio>
#include <retention/configuration.hpp>
#include <retention/symmetric_power.hpp>

static_assert(retention::state_dim(64, 2) == 2304);

int main() {
  for (auto const& configuration : retention::kConfigurations) {
    std::int64_t const rows = retention::state_dim(configuration.head_dim, configuration.degree);
    std::printf("%s: %lld rows a state\n", retention::to_string(configuration).c_str(),
                static_cast<long long>(rows));
    if (!retention::is_supported(configuration.head_dim, configuration.degree) || rows <= 0) {
      return 1;
    }
  }
  return 0;
}
