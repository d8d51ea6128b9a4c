"""Translation: what attention, and then attention alone, brought to a decoder that knows one vector of its source.

Three models learn the same pairs with the same tokenizer, each in a run of ``portlm pretrain``, and translate captions
that they have not seen. The claim is of their order, and of the size of the best figure that two cores reach in an hour
and a half.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

from portlm.data.text import read_text
from portlm.errors import UsageError
from portlm.files import sha256_file, write_atomic
from portlm.flows.lab.experiment import Bar
from portlm.flows.lab.translation_recipes import RECIPES, Recipe

PARTS = ("train.de", "train.en", "val.de", "val.en")  # how the names of the files end
BEAMS = 5
_TOGETHER = 64  # rows that are computed together: sources, or beams of sources
_SHOWN = 3  # captions whose translations are kept to look at


class Translation:
    """A recurrent encoder-decoder, one that looks back at its source, and a Transformer, from German to English.

    Args:
        recipes: How each is trained; the names are part of the figures.
    """

    name: ClassVar[str] = "translation"
    shows: ClassVar[str] = (
        "Attention translates better than one vector, attention alone is good in minutes, and a search is better still."
    )
    source: ClassVar[str] = (
        "Sutskever, Vinyals and Le, 2014; Bahdanau, Cho and Bengio, 2015; Vaswani et al., 2017"
    )
    seeds: ClassVar[tuple[int, ...]] = (0,)
    bars: ClassVar[tuple[Bar, ...]] = (
        Bar("marian_bleu", ">=", 30.0),
        Bar("marian_lead", ">", 0.0),
        Bar("bahdanau_lead", ">", 0.0),
        Bar("marian_beam_gain", ">", 0.0),
        Bar("marian_minutes", "<=", 90.0),
    )
    needs: ClassVar[str] = f"four texts, a pair in each line, whose names end in {', '.join(PARTS)}"

    def __init__(self, recipes: Mapping[str, Recipe] = RECIPES):
        self.recipes, self.digest = recipes, ""
        self.files: dict[str, Path] = {}
        self.work = Path()

    def given(self, data: Path, work: Path) -> Self:
        """Return the experiment with its texts.

        Raises:
            UsageError: A text is not there, or there are several of its name.
        """
        with_data = type(self)(self.recipes)
        with_data.work = work
        for part in PARTS:
            there = sorted(data.glob(f"*{part}"))
            if len(there) != 1:
                raise UsageError(f"{data} must hold one file whose name ends in {part}, and has {len(there)}")
            with_data.files[part] = there[0]
        digests = (sha256_file(path) for path in with_data.files.values())
        with_data.digest = hashlib.sha256(" ".join(digests).encode()).hexdigest()
        return with_data

    def run(self, seed: int, tell: Callable[[str], None]) -> dict[str, Any]:
        """Train each model, or go on where its run was interrupted; translate, greedily and with beams; compare."""
        from portlm.train.bleu import check_sacrebleu

        check_sacrebleu()
        folder = self.work / str(seed)
        folder.mkdir(parents=True, exist_ok=True)
        pairs, share, learned = self._pairs(folder)
        sources, references = _lines(self.files["val.de"]), _lines(self.files["val.en"])
        found: dict[str, Any] = {
            "curves": {},
            "captions": [{"source": s, "reference": r} for s, r in zip(sources, references, strict=True)][
                :_SHOWN
            ],
        }
        for name, recipe in self.recipes.items():
            more = {
                "seed": seed,
                **pairs,
                "data.validation_fraction": share,
                "evaluation.translations": len(sources),
            }
            tell(f"{name}: learns in {folder / name}, whose metrics.jsonl says how far it is")
            checkpoint = self._train(folder / name, recipe.overrides(learned, more), name, found)
            scores = self._judge(checkpoint, sources, references, name, found)
            tell(f"{name}: {', '.join(scores)}")
        for name in self.recipes:
            if name != "seq2seq":
                found[f"{name}_lead"] = found[f"{name}_bleu"] - found["seq2seq_bleu"]
        return found

    def _pairs(self, folder: Path) -> tuple[dict[str, str], float, int]:
        """Write one file for each language, what is judged by behind what is learned from.

        Returns:
            The settings that name them, which share of the pairs is judged by, and how many are learned from.
        """
        named, counts = {}, []
        for side, language in (("source", "de"), ("target", "en")):
            train, val = (_lines(self.files[f"{part}.{language}"]) for part in ("train", "val"))
            path = (folder / f"pairs.{language}").absolute()
            write_atomic(path, "".join(f"{line}\n" for line in (*train, *val)))
            named[f"data.{side}"] = str(path)
            counts.append((len(train), len(val)))
        if counts[0] != counts[1]:
            raise UsageError(f"the texts are no pairs: {counts[0]} lines in German, {counts[1]} in English")
        learned, judged = counts[0]
        return named, judged / (learned + judged), learned

    def _train(self, folder: Path, values: Mapping[str, Any], name: str, found: dict[str, Any]) -> Path:
        """Train to the last step, note what it took and how good it was on the way, and return the checkpoint."""
        from portlm import settings
        from portlm.train.config import PretrainConfig
        from portlm.train.metrics import read_metrics
        from portlm.train.pretrain import pretrain

        config = settings.load(PretrainConfig, overrides=list(values.items()))
        done = pretrain(config, folder, resume="auto", quiet=True)
        found[f"{name}_parameters"] = done.parameters
        found[f"{name}_minutes"] = done.seconds / 60
        found[f"{name}_loss"] = done.loss
        curve, seconds = [], 0.0
        for record in read_metrics(folder / "metrics.jsonl"):
            if record["kind"] == "train":
                seconds = record["seconds"]
            elif record["kind"] == "eval":
                curve.append([record["step"], round(seconds / 60, 2), record["loss"], record["bleu"]])
        found["curves"][name] = curve
        return done.checkpoint

    def _judge(
        self,
        checkpoint: Path,
        sources: Sequence[str],
        references: Sequence[str],
        name: str,
        found: dict[str, Any],
    ) -> list[str]:
        """Translate what was not learned from, note BLEU of words as they are and as 13a cuts them, and say it."""
        import portlm
        from portlm.train.bleu import corpus_bleu

        said = []
        with portlm.load(checkpoint, engine="torch") as session:
            longest = session.engine.context_length - 1
            for beams, key in ((1, "greedy_bleu"), (BEAMS, "bleu")):
                limit = min(longest, 2 * max(len(session.tokenizer.encode(s)) for s in sources) + 8)
                results = session.translate(
                    sources, num_beams=beams, max_new_tokens=limit, batch_size=_TOGETHER
                )
                written = [" ".join(result.text.split()) for result in results]
                score = corpus_bleu(written, references, "none")
                found[f"{name}_{key}"] = score.score
                found[f"{name}_{key}_13a"] = corpus_bleu(written, references, "13a").score
                found["signature"] = score.signature
                said.append(f"BLEU {score.score:.2f} with {beams} beam{'s' * (beams > 1)}")
        for caption, text in zip(found["captions"], written, strict=False):
            caption[name] = text
        found[f"{name}_beam_gain"] = found[f"{name}_bleu"] - found[f"{name}_greedy_bleu"]
        return said

    def draw(self, results: Mapping[int, dict[str, Any]], path: Path) -> None:
        """Draw the held-out loss and BLEU of greedy translations over the minutes of training."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 4), layout="constrained")
        axes = figure.subplots(1, 2)
        for row, (place, label) in enumerate(((2, "held-out loss (nats per token)"), (3, "BLEU, greedy"))):
            for number, result in enumerate(results.values()):
                for color, (name, curve) in enumerate(result["curves"].items()):
                    axes[row].plot(
                        [point[1] for point in curve],
                        [point[place] for point in curve],
                        color=f"C{color}",
                        marker=".",
                        label=None if number else name,
                    )
            axes[row].set_xlabel("minutes of training")
            axes[row].set_ylabel(label)
            axes[row].legend()
        figure.savefig(path, dpi=120)


def _lines(path: Path) -> list[str]:
    return read_text(path).removesuffix("\n").split("\n")
