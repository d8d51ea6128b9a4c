"""What the tests of engines that go on by themselves share."""

from portlm.engine import RowChoice
from portlm.rows import Rows


def started(engine, texts):
    """A state that has read all but the last token of some texts, and what goes on from there."""
    rows = Rows(engine, len(texts))
    rows.read_texts([text[:-1] for text in texts])
    return rows, [text[-1] for text in texts], [RowChoice(0.0, 0, 1.0, 0.0, 0, 0, 0)] * len(texts)
