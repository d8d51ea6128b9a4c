"""A transformers model on ONNX Runtime, with the same logits, and back in transformers unchanged.

Makes a small LLaMA with random weights in transformers (so nothing is downloaded), imports the saved folder,
exports it to ONNX, runs it on ONNX Runtime without PyTorch's help, and compares the logits with those of
transformers. Use it as a template for a model of your own: replace the folder `theirs` by one you have.

    python examples/huggingface_roundtrip.py --out roundtrip

Ten seconds on two cores. Needs transformers: pip install 'portlm[hf]'.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import portlm
from portlm.agreement import within
from portlm.compile.export import export
from portlm.compile.parity import allowed_error
from portlm.hub import export_hf, import_hf
from portlm.rows import Rows


def main() -> None:
    """Go there and back, and compare at each end."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path("roundtrip"), help="new folder (default: %(default)s)"
    )
    out = parser.parse_args().out

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.2,
    )  # fmt: skip
    theirs = LlamaForCausalLM(config).eval()
    theirs.save_pretrained(out / "theirs")

    imported = import_hf(out / "theirs", out / "checkpoint")
    print(
        f"imported a {imported.family} of {imported.parameters:,} parameters",
        *imported.notes,
        sep="\n  note: ",
    )
    model = export(out / "checkpoint", out / "model")

    # Two prompts of different lengths, as token ids: this model has no tokenizer. Row 1 is padded on the left.
    prompts = [[1, 17, 203, 45, 310, 8], [1, 99, 7]]
    length = max(map(len, prompts))
    ids = np.array([[0] * (length - len(p)) + p for p in prompts])
    mask = np.array([[0] * (length - len(p)) + [1] * len(p) for p in prompts])
    with portlm.load(model, engine="ort", device="cpu") as session:
        logits = Rows(session.engine, len(prompts)).read(ids, mask, every=True)
        answers = session.generate(prompts, max_new_tokens=16, temperature=0, ignore_eos=True)
        tokens = [answer.token_ids for answer in answers]

    errors, largest = [], 0.0
    for row, prompt in enumerate(prompts):
        with torch.no_grad():
            expected = theirs(torch.tensor([prompt])).logits[0].numpy()
        errors.append(np.abs(logits[row, length - len(prompt) :] - expected).max())
        largest = max(largest, float(np.abs(expected).max()))
    error = float(np.max(errors))
    print(f"largest difference of a logit: {error:.1e}, of logits up to {largest:.1f}")

    export_hf(model, out / "back")
    again = AutoModelForCausalLM.from_pretrained(out / "back").eval()
    for prompt, ours in zip(prompts, tokens, strict=True):
        sequence = torch.tensor([prompt])
        with torch.no_grad():
            for _ in ours:
                sequence = torch.cat([sequence, again(sequence).logits[:, -1:].argmax(-1)], dim=1)
        same = sequence[0, len(prompt) :].tolist() == list(ours)
        print(f"greedy tokens {'equal' if same else 'differ'}: {list(ours)}")
    if not within(error, allowed_error(largest)):  # also if it is NaN
        raise SystemExit("the logits differ by more than float32 explains")


if __name__ == "__main__":
    main()
