"""The engines on CUDA, through the commands that a user types: verify, then prefill and decode."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from context import Context, MissingError, last_line
from timing import Limits

from portlm import models
from portlm.tokenizer import byte_tokenizer

CONTEXT = 160  # room for the certificate's probe and 128 greedy tokens
LARGE, LARGE_PRESET = "large", "gpt2"
ENDING = {"checkpoint": "-checkpoint", "artifact": "-artifact"}
KINDS = {
    "int8": ("--quantize", "int8", "--group", "32"),
    "int4": ("--quantize", "int4", "--group", "32"),
    "bfloat16": ("--weights", "bfloat16"),
    "byte-cache": ("--cache", "int8"),
}
"""What else an artifact can hold, by name: options of `portlm export`."""
KIND_FAMILY, KIND_SIZES = "llama", {"width": 64, "hidden": 96}  # groups of 32 divide them


def make_models(context: Context) -> str:
    """Write a small checkpoint and artifact of every family and kind, and GPT-2 small with random weights."""
    made, problems = [], []
    wanted: list[tuple[str, Any, float, tuple[str, ...]]] = [
        (name, replace(family.config_class().tiny(), context_length=CONTEXT), 0.3, ())
        for name, family in models.DECODERS.items()
    ]
    sizes = replace(models.DECODERS[KIND_FAMILY].config_class().tiny(), context_length=CONTEXT, **KIND_SIZES)
    wanted += [(kind, sizes, 0.2, options) for kind, options in KINDS.items()]
    if not context.dry:
        wanted.append((LARGE, models.preset(LARGE_PRESET), 0.0, ()))
    for name, config, spread, options in wanted:
        try:
            made.append(_make(context, name, config, spread, options))
        except Exception as error:  # the others are still worth their time
            problems.append(f"{name}: {error}")
            context.claim(f"export of {name}", f"failed: {error}")
    if not made:
        raise RuntimeError("; ".join(problems))
    return ", ".join(made) + "".join(f"; not made: {problem}" for problem in problems)


def _make(context: Context, name: str, config: Any, spread: float, options: tuple[str, ...]) -> str:
    """Save and export one model; `spread` makes small models' choices distinct."""
    checkpoint, artifact = (_folder(context, name, kind) for kind in ENDING)
    torch.manual_seed(0)
    model = models.build(config)
    with torch.no_grad():
        for p in model.parameters():
            if spread and p.dim() > 1:
                p.normal_(0.0, spread)
    models.save_model(checkpoint, model, byte_tokenizer("<|endoftext|>"))
    done = context.portlm("export", checkpoint, artifact, *options)
    if done.returncode:
        raise RuntimeError(last_line(done.stderr))
    return f"{name} ({model.num_parameters():,} parameters)"


def _folder(context: Context, name: str, kind: str) -> Path:
    return context.work / "models" / f"{name}{ENDING[kind]}"


def verify_torch(context: Context) -> str:
    """PyTorch's engine on CUDA against its answer on the CPU, by the models' code and by their graphs."""
    said = [_verify(context, "torch", "native", models.DECODERS)]
    for profile in ("fused", "portable"):
        _compile(context, models.DECODERS, profile)
        said.append(_verify(context, "torch", profile, models.DECODERS))
    return ", ".join(said)


def _compile(context: Context, names: Iterable[str], profile: str) -> None:
    """Compile artifacts for PyTorch's engine.

    Raises:
        RuntimeError: one cannot be.
    """
    where = ("--engine", "torch", "--device", context.device, "--profile", profile)
    for name in names:
        done = context.portlm("compile", _folder(context, name, "artifact"), *where)
        if done.returncode:
            raise RuntimeError(f"{name}: {last_line(done.stderr)}")


def verify_ort(context: Context) -> str:
    """ONNX Runtime on CUDA against eager PyTorch on the CPU."""
    return _verify(context, "ort", "portable", models.DECODERS)


def verify_kinds_torch(context: Context) -> str:
    """PyTorch's engine on CUDA with weights of 8, 4 and 16 bits and a cache of bytes: widened, and as they are."""
    said = _verify(context, "torch", "native", KINDS)
    _compile(context, KINDS, "fused")  # on portlm's kernels
    return f"{said}, {_verify(context, 'torch', 'fused', KINDS)}"


def verify_kinds_ort(context: Context) -> str:
    """ONNX Runtime on CUDA with the same."""
    return _verify(context, "ort", "portable", KINDS)


def verify_tvm(context: Context) -> str:
    """Machine code for the device, and with it every family and kind of weights against eager PyTorch on the CPU.

    Compiling is most of it, so several models are at it together. A dry run compiles the first family for sm_90, up to
    the launch.
    """
    if context.dry:
        return _compile_ahead(context, next(iter(models.DECODERS)), "sm_90")
    _require(context, "tvm")
    cases = [(name, profile) for name in models.DECODERS for profile in ("fused", "portable")]
    cases += [(kind, "fused") for kind in KINDS if kind != "byte-cache"]  # which has no form there

    def compile_and_verify(case: tuple[str, str]) -> str | None:
        name, profile = case
        target = f"tvm:{context.device}:{profile}"
        done = context.portlm("compile", _folder(context, name, "artifact"), "-e", target)
        return last_line(done.stderr) if done.returncode else _differs(context, name, target)

    by_model: dict[str, list[tuple[str, str]]] = {}  # one command at a time writes a model's manifest
    for case in cases:
        by_model.setdefault(case[0], []).append(case)
    with ThreadPoolExecutor(max_workers=max(1, (os.cpu_count() or 1) // 2)) as pool:
        found = pool.map(lambda of_one: [compile_and_verify(case) for case in of_one], by_model.values())
    problems = [
        f"{':'.join(case)}: {problem}"
        for of_one, answers in zip(by_model.values(), found, strict=True)
        for case, problem in zip(of_one, answers, strict=True)
        if problem
    ]
    if problems:
        raise RuntimeError("; ".join(problems))
    return f"{len(cases)} models on tvm:{context.device}: {', '.join(by_model)}"


def _compile_ahead(context: Context, name: str, architecture: str) -> str:
    """Compile one artifact for a GPU that is not here.

    Raises:
        MissingError: TVM or NVIDIA's compiler is not here.
        RuntimeError: it fails otherwise.
    """
    artifact = _folder(context, name, "artifact")
    done = context.portlm("compile", artifact, "-e", "tvm:cuda:fused", "--arch", architecture)
    if done.returncode:
        said = last_line(done.stderr).removeprefix("portlm: error: ")
        raise (MissingError if "not installed" in said or "nvcc" in said else RuntimeError)(said)
    code = next(line for line in done.stdout.splitlines() if line.endswith(f".{architecture}.cubin"))
    return f"{name} compiled for {architecture}: {Path(code).stat().st_size:,} bytes of machine code"


def _verify(context: Context, engine: str, profile: str, names: Iterable[str]) -> str:
    """Run portlm verify on small artifacts.

    Raises:
        MissingError: the engine does not run on CUDA here.
        RuntimeError: an artifact differs, is not there, or the command fails; all were tried before.
    """
    target = f"{engine}:{context.device}:{profile}"
    _require(context, engine)
    problems = [f"{name}: {problem}" for name in names if (problem := _differs(context, name, target))]
    if problems:
        raise RuntimeError("; ".join(problems))
    return f"{', '.join(names)} on {target}"


def _differs(context: Context, name: str, target: str) -> str | None:
    """Verify one artifact, keep what was found, and return what is wrong with it, if anything is."""
    done = context.portlm("verify", _folder(context, name, "artifact"), "-e", target, "--certify", "--json")
    results = json.loads(done.stdout) if done.stdout.strip() else []
    problem = next((r["problem"] for r in results if r["problem"]), None)
    if done.returncode or problem or not results:
        problem = problem or last_line(done.stderr)
        context.claim(f"{name} on {target}", problem)
        return problem
    row = results[0]["row"]
    context.claim(
        f"{name} on {target}",
        f"logits within {row['max_logit_error']:.1e}, {row['greedy_match']} of {row['greedy_total']} greedy tokens, "
        f"{len(row['fallback'])} nodes elsewhere",
    )
    return None


def _require(context: Context, engine: str) -> None:
    """Raise MissingError with doctor's reason unless an engine runs on the device."""
    rows = context.command_json("doctor", "--json")["engines"]
    row = next(r for r in rows if (r["engine"], r["device"]) == (engine, context.device))
    if not row["available"]:
        raise MissingError(f"{engine}:{context.device}: {row['reason']}")


def decode(context: Context) -> str:
    """Prefill and decode rates at batch 1, beside the rate at which the weights could be read once per token.

    PyTorch's engine once more with its steps launched kernel by kernel, not as one graph.
    """
    name, prompt, tokens, rounds = (
        (LARGE, 512, 128, 5) if not context.dry else (next(iter(models.DECODERS)), 16, 4, 1)
    )
    targets = [f"{engine}:{context.device}" for engine in ("torch", "ort", "tvm")]
    artifact = _folder(context, name, "artifact")
    sizes = ("--prompt", str(prompt), "--tokens", str(tokens), "--rounds", str(rounds), "--json")
    result = context.command_json(
        "bench", artifact, *(word for target in targets for word in ("-e", target)), *sizes
    )
    limits = Limits(context.dry)
    limits.probe_copy()
    size = (artifact / "model.safetensors").stat().st_size
    where = f"behind {prompt} tokens, batch 1"
    for row in result["rows"]:
        contender = f"{row['engine']}:{row['device']}:{row['profile']}"
        _rate(context, f"decode {where}", contender, row["decode_tok_s"], size / limits.copy)
        _rate(context, f"prefill {prompt} tokens, batch 1", contender, row["prefill_tok_s"], None)
    os.environ["PORTLM_NO_CUDA_GRAPHS"] = "1"  # of the commands that follow in this section
    for row in context.command_json("bench", artifact, "-e", targets[0], *sizes)["rows"]:
        contender = f"{row['engine']}:{row['device']}:{row['profile']}, no graphs"
        _rate(context, f"decode {where}", contender, row["decode_tok_s"], size / limits.copy)
    for failure in result["failed"]:
        context.figure(case=f"decode {where}", contender=failure["target"], absent=failure["reason"])
    try:
        rival = _transformers(context, _folder(context, name, "checkpoint"), prompt, tokens, rounds)
        _rate(context, f"decode {where}", "transformers, eager", rival, size / limits.copy)
    except ImportError as error:
        context.figure(case=f"decode {where}", contender="transformers, eager", absent=str(error))
    return "see the figures" if not context.dry else f"measures {' and '.join(targets)}"


def decode_kinds(context: Context) -> str:
    """Decode rates of GPT-2 small with weights of 4 and 16 bits, which a step reads as they are."""
    source, prompt, tokens, rounds = (LARGE, 512, 128, 5) if not context.dry else ("int4", 16, 4, 1)
    limits = Limits(context.dry)
    limits.probe_copy()
    said = []
    for kind in ("int4", "bfloat16"):
        name = f"{source}-of-{kind}"
        done = context.portlm(
            "export", _folder(context, source, "checkpoint"), _folder(context, name, "artifact"), *KINDS[kind]
        )
        if done.returncode:
            raise RuntimeError(f"{name}: {last_line(done.stderr)}")
        _compile(context, [name], "fused")
        artifact = _folder(context, name, "artifact")
        target = f"torch:{context.device}:fused"
        result = context.command_json(
            "bench", artifact, "-e", target, "--prompt", str(prompt), "--tokens", str(tokens),
            "--rounds", str(rounds), "--json",
        )  # fmt: skip
        weights = json.loads((artifact / "manifest.json").read_text())["roles"]["decoder"]["weights"]
        size = (artifact / weights).stat().st_size
        for row in result["rows"]:
            _rate(
                context,
                f"decode behind {prompt} tokens, {kind}",
                target,
                row["decode_tok_s"],
                size / limits.copy,
            )
        said += [f"{kind}: {failure['reason']}" for failure in result["failed"]]
    if said:
        raise RuntimeError("; ".join(said))
    return "see the figures" if not context.dry else "measures int4 and bfloat16"


def _rate(context: Context, case: str, contender: str, rate: float, floor: float | None) -> None:
    """Keep a rate in tokens per second; `floor` is the least time of a token, if there is one to compare with."""
    if context.dry:
        context.figure(case=case, contender=contender)
        return
    share = None if floor is None else rate * floor
    context.figure(case=case, contender=contender, seconds=1 / rate, rate=rate, unit="tok/s", of_limit=share)


def _transformers(context: Context, checkpoint: Path, prompt: int, tokens: int, rounds: int) -> float:
    """Return the median rate of greedy steps in transformers, which reads the same folder."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint).to(context.device).eval()
    rates = []
    for round_ in range(rounds + 1):  # the first warms up
        ids = torch.randint(model.config.vocab_size, (1, prompt), device=context.device)
        with torch.inference_mode():
            answer = model(ids, use_cache=True)
            _wait(context)
            begin = time.perf_counter()
            for _ in range(tokens):
                token = answer.logits[:, -1:].argmax(-1)
                answer = model(token, past_key_values=answer.past_key_values, use_cache=True)
            _wait(context)
        if round_:
            rates.append(tokens / (time.perf_counter() - begin))
    return statistics.median(rates)


def _wait(context: Context) -> None:
    if not context.dry:
        torch.cuda.synchronize()
