"""A model without a tokenizer: token ids in, token ids out.

Not every tokenizer is one that portlm can use, and a model can be run, measured and verified without.
"""

from typing import NoReturn

from portlm.errors import UsageError

NONE = "this model has no tokenizer (portlm reads tokenizer.json; docs/tokenizer.md says which kinds)"
INSTEAD = "give token ids: a list of them, or --ids on the command line"


class NoTokenizer:
    """Stands where a tokenizer would be: refuses text, and leaves the text of an answer empty.

    Attributes:
        vocab_size: of the model.
        eos_id: None.
        why: why there is none.
    """

    eos_id: int | None = None

    def __init__(self, vocab_size: int, why: str = NONE):
        self.vocab_size, self.why = vocab_size, why

    def encode(self, text: str, *, add_special_tokens: bool = True) -> NoReturn:
        """Refuse.

        Raises:
            UsageError: always.
        """
        raise UsageError(f"{self.why}: {INSTEAD}")

    def encode_typed(self, text: str, other: str | None = None) -> NoReturn:
        """Refuse.

        Raises:
            UsageError: always.
        """
        self.encode(text)

    def stream_decoder(self, skip_special: bool = False) -> "NoTokenizer":
        """Return a decoder without words."""
        return self

    def push(self, token: int) -> str:
        """Take a token; return no text."""
        return ""

    def finish(self) -> str:
        """Return no text."""
        return ""
