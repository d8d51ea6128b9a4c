"""The whole path on one machine: text to tokenizer to model to every engine, with the proof and the figures.

Everything is the ordinary public path, nothing is special to the demonstration: the same functions are behind
``portlm pretrain``, ``export``, ``compile``, ``verify``, ``generate`` and ``bench``.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from portlm.artifact import ParityRow
from portlm.errors import FormatError, ParityError, UsageError
from portlm.extension import load_extension
from portlm.files import write_atomic
from portlm.flows.bench import measure
from portlm.flows.targets import Target

Progress = Callable[[str], None]

# Sized so that two cores of a laptop train it in minutes: about 2 million parameters, three passes over
# the text in many small steps, too few to learn it by heart, so without dropout. A higher rate is worse: at 3e-3, 1.85
# bits per byte of the held-out language reference instead of 1.71, in 1800 steps. The context holds the certificate's
# probe and 128 greedy tokens after it.
SETTINGS: dict[str, Any] = {
    "steps": 1700,
    "log_interval": 20,
    "model": {
        "n_layer": 4,
        "n_head": 6,
        "width": 192,
        "context_length": 160,
        "dropout": 0.0,
    },
    "data": {"tokenizer": "bpe:2048", "batch_size": 6},
    "optimizer": {"lr": 2e-3},
    "schedule": {"min_lr": 5e-5},
    "evaluation": {
        "interval": 600,
        "sample_tokens": 120,
        "prompt": 'The "while" statement',
        "temperature": 0.6,
    },
    "checkpoint": {"interval": 850},
}
CORPUS = "python.txt"
HELD_OUT = 0.1  # of the text
PROMPT = 'The "while" statement'  # a heading of the held-out text
SAMPLE: dict[str, Any] = {"max_new_tokens": 140, "temperature": 0.5, "top_k": 40, "seed": 2}
BENCH: dict[str, Any] = {"prompt": 64, "tokens": 64, "rounds": 3}
RATES = (
    "prefill_tok_s",
    "prefill_interval",
    "decode_tok_s",
    "decode_interval",
    "load_s",
)  # of bench, for the report

# Every engine that the demonstration tries; one that this machine lacks is reported with the reason.
TARGETS = (
    Target("torch", "cpu", "native"),
    Target("ort", "cpu", "portable"),
    Target("ort", "cpu", "fused"),
    Target("ort", "vulkan", "portable"),
    Target("ort", "vulkan", "fused"),
    Target("tvm", "cpu", "portable"),
    Target("tvm", "cpu", "fused"),
    Target("packed", "cpu", "fused"),
)


def run(out: Path, *, steps: int | None = None, progress: Progress = lambda message: None) -> dict[str, Any]:
    """Train a GPT on Python's own documentation, run it on every engine here, and write the report.

    Args:
        out: folder for everything; what an earlier demonstration left there is replaced.
        steps: training steps instead of the usual number.
        progress: called with a line before each stage.

    Returns:
        What ``report.json`` holds.

    Raises:
        ExtensionError: portlm's kernels are not built.
        UsageError: `out` exists and is not an earlier demonstration.
        PortlmError: whatever fails on the way.
    """
    begin = time.perf_counter()
    load_extension()  # which measuring needs, and would miss after minutes of training without it
    _clear(out)
    progress("text: Python's docstrings, and the language reference behind its help()")
    text = _write_corpus(out)
    progress("train: tokenizer and model")
    result, metrics = _train(text, out / "run", steps)
    reference = _score_of_the_reference(result.checkpoint)
    progress("export: ONNX, portable and fused")
    model = _export(result.checkpoint, out / "model")
    targets, missing = _available()
    progress("compile: " + ", ".join(str(target) for target in targets))
    _compile(model, targets)
    progress("verify: every engine against eager PyTorch")
    certificate = _verify(model, targets, progress)
    progress("measure: prefill and decode on every engine, interleaved")
    figures = measure(model, targets, progress=progress, **BENCH)
    progress("write: one page of documentation")
    sample = _sample(model)
    report = _report(
        result, metrics, reference, certificate, figures, missing, sample, time.perf_counter() - begin
    )
    write_atomic(out / "report.json", json.dumps(report, indent=2) + "\n")
    _page(out / "report.html", report, metrics)
    return report


def _clear(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file: choose another --out")
    known = {
        CORPUS,
        "topics.txt",
        "run",
        "model",
        "report.json",
        "report.html",
    }  # one of them of earlier versions
    if out.exists() and any(entry.name not in known for entry in out.iterdir()):
        raise UsageError(f"{out} holds files that are not a demonstration's: choose another --out")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)


def _write_corpus(out: Path) -> Path:
    path = out / CORPUS
    write_atomic(path, corpus())
    return path


def corpus() -> str:
    """Return the text that every Python carries: docstrings of the standard library, and the language reference.

    Its last tenth, which training holds out, is the last tenth of the one and then the last tenth of the other.
    """
    from portlm.data.python_docstrings import python_docstrings
    from portlm.data.python_topics import python_topics
    from portlm.data.text import split_text

    parts = [split_text(text, HELD_OUT) for text in (python_docstrings(), python_topics())]
    return "".join(trained for trained, _ in parts) + "".join(held_out for _, held_out in parts)


def _train(text: Path, run: Path, steps: int | None) -> tuple[Any, list[dict[str, Any]]]:
    from portlm import settings
    from portlm.train.config import PretrainConfig
    from portlm.train.metrics import read_metrics
    from portlm.train.pretrain import pretrain

    preset = {**SETTINGS, "data": {**SETTINGS["data"], "texts": (str(text),)}}
    if steps is not None:
        preset |= {"steps": steps, "evaluation": {**SETTINGS["evaluation"], "interval": max(1, steps // 4)}}
    config = settings.load(PretrainConfig, preset=preset)
    result = pretrain(config, run)
    return result, read_metrics(run / "metrics.jsonl")


def _score_of_the_reference(checkpoint: Path) -> float:
    """Bits per byte of the language reference's last tenth, which no version of the demonstration has trained on."""
    import numpy as np
    import torch

    from portlm.data.python_topics import python_topics
    from portlm.data.text import split_text
    from portlm.models import load_model
    from portlm.tokenizer import Tokenizer
    from portlm.train.evaluation import HeldOut, evaluate

    tokenizer, (before, text) = Tokenizer.load(checkpoint), split_text(python_topics(), HELD_OUT)
    held_out = HeldOut(np.array(tokenizer.encode(text)), tokenizer.encode(before[-1])[-1], len(text.encode()))
    found = evaluate(load_model(checkpoint), held_out, SETTINGS["data"]["batch_size"], torch.device("cpu"))
    assert found is not None  # nothing stops it
    return found.bits_per_byte


def _export(checkpoint: Path, out: Path) -> Path:
    from portlm.compile.export import export

    return export(checkpoint, out)


def _available() -> tuple[list[Target], list[str]]:
    from portlm.runtimes.probe import probe

    rows = {(row["engine"], row["device"]): row for row in probe()}
    targets, missing = [], {}
    for target in TARGETS:
        row = rows[target.engine, target.device]
        if row["available"]:
            targets.append(target)
        else:
            advice = f" ({row['command']})" if row["command"] else ""
            missing[f"{target.engine}:{target.device}"] = f"{row['reason']}{advice}"
    return targets, [f"{name}: {reason}" for name, reason in missing.items()]


def _compile(model: Path, targets: list[Target]) -> None:
    from portlm.compile.build import COMPILERS, build

    build(model, [key for t in targets if (key := (t.engine, t.device, t.profile)) in COMPILERS])


def _verify(model: Path, targets: list[Target], progress: Progress) -> list[ParityRow]:
    from portlm.flows.verify import verify_artifact

    results = verify_artifact(model, targets, certify=True, progress=progress)
    problems = [f"{r.problem}{f' ({r.node})' if r.node else ''}" for r in results if r.problem]
    if problems:
        raise ParityError("; ".join(problems))
    return [result.row for result in results if result.row is not None]


def _sample(model: Path) -> str:
    import portlm

    with portlm.load(model) as session:
        return PROMPT + session.generate(PROMPT, **SAMPLE).text


def _report(
    result: Any,
    metrics: list[dict[str, Any]],
    reference: float,
    certificate: list[ParityRow],
    figures: dict[str, Any],
    missing: list[str],
    sample: str,
    seconds: float,
) -> dict[str, Any]:
    evaluations = [record for record in metrics if record["kind"] == "eval"]
    if not evaluations:
        raise FormatError(f"{result.run / 'metrics.jsonl'}: holds no evaluation")
    rates = {(row["engine"], row["device"], row["profile"]): row for row in figures["rows"]}
    engines = []
    for row in certificate:
        rate = rates[row.engine, row.device, row.profile]
        engines.append(
            {
                "engine": row.engine,
                "device": row.device,
                "profile": row.profile,
                "precision": row.precision,
                "max_logit_error": row.max_logit_error,
                "logit_scale": row.logit_scale,
                "greedy_match": row.greedy_match,
                "greedy_total": row.greedy_total,
                "fallback_nodes": len(row.fallback),
                **{name: rate[name] for name in RATES},
            }
        )
    return {
        "train": {
            "tokens": result.tokens,
            "seconds": result.seconds,
            "parameters": result.parameters,
            "tokens_per_second": result.tokens_per_second,
            "val_bits_per_byte_start": evaluations[0]["bits_per_byte"],
            "val_bits_per_byte_end": evaluations[-1]["bits_per_byte"],
            "reference_bits_per_byte": reference,
        },
        "engines": engines,
        "missing": missing,
        "limits": figures["limits"],
        "environment": figures["environment"],
        "sample": sample,
        "seconds": seconds,
    }


def _page(path: Path, report: dict[str, Any], metrics: list[dict[str, Any]]) -> None:
    from portlm.flows.report import write_html

    train, env = report["train"], report["environment"]
    write_html(
        path,
        title="A GPT trained on Python's documentation, on every engine here",
        summary=(
            f"{train['parameters']:,} parameters, {train['tokens']:,} tokens in {train['seconds']:.0f} s, "
            f"then the same model on {len(report['engines'])} engines; {report['seconds']:.0f} s in all."
        ),
        training=[
            ("held-out bits per byte, untrained", f"{train['val_bits_per_byte_start']:.3f}"),
            ("held-out bits per byte, trained", f"{train['val_bits_per_byte_end']:.3f}"),
            ("of the language reference alone", f"{train['reference_bits_per_byte']:.3f}"),
            ("tokens learned from", f"{train['tokens']:,}"),
            ("tokens per second", f"{train['tokens_per_second']:,.0f}"),
        ],
        metrics=metrics,
        prompt=PROMPT,
        sample=report["sample"],
        sample_rule=f"{SAMPLE['top_k']} best at temperature {SAMPLE['temperature']}, seed {SAMPLE['seed']}",
        engines=report["engines"],
        limits=report["limits"],
        missing=report["missing"],
        environment=[
            ("processor", f"{env['cpu']}, {env['cores']} cores, kernels for {env['isa']}"),
            ("read bandwidth, measured", f"{report['limits']['read_bandwidth_gb_s']:.1f} GB/s"),
            ("multiply-add rate, measured", f"{report['limits']['fp32_gflop_s']:.0f} GFLOP/s"),
            ("system", f"{env['system']}, Python {env['python']}, load {env['load']:.2f}"),
            ("packages", ", ".join(f"{name} {version}" for name, version in env["versions"].items())),
        ],
    )
