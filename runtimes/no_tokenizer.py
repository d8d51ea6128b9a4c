"""A model without a tokenizer: token ids in, token ids out.

Not every tokenizer is a byte-level BPE that portlm can use, and a model can be run, measured and verified without.
"""

from typing import NoReturn

from portlm.errors import UsageError


class NoTokenizer:
    """Stands where a tokenizer would be: refuses text, and leaves the text of an answer empty.

    Attributes:
        vocab_size: of the model.
        eos_id: None.
    """

    eos_id: int | None = None

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size

    def encode(self, text: str) -> NoReturn:
        """Refuse.

        Raises:
            UsageError: always.
        """
        raise UsageError(
            "this model has no tokenizer: give lists of token ids, or export again with one: tokenizer= of "
            "portlm.export, or tokenizer.json in the checkpoint"
        )

    def stream_decoder(self, skip_special: bool = False) -> "NoTokenizer":
        """Return a decoder without words."""
        return self

    def push(self, token: int) -> str:
        """Take a token; return no text."""
        return ""

    def finish(self) -> str:
        """Return no text."""
        return ""
