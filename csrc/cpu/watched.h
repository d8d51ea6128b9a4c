// Memory that masked instructions read or write, shown to the address sanitizer, which does not look into them.
#pragma once

#include <cstdint>

namespace portlm::PORTLM_ISA {

// Nothing, but in a build with the sanitizer, which reports an element of p[0 .. n) that is not ours.
template <typename T>
inline const T* watched(const T* p, int64_t n) {
#ifdef __SANITIZE_ADDRESS__
  for (int64_t i = 0; i < n; ++i) (void)*static_cast<const volatile T*>(p + i);
#else
  (void)n;
#endif
  return p;
}

}  // namespace portlm::PORTLM_ISA
