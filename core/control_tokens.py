"""Control tokens and a template for a tokenizer that has none: what texts are put between that are read as a whole.

Of an encoder: Devlin et al. 2018 put [CLS] before a text, whose place stands for the whole, and [SEP] behind each of
one or two; [MASK] hides a token, and [PAD] fills a batch. Of a decoder: Radford et al. 2018 put _start_ before a text,
_delimiter_ between two, and _classify_ behind, where the whole has been seen. Liu et al. 2023 put <image> where a
picture stands among the tokens.
"""

import json
from typing import Any

from portlm.errors import FormatError
from portlm.text_tokenizer import TextTokenizer
from portlm.tokenizer import Tokenizer
from portlm.tokenizer_file import parse
from portlm.tokenizer_kinds import parse_text

# What tokenizers call the tokens that begin a text, end it, and hide one; those of the first row are added.
NAMES = (("[CLS]", "[SEP]", "[MASK]"), ("<s>", "</s>", "<mask>"))
PADDING = "[PAD]"
START, DELIMITER, CLASSIFY = "_start_", "_delimiter_", "_classify_"
IMAGE = "<image>"


def for_reading(tokenizer: Tokenizer, *, closed: bool = True) -> tuple[Tokenizer, int]:
    """Return a tokenizer that puts a text between control tokens and can hide tokens, and the id that hides one.

    A tokenizer that has such tokens keeps them; to another they are added, behind all that it has. No text has other
    ids than before.

    Args:
        tokenizer: any.
        closed: put a token behind a text as well as before it.

    Raises:
        FormatError: the tokenizer has some of the tokens, and not all.
    """
    names = next((row for row in NAMES if {*row} <= {*tokenizer.special}), NAMES[0])
    document: dict[str, Any] = json.loads(tokenizer.to_json())
    if missing := [name for name in names if name not in tokenizer.special]:
        if len(missing) < len(names):
            raise FormatError(f"the tokenizer has no {missing[0]}, but others that an encoder needs: add it")
        for name in (PADDING, *names):
            if name not in tokenizer.special:
                document["added_tokens"].append(_added(name, tokenizer, document))
    ids = dict(tokenizer.special) | {t["content"]: t["id"] for t in document["added_tokens"] if t["special"]}
    document["post_processor"] = _template(names[0], names[1], names[1], ids, closed=closed)
    return _made(document, tokenizer, "the tokenizer of the encoder"), ids[names[2]]


def for_labelling(tokenizer: Tokenizer) -> Tokenizer:
    """Return a tokenizer that puts a text, or two, between the control tokens of a decoder that says a label.

    A tokenizer that has them keeps them; to another they are added, behind all that it has. No text has other ids than
    before.
    """
    document: dict[str, Any] = json.loads(tokenizer.to_json())
    names = (START, DELIMITER, CLASSIFY)
    for name in names:
        if name not in tokenizer.special:
            document["added_tokens"].append(_added(name, tokenizer, document))
    ids = dict(tokenizer.special) | {t["content"]: t["id"] for t in document["added_tokens"] if t["special"]}
    document["post_processor"] = _template(*names, ids, kinds=1)
    return _made(document, tokenizer, "the tokenizer of the classifier")


def for_pictures(tokenizer: Tokenizer) -> tuple[Tokenizer, int]:
    """Return a tokenizer with a token that stands for a picture, and its id.

    A tokenizer that has one keeps it; to another it is added, behind all that it has. No text has other ids than
    before.
    """
    if IMAGE in tokenizer.special:
        return tokenizer, tokenizer.special[IMAGE]
    document: dict[str, Any] = json.loads(tokenizer.to_json())
    document["added_tokens"].append(added := _added(IMAGE, tokenizer, document))
    return _made(document, tokenizer, "the tokenizer of a model that is shown pictures"), int(added["id"])


def _made(document: dict[str, Any], tokenizer: Tokenizer, where: str) -> Tokenizer:
    """The tokenizer of a changed file, which ends and begins texts as another one does."""
    by_id = {index: name for name, index in tokenizer.special.items()}
    eos, bos = (None if index is None else by_id[index] for index in (tokenizer.eos_id, tokenizer.bos_id))
    if isinstance(tokenizer, TextTokenizer):
        return TextTokenizer(parse_text(document, where), eos, bos)
    return Tokenizer(parse(document, where), eos, bos)


def _added(name: str, tokenizer: Tokenizer, document: dict[str, Any]) -> dict[str, Any]:
    """An entry of added_tokens with the next free id."""
    taken = [t["id"] for t in document["added_tokens"]]
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": max([tokenizer.vocab_size - 1, *taken]) + 1, "content": name, **plain}


def _template(
    begin: str, between: str, end: str, ids: dict[str, int], *, kinds: int = 2, closed: bool = True
) -> dict[str, Any]:
    """A post-processor: begin, text, end; and for a pair begin, text, between, another text and end.

    With two kinds the other text and its end are of type 1; a text that is not closed
    has no end, nor a pair anything between.
    """
    last = kinds - 1

    def token(name: str, kind: int) -> dict[str, Any]:
        return {"SpecialToken": {"id": name, "type_id": kind}}

    first, second = ({"Sequence": {"id": name, "type_id": kind}} for name, kind in (("A", 0), ("B", last)))
    names = dict.fromkeys((begin, between, end) if closed else (begin,))
    return {
        "type": "TemplateProcessing",
        "single": [token(begin, 0), first, *[token(end, 0)] * closed],
        "pair": [
            token(begin, 0),
            first,
            *[token(between, 0)] * closed,
            second,
            *[token(end, last)] * closed,
        ],
        "special_tokens": {name: {"id": name, "ids": [ids[name]], "tokens": [name]} for name in names},
    }
