"""token_selection against its numpy definition and against PyTorch's operators, used as transformers uses them."""

from collections.abc import Iterator

import numpy as np
import torch
from harness import Case, main

from portlm.ops.token_selection import select_tokens, token_selection_reference

V = 50257
SETTINGS = {
    "greedy": {},
    "temperature": {"temperature": 0.8},
    "top-k 50": {"temperature": 0.8, "top_k": 50},
    "top-p 0.95": {"temperature": 0.8, "top_p": 0.95},
    "top-k 50, top-p 0.95": {"temperature": 0.8, "top_k": 50, "top_p": 0.95},
    "min-p 0.05": {"temperature": 0.8, "min_p": 0.05},
}


def torch_select(logits, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0):
    """What transformers' processors do, one after the other, on (B, V)."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k:
        logits = logits.masked_fill(logits < logits.topk(top_k)[0][..., -1, None], -torch.inf)
    if top_p < 1:
        ascending, order = logits.sort(descending=False)
        drop = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
        drop[..., -1:] = False
        logits = logits.masked_fill(drop.scatter(1, order, drop), -torch.inf)
    if min_p:
        share = logits.softmax(-1)
        logits = logits.masked_fill(share < min_p * share.amax(-1, keepdim=True), -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1)[:, 0]


def cases(smoke: bool) -> Iterator[Case]:
    generator = np.random.default_rng(0)
    for rows, width in [(2, 100)] if smoke else [(1, V), (16, V)]:
        # As peaked as a trained model is: an entropy of about 4 bits.
        logits = (generator.standard_normal((rows, width)) * 3.2).astype(np.float32)
        tensor = torch.from_numpy(logits)
        for name, filters in SETTINGS.items():
            # Random choices differ by design, so only greedy ones are compared.
            def keep(tokens, filters=filters):
                return None if filters else torch.as_tensor(tokens)

            yield Case(
                f"{name} ({rows}, {width})",
                {
                    "portlm": lambda f=filters, k=keep, x=logits: k(select_tokens(x, **f)),
                    "numpy": lambda f=filters, k=keep, x=logits: k(token_selection_reference(x, **f)),
                    "torch": lambda f=filters, k=keep, x=tensor: k(torch_select(x, **f)),
                },
                moved=4 * rows * width,
            )


if __name__ == "__main__":
    main("token_selection", cases)
