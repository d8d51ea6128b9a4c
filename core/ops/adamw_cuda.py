"""The CUDA side of AdamW: tables of addresses on the device, and one call for the norm and the update."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from portlm.ops import cuda

__all__ = ["CudaPlan"]

_CHUNK = 1 << 16  # elements per block: a large tensor makes many, a small one only one


class CudaPlan:
    """What csrc/cuda/adamw.cu reads: addresses, chunks and coefficients, kept on the device between steps.

    Args:
        params: float32, contiguous, on one CUDA device.
        states: ``exp_avg``, ``exp_avg_sq`` (on the device) and ``step`` (one value on the host) of each.
        groups: index of each parameter's group.
    """

    def __init__(self, params: list[Tensor], states: list[dict[str, Any]], groups: list[int]):
        self.params = params
        self.states = states  # keeps the moments alive: the table holds their addresses
        self.steps = torch.tensor([float(s["step"]) for s in states])
        for state, step in zip(states, self.steps.unbind(), strict=True):
            state["step"] = step  # a view, so that hundreds of counts are read and raised at once
        self.groups = np.array(groups)
        self.device = params[0].device
        sizes = [p.numel() for p in params]
        self.table = np.empty((5, len(params)), np.int64)
        self.table[2] = [s["exp_avg"].data_ptr() for s in states]
        self.table[3] = [s["exp_avg_sq"].data_ptr() for s in states]
        self.table[4] = sizes
        chunks = [(i, first) for i, size in enumerate(sizes) for first in range(0, size, _CHUNK)]
        self.chunks = torch.tensor(chunks, dtype=torch.int64).reshape(-1, 2).to(self.device)
        self.partial = torch.empty(max(len(chunks), 1), dtype=torch.float64, device=self.device)
        self.norm = torch.zeros(1, dtype=torch.float64, device=self.device)
        self._sent: np.ndarray = np.empty(0, np.int64)
        self._device_table = torch.empty(0, dtype=torch.int64, device=self.device)

    def update_addresses(self, params: list[int], grads: list[int]) -> None:
        """Take the addresses of this step's weights and gradients; they travel only if one has changed."""
        self.table[0], self.table[1] = params, grads
        if not np.array_equal(self._sent, self.table):
            self._sent = self.table.copy()
            self._device_table = torch.from_numpy(self._sent).to(self.device)

    def run(self, settings: np.ndarray, max_norm: float) -> float:
        """Update everything and return the gradient norm. Waits for the device, as reading the norm has to.

        Args:
            settings: (groups, 5) float64: lr, beta1, beta2, eps, weight decay.
            max_norm: see AdamW; infinity for no clipping.
        """
        steps = self.steps.numpy().astype(np.float64) + 1
        lr, beta1, beta2, eps, decay = settings[self.groups].T
        coefficients = np.stack(
            [
                1 - beta1, beta2, 1 - beta2, eps, 1 - lr * decay,
                lr / (1 - beta1**steps), 1 / np.sqrt(1 - beta2**steps),
            ], axis=1,
        ).astype(np.float32)  # fmt: skip
        on_device = torch.from_numpy(coefficients).to(self.device)
        cuda.launch(
            "adamw_step", self.device, self._device_table.data_ptr(), len(self.params), self.chunks.data_ptr(),
            self.chunks.shape[0], _CHUNK, on_device.data_ptr(), max_norm, self.partial.data_ptr(),
            self.norm.data_ptr(),
        )  # fmt: skip
        norm = float(self.norm)
        if np.isfinite(norm):
            self.steps += 1
        return norm
