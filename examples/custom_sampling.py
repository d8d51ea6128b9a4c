"""A sampling loop of your own around an engine's step.

`Session.generate` picks tokens by temperature, top-k, top-p and min-p. Anything else is a loop of twenty
lines: feed tokens, take logits, change them as you like in numpy, choose, and feed the choice. This one
samples only among the tokens whose surprise is close to what the model expects on average ("locally typical
sampling", Meister et al., 2023), and makes what was said lately less likely.

    python examples/custom_sampling.py MODEL "Once upon" --tokens 40

MODEL is an artifact, such as shipped/model of examples/train_and_ship.py. Any engine can be named.
"""

import argparse
from pathlib import Path

import numpy as np

import portlm
from portlm.rows import Rows


def typical(logits: np.ndarray, recent: list[int], mass: float, penalty: float) -> np.ndarray:
    """Return probabilities (V,) of the next token.

    Args:
        logits: (V,) float64.
        recent: tokens said lately, each of which loses `penalty` from its logit.
        mass: keep the most typical tokens that together have this probability.
        penalty: 0 for none.
    """
    logits = logits - penalty * np.isin(np.arange(len(logits)), recent)
    p = np.exp(logits - logits.max())
    p /= p.sum()
    surprise = -np.log(np.maximum(p, 1e-300))
    expected = (p * surprise).sum()  # the entropy
    order = np.argsort(np.abs(surprise - expected), kind="stable")
    keep = order[: int(np.searchsorted(p[order].cumsum(), mass)) + 1]
    chosen = np.zeros_like(p)
    chosen[keep] = p[keep]
    return chosen / chosen.sum()


def main() -> None:
    """Continue a prompt and print the text as it comes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="artifact")
    parser.add_argument("prompt", help="text to continue")
    parser.add_argument("--engine", default="auto", help="torch, ort, tvm or auto (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=40, help="tokens to write (default: %(default)s)")
    parser.add_argument("--mass", type=float, default=0.9, help="probability to keep (default: %(default)s)")
    parser.add_argument("--penalty", type=float, default=0.5, help="for repetition (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the random numbers (default: %(default)s)")
    options = parser.parse_args()

    random = np.random.default_rng(options.seed)
    with portlm.load(options.model, options.engine) as session:
        engine, tokenizer = session.engine, session.tokenizer
        decoder = tokenizer.stream_decoder(skip_special=True)
        new = tokenizer.encode(options.prompt)
        said: list[int] = []
        rows = Rows(engine, 1)
        while len(said) < options.tokens and rows.lengths[0] + len(new) <= engine.context_length:
            logits = rows.read(np.array([new], dtype=np.int64))  # (1, 1, V), of what follows the last token

            p = typical(logits[0, -1].astype(np.float64), said[-32:], options.mass, options.penalty)
            token = int(random.choice(len(p), p=p))
            if token in session.eos_ids:
                break
            said.append(token)
            new = [token]
            print(decoder.push(token), end="", flush=True)
        print(decoder.finish())


if __name__ == "__main__":
    main()
