#include "kernels.h"  // what NVIDIA calls the driver's header
