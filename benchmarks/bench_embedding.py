"""embedding, and above all its gradient, against PyTorch eager and torch.compile."""

from collections.abc import Iterator

import torch
from harness import Case, compiled, main, with_gradients, without_gradients

from portlm.ops.embedding import embedding, embedding_reference

SIZES = [(768, 256, 128), (2048, 8192, 384), (8192, 50257, 768)]  # tokens, V, C


def cases(smoke: bool) -> Iterator[Case]:
    for n, V, C in [(8, 32, 48)] if smoke else SIZES:
        # Token frequencies of a text: a few are most of it (Zipf).
        ids = (torch.rand(n).pow(4) * V).long()
        weight = torch.randn(V, C)
        contenders = {
            "portlm": embedding,
            "eager": embedding_reference,
            "compile": compiled(embedding_reference),
        }
        rows, table = 4 * n * C, 4 * V * C
        yield Case(
            f"forward {n} of ({V}, {C})",
            {k: without_gradients(f, ids, weight) for k, f in contenders.items()},
            moved=2 * rows,
        )
        yield Case(
            f"forward + backward {n} of ({V}, {C})",
            {k: with_gradients(f, ids, weight) for k, f in contenders.items()},
            moved=5 * rows + table,  # backward: the table is cleared, then rows are read, added and written
        )


if __name__ == "__main__":
    main("embedding", cases)
