"""A BERT on TVM and on ONNX Runtime against transformers, and `embed` against ONNX Runtime alone.

Encoding is B rows of T tokens each, nothing masked. Embedding is texts of 8 to 128 tokens, which are given as text: the
rival tokenizes them with the same tokenizer, reads them in the same batches of like length with onnxruntime alone, from
the same portable graph, and takes means and norms with numpy. transformers runs its attention of PyTorch's own.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from harness import Call, Case, main
from torch import Tensor

from portlm.models.bert import PRESETS, BertConfig

# (configuration, B, T)
SHAPES = [(PRESETS["bert-base-uncased"], 8, 128), (PRESETS["minilm-l6"], 8, 128)]
SMALL = BertConfig(vocab_size=300, context_length=128, n_layer=2, n_head=2, width=32, hidden=64)
TEXTS, BATCH = 96, 32


def exported(config: BertConfig, folder: Path) -> Path:
    """A random model of this shape, compiled for TVM and ONNX Runtime, with a tokenizer of bytes."""
    from portlm.compile.build import build as compile_for
    from portlm.compile.export import export
    from portlm.models import build, save_model
    from portlm.tokenizer import byte_tokenizer

    torch.manual_seed(0)
    save_model(folder / "checkpoint", build(config), byte_tokenizer("<|endoftext|>"))
    artifact = export(folder / "checkpoint", folder / "artifact")
    compile_for(artifact, [("tvm", "cpu", "fused"), ("ort", "cpu", "fused")])
    return artifact


def arithmetic(config: BertConfig, rows: int, tokens: int) -> int:
    """Operations of an encoder's matrix products on so many rows of so many tokens."""
    width, hidden = config.width, config.hidden
    weights = config.n_layer * (4 * width * width + 2 * width * hidden)
    return rows * tokens * (2 * weights + config.n_layer * 4 * tokens * width)


def encoding(config: BertConfig, B: int, T: int, artifact: Path) -> Case:
    """One call of the encoder."""
    from transformers import AutoModel

    from portlm.flows.load import load

    ids = np.random.default_rng(0).integers(0, 256, (B, T))
    inputs = {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "token_type_ids": np.zeros_like(ids),
        "position_ids": np.broadcast_to(np.arange(T), (B, T)).copy(),
    }
    tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
    module = AutoModel.from_pretrained(artifact.parent / "checkpoint").eval()

    def ours(engine: str) -> Call:
        opened = load(artifact, engine, "cpu", threads=torch.get_num_threads()).engine

        def call() -> Tensor:
            outputs, _ = opened.run("encoder", inputs, opened.start("encoder", B))
            return torch.from_numpy(np.asarray(outputs["last_hidden_state"]))

        return call

    @torch.inference_mode()
    def theirs() -> Tensor:
        found: Tensor = module(**tensors).last_hidden_state
        return found

    return Case(
        f"encode {(B, T)}, {config.n_layer} layers of {config.width}",
        {"tvm": ours("tvm"), "ort": ours("ort"), "transformers": theirs},
        flops=arithmetic(config, B, T),
    )


def embedding(config: BertConfig, artifact: Path) -> Case:
    """Texts to vectors, their tokens counted in the limit without padding."""
    from portlm.flows.load import load
    from portlm.ort_support import import_onnxruntime

    onnxruntime = import_onnxruntime()
    random = np.random.default_rng(1)
    lengths = random.integers(8, min(128, config.context_length) + 1, TEXTS)
    texts = ["".join(chr(c) for c in random.integers(97, 123, n)) for n in lengths]
    threads = torch.get_num_threads()

    def ours(engine: str) -> Call:
        session = load(artifact, engine, "cpu", threads=threads)
        return lambda: torch.from_numpy(session.embed(texts, batch_size=BATCH))

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    alone = onnxruntime.InferenceSession(
        artifact / "onnx" / "encoder.portable.onnx", options, providers=["CPUExecutionProvider"]
    )
    coder = load(artifact, "ort", "cpu", threads=threads).tokenizer
    taken = {item.name for item in alone.get_inputs()}

    def theirs() -> Tensor:
        rows = [coder.encode(text) for text in texts]
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        vectors = np.empty((len(rows), config.width), np.float32)
        for begin in range(0, len(rows), BATCH):
            numbers = order[begin : begin + BATCH]
            longest = len(rows[numbers[0]])
            ids, mask = np.zeros((2, len(numbers), longest), np.int64)
            for place, i in enumerate(numbers):
                ids[place, : len(rows[i])], mask[place, : len(rows[i])] = rows[i], 1
            given = {
                "input_ids": ids,
                "attention_mask": mask,
                "token_type_ids": np.zeros_like(ids),
                "position_ids": np.broadcast_to(np.arange(longest), ids.shape).copy(),
            }
            (hidden,) = alone.run(["last_hidden_state"], {name: given[name] for name in taken})
            means = (hidden * mask[:, :, None]).sum(1) / mask.sum(1, keepdims=True)
            vectors[numbers] = means / np.linalg.norm(means, axis=1, keepdims=True)
        return torch.from_numpy(vectors)

    return Case(
        f"embed {TEXTS} texts of {lengths.sum()} tokens, {config.n_layer} layers of {config.width}",
        {"embed on ort": ours("ort"), "embed on tvm": ours("tvm"), "onnxruntime": theirs},
        flops=sum(arithmetic(config, 1, int(n)) for n in lengths),
    )


def cases(smoke: bool) -> Iterator[Case]:
    with tempfile.TemporaryDirectory() as folder:
        for place, (config, B, T) in enumerate([(SMALL, 2, 16)] if smoke else SHAPES):
            artifact = exported(config, Path(folder) / str(place))
            yield encoding(config, B, T, artifact)
            yield embedding(config, artifact)


if __name__ == "__main__":
    main("encoder", cases)
