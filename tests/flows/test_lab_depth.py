"""Steps that wait for one another are counted in a model's own graph, whatever the model."""

from dataclasses import replace

import pytest

torch = pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")

from torch import nn  # noqa: E402

from portlm.compile.trace import record  # noqa: E402
from portlm.flows.lab.parallel_depth import calls_for, layers_of, longest_path  # noqa: E402
from portlm.models import build  # noqa: E402
from portlm.models.awd_lstm import AWDLSTMConfig  # noqa: E402
from portlm.models.gpt2 import GPT2Config  # noqa: E402
from portlm.models.recurrent import RecurrentConfig  # noqa: E402
from portlm.models.roles import Role  # noqa: E402
from portlm.ops.rnn_cell import rnn_cell  # noqa: E402
from portlm.roles import StateSpec, TensorSpec  # noqa: E402

pytestmark = pytest.mark.no_kernel("graphs are recorded, and nothing is computed")


def counted(model, tokens):
    """The steps of each layer, and of all of them."""
    role = model.roles()["decoder"]
    recording = record(model, "decoder", role)
    layers, calls = layers_of(recording), calls_for(role, tokens)
    return [longest_path(recording, role, calls, [layer]) for layer in layers], longest_path(
        recording, role, calls, layers
    )


@pytest.mark.parametrize(
    "config",
    [RecurrentConfig(vocab_size=9, context_length=64, n_layer=2, width=4, cell=cell) for cell in ("lstm", "gru", "rnn")]
    + [AWDLSTMConfig.tiny()],
    ids=["lstm", "gru", "rnn", "awd_lstm"],
)  # fmt: skip
def test_a_recurrent_layer_takes_a_step_for_each_token_and_layers_overlap(config):
    """Layer l can read token t once layer l - 1 has and it itself has read t - 1: T + L - 1 in all."""
    each, together = counted(build(config), 17)
    assert each == [17] * config.n_layer
    assert together == 17 + config.n_layer - 1


def test_a_layer_of_attention_takes_one_step_whatever_the_length():
    model = build(GPT2Config(vocab_size=9, context_length=64, n_layer=3, n_head=2, width=4))
    for tokens in (1, 17, 64):
        assert counted(model, tokens) == ([1, 1, 1], 3)


class Apart(nn.Module):
    """Two states; only one is read again, so the other one's steps do not wait."""

    def forward(self, ids, kept, read):
        x = ids.float().unsqueeze(-1).expand(-1, -1, 3)  # (B, 1, 3)
        one = rnn_cell(x, kept.unsqueeze(1), kept.unsqueeze(1), None)
        two = rnn_cell(x, x, x, None)
        return one, one.squeeze(1), two.squeeze(1)


def test_steps_that_do_not_read_the_last_one_are_not_a_chain():
    model = Apart()
    states = [
        StateSpec(f"past_{name}", f"present_{name}", "float32", ("batch", 3), "zeros", "replace")
        for name in ("kept", "read")
    ]
    role = Role(
        model.forward, (TensorSpec("input_ids", "int64", ("batch", 1)),),
        (TensorSpec("logits", "float32", ("batch", 1, 3)),), tuple(states),
    )  # fmt: skip
    recording = record(model, "decoder", role)
    assert longest_path(recording, role, 5, layers_of(recording)) == 5
    ends = replace(role, function=lambda ids, kept, read: (model(ids, kept, read)[0], kept + 1, read + 1))
    recording = record(model, "decoder", ends)
    assert longest_path(recording, ends, 5, layers_of(recording)) == 1  # each begins where the text began
