"""What the tests of attention over a cache share, whatever the cache keeps."""

import numpy as np

# B, T, P, H, K, D: decode, prefill, a step of several tokens behind a cache, grouped heads, odd widths, more than
# one block of 64 positions, the tiles of a prompt (16 queries and more) alone and behind a cache, no batch
SHAPES = [
    (1, 1, 0, 1, 1, 1),
    (1, 1, 70, 4, 4, 32),
    (2, 3, 5, 4, 2, 33),
    (3, 7, 130, 6, 1, 64),
    (1, 16, 0, 1, 1, 5),
    (2, 40, 150, 4, 2, 33),
    (0, 1, 3, 2, 2, 8),
]


def padded_rows(sizes, rng):
    """Rows with more and more padding on the left, down to one token, and the places of the new tokens."""
    B, T, total = sizes["batch"], sizes["sequence"], sizes["past"] + sizes["sequence"]
    hidden = np.arange(B)[:, None] * max(total - 1, 0) // max(B - 1, 1)
    mask = (np.arange(total) >= hidden).astype(np.int64)
    return {"mask": mask, "position_ids": np.maximum(mask.cumsum(1) - 1, 0)[:, total - T :]}
