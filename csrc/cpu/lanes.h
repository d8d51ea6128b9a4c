// Which lanes of a vector exist. Whole is known at compile time, so a loop body written once for both costs nothing.
#pragma once

#include <cstdint>

namespace portlm::PORTLM_ISA {

struct Whole {};
struct First {
  int64_t n;  // 0 <= n <= Vec::N
};

}  // namespace portlm::PORTLM_ISA
