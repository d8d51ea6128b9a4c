"""Tables that stay readable in a terminal of 80 columns and in a pipe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table


def figures(title: str, texts: Sequence[str], numbers: Sequence[str], gap: int = 2) -> Table:
    """Return a table of measurements without rules between the columns, which would take a quarter of the width.

    Args:
        title: above the table.
        texts: headers of the first columns, aligned left.
        numbers: headers of the others, aligned right. Headers may have two lines.
        gap: spaces between columns, 1 where there are many.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(
        title=title, title_justify="left", box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, gap - 1, 0, 0)
    )  # fmt: skip
    for name in texts:
        table.add_column(name, no_wrap=True)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table
