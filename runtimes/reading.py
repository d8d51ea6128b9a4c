"""What a session does with a model that reads whole texts: embed, classify, tag, find a passage, fill in.

Each verb encodes texts with the tokenizer's own template, reads them in batches of like length (reader.py), and puts
what the head says into words (answers.py). Nothing is cut off silently: a text that is too long is an error, unless
the caller lets it be cut.
"""

from collections.abc import Sequence
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from portlm.arguments import flag, one_of, real, shown, whole
from portlm.engine import Engine
from portlm.errors import ContextLengthError, UsageError
from portlm.labels import Labels
from portlm.runtimes.answers import (
    Classification,
    Filling,
    Passage,
    Tag,
    best_passage,
    classification,
    names_for,
    pooled,
    scores_of,
    softmax,
)
from portlm.runtimes.no_tokenizer import NoTokenizer
from portlm.runtimes.prompts import Ids, Prompt, one_or_several, token_ids
from portlm.runtimes.reader import ENCODER, Reader, Row, characters_of

HIDDEN = "last_hidden_state"
POOLING = ("mean", "cls")
MASKS = ("[MASK]", "<mask>")  # what tokenizers call the token that hides another
NEXT = ("follows", "does not follow")  # what the head for the next text says
LONGEST_PASSAGE = 30  # tokens

Vectors = npt.NDArray[np.float32]


class Reading:
    """Verbs of a session on a model with an encoder and heads.

    Attributes:
        engine: what computes.
        tokenizer: what turns text into token ids and back.
        labels: what config.json says of the answers of its heads.
    """

    engine: Engine
    tokenizer: Any
    labels: Labels = Labels()

    def embed(
        self,
        texts: Prompt | Sequence[Prompt],
        *,
        pooling: str = "mean",
        normalize: bool = True,
        truncate: bool = False,
        batch_size: int = 32,
    ) -> Vectors:
        """Return a vector for a text, or for each of several.

        Args:
            texts: a text, or several; in place of a text, token ids.
            pooling: "mean" of what the encoder says of the tokens, or "cls" for what it says of the first.
            normalize: make each vector 1 long, so that a product of two is the cosine of the angle between them.
            truncate: cut a text that is longer than the context, instead of refusing it.
            batch_size: texts that are computed together. It changes the speed and the memory, not the answers.

        Returns:
            (C,) float32 for one text, (N, C) for several.

        Raises:
            ContextLengthError: a text has more tokens than the model's context.
            UsageError: the model has no encoder, or an argument is out of range.
            PortlmError: the model gave numbers that are none.
        """
        one_of("pooling", pooling, POOLING)
        normalize, batch_size = flag("normalize", normalize), whole("batch_size", batch_size, 1)
        reader = Reader(self.engine, ENCODER, "embed texts")
        hidden = next((item for item in reader.outputs if item.name == HIDDEN), None)
        if hidden is None or not isinstance(hidden.shape[-1], int):
            raise UsageError(f"this model cannot embed texts: its encoder gives no {HIDDEN}")
        several, single = one_or_several("text", texts)
        rows = self._encoded(several, single, truncate=truncate)
        found = np.zeros((len(rows), hidden.shape[-1]), np.float32)
        for i, outputs in reader.read(rows, batch_size):
            found[i] = pooled(outputs[HIDDEN], pooling, normalize)
        return found[0] if single else found

    @overload
    def classify(  # type: ignore[overload-overlap]
        self,
        texts: str | Ids,
        others: str | None = ...,
        *,
        head: str = ...,
        truncate: bool = ...,
        batch_size: int = ...,
    ) -> Classification: ...

    @overload
    def classify(
        self,
        texts: Sequence[Prompt],
        others: Sequence[str] | None = ...,
        *,
        head: str = ...,
        truncate: bool = ...,
        batch_size: int = ...,
    ) -> list[Classification]: ...

    def classify(
        self,
        texts: Prompt | Sequence[Prompt],
        others: str | Sequence[str] | None = None,
        *,
        head: str = "classify",
        truncate: bool = False,
        batch_size: int = 32,
    ) -> Classification | list[Classification]:
        """Say what a text is, or each of several, or what two texts are to each other.

        Args:
            texts: a text, or several; in place of a text, token ids.
            others: the second text of each pair; None where there are no pairs.
            head: which head to ask, "next_sentence" for whether the second text follows the first.
            truncate: cut texts that are longer than the context, instead of refusing them.
            batch_size: as of embed.

        Returns:
            All labels with their scores for one text, a list of these for several.

        Raises:
            ContextLengthError: a text has more tokens than the model's context.
            UsageError: the model has no such head, its labels are not as many as the head's answers, or an argument is
                out of range.
            PortlmError: the model gave numbers that are none.
        """
        reader, names, problem = self._labelled(f"head:{head}", "classify texts", 2)
        several, single = one_or_several("text", texts)
        pairs = (
            [None] * len(several) if others is None else [others] if isinstance(others, str) else list(others)
        )
        if len(pairs) != len(several) or not all(isinstance(other, str | None) for other in pairs):
            raise UsageError(f"each of {len(several)} texts needs another text, got {shown(others)}")
        rows = self._encoded(several, single, pairs, truncate)
        found: list[Any] = [None] * len(rows)
        for i, outputs in reader.read(rows, whole("batch_size", batch_size, 1)):
            found[i] = classification(outputs["logits"], names, problem)
        return found[0] if single else found

    @overload
    def tag(  # type: ignore[overload-overlap]
        self, texts: str, *, words: bool = ..., batch_size: int = ...
    ) -> list[Tag]: ...

    @overload
    def tag(self, texts: Sequence[str], *, words: bool = ..., batch_size: int = ...) -> list[list[Tag]]: ...

    def tag(
        self, texts: str | Sequence[str], *, words: bool = True, batch_size: int = 32
    ) -> list[Tag] | list[list[Tag]]:
        """Label the words of a text, or of each of several.

        Args:
            texts: a text, or several.
            words: a label for each word, that of its first token: letters and digits that stand together are a word,
                and so is any other character but a space. False gives one for each token that is not a space.
            batch_size: as of embed.

        Returns:
            The words in order, with where they stand; a list of these for several texts.

        Raises:
            ContextLengthError: a text has more tokens than the model's context.
            UsageError: the model has no head for this, its labels are not as many as the head's answers, or a text is
                no text.
            PortlmError: the model gave numbers that are none.
        """
        from portlm.token_spans import token_spans, word_of
        from portlm.token_spans import words as words_in

        reader, names, problem = self._labelled("head:tag", "tag words", 3)
        several, single, words = *_texts(texts), flag("words", words)
        rows = self._encoded(several, single)
        found: list[list[Tag]] = [[] for _ in rows]
        for i, outputs in reader.read(rows, whole("batch_size", batch_size, 1)):
            text = several[i]
            _, spans = token_spans(self.tokenizer, text)
            places, in_words = words_in(text), word_of(text, spans)
            first, seen = len(self.tokenizer.begin_ids), -1
            for t, (span, word) in enumerate(zip(spans, in_words, strict=True)):
                if word < 0 or (words and word <= seen):
                    continue
                scores, seen = scores_of(outputs["logits"][first + t], problem), word
                begin, end = places[word] if words else span
                best = int(scores.argmax())
                found[i].append(Tag(text[begin:end], begin, end, names[best], float(scores[best])))
        return found[0] if single else found

    @overload
    def span(  # type: ignore[overload-overlap]
        self,
        question: str,
        text: str,
        *,
        longest: int = ...,
        no_answer: float | None = ...,
        batch_size: int = ...,
    ) -> Passage: ...

    @overload
    def span(
        self,
        question: Sequence[str],
        text: Sequence[str],
        *,
        longest: int = ...,
        no_answer: float | None = ...,
        batch_size: int = ...,
    ) -> list[Passage]: ...

    def span(
        self,
        question: str | Sequence[str],
        text: str | Sequence[str],
        *,
        longest: int = LONGEST_PASSAGE,
        no_answer: float | None = None,
        batch_size: int = 32,
    ) -> Passage | list[Passage]:
        """Find the part of a text that answers a question: of all that begin before they end, the most probable.

        Args:
            question: one, or several.
            text: to look in, or one for each of several questions.
            longest: tokens of a passage, at most.
            no_answer: give an empty passage where no answer beats the best one by more than this, in logits; 0 is
                usual for a model that learned to say so. None for an answer in any case.
            batch_size: as of embed.

        Returns:
            The passage, or a list of them for several questions.

        Raises:
            ContextLengthError: a question with its text has more tokens than the model's context.
            UsageError: the model has no head for this, a text is empty, or an argument is out of range.
            PortlmError: the model gave numbers that are none.
        """
        from portlm.token_spans import token_spans

        reader, ends_of_each = self._answering("head:span", "find passages", 3)
        if ends_of_each != 2:
            raise UsageError(
                f"this model cannot find passages: its head:span gives {ends_of_each} numbers for each token, not 2"
            )
        longest = whole("longest", longest, 1)
        threshold = None if no_answer is None else real("no_answer", no_answer)
        (questions, single), (contexts, _) = _texts(question), _texts(text)
        if len(questions) != len(contexts):
            raise UsageError(f"{len(questions)} questions need as many texts, got {len(contexts)}")
        rows = self._encoded(questions, single, contexts)
        found: list[Any] = [None] * len(rows)
        for i, outputs in reader.read(rows, whole("batch_size", batch_size, 1)):
            ids, spans = token_spans(self.tokenizer, contexts[i])
            first = _place(rows[i].ids, ids, len(self.tokenizer.begin_ids) + len(self._plain(questions[i])))
            allowed = np.zeros(len(rows[i].ids), bool)
            allowed[first : first + len(ids)] = [begin < end for begin, end in spans]
            if not allowed.any():
                raise UsageError(
                    f"{'the text' if single else f'text {i}'} is empty, so nothing in it is an answer"
                )
            starts, ends = outputs["logits"].T
            start, end, best, none = best_passage(starts, ends, allowed, longest)
            if threshold is not None and none - best > threshold:
                found[i] = Passage("", 0, 0, float(np.exp(none)))
                continue
            begin, stop = spans[start - first][0], spans[end - first][1]
            found[i] = Passage(contexts[i][begin:stop], begin, stop, float(np.exp(best)))
        return found[0] if single else found

    @overload
    def fill(  # type: ignore[overload-overlap]
        self, texts: str, *, top_k: int = ..., batch_size: int = ...
    ) -> list[list[Filling]]: ...

    @overload
    def fill(
        self, texts: Sequence[str], *, top_k: int = ..., batch_size: int = ...
    ) -> list[list[list[Filling]]]: ...

    def fill(
        self, texts: str | Sequence[str], *, top_k: int = 5, batch_size: int = 32
    ) -> list[list[Filling]] | list[list[list[Filling]]]:
        """Guess what the masks of a text stand for, or of each of several: each mask by itself.

        Args:
            texts: a text, or several, with the tokenizer's mask in it: [MASK], or <mask>.
            top_k: guesses for each mask.
            batch_size: as of embed.

        Returns:
            For each mask of the text its guesses, the most probable first; a list of these for several texts.

        Raises:
            ContextLengthError: a text has more tokens than the model's context.
            UsageError: the model has no head for this, its tokenizer no mask, or a text has none; or top_k is out of
                range.
            PortlmError: the model gave numbers that are none.
        """
        reader = Reader(self.engine, "head:masked_lm", "fill in masks")
        vocabulary = self.tokenizer.vocab_size
        top_k = whole("top_k", top_k, 1, vocabulary)
        mask, mask_id = self.mask
        several, single = _texts(texts)
        rows = []
        for i, text in enumerate(several):
            name = "the text" if single else f"text {i}"
            if mask not in text:
                raise UsageError(f"{name} has no {mask}, so there is nothing to fill in")
            rows.append(self._checked(name, self._masked(text, mask, mask_id)))
        found: list[list[list[Filling]]] = [[] for _ in rows]
        places = [[t for t, token in enumerate(row.ids) if token == mask_id] for row in rows]
        for i, logits in reader.read_places(rows, places, whole("batch_size", batch_size, 1)):
            for shares in softmax(logits[:, :vocabulary]):
                best = np.argsort(-shares, kind="stable")[:top_k].tolist()
                found[i].append([Filling(self.tokenizer.decode([t]), t, float(shares[t])) for t in best])
        return found[0] if single else found

    @property
    def mask(self) -> tuple[str, int]:
        """The name and the id of the token that hides another.

        Raises:
            UsageError: the tokenizer has none.
        """
        special = getattr(self.tokenizer, "special", {})
        for name in MASKS:
            if name in special:
                return name, special[name]
        raise UsageError(f"this model's tokenizer has no token that hides another ({' or '.join(MASKS)})")

    def _labelled(self, role: str, to_do: str, rank: int) -> tuple[Reader, tuple[str, ...], str | None]:
        """A reader of a head, the names of its answers, and how their numbers are meant."""
        reader, count = self._answering(role, to_do, rank)
        if role == "head:next_sentence":
            return reader, NEXT, None
        names = names_for(self.labels, count)
        if names is None:
            raise UsageError(
                f"{role} gives {count} answers, and id2label in config.json names {len(self.labels.names)}"
            )
        return reader, names, self.labels.problem

    def _answering(self, role: str, to_do: str, rank: int) -> tuple[Reader, int]:
        """A reader of a head whose logits have so many axes, and how many numbers the last of them holds."""
        reader = Reader(self.engine, role, to_do)
        logits = next((item for item in reader.outputs if item.name == "logits"), None)
        count = logits.shape[-1] if logits is not None and len(logits.shape) == rank else None
        if not isinstance(count, int):
            raise UsageError(f"this model cannot {to_do}: its {role} gives no logits of that shape")
        return reader, count

    def _encoded(
        self, texts: Sequence[Prompt], single: bool, others: Sequence[str | None] = (), truncate: bool = False
    ) -> list[Row]:
        """The tokens of texts, or of pairs, with what is put around them, checked."""
        truncate, rows = flag("truncate", truncate), []
        length = characters_of(self.engine)
        for i, text in enumerate(texts):
            name, other = "the text" if single else f"text {i}", others[i] if others else None
            if not isinstance(text, str):
                if other is not None:
                    raise UsageError(
                        f"{name} is token ids, which make no pair with another text: give both as text"
                    )
                ids = token_ids(name, text, self.engine.vocab_size, self.engine.context_length)
                row = Row(ids, (0,) * len(ids))
            else:
                row = Row(*self.tokenizer.encode_typed(text, other))
                if truncate and len(row.ids) > self.engine.context_length:
                    row = self._cut(row)
            row = self._checked(name, row)
            if length:
                row = row._replace(characters=self._characters(text if other is None else "", row, length))
            rows.append(row)
        return rows

    def _characters(self, text: Prompt, row: Row, length: int) -> npt.NDArray[np.int64]:
        """What each token of a row is spelled with, (T, W): the words of a text as they stand in it, known or not."""
        from portlm.character_ids import character_ids, spelled
        from portlm.token_spans import token_spans

        if isinstance(self.tokenizer, NoTokenizer):
            raise UsageError(
                f"this model reads the characters of words, which token ids do not say: {self.tokenizer.why}"
            )
        found = spelled(self.tokenizer, row.ids, length)
        if isinstance(text, str) and text:
            ids, spans = token_spans(self.tokenizer, text)
            first = len(self.tokenizer.begin_ids)
            if tuple(row.ids[first : first + len(ids)]) == tuple(ids):  # not where its end was cut off
                found[first : first + len(ids)] = character_ids([text[a:b] for a, b in spans], length)
        return found

    def _checked(self, name: str, row: Row) -> Row:
        if not row.ids:
            raise UsageError(f"{name} is empty, so there is nothing to read")
        if len(row.ids) > self.engine.context_length:
            raise ContextLengthError(
                len(row.ids), self.engine.context_length, name, "shorten it, or cut it (truncate)"
            )
        return row

    def _cut(self, row: Row) -> Row:
        """As many tokens as the context holds: the last are left out, save those that the template ends with."""
        ends = len(self.tokenizer.end_ids)
        kept = max(self.engine.context_length - ends, 0)
        after = len(row.ids) - ends
        return Row((*row.ids[:kept], *row.ids[after:]), (*row.types[:kept], *row.types[after:]))

    def _masked(self, text: str, mask: str, mask_id: int) -> Row:
        """The tokens of a text in which the name of the mask is the mask, and no other name a control token."""
        pieces = text.split(mask)
        if mask == "<mask>":  # which takes the space before it
            pieces = [*(piece.rstrip() for piece in pieces[:-1]), pieces[-1]]
        ids: list[int] = []
        for i, piece in enumerate(pieces):
            ids += [mask_id] * (i > 0)
            ids += self._plain(piece) if piece else []
        ids = [*self.tokenizer.begin_ids, *ids, *self.tokenizer.end_ids]
        return Row(ids, [0] * len(ids))

    def _plain(self, text: str) -> list[int]:
        found: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return found


def _place(row: Sequence[int], ids: Sequence[int], begin: int) -> int:
    """Where the tokens of a text lie among those of a row, from a place on. No text holds what is put around it."""
    wanted, n = tuple(ids), len(ids)
    for place in range(begin, len(row) - n + 1):
        if tuple(row[place : place + n]) == wanted:
            return place
    raise UsageError("this model's tokenizer does not put one text behind the other")


def _texts(texts: Any) -> tuple[list[str], bool]:
    """Texts as a list, and whether one was given by itself."""
    several = [texts] if isinstance(texts, str) else texts
    if not isinstance(several, Sequence) or not all(isinstance(text, str) for text in several):
        raise UsageError(f"texts must be a text, or a list of texts, got {shown(texts)}")
    return list(several), isinstance(texts, str)
