"""Packed files as bytes: opened by the reader in C++, taken apart, and damaged."""

import os
import struct
import subprocess
import sys


def open_bytes(raw, folder):
    """What the reader makes of a file with these bytes; a RuntimeError says why it refuses it."""
    from portlm import _C

    path = folder / "some.portlm"
    path.write_bytes(raw)
    with path.open("rb") as file:
        return _C.run.PackedFile(file.fileno())


def places(raw):
    """Offset and count of every table."""
    return [struct.unpack_from("<QQ", raw, 64 + 16 * i) for i in range(10)]


def damage_everywhere(path):
    """Change header and tables of a file, one place at a time, and run what is not refused.

    In a process of its own, which a read outside of memory would end.
    """
    done = subprocess.run(
        [sys.executable, "-c", _DAMAGE, str(path), "1"], capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])


_DAMAGE = """
import os, random, struct, sys
import numpy as np
from portlm import _C

raw = open(sys.argv[1], "rb").read()
rng = random.Random(int(sys.argv[2]))
tables = [struct.unpack_from("<QQ", raw, 64 + 16 * i) for i in range(10)]
end = tables[-1][0] + 8 * tables[-1][1]
odd = [0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1]
cases = [(bit // 8, bytes([raw[bit // 8] ^ 1 << bit % 8])) for bit in range(8 * 256)]
for _ in range(2500):
    bit = rng.randrange(8 * 256, 8 * end)
    cases.append((bit // 8, bytes([raw[bit // 8] ^ 1 << bit % 8])))
for _ in range(2500):
    size = rng.choice([4, 8])
    at = rng.randrange(256, end, size)
    cases.append((at, (rng.choice(odd) % 2 ** (8 * size)).to_bytes(size, "little")))
refused = ran = failed = 0
file = open(sys.argv[1], "r+b")
for at, value in cases:
    os.pwrite(file.fileno(), value, at)
    try:
        packed = _C.run.PackedFile(file.fileno())
        role = packed.open(0)
    except RuntimeError:
        refused += 1
        continue
    finally:
        os.pwrite(file.fileno(), raw[at : at + len(value)], at)
    [(name, inputs, outputs, states)] = packed.roles()
    B, T, kept, total = 2, 3, 2, 0
    cache = role.start(B)
    for _ in range(2):
        sizes = {"batch": B, "sequence": T, "past": cache.past, "kept": kept,
                 "past + sequence": cache.past + T}
        shapes = [[[d if isinstance(d, int) else sizes[d] for d in item[3]] for item in group]
                  for group in (inputs, outputs)]
        if any(np.prod([float(d) for d in shape]) > 1e7 for group in shapes for shape in group):
            break
        given = [np.ones(shape, item[2]) for shape, item in zip(shapes[0], inputs)]
        taken = [np.zeros(shape, item[2]) for shape, item in zip(shapes[1], outputs)]
        try:
            role.run(cache, T, kept, [a.ctypes.data for a in given], [a.ctypes.data for a in taken])
            ran += 1
        except RuntimeError:
            failed += 1
            break
print(refused, ran, failed)
assert refused > len(cases) * 0.5, "nothing was checked"
assert ran > 100, "nothing ran"
"""
