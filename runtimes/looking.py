"""What a session that is shown pictures does beside others: a picture stands in a prompt, in the place of a token."""

from collections.abc import Sequence
from typing import Any

from portlm.arguments import shown
from portlm.engine import Array, Engine
from portlm.errors import UsageError
from portlm.memory import DECODER, PIXELS, SEE, sees_pictures
from portlm.pictures import Pictures
from portlm.rows import PICTURE

Placed = tuple[tuple[int, ...], Array | None]


class Looks:
    """How a Session puts pictures into prompts.

    Attributes:
        engine: what computes.
        tokenizer: what turns text into token ids.
        pictures: how its model is shown them; None for one that sees none.
    """

    engine: Engine
    tokenizer: Any
    pictures: Pictures | None = None

    def images_for(self, image: Any, prompts: int, single: bool) -> list[Any]:
        """Return the picture of each prompt, None for one without.

        Args:
            image: one for a single prompt, or a list of as many as there are prompts; None for none at all.
            prompts: how many there are.
            single: whether one was given by itself.

        Raises:
            UsageError: there are more or fewer, or the model sees no pictures.
        """
        if image is None:
            return [None] * prompts
        if self.pictures is None or not sees_pictures(self.engine.roles):
            raise UsageError(
                "this model sees no pictures: leave out image, or load one that does (family llava)"
            )
        several = isinstance(image, list | tuple)
        if single and several:
            raise UsageError(
                f"one prompt is shown one picture, got a list of {len(image)}: give the picture by itself"
            )
        if not single and (not several or len(image) != prompts):
            got = f"{len(image)} pictures" if several else shown(image)
            raise UsageError(
                f"{prompts} prompts are shown as many pictures, None for none, in a list, got {got}"
            )
        return list(image) if several else [image]

    def with_picture(self, name: str, tokens: Sequence[int], image: Any) -> Placed:
        """Return the tokens of a prompt with the rows of a picture in its place (portlm.rows), and the pixels.

        Raises:
            UsageError: there is a picture and no place for it, or more places than one, or a place and no picture.
            FormatError: the picture cannot be read.
        """
        if self.pictures is None:
            return tuple(tokens), None
        token, (side, _) = self.pictures.token_id, self._sizes()
        places = [i for i, each in enumerate(tokens) if each == token]
        if image is None:
            if places:
                raise UsageError(
                    f"{name} has a place for a picture, {self._said()}, and none is shown: give image"
                )
            return tuple(tokens), None
        if len(places) != 1:
            problem = (
                f"{len(places)} places for pictures, and is shown one"
                if places
                else "no place for its picture"
            )
            raise UsageError(
                f"{name} has {problem}: write {self._said()} once, where the picture is to stand"
            )
        pixels = self.pictures.prepare(image)
        if pixels.shape[1:] != (side, side):
            raise UsageError(
                f"preprocessor_config.json makes pictures of {pixels.shape[2]} x {pixels.shape[1]} pixels, and the "
                f"model takes {side} x {side}"
            )
        first, (at,) = self.engine.vocab_size, places
        return (*tokens[:at], *range(first, first + self._sizes()[1]), *tokens[at + 1 :]), pixels

    def encode_placed(self, text: str, add_special_tokens: bool) -> tuple[int, ...] | None:
        """Return the ids of a text with the token of a picture where its name stands; None if it stands nowhere."""
        word = self._word()
        if not word or word not in text:
            return None
        assert self.pictures is not None
        first, *others = (self.tokenizer.encode(part, add_special_tokens=False) for part in text.split(word))
        ids = [*first, *(token for part in others for token in (self.pictures.token_id, *part))]
        if add_special_tokens:
            ids = [*self.tokenizer.begin_ids, *ids, *self.tokenizer.end_ids]
        return tuple(ids)

    def _word(self) -> str:
        """The name of the token that stands for a picture; "" if the tokenizer has none."""
        special: dict[str, int] = getattr(self.tokenizer, "special", {})
        token = None if self.pictures is None else self.pictures.token_id
        return next((name for name, index in special.items() if index == token), "")

    def _said(self) -> str:
        assert self.pictures is not None
        return self._word() or f"token {self.pictures.token_id}"

    def _sizes(self) -> tuple[int, int]:
        """Pixels along a side of a picture, and places that it takes."""
        roles = self.engine.roles
        side = next(item.shape[2] for item in roles[SEE].inputs if item.name == PIXELS)
        places = next(state.shape[1] for state in roles[DECODER].state if state.name == PICTURE)
        return int(side), int(places)
