"""A run as one self-contained HTML page: loss curve, sample, engines compared, environment."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from portlm.files import write_atomic


def _element(svg: str) -> str:
    """Return the <svg> element of a file's text, without the XML prologue, to stand inside a page."""
    return svg[svg.index("<svg") :]


def engine_bars(rows: Sequence[Mapping[str, Any]]) -> str:
    """Draw decode and prefill rates of every engine side by side as an <svg> element, on logarithmic axes."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    names = [f"{row['engine']}:{row['device']} {row['profile']}" for row in rows]
    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": "portlm", "font.size": 9}):  # the same figures give the same bytes
        figure = Figure(figsize=(8, 0.9 + 0.35 * max(len(rows), 1)), layout="constrained")
        decode, prefill = figure.subplots(1, 2, sharey=True)
        for axes, key, title in (
            (decode, "decode_tok_s", "decode, tokens/s"),
            (prefill, "prefill_tok_s", "prefill, tokens/s"),
        ):
            values = [row[key] for row in rows]
            bars = axes.barh(names, values, color="#0b6e99", log=True)
            axes.bar_label(bars, [f"{value:,.0f}" for value in values], padding=3, fontsize=8)
            axes.set_title(title, fontsize=10)
            axes.margins(x=0.35)
            axes.spines[["top", "right"]].set_visible(False)
        decode.invert_yaxis()  # the first row on top; the other axes share it
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return _element(buffer.getvalue())


def write_html(
    path: Path,
    *,
    title: str,
    summary: str,
    training: Sequence[tuple[str, str]],
    metrics: Sequence[dict[str, Any]],
    prompt: str,
    sample: str,
    sample_rule: str,
    engines: Sequence[Mapping[str, Any]],
    missing: Sequence[str],
    environment: Sequence[tuple[str, str]],
) -> None:
    """Write the page to `path`, pictures included; it loads nothing from anywhere.

    Raises:
        StorageError: the file cannot be written.
    """
    from jinja2 import Environment

    from portlm.train.plot import render_loss

    template = Environment(autoescape=True, trim_blocks=True).from_string(
        files("portlm.flows").joinpath("report.html.jinja").read_text(encoding="utf-8")
    )
    page = template.render(
        title=title,
        summary=summary,
        training=training,
        loss_svg=_element(render_loss(metrics)["svg"].decode()),
        prompt=prompt,
        sample=sample,
        sample_rule=sample_rule,
        engines=engines,
        engines_svg=engine_bars(engines),
        missing=missing,
        environment=environment,
    )
    write_atomic(path, page)
