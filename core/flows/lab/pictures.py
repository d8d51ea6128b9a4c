"""Two shapes in a picture: a decoder that is shown it says what it never was shown together.

A picture of 32 x 32 pixels has two shapes of different colour or form, one above the other or left of it, at places and
of sizes that vary. Its caption is "a red circle above a blue square". A fifth of all such captions, of which each part
is known from others, is kept from the model until it is judged. A model that learns from the same pictures and
captions, but each caption beside another's picture, can learn no more than how captions are written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from portlm.flows.lab.experiment import Bar
from portlm.flows.lab.fitting import fit, fresh, mean_curve, named, seeded
from portlm.models.llava_config import LlavaConfig
from portlm.models.vision import VisionConfig

COLOURS = {"red": (220, 40, 40), "green": (40, 200, 40), "blue": (50, 60, 230), "yellow": (230, 220, 40)}
SHAPES = ("circle", "square", "triangle")
RELATIONS = ("above", "left of")
WORDS = ("a", *COLOURS, *SHAPES, *RELATIONS, "end", "<image>")
END, IMAGE = WORDS.index("end"), WORDS.index("<image>")
SIDE, LENGTH = 32, 8  # pixels along a side; words of a caption with its end
_ROWS, _JUDGED = 64, 4  # of a batch; pictures of each caption that was kept
# Of training. The loss of the other model does not fall any more from step 50 on, as the picture shows.
_STEPS = {"": 1800, "shuffled_": 600}
_CONFIG = LlavaConfig(
    vocab_size=len(WORDS), context_length=32, n_layer=2, n_head=4, n_kv_head=4, width=64, hidden=128,
    image_token_id=IMAGE,
    vision=VisionConfig(image_size=SIDE, patch_size=8, n_layer=2, n_head=4, width=64, hidden=128),
)  # fmt: skip

Scene = tuple[int, int, int]  # two things, each colour times shapes plus shape, and a relation


def scenes() -> list[Scene]:
    """Return everything that can be said of two different things."""
    things = range(len(COLOURS) * len(SHAPES))
    return [(a, b, r) for a in things for b in things if a != b for r in range(len(RELATIONS))]


def caption(scene: Scene) -> list[int]:
    """Return the words of a caption and its end."""
    names = [(list(COLOURS)[thing // len(SHAPES)], SHAPES[thing % len(SHAPES)]) for thing in scene[:2]]
    words = ["a", *names[0], RELATIONS[scene[2]], "a", *names[1], "end"]
    return [WORDS.index(word) for word in words]


def draw(scene: Scene, generator: np.random.Generator) -> np.ndarray:
    """Return a picture (32, 32, 3) uint8 of a scene, on a dark ground with noise."""
    picture = generator.integers(0, 40, (SIDE, SIDE, 3))
    across, along = np.mgrid[0:SIDE, 0:SIDE]  # rows, columns
    for place, thing in enumerate(scene[:2]):
        near, off = (7 if place == 0 else 24) + generator.integers(-1, 2), 16 + generator.integers(-6, 7)
        row, column = (near, off) if scene[2] == 0 else (off, near)
        size, shape = generator.integers(6, 8), SHAPES[thing % len(SHAPES)]
        y, x = across - row, along - column
        if shape == "circle":
            inside = y**2 + x**2 <= size**2
        elif shape == "square":
            inside = np.maximum(abs(y), abs(x)) <= size - 1
        else:
            inside = (abs(y) <= size) & (2 * abs(x) <= y + size)  # its point is on top
        picture[inside] = list(COLOURS.values())[thing // len(SHAPES)]
    return picture.astype(np.uint8)


def pixels(pictures: np.ndarray) -> Tensor:
    """Return pictures (B, 32, 32, 3) uint8 as the model takes them, (B, 3, 32, 32) float32 around 0."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous()


def batches(
    generator: np.random.Generator, known: list[Scene], shuffled: bool
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield rows of a picture and a caption: inputs and targets (B, T), and pixels; shuffled: of another's picture."""
    P = _CONFIG.places
    while True:
        chosen = [known[i] for i in generator.integers(0, len(known), _ROWS)]
        said = torch.tensor([caption(scene) for scene in chosen])
        inputs = torch.cat((torch.full((_ROWS, P), IMAGE), said[:, :-1]), dim=1)
        targets = torch.cat((torch.full((_ROWS, P - 1), -100), said), dim=1)
        shown = np.stack([draw(scene, generator) for scene in chosen])
        yield inputs, targets, pixels(np.roll(shown, 1, axis=0) if shuffled else shown)


@torch.no_grad()
def written(model: Any, shown: Tensor) -> np.ndarray:
    """Return the most probable words behind pictures, (B, LENGTH)."""
    ids = torch.full((len(shown), _CONFIG.places), IMAGE)
    for _ in range(LENGTH):
        ids = torch.cat((ids, model(ids, None, shown)[:, -1:].argmax(-1)), dim=1)
    return ids[:, -LENGTH:].numpy()


class Pictures:
    """A LLaVA of 172,608 parameters from nothing, on captions of pictures and on captions of other pictures."""

    name: ClassVar[str] = "pictures"
    shows: ClassVar[str] = (
        "A decoder behind an image encoder says what a picture shows, in combinations it never saw."
    )
    source: ClassVar[str] = "OpenAI, 2023; Liu et al., 2023"
    seeds: ClassVar[tuple[int, ...]] = (0, 1, 2)
    bars: ClassVar[tuple[Bar, ...]] = (
        Bar("exact", ">=", 0.9),
        Bar(
            "exact_of_others", "<=", 0.03
        ),  # the same captions against another held-out picture; chance is 1/264
        Bar("shuffled_exact", "<=", 0.03),
    )

    def run(self, seed: int, tell: Callable[[str], None]) -> dict[str, Any]:
        """Measure the share of captions that are right in every word, of combinations that were kept."""
        generator = seeded(seed)
        every = scenes()
        order = generator.permutation(len(every))
        kept = [every[i] for i in order[: len(every) // 5]]
        known = [every[i] for i in order[len(every) // 5 :]]
        judge = seeded(seed, 1)
        asked = kept * _JUDGED
        shown = pixels(np.stack([draw(scene, judge) for scene in asked]))
        right = np.array([caption(scene) for scene in asked])
        figures: dict[str, Any] = {"captions": len(asked)}
        for name, steps in _STEPS.items():
            model: Any = fresh(_CONFIG, seed)
            losses = fit(
                model, batches(seeded(seed, 2), known, bool(name)), steps, lr=3e-3, weight_decay=0.05,
                tell=named(tell, f"{name}llava"),
            )  # fmt: skip
            said = written(model, shown)
            figures[f"{name}exact"] = float((said == right).all(1).mean())
            figures[f"{name}words"] = float((said == right).mean())
            figures[f"{name}losses"] = mean_curve(losses)
            if not name:
                figures["exact_of_others"] = float((said == np.roll(right, 1, axis=0)).all(1).mean())
        return figures

    def draw(self, results: Mapping[int, dict[str, Any]], path: Path) -> None:
        """Draw the losses, and the shares of captions that are right."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 4), layout="constrained")
        left, right = figure.subplots(1, 2)
        for seed, result in results.items():
            for (name, steps), style in zip(_STEPS.items(), ("-", "--"), strict=True):
                curve = result[f"{name}losses"]
                left.plot(np.linspace(0, steps, len(curve)), curve, style, label=f"{name}losses, seed {seed}")
        left.set_xlabel("step")
        left.set_ylabel("nats per word")
        left.legend(fontsize="x-small")
        names = ("exact", "exact_of_others", "shuffled_exact")
        for place, (seed, result) in enumerate(results.items()):
            at = np.arange(len(names)) + 0.8 * place / len(results)
            right.bar(at, [result[name] for name in names], 0.8 / len(results), label=f"seed {seed}")
        right.set_xticks(np.arange(len(names)) + 0.3, names, fontsize="small")
        right.axhline(0.9, color="black", linestyle="--")
        right.set_ylabel("captions right in every word")
        right.legend()
        figure.savefig(path, dpi=120)
