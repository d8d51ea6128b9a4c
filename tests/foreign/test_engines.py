"""Modules that nobody here shaped, exported by portlm.export, continue texts on every engine as they do themselves."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")
pytest.importorskip("onnx", reason="onnx is missing: pip install portlm[onnx]")

import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402

import portlm  # noqa: E402
from portlm.errors import EngineUnavailableError, UsageError  # noqa: E402

PROMPTS = [[5, 9, 2, 44, 17], [30, 31]]  # of different lengths: one row is padded
NEW = 12
ERROR = 1e-4  # of a logit, as everywhere between engines
ENGINES = (("torch", "cpu"), ("ort", "cpu"), ("ort", "vulkan"), ("tvm", "cpu"), ("packed", "cpu"))
NAMES = [":".join(pair) for pair in ENGINES]


def logits_of(model, ids):
    with torch.no_grad():
        result = model(torch.tensor([ids]))
    result = getattr(result, "logits", result)
    return (result[0] if isinstance(result, tuple) else result)[0].numpy()


def continued(model, prompt):
    ids = list(prompt)
    for _ in range(NEW):
        ids.append(int(logits_of(model, ids)[-1].argmax()))
    return tuple(ids[len(prompt) :])


def assert_same_on(engine, device, model, folder):
    try:
        session = portlm.load(folder, engine=engine, device=device)
    except EngineUnavailableError as error:
        pytest.skip(f"no {engine}:{device}: {error}")
    with session:
        assert session.placement().fallback == ()
        found = [g.token_ids for g in session.generate(PROMPTS, max_new_tokens=NEW, ignore_eos=True)]
        assert found == [continued(model, prompt) for prompt in PROMPTS]
        tokens = [*PROMPTS[0], *found[0]]
        scores = np.array(session.score([tokens])[0].logprobs)
    expected = F.log_softmax(torch.from_numpy(logits_of(model, tokens)), -1).numpy()
    expected = expected[np.arange(len(tokens) - 1), tokens[1:]]
    assert np.abs(scores[-len(expected) :] - expected).max() <= ERROR


@pytest.fixture(scope="module", params=("tutorial_gpt", "transformers_gpt2", "transformers_llama"))
def exported(request, foreign, tmp_path_factory):
    if request.param != "tutorial_gpt":
        pytest.importorskip("transformers", reason="transformers is missing: pip install portlm[hf]")
    model = getattr(foreign, request.param)()
    return model, portlm.export(model, tmp_path_factory.mktemp("foreign") / request.param)


@pytest.mark.parametrize(("engine", "device"), ENGINES, ids=NAMES)
def test_a_foreign_module_runs_on(engine, device, exported):
    assert_same_on(engine, device, *exported)


class Windowed(nn.Module):
    """One causal attention, and one that sees four tokens: no cache can serve the second here."""

    context_length = 24

    def __init__(self):
        super().__init__()
        self.tokens, self.places = nn.Embedding(61, 32), nn.Embedding(24, 32)
        self.one, self.two = nn.Linear(32, 48), nn.Linear(32, 48)
        self.out, self.head = nn.Linear(32, 32), nn.Linear(32, 61)

    def forward(self, ids):
        place = torch.arange(ids.shape[1])
        x = self.tokens(ids) + self.places(place)
        back = place[:, None] - place[None, :]
        y = F.scaled_dot_product_attention(*self.one(x).chunk(3, -1), is_causal=True)
        z = F.scaled_dot_product_attention(*self.two(x).chunk(3, -1), attn_mask=(back >= 0) & (back < 4))
        return self.head(x + torch.tanh(self.out(torch.cat((y, z), -1))) * (0.1 * x).exp())


@pytest.fixture(scope="module")
def windowed(foreign, tmp_path_factory):
    model = foreign.randomised(Windowed())
    with pytest.warns(UserWarning, match=r"Windowed is exported without a cache.*test_engines.py line"):
        folder = portlm.export(model, tmp_path_factory.mktemp("foreign") / "windowed")
    return model, folder


@pytest.mark.parametrize(("engine", "device"), ENGINES, ids=NAMES)
def test_a_foreign_module_without_a_cache_runs_on(engine, device, windowed):
    assert_same_on(engine, device, *windowed)


def test_a_module_that_cannot_be_exported_leaves_nothing_behind(tmp_path):
    class Sorted(nn.Module):
        context_length = 8

        def __init__(self):
            super().__init__()
            self.tokens, self.head = nn.Embedding(61, 32), nn.Linear(32, 61)

        def forward(self, ids):
            return self.head(self.tokens(ids).sort(-1).values)

    with pytest.raises(UsageError, match="sort"):
        portlm.export(Sorted(), tmp_path / "artifact")
    assert list(tmp_path.iterdir()) == []


def test_a_foreign_module_can_be_measured(exported):
    """Its artifact holds no checkpoint; the share of the limit was read from one."""
    from portlm.flows.bench import measure
    from portlm.flows.targets import Target

    folder = exported[1]
    result = measure(folder, [Target("ort", "cpu", "portable")], prompt=4, tokens=2, rounds=1)
    (row,) = result["rows"]
    assert row["decode_of_limit"] > 0
    assert row["prefill_of_limit"] > 0
