// What the tests set of the emulation.
#pragma once

namespace cuda_on_cpu {

// In which order threads and blocks of later launches run: 0 forwards, 1 backwards, others shuffled. Copies to shared memory
// arrive as late as they may, but with 1 as early.
void choose_order(unsigned order);

}  // namespace cuda_on_cpu
