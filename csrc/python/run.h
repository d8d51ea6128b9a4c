#pragma once

#include <pybind11/pybind11.h>

// Adds the runner of packed files to a module.
void bind_run(pybind11::module_& m);
