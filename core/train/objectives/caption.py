"""Say what a picture shows: the next token of a text behind a picture (Liu et al., 2023, arXiv:2304.08485).

A row is what the tokenizer puts before a text, the picture's places, a prompt where there is one, and the text with an
end; only the text and its end are predicted. The whole model learns, the vision transformer with it.

B rows, T tokens, P places of a picture.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from portlm import models
from portlm.control_tokens import IMAGE, for_pictures
from portlm.data.batches import IGNORE
from portlm.data.captions import read_captions
from portlm.data.pairs import padded
from portlm.errors import ConfigError, UsageError
from portlm.files import sha256_file
from portlm.pictures import PREPROCESSOR, Pictures, Preprocessing
from portlm.tokenizer import Tokenizer
from portlm.train.config import DataSettings, PretrainConfig
from portlm.train.evaluation import evaluating
from portlm.train.initial import begun_from, with_ids
from portlm.train.objectives import Stop
from portlm.train.objectives.pairs import PairObjective
from portlm.train.objectives.seq2seq import tokenizer_for

_KEPT = 1 << 28  # bytes of pixels that are kept for the next time a picture is asked for


class Tokens(NamedTuple):
    """A caption as tokens: the picture's file, the prompt, and the text without an end."""

    picture: Path
    prompt: list[int]
    text: list[int]


@dataclasses.dataclass(frozen=True)
class CaptionCorpus:
    """Captions to learn from and captions to judge by.

    Attributes:
        tokenizer: What made the tokens; it has an end of text, and a token for a picture.
        train: The first captions.
        validation: The last ones.
        digest: What identifies all tokens and pictures, for comparison with a checkpoint.
    """

    tokenizer: Tokenizer
    train: list[Tokens]
    validation: list[Tokens]
    digest: dict[str, str]


def open_captions(
    data: DataSettings, folder: Path, *, fresh: bool, note: Callable[[str], None]
) -> CaptionCorpus:
    """Return the captions of a run; a resumed one reads them again, with the tokenizer that it was begun with.

    Args:
        data: Where they are, and the tokenizer.
        folder: Where the run keeps its tokenizer.
        fresh: Whether the run begins.
        note: Told what is being done.

    Raises:
        UsageError: No captions, too few, or a tokenizer without an end of text.
        FormatError: A file is missing or holds something else.
    """
    if len(data.texts) != 1:
        raise UsageError("captions are learned from one file, .tsv or .jsonl, that names pictures beside it")
    note(f"reading captions from {data.texts[0]}")
    captions = read_captions(data.texts[0])
    kept = max(1, round(data.validation_fraction * len(captions)))
    if len(captions) - kept < 1:
        raise UsageError("one caption is too few: one must be left to judge by")
    if not fresh and (folder / "tokenizer.json").exists():
        tokenizer = Tokenizer.load(folder)
    else:
        texts = (side for caption in captions[:-kept] for side in (caption.prompt, caption.text))
        tokenizer, _ = for_pictures(tokenizer_for(data.tokenizer, texts, note))
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer.save(folder)
    if tokenizer.eos_id is None:
        raise UsageError(f"{data.tokenizer} has no token that ends a text, by which a caption would end")

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    tokens = [Tokens(each.picture, encode(each.prompt), encode(each.text)) for each in captions]
    sums = [(sha256_file(each.picture), each.prompt, each.text) for each in tokens]
    digest = {"captions": hashlib.sha256(repr(sums).encode()).hexdigest()}
    return CaptionCorpus(tokenizer.without_template(), tokens[:-kept], tokens[-kept:], digest)


class Part(NamedTuple):
    """Some captions of a step's batch.

    Attributes:
        read: (B, T) int64, all but the last token of each row.
        targets: (B, T) int64, the text and its end, -100 elsewhere.
        pixels: (B, 3, H, W) float32.
        share: Of the batch's targets that are in these rows.
    """

    read: Tensor
    targets: Tensor
    pixels: Tensor
    share: float


class CaptionObjective(PairObjective):
    """Cross-entropy of a text's tokens behind a picture; judged on captions that were not learned from.

    Args:
        config: The settings of the run.
        corpus: The captions.
        device: Where the model trains.
    """

    kind = "caption"
    open_corpus = staticmethod(open_captions)

    def __init__(self, config: PretrainConfig, corpus: CaptionCorpus, device: torch.device):
        tokenizer = corpus.tokenizer
        assert tokenizer.eos_id is not None  # open_captions saw to it
        self.image, self.end = tokenizer.special[IMAGE], tokenizer.eos_id
        if config.init:
            family = models.load_config(config.init).family
            if models.FAMILIES[family].kind != "picture":
                raise ConfigError(f"init is a {family}, which sees no pictures: give one of the family llava")
            model, _ = begun_from(config.init, functools.partial(with_ids, tokenizer.vocab_size))
            side = model.config.vision.image_size
            prepare = Pictures.read(Path(config.init), side).prepare
        else:
            shape: Any = config.model.config(tokenizer.vocab_size, (self.end,))
            model = models.build(dataclasses.replace(shape, image_token_id=self.image))
            prepare = Preprocessing.of_size(model.config.vision.image_size)
        if model.config.image_token_id != self.image:
            raise ConfigError(
                f"the picture's token is {model.config.image_token_id} in the model and {self.image} in its tokenizer: "
                "they do not belong together"
            )
        self.pictures = Pictures(self.image, prepare)
        kept = _KEPT // (12 * model.config.vision.image_size**2)
        self._pixels = functools.lru_cache(max(1, kept))(prepare)
        self._before = [*tokenizer.begin_ids, *[self.image] * model.config.places]
        super().__init__(config, corpus, device, model)

    def sample(self, stop: Stop) -> str | None:
        """Return the first caption that was not learned from, and below it what the model says of its picture."""
        from portlm.runtimes.eager import TorchEngine
        from portlm.runtimes.session import Session

        picture, prompt, text = self.judged[0]
        room = self.model.config.context_length - len(self._before) - len(prompt)
        limit = min(self.config.evaluation.sample_tokens, room)
        if limit < 1 or stop():
            return None
        decode, tokenizer = self.corpus.tokenizer.decode, self.corpus.tokenizer
        with evaluating(self.model):
            session = Session(TorchEngine.of(self.model, str(self.device)), tokenizer)
            session.pictures = self.pictures
            asked = [*tokenizer.begin_ids, self.image, *prompt]
            written = session.generate(asked, image=picture, max_new_tokens=limit).text
        return f"{picture.name} {decode(prompt)}\n{decode(text)}\n{written}"

    def save(self, folder: Path) -> None:
        """Write a checkpoint folder with the tokenizer, and what is done to pictures."""
        super().save(folder)
        models.write_json(folder / PREPROCESSOR, self.pictures.prepare.to_hf())

    def fits(self, pair: Tokens, shape: Any) -> bool:
        """Say whether a row is no longer than the context; its end is predicted and not read."""
        return bool(len(self._before) + len(pair.prompt) + len(pair.text) <= shape.context_length)

    def lengths(self, pair: Tokens) -> tuple[int, int]:
        """Return the tokens before the text, and those of the text."""
        return len(self._before) + len(pair.prompt), len(pair.text)

    def targets_of(self, pair: Tokens) -> int:
        """Return the tokens of the text and its end."""
        return len(pair.text) + 1

    def part(self, pairs: Sequence[Tokens], total: int) -> Part:
        """Return captions as tensors, of a batch with so many targets."""
        rows = [[*self._before, *prompt, *text] for _, prompt, text in pairs]
        wanted = [
            [*[IGNORE] * (len(row) - len(pair.text) - 1), *pair.text, self.end]
            for row, pair in zip(rows, pairs, strict=True)
        ]
        pixels = np.stack([self._pixels(pair.picture) for pair in pairs])
        read, targets = (padded(each, fill) for each, fill in ((rows, self.end), (wanted, IGNORE)))
        a, b, c = (torch.from_numpy(array).to(self.device) for array in (read, targets, pixels))
        return Part(a, b, c, sum(self.targets_of(pair) for pair in pairs) / total)

    def mean(self, part: Part, label_smoothing: float) -> Tensor:
        """Return the mean cross-entropy over the targets of a part."""
        loss: Tensor = self.model(part.read, part.targets, part.pixels)
        return loss
