"""Quantizing to the numbers that a checkpoint was made of, where it kept their scales (portlm.kept_scales)."""

from pathlib import Path
from typing import Any

import numpy as np

from portlm.compile.quantize import (
    Floats,
    Prepare,
    Quantized,
    RoundToNearest,
    Scheme,
    dequantize,
    nearest,
)
from portlm.errors import FormatError
from portlm.kept_scales import GROUP, SCALES, load_scales


def kept_group(source: Path, quantize: str | None, group: int | None, chosen: bool) -> int | None:
    """Return how many weights share a scale where nothing is said: as many as in the file that the scales are of.

    Args:
        source: folder of the checkpoint.
        quantize: what was asked for.
        group: what was asked for.
        chosen: whether the numbers are to be others anyway.
    """
    kept = quantize is not None and group is None and not chosen and (source / SCALES).exists()
    return GROUP if kept else group


def kept_numbers(source: Path, scheme: Scheme | None) -> Prepare | None:
    """Return what makes the quantizer of a checkpoint whose scales are known; None where none are, or of other numbers.

    Args:
        source: folder of the checkpoint.
        scheme: which numbers are wanted.

    Raises:
        FormatError: the file of scales is damaged.
    """
    if scheme is None or scheme.group != GROUP or not scheme.symmetric:
        return None
    scales = {name: scale for name, (bits, scale) in load_scales(source).items() if bits <= scheme.bits}
    return (lambda module: KeptScales(module, scheme, scales, source)) if scales else None


class KeptScales:
    """The Quantizer that finds the numbers of weights again; those without a scale are rounded to the nearest.

    Args:
        module: whose parameters are quantized.
        scheme: in groups of GROUP, symmetric.
        scales: (N, G) float16, by names in model.safetensors.
        source: folder of the checkpoint, for errors.
    """

    def __init__(self, module: Any, scheme: Scheme, scales: dict[str, np.ndarray], source: Path):
        self.scheme, self._scales, self._source = scheme, scales, source
        self._stored, self._other = module.hf_name, RoundToNearest(scheme)
        self._kept, self._rounded = 0, 0
        self.method = self._done()

    def _done(self) -> str:
        """What was done so far, for the manifest."""
        rounded = f", {self._rounded} rounded to nearest" if self._rounded else ""
        return f"the numbers of {self._kept} matrices kept{rounded}"

    def __call__(self, name: str, weight: Floats) -> Quantized:
        """Return the numbers that a matrix (N, K) was made of.

        Raises:
            FormatError: it is no multiple of its scales.
        """
        scale = self._scales.get(self._stored(name)[0])
        if scale is None:
            self._rounded += 1
            self.method = self._done()
            return self._other(name, weight)
        N, K = weight.shape
        wide = scale.astype(np.float32)
        if wide.shape == (N, K // GROUP):
            found = Quantized(nearest(weight, wide, None, self.scheme), wide)
            if np.array_equal(dequantize(found, self.scheme), weight):
                self._kept += 1
                self.method = self._done()
                return found
        raise FormatError(
            f"{self._source}: {name} is not made of whole numbers times the scales in {SCALES}, so its weights have "
            f"changed since: remove {SCALES} to round them"
        )
