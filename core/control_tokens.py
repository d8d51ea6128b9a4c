"""Control tokens and a template for a tokenizer that has none: what an encoder's texts are put between.

Devlin et al. 2018 put [CLS] before a text, whose place stands for the whole, and [SEP] behind each of one or two;
[MASK] hides a token, and [PAD] fills a batch.
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
    document["post_processor"] = _template(names[0], names[1], ids, closed=closed)
    by_id = {index: name for name, index in tokenizer.special.items()}
    eos, bos = (None if index is None else by_id[index] for index in (tokenizer.eos_id, tokenizer.bos_id))
    where = "the tokenizer of the encoder"
    if isinstance(tokenizer, TextTokenizer):
        return TextTokenizer(parse_text(document, where), eos, bos), ids[names[2]]
    return Tokenizer(parse(document, where), eos, bos), ids[names[2]]


def _added(name: str, tokenizer: Tokenizer, document: dict[str, Any]) -> dict[str, Any]:
    """An entry of added_tokens with the next free id."""
    taken = [t["id"] for t in document["added_tokens"]]
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": max([tokenizer.vocab_size - 1, *taken]) + 1, "content": name, **plain}


def _template(begin: str, end: str, ids: dict[str, int], *, closed: bool) -> dict[str, Any]:
    """A post-processor: begin, text, end, and for a pair another text of type 1, and end; no ends if not closed."""

    def token(name: str, kind: int) -> dict[str, Any]:
        return {"SpecialToken": {"id": name, "type_id": kind}}

    first, second = ({"Sequence": {"id": name, "type_id": kind}} for kind, name in enumerate("AB"))
    single = [token(begin, 0), first, *[token(end, 0)] * closed]
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, second, *[token(end, 1)] * closed],
        "special_tokens": {
            name: {"id": name, "ids": [ids[name]], "tokens": [name]} for name in (begin, end)[: 1 + closed]
        },
    }
