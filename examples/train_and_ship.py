"""From a text file to the same words on every engine of this machine.

Trains a toy GPT on any UTF-8 text, exports it to ONNX, compiles it for every engine that is installed, lets
each continue the same prompt, and compares the tokens. It shows the Python functions behind `portlm
pretrain`, `export`, `compile` and `generate`.

    python examples/train_and_ship.py text.txt --out shipped

Half a minute on two cores. Afterwards shipped/model is an artifact to keep: `portlm verify shipped/model`,
`portlm generate shipped/model "Once"`.
"""

import argparse
from pathlib import Path

import portlm
from portlm import settings
from portlm.artifact import read_manifest
from portlm.compile.build import build_choice
from portlm.compile.export import export
from portlm.flows.verify import ready_targets
from portlm.train.config import PretrainConfig
from portlm.train.presets import preset_settings
from portlm.train.pretrain import pretrain


def main() -> None:
    """Train, export, compile, and compare every engine."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("text", type=Path, help="UTF-8 text to learn from, 10 kB or more")
    parser.add_argument("--out", type=Path, default=Path("shipped"), help="new folder (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=200, help="training steps (default: %(default)s)")
    options = parser.parse_args()

    config = settings.load(
        PretrainConfig,
        preset=preset_settings("tiny"),
        overrides=[("data.texts", [str(options.text)]), ("steps", options.steps)],
    )
    trained = pretrain(config, options.out / "run", quiet=True)
    print(
        f"trained {trained.parameters:,} parameters: {trained.bits_per_byte:.2f} bits per byte of held-out text"
    )

    model = export(trained.checkpoint, options.out / "model")
    build_choice(model, note=print)

    prompt = options.text.read_text(encoding="utf-8")[:8]
    answers = {}
    for target in ready_targets(read_manifest(model), print):
        with portlm.load(model, target.engine, target.device, target.profile) as session:
            answer = session.generate(prompt, max_new_tokens=24, temperature=0.8, seed=7)
        answers[target] = answer.token_ids
        print(f"{target!s:20}  {answer.text!r}")

    if len(set(answers.values())) > 1:
        raise SystemExit("the engines do not agree: run portlm verify to find out where they part")
    print(f"{len(answers)} engines, the same {len(answer.token_ids)} tokens")


if __name__ == "__main__":
    main()
