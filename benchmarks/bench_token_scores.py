"""token_scores against its numpy definition, and against PyTorch's log-softmax, which is of float32."""

from collections.abc import Iterator

import numpy as np
import torch
from harness import Case, main

from portlm.ops.token_scores import token_scores, token_scores_reference

V = 50257


def torch_scores(logits, targets):
    """Log-probabilities of targets (B,) by logits (B, V)."""
    return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0], logits.argmax(-1)


def cases(smoke: bool) -> Iterator[Case]:
    generator = np.random.default_rng(0)
    for rows, width in [(2, 100)] if smoke else [(1, V), (64, V)]:
        logits = (generator.standard_normal((rows, width)) * 3.2).astype(np.float32)
        targets = generator.integers(0, width, rows)
        tensors = torch.from_numpy(logits), torch.from_numpy(targets)
        yield Case(
            f"({rows}, {width})",
            {
                "portlm": lambda x=logits, t=targets: torch.from_numpy(token_scores(x, t)[0]),
                "numpy": lambda x=logits, t=targets: torch.from_numpy(token_scores_reference(x, t)[0]),
                "torch": lambda pair=tensors: torch_scores(*pair)[0],
            },
            moved=4 * rows * width,
        )


if __name__ == "__main__":
    main("token_scores", cases)
