"""Small packed files and what they write, to compare one instruction set's or one machine's tokens with another's.

make FOLDER makes them, with weights of every kind that a packed file holds; it needs torch and onnx. write
FOLDER prints, in JSON, what the packed engine writes for each of them and how probable it finds a text, on
the instruction set that PORTLM_ISA names; it needs neither. compare FILE OTHER compares what was printed.

Float32's rounding moves a log-probability by some 1e-6, which changes no token but by rare chance. Where
activations become whole numbers, it decides now and then which of two numbers one becomes: with 15 bits that
moves log-probabilities by some 5e-4, which does change a token now and then: seed 3 gave other tokens of 4 bits
on AVX-512 than on AVX2, so "sampled" has a seed with which no set of x86 differs. With 8 bits it moves them
by 1e-2, and other tokens are no error.
"""

import json
import os
import sys
from pathlib import Path

from portlm import load
from portlm.quantization import ACTIVATIONS_VARIABLE, BYTES, FLOATS

LLAMA = {"width": 64, "hidden": 96, "n_head": 4, "n_kv_head": 2}
GPT2 = {"width": 96, "n_head": 4}
# By name: the family, its sizes, how it is exported, and the activations it is compiled for.
FILES = {
    "float32": ("llama", LLAMA, {}, FLOATS),
    "float16": ("gpt2", GPT2, {"weights": "float16"}, FLOATS),
    "bfloat16": ("llama", LLAMA, {"weights": "bfloat16"}, FLOATS),
    "int8": ("llama", LLAMA, {"quantize": "int8", "group": 32}, FLOATS),
    "int4": ("gpt2", GPT2, {"quantize": "int4", "group": 32, "asymmetric": True}, FLOATS),
    "int8-bytes": ("gpt2", GPT2, {"quantize": "int8", "group": 32}, BYTES),
    "int4-bytes": ("llama", LLAMA, {"quantize": "int4", "group": 32}, BYTES),
    "byte-cache": ("llama", LLAMA, {"cache": "int8"}, FLOATS),
}
PROMPTS = ["The ", "a much longer prompt than the others", "12", "x"]
TEXT = "The model's answer is the same on every machine, whatever its instructions."
OPTIONS = {
    "greedy": {},
    "sampled": {"temperature": 1.0, "seed": 5},
    "filtered": {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "seed": 4},
    "seeds": {"temperature": 1.5, "seed": [9, 8, 7, 6]},
}


def make(folder: Path) -> None:
    """Make the files. Weights are large, so that logits are far apart and rounding changes no choice."""
    import torch

    from portlm.compile.build import build
    from portlm.compile.export import export
    from portlm.models import FAMILIES, save_model
    from portlm.models import build as build_model
    from portlm.tokenizer import byte_tokenizer

    for name, (family, sizes, how, activations) in FILES.items():
        config = FAMILIES[family].config_class()(vocab_size=257, context_length=96, n_layer=2, **sizes)
        generator = torch.Generator().manual_seed(1)
        model = build_model(config)
        with torch.no_grad():
            for p in model.parameters():
                noise = torch.randn(p.shape, generator=generator)
                p.copy_(0.2 * noise if p.dim() > 1 else p + 0.1 * noise)
        save_model(folder / "checkpoints" / name, model, byte_tokenizer("<|endoftext|>"))
        os.environ[ACTIVATIONS_VARIABLE] = activations
        artifact = export(folder / "checkpoints" / name, folder / name, **how)
        build(artifact, [("packed", "cpu", "fused")])


def write(folder: Path) -> None:
    """Print what each file writes, in every way of OPTIONS, and how probable it finds each token of the prompts."""
    for name, (*_, activations) in FILES.items():
        os.environ[ACTIVATIONS_VARIABLE] = activations
        with load(folder / name, "packed", threads=2) as session:
            scores = [logprob for score in session.score([TEXT]) for logprob in score.logprobs]
            print(json.dumps([name, "scores", scores]))
            for how, options in OPTIONS.items():
                written = session.generate(
                    PROMPTS, max_new_tokens=20, ignore_eos=True, batch_size=4, **options
                )
                print(json.dumps([name, how, [list(text.token_ids) for text in written]]))


def compare(one: Path, other: Path) -> None:
    """Exit with what two files of what was written do not agree in; print how far apart the scores are."""
    lines = [[json.loads(line) for line in path.read_text().splitlines()] for path in (one, other)]
    problems = []
    for (name, how, ours), (_, _, theirs) in zip(*lines, strict=True):
        _, _, export, activations = FILES[name]
        bound = 0.05 if activations == BYTES else 2e-3 if "quantize" in export else 5e-5
        if how == "scores":
            difference = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
            print(f"{name}: log-probabilities differ by {difference:.1g} at most")
            if not difference <= bound:
                problems.append(f"{name}: log-probabilities differ by {difference:.2g}, more than {bound:g}")
        elif activations != BYTES and ours != theirs:
            problems.append(f"{name}, {how}: other tokens")
    if problems:
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    {"make": make, "write": write, "compare": compare}[sys.argv[1]](*map(Path, sys.argv[2:]))
