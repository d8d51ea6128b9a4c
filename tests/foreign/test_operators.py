"""Every operator that docs/own-models.md promises, in one module, on every engine."""

import warnings

import engine_cases
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")
onnx = pytest.importorskip("onnx", reason="onnx is missing: pip install portlm[onnx]")

import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402

import portlm  # noqa: E402
from portlm.errors import EngineUnavailableError, UsageError  # noqa: E402

IDS = [3, 7, 1, 9, 30]
TARGETS = [t for t in engine_cases.TARGETS if t[0] != "packed" and t[2] != "native"]
FORMS = {
    "neg": lambda x, w: -x,
    "rsub": lambda x, w: 1.0 - x,
    "power": lambda x, w: x**2,
    "quotient": lambda x, w: x / (x * x + 1),
    "sqrt": lambda x, w: torch.sqrt(x * x + 1),
    "rsqrt": lambda x, w: torch.rsqrt(x * x + 1),
    "exp": lambda x, w: torch.exp(-x * x),
    "sigmoid": lambda x, w: torch.sigmoid(x),
    "relu": lambda x, w: F.relu(x),
    "silu": lambda x, w: F.silu(x),
    "tanh": lambda x, w: torch.tanh(x),
    "gelu": lambda x, w: F.gelu(x),
    "softmax": lambda x, w: F.softmax(x, -1),
    "mean": lambda x, w: x - x.mean(-1, keepdim=True),
    "sum": lambda x, w: x + x.sum(-1, keepdim=True),
    "matmul": lambda x, w: x @ w,
    "transposed": lambda x, w: x @ w.T,
    "einsum": lambda x, w: torch.einsum("btc,cd->btd", x, w),
    "layer_norm": lambda x, w: F.layer_norm(x, (8,)),
    "slices": lambda x, w: torch.cat((x[..., 4:], x[..., :4]), -1),
    "chunk": lambda x, w: torch.cat(x.chunk(2, -1)[::-1], -1),
    "stack": lambda x, w: torch.stack((x[..., :4], x[..., 4:]), -1).flatten(-2),
    "permuted": lambda x, w: x.unflatten(-1, (2, 4)).transpose(-1, -2).flatten(-2),
    "squeezed": lambda x, w: x.unsqueeze(2).squeeze(2),
}


class Forms(nn.Module):
    context_length = 16

    def __init__(self, forms):
        super().__init__()
        self.table, self.head = nn.Embedding(31, 8), nn.Linear(8 * len(forms), 31)
        self.weight, self.forms = nn.Parameter(torch.randn(8, 8)), forms

    def forward(self, ids):
        x = self.table(ids)
        return self.head(torch.cat([form(x, self.weight) for form in self.forms], -1))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    torch.manual_seed(0)
    module = Forms(list(FORMS.values()))
    with pytest.warns(UserWarning, match="without a cache"):
        return module, portlm.export(module, tmp_path_factory.mktemp("forms") / "model")


@pytest.mark.parametrize("target", TARGETS, ids=":".join)
def test_every_operator_of_the_page_gives_pytorchs_answer(target, exported):
    module, folder = exported
    try:
        session = portlm.load(folder, *target)
    except EngineUnavailableError as error:
        pytest.skip(str(error))
    with session, torch.no_grad():
        assert session.placement().fallback == ()
        found = np.array(session.score([IDS])[0].logprobs)
        expected = F.log_softmax(module(torch.tensor([IDS])), -1)[0, range(len(IDS) - 1), IDS[1:]].numpy()
    np.testing.assert_allclose(
        found, expected, rtol=0, atol=1e-4, equal_nan=False
    )  # of a logit, as everywhere between engines


@pytest.mark.parametrize(
    "form",
    [torch.abs, lambda x: x.clamp(-1, 1), lambda x: torch.where(x > 0, x, 0 * x)],
    ids=["abs", "clamp", "where"],
)
def test_another_operator_is_an_error_that_names_it_and_its_line(form, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(
            UsageError,
            match=r"aten\.\w+.* cannot be exported, in .*, test_operators\.py line \d+",
        ):
            portlm.export(Forms([lambda x, w: form(x)]), tmp_path / "model")
    assert not list(tmp_path.iterdir())
