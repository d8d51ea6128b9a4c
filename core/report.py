"""A run as one self-contained HTML page: loss curve, sample, engines compared, environment."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from portlm.files import write_atomic


def _svg(figure: Any) -> str:
    """Return a matplotlib figure as an <svg> element, without the XML prologue."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _figure(width: float, height: float) -> Any:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "portlm"  # the same figure gives the same bytes
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def loss_curve(metrics: Iterable[Mapping[str, Any]]) -> str:
    """Draw training and held-out loss over steps as SVG.

    Args:
        metrics: records of metrics.jsonl; those with "loss" are training points, those with "val_loss" held-out ones.
    """
    records = list(metrics)
    train = [(r["step"], r["loss"]) for r in records if "loss" in r]
    held_out = [(r["step"], r["val_loss"]) for r in records if "val_loss" in r]
    figure = _figure(8, 3.2)
    axes = figure.subplots()
    if train:
        axes.plot(*zip(*train, strict=True), color="#9aa5b1", linewidth=0.8, label="training")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), color="#0b6e99", marker="o", markersize=3, label="held out")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return _svg(figure)


def engine_bars(rows: Sequence[Mapping[str, Any]]) -> str:
    """Draw decode and prefill rates of every engine side by side as SVG, on logarithmic axes."""
    figure = _figure(8, 0.9 + 0.35 * max(len(rows), 1))
    names = [f"{row['engine']}:{row['device']} {row['profile']}" for row in rows]
    for axes, key, title in zip(
        figure.subplots(1, 2, sharey=True),
        ("decode_tok_s", "prefill_tok_s"),
        ("decode, tokens/s", "prefill, tokens/s"),
        strict=True,
    ):
        values = [row[key] for row in rows]
        bars = axes.barh(names, values, color="#0b6e99", log=True)
        axes.bar_label(bars, [f"{value:,.0f}" for value in values], padding=3, fontsize=8)
        axes.set_title(title, fontsize=10)
        axes.margins(x=0.35)
        axes.spines[["top", "right"]].set_visible(False)
        axes.invert_yaxis() if key == "decode_tok_s" else None
    return _svg(figure)


def write_html(
    path: Path,
    *,
    title: str,
    summary: str,
    training: Sequence[tuple[str, str]],
    metrics: Iterable[Mapping[str, Any]],
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
    from markupsafe import Markup

    template = Environment(autoescape=True, trim_blocks=True).from_string(
        files("portlm").joinpath("report.html.jinja").read_text(encoding="utf-8")
    )
    page = template.render(
        title=title,
        summary=summary,
        training=training,
        loss_svg=Markup(loss_curve(metrics)),
        sample=sample,
        sample_rule=sample_rule,
        engines=engines,
        engines_svg=Markup(engine_bars(engines)),
        missing=missing,
        environment=environment,
    )
    write_atomic(path, page)
