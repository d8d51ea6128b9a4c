"""How long an idle thread of the OpenMP pool may spin before it sleeps.

libgomp's default, some milliseconds, is right for a machine that does nothing else. With another busy program on the
same cores every parallel loop then waits for a thread that the system has set aside: training and decoding were
measured eight times slower, and more. A short spin costs nothing measurable on an idle machine.
"""

import os

SPIN_COUNT = "2000"
MOST_THREADS = 4096  # that a user may ask for


def bound_spinning() -> None:
    """Bound libgomp's spinning, unless the user has said otherwise. Works until PyTorch or the kernels are loaded."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
