"""A ragged batch that is read in steps, and what transformers says about it."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest

LENGTHS = (11, 7, 3)  # left-padded to the first
CUTS = (
    5,
    9,
    10,
    11,
)  # a prefill that is all padding for the last row, several tokens on a cache, single tokens


@pytest.fixture(scope="session")
def variants(tmp_path_factory):
    """Checkpoints of the shapes that the shared fixture does not have, by name."""
    pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")
    from random_weights import randomise

    from portlm.models import build, save_model
    from portlm.models.gpt2 import GPT2Config
    from portlm.models.llama import LlamaConfig

    gpt2 = {"vocab_size": 61, "context_length": 24, "width": 30}
    llama = {"vocab_size": 61, "context_length": 24, "width": 36, "hidden": 52, "rms_norm_eps": 1e-5}
    configs = {
        "gpt2-erf": GPT2Config(**gpt2, n_layer=3, n_head=5, gelu="none"),
        "gpt2-one-head": GPT2Config(**gpt2, n_layer=1, n_head=1),
        "llama-tied": LlamaConfig(**llama, n_layer=2, n_head=6, n_kv_head=6, tie_embeddings=True),
        "llama-one-kv-head": LlamaConfig(**llama, n_layer=1, n_head=6, n_kv_head=1, rope_theta=500.0),
    }
    folders = {}
    for name, config in configs.items():
        model = randomise(build(config), 0.3, seed=2)
        folders[name] = tmp_path_factory.mktemp("variants") / name
        save_model(folders[name], model)
    return folders


@pytest.fixture(scope="session")
def exported(variants, artifacts, once):
    """Artifact folder by name, of the shared checkpoints and the variants."""
    from made import Made

    from portlm.compile.export import export

    def make(name):
        if name in artifacts:
            return artifacts[name]
        return once(f"exported-{name}", partial(export, variants[name]))

    return Made((*artifacts, *variants), make)


@pytest.fixture(scope="session")
def foreign_logits():
    """Function: checkpoint folder -> logits of transformers for the rows of the ragged batch, each alone."""
    torch = pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")
    transformers = pytest.importorskip(
        "transformers", reason="transformers is missing: pip install portlm[hf]"
    )
    answers = {}

    def logits(folder: Path) -> list[np.ndarray]:
        if folder not in answers:
            model = transformers.AutoModelForCausalLM.from_pretrained(
                folder, attn_implementation="eager"
            ).eval()
            with torch.no_grad():
                answers[folder] = [model(torch.tensor(row[None])).logits[0].numpy() for row in rows(folder)]
        return answers[folder]

    return logits


def rows(folder: Path) -> list[np.ndarray]:
    from portlm.artifact import read_manifest

    vocab = read_manifest(folder).model.vocab_size
    rng = np.random.default_rng(3)
    return [rng.integers(0, vocab, n) for n in LENGTHS]


@pytest.fixture(scope="session")
def ragged_error(foreign_logits):
    """Function: (artifact folder, step) -> largest logit difference from transformers over the ragged batch.

    step(inputs by name) returns the graph's outputs by name.
    """
    from portlm.artifact import read_manifest

    def error(folder: Path, step) -> float:
        batch, total = rows(folder), LENGTHS[0]
        ids = np.stack([np.pad(row, (total - len(row), 0)) for row in batch])
        mask = np.stack([[0] * (total - n) + [1] * n for n in LENGTHS]).astype(np.int64)
        positions = np.maximum(mask.cumsum(1) - 1, 0)
        states = read_manifest(folder).roles["decoder"].state
        sizes = {"batch": len(batch), "past": 0}
        cache = {s.name: np.zeros([sizes.get(d, d) for d in s.shape], np.float32) for s in states}
        parts, start = [], 0
        for end in CUTS:
            inputs = {"input_ids": ids[:, start:end], "position_ids": positions[:, start:end]}
            inputs["logits_to_keep"] = np.arange(end - start)
            outputs = step({**inputs, "attention_mask": mask[:, :end], **cache})
            cache = {s.name: outputs[s.output] for s in states}
            parts.append(outputs["logits"])
            start = end
        logits = np.concatenate(parts, axis=1)
        expected = foreign_logits(folder)
        errors = [np.abs(logits[b, total - n :] - expected[b]).max() for b, n in enumerate(LENGTHS)]
        return float(np.max(errors))  # NaN if one of them is

    return error


@pytest.fixture(scope="session")
def ort_step():
    """Function: (graph path, device) -> step function of ONNX Runtime, without any fallback to the CPU."""
    onnxruntime = pytest.importorskip(
        "onnxruntime", reason="onnxruntime is missing: pip install portlm[onnx]"
    )
    from portlm.ort_support import IN_PLACE, row_by_row

    def open_graph(path: Path, device: str = "cpu"):
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        providers = ["CPUExecutionProvider"]
        if device == "vulkan":
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
            options.add_provider_for_devices([_webgpu_device()], {})
            providers = None
        session = onnxruntime.InferenceSession(path, options, providers, enable_fallback=0)
        names = [value.name for value in session.get_outputs()]

        def step(inputs: dict) -> dict:
            """Call the graph, row by row where it asks for that."""
            B, T = inputs["input_ids"].shape
            kept = IN_PLACE.items() <= session.get_modelmeta().custom_metadata_map.items()
            rows = B if kept and row_by_row({"batch": B, "sequence": T, "past": past(inputs)}) else 1
            parts = [
                session.run(
                    names, {k: v[b : b + 1] if rows > 1 and v.ndim > 1 else v for k, v in inputs.items()}
                )
                for b in range(rows)
            ]
            return {name: np.concatenate(values) for name, *values in zip(names, *parts, strict=True)}

        return step

    def past(inputs: dict) -> int:
        return next((value.shape[2] for name, value in inputs.items() if name.startswith("past")), 0)

    return open_graph


def _webgpu_device():
    """The WebGPU plugin's device, registered through the engine, which knows about software drivers."""
    import onnxruntime

    from portlm.errors import EngineUnavailableError
    from portlm.runtimes.ort_devices import vulkan_device

    try:
        return vulkan_device()[0]
    except EngineUnavailableError as error:
        pytest.skip(f"no Vulkan for ONNX Runtime {onnxruntime.__version__}: {error}")
