"""What has no form in a graph is refused in one line that names the operator and its place."""

import pytest

torch = pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")

import torch.nn.functional as F  # noqa: E402
from canonical_cases import CONTEXT, C, Row, V, canonical_of  # noqa: E402
from torch import nn  # noqa: E402

from portlm.errors import UsageError  # noqa: E402


def refused(module, match, **options):
    with pytest.raises(UsageError, match=match) as caught:
        canonical_of(module.eval(), **{"context_length": CONTEXT} | options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_operator_without_a_form_is_named_with_its_place():
    class Mixer(nn.Module):
        def forward(self, x):
            return x.cumsum(-1)

    message = refused(Row(lambda m, x: m.mixer(x), mixer=Mixer()), "cumsum")
    assert "in module mixer (Mixer), test_canonical_limits.py line" in message
    assert "`return x.cumsum(-1)`" in message


def test_a_fourier_transform_is_refused():
    assert "linear maps" in refused(Row(lambda m, x: torch.fft.fft2(x).real), "fft")


def test_an_operator_with_several_results_is_refused():
    assert "sort" in refused(Row(lambda m, x: x.sort(-1).values), "sort")


def test_complex_numbers_are_refused():
    class Complex(nn.Module):
        def forward(self, x):
            z = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
            return torch.view_as_real(z * z).flatten(-2)

    message = refused(Row(lambda m, x: m.turn(x), turn=Complex()), "complex")
    assert "turn (Complex)" in message
    assert "rotate_half" in message


def test_control_flow_by_data_is_refused():
    refused(Row(lambda m, x: x if x.sum() > 0 else -x), "decides by the values of its input")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_weights_that_are_not_float32_are_refused(dtype):
    refused(Row(lambda m, x: x).to(dtype), str(dtype).removeprefix("torch."))


def test_integer_weights_are_refused():
    model = Row(lambda m, x: x * m.codes)
    model.codes = nn.Parameter(torch.ones(C, dtype=torch.int64), requires_grad=False)
    refused(model, "codes is int64")


def test_weights_that_overlap_in_memory_are_refused():
    model = Row(lambda m, x: x)
    model.head.weight = nn.Parameter(model.tokens.weight.data.view(-1)[: (V - 1) * C].view(V - 1, C))
    model.head.bias = None
    refused(model, "share memory")


def test_a_module_without_a_bound_on_its_length_asks_for_one():
    refused(Row(lambda m, x: x), "context_length", context_length=0)


def test_dropout_that_ignores_eval_is_refused():
    refused(Row(lambda m, x: F.dropout(x, 0.1)), r"model.eval|self.training")


def test_logits_of_the_last_position_only_are_refused():
    refused(Row(lambda m, x: x[:, -1:]), "every position")
