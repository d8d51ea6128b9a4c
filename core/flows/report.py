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


def engine_bars(rows: Sequence[Mapping[str, Any]], limits: Mapping[str, float | None]) -> str:
    """Draw decode and prefill rates of every engine side by side as an <svg> element, bars from zero.

    Args:
        rows: of a bench, with the rates and their intervals, which are drawn as lines.
        limits: by the names of the rates, what the processor allows, drawn as a dashed line; None is not drawn.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    names = [f"{row['engine']}:{row['device']} {row['profile']}" for row in rows]
    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": "portlm", "font.size": 9}):  # the same figures give the same bytes
        figure = Figure(figsize=(8, 1.3 + 0.35 * max(len(rows), 1)), layout="constrained")
        for axes, kind, bound in zip(
            figure.subplots(1, 2, sharey=True),
            ("decode", "prefill"),
            ("reading the weights from memory", "multiply-adds"),
            strict=True,
        ):
            values = [row[f"{kind}_tok_s"] for row in rows]
            intervals = [row[f"{kind}_interval"] for row in rows]
            lengths = [
                (max(value - low, 0.0), max(high - value, 0.0))
                for value, (low, high) in zip(values, intervals, strict=True)
            ]
            axes.barh(
                names, values, color="#9cc9dd", xerr=list(zip(*lengths, strict=True)) or None, capsize=2
            )
            for place, (value, (_, high)) in enumerate(zip(values, intervals, strict=True)):
                axes.annotate(
                    f"{value:,.0f}", (high, place), (4, 0), textcoords="offset points", va="center", fontsize=8,
                    bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
                )  # fmt: skip
            top = max((high for _, high in intervals), default=1.0)
            limit = limits.get(f"{kind}_tok_s")
            if limit is not None:
                axes.axvline(limit, color="#c44e52", linestyle="--", linewidth=1)
                top = max(top, limit)
            axes.set_xlim(0, 1.3 * top)  # room for the numbers
            axes.set_xlabel(f"limit by {bound}: {limit:,.0f}" if limit is not None else "", color="#c44e52")
            axes.set_title(f"{kind}, tokens/s", fontsize=10)
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
            axes.locator_params(axis="x", nbins=4)
            axes.spines[["top", "right"]].set_visible(False)
        axes.invert_yaxis()  # the first row on top; the other axes share it
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
    limits: Mapping[str, float | None],
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
        engines_svg=engine_bars(engines, limits),
        missing=missing,
        environment=environment,
    )
    write_atomic(path, page)
