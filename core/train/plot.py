"""The loss curve of a run as SVG and PNG, drawn from its metrics file."""

import io
from collections.abc import Sequence
from pathlib import Path

from portlm.errors import EngineUnavailableError
from portlm.files import write_atomic
from portlm.train.metrics import Record, read_metrics


def plot_loss(run: str | Path) -> list[Path]:
    """Draw ``<run>/metrics.jsonl`` to ``<run>/loss.svg`` and ``<run>/loss.png`` and return both paths.

    Needs no display. With nothing to draw yet, returns an empty list.

    Raises:
        EngineUnavailableError: matplotlib is not installed.
        FormatError: The metrics file is missing or damaged.
        StorageError: The disk refuses the picture.
    """
    run = Path(run)
    records = read_metrics(run / "metrics.jsonl")
    if not any(record["kind"] in ("train", "eval") for record in records):
        return []
    paths = []
    for kind, data in render_loss(records, title=run.resolve().name).items():
        path = run / f"loss.{kind}"
        write_atomic(path, data)
        paths.append(path)
    return paths


def render_loss(records: Sequence[Record], title: str = "") -> dict[str, bytes]:
    """Return the loss curve as ``{"svg": ..., "png": ...}``: training loss, held-out loss, learning rate."""
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise EngineUnavailableError(
            "no loss curve: matplotlib is not installed, try pip install portlm[report]"
        ) from (error)
    # A fixed salt and no date make the SVG of equal data equal, byte for byte.
    with rc_context({"svg.hashsalt": "portlm", "font.size": 9}):
        figure = Figure(figsize=(7, 4), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        train = [record for record in records if record["kind"] == "train"]
        evaluated = [record for record in records if record["kind"] == "eval"]
        if train:
            axes.plot(
                [record["step"] for record in train],
                [record["loss"] for record in train],
                color="#4c72b0",
                linewidth=1,
                label="training",
            )
        if evaluated:
            axes.plot(
                [record["step"] for record in evaluated],
                [record["loss"] for record in evaluated],
                color="#c44e52",
                marker="o",
                markersize=3,
                label="held out",
            )
        axes.set_xlabel("step")
        axes.set_ylabel("loss (nats per token)")
        axes.set_title(title)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
        pictures = {}
        for kind, metadata in (("svg", {"Date": None}), ("png", {})):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=kind, dpi=150, metadata=metadata)
            pictures[kind] = buffer.getvalue()
    return pictures
