"""Recurrent layers against torch.nn's: a training step of each, and decoding of an exported LSTM.

A step of training is forward and backward over B rows of T tokens; all of torch.nn's layers get the same weights. Then
an LSTM language model of two layers, exported and compiled for TVM, continues one row token by token, against
torch.nn.LSTM with the embedding and the output layer around it, in PyTorch's inference mode. The tokens of both must be
the same.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from harness import Call, Case, main, with_gradients
from torch import Tensor, nn

from portlm.ops.gru import gru
from portlm.ops.lstm import lstm
from portlm.ops.rnn import rnn

LAYERS = {"lstm": (lstm, nn.LSTM, 2), "gru": (gru, nn.GRU, 1), "rnn": (rnn, nn.RNN, 1)}
# (B, T, width): a small model's batch, the medium one of Zaremba et al.
SHAPES = [(16, 128, 256), (20, 35, 650)]
# (vocabulary, width, tokens written)
MODELS = [(257, 256, 128), (10000, 650, 64)]


def training(op: str, B: int, T: int, width: int) -> Case:
    """Forward and backward of one layer."""
    ours, kind, states = LAYERS[op]
    module = kind(width, width, batch_first=True)
    weights = [p.detach() for p in module.parameters()]
    zeros = [torch.zeros(B, width)] * states

    def portlm(x: Tensor, *weights: Tensor) -> Tensor:
        return ours(x, *weights, *zeros)[0]

    def theirs(x: Tensor, *weights: Tensor) -> Tensor:
        names = [name for name, _ in module.named_parameters()]
        return torch.func.functional_call(module, dict(zip(names, weights, strict=True)), (x,))[0]

    x = torch.randn(B, T, width)
    gates = weights[0].shape[0] // width
    return Case(
        f"{op} training {(B, T, width)}",
        {"portlm": with_gradients(portlm, x, *weights), "torch.nn": with_gradients(theirs, x, *weights)},
        flops=3 * 2 * 2 * B * T * gates * width * width,  # two products forward, and twice that backward
    )


def decoding(vocabulary: int, width: int, count: int, folder: Path) -> Case:
    """Greedy tokens of one row, one by one."""
    import numpy as np

    from portlm.compile.build import build as compile_for
    from portlm.compile.export import export
    from portlm.flows.load import load
    from portlm.models import build, save_model
    from portlm.models.recurrent import RecurrentConfig
    from portlm.rows import Rows

    model = build(RecurrentConfig(vocab_size=vocabulary, width=width, context_length=1024)).eval()
    save_model(folder / "checkpoint", model)
    artifact = export(folder / "checkpoint", folder / "artifact")
    compile_for(artifact, [("tvm", "cpu", "fused")])
    engine = load(artifact, "tvm", "cpu", "fused", threads=torch.get_num_threads()).engine
    layers = nn.LSTM(width, width, 2, batch_first=True)
    with torch.no_grad():
        for n, layer in enumerate(model.layers):
            getattr(layers, f"weight_ih_l{n}").copy_(layer.input.weight)
            getattr(layers, f"weight_hh_l{n}").copy_(layer.recurrent.weight)
            getattr(layers, f"bias_ih_l{n}").copy_(layer.input.bias)
            getattr(layers, f"bias_hh_l{n}").zero_()

    def portlm() -> Tensor:
        rows, written = Rows(engine, 1), [1]
        for _ in range(count):
            written.append(int(np.argmax(rows.next([written[-1]]))))
        return torch.tensor(written)

    @torch.inference_mode()
    def theirs() -> Tensor:
        state, written = None, [1]
        for _ in range(count):
            x = nn.functional.embedding(torch.tensor([[written[-1]]]), model.embed.weight)
            y, state = layers(x, state)
            written.append(int(nn.functional.linear(y, model.head_weight, model.head_bias).argmax()))
        return torch.tensor(written)

    calls: dict[str, Call] = {"portlm": portlm, "torch.nn": theirs}
    weights = 2 * 2 * 4 * width * width + vocabulary * width
    return Case(
        f"decode {count} tokens, vocabulary {vocabulary}, width {width}", calls, moved=4 * weights,
        calls=dict.fromkeys(calls, count), tolerance=0.0,
    )  # fmt: skip


def cases(smoke: bool) -> Iterator[Case]:
    for shape in [(3, 4, 8)] if smoke else SHAPES:
        for op in LAYERS:
            yield training(op, *shape)
    with tempfile.TemporaryDirectory() as folder:
        for place, model in enumerate([(257, 16, 4)] if smoke else MODELS):
            yield decoding(*model, Path(folder) / str(place))


if __name__ == "__main__":
    main("recurrent", cases)
