"""How the torch engine's graphs are run with their inner values exposed, for portlm.compile.bisect.

A plan computes every value of its graph under the name that it has there, so one is made from the graph and asked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from portlm.compile.runners import Runner
    from portlm.runtimes.torch_plan import Program


def plan_runner(device: str, profile: str) -> Runner:
    """Run a graph in PyTorch as the torch engine does, on "cpu" or "cuda".

    Args:
        device: of PyTorch.
        profile: "portable" or "fused". The model's own code, "native", has no graph.
    """
    import torch

    from portlm.compile.torch_plan import graph_plan
    from portlm.runtimes.torch_plan import open_program

    opened: list[Program] = []

    def run(
        model: Any, folder: Path, names: Sequence[str], inputs: Mapping[str, np.ndarray]
    ) -> list[np.ndarray]:
        if not opened:
            plan = graph_plan(model, profile)
            opened.append(open_program(plan, folder, folder / plan.weights_file, device))
        given = [torch.from_numpy(np.array(inputs[value.name])).to(device) for value in model.graph.input]
        with torch.inference_mode():
            values = opened[0].values(*given)
        return [values[name].cpu().numpy() for name in names]

    return run
