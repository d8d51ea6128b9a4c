"""The CUDA twins of choosing and scoring tokens: the same tokens as everywhere, and scores as near as the CPU's."""

import numpy as np
import pytest
import torch

from portlm.errors import PortlmError, UsageError
from portlm.ops.token_scores import token_scores, token_scores_reference
from portlm.ops.token_scores_cuda import token_scores_cuda
from portlm.ops.token_selection import select_tokens, token_selection_reference
from portlm.ops.token_selection_cuda import select_tokens_cuda

SELECT = pytest.mark.runs_kernel("select_tokens", on="cuda")
SCORE = pytest.mark.runs_kernel("score_logits", on="cuda")
FILTERS = [
    {},
    {"temperature": 1.0},
    {"temperature": 0.3, "top_k": 7},
    {"temperature": 2.0, "top_p": 0.9},
    {"temperature": 1.0, "min_p": 0.05},
    {"temperature": 1.5, "top_k": 40, "top_p": 0.7, "min_p": 0.01},
    {"temperature": 1e-300, "top_p": 1e-300},
    {"temperature": 1e300, "top_p": 0.5},
]
EVERY_FILTER = pytest.mark.parametrize("filters", FILTERS, ids=str)


def logits_of(kind: str, B: int, V: int) -> np.ndarray:
    rng = np.random.default_rng(V)
    x = rng.standard_normal((B, V)).astype(np.float32) * 3
    if kind == "equal":  # many equal logits of a few values, zeros of both signs among them
        x = np.round(x).astype(np.float32)
        x[x == 0] *= rng.choice(np.float32([-1, 1]), (x == 0).sum())
    if kind == "forbidden":
        x[rng.random((B, V)) < 0.7] = -np.inf
        x[:, rng.integers(V)] = 1
    return x


def assert_same_tokens(x: np.ndarray, device: str, **settings) -> None:
    settings["top_k"] = min(settings.get("top_k", 0), x.shape[1])
    ours = select_tokens_cuda(torch.from_numpy(x).to(device), **settings)
    assert ours.tolist() == token_selection_reference(x, **settings).tolist()


@SELECT
@EVERY_FILTER
@pytest.mark.parametrize("kind", ["normal", "equal", "forbidden"])
@pytest.mark.parametrize("V", [1, 2, 257, 4096, 4097, 9001])
def test_cuda_selection_gives_the_tokens_of_the_definition(V, kind, filters, device):
    """Sizes that fill a thread, a chunk, and neither; the same random numbers for each."""
    assert_same_tokens(
        logits_of(kind, 3, V), device, seed=[5, 2**64 - 1, 7], step=V, rows=[0, 9, 2**63], **filters
    )


@SELECT
@pytest.mark.parametrize("filters", [FILTERS[0], FILTERS[5]], ids=["greedy", "filtered"])
@pytest.mark.parametrize("V", [256 * 1024, (1 << 20) + 5], ids=["256k", "more"])
def test_cuda_selection_takes_large_vocabularies(V, filters, device):
    """The second one has more chunks than a block threads, unless they are longer."""
    assert_same_tokens(logits_of("normal", 1, V), device, seed=3, **filters)


@SELECT
def test_cuda_selection_draws_every_token_that_is_kept(device):
    """Of 16 tokens, each of 200 rows draws its own number."""
    x = np.repeat(logits_of("normal", 1, 16) / 3, 200, axis=0)
    assert_same_tokens(x, device, temperature=1.5, seed=1)
    assert set(select_tokens_cuda(torch.from_numpy(x).to(device), temperature=1e300).tolist()) == set(
        range(16)
    )


@SELECT
def test_cuda_selection_does_not_depend_on_the_order_of_threads(device, request):
    if device == "cuda":
        pytest.skip("its own order is the only one")
    x = logits_of("equal", 2, 5000)
    for order in (1, 2):
        request.getfixturevalue("emulator").order(order)
        assert_same_tokens(x, device, **FILTERS[5])


@SELECT
@pytest.mark.parametrize("filters", [{}, FILTERS[5]], ids=["greedy", "filtered"])
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf])
def test_cuda_selection_names_a_row_that_says_nothing(bad, filters, device):
    x = logits_of("normal", 3, 5000)
    x[1, 4999] = bad
    with pytest.raises(PortlmError, match=r"row 1: the logit of token 4999 is -?(nan|inf)"):
        select_tokens_cuda(torch.from_numpy(x).to(device), **filters)
    x[1] = -np.inf
    with pytest.raises(PortlmError, match=r"row 1: every logit is -inf"):
        select_tokens_cuda(torch.from_numpy(x).to(device), **filters)


def test_cuda_selection_of_no_rows_is_empty_and_bad_arguments_are_named(device):
    assert select_tokens_cuda(torch.zeros(0, 5, device=device), temperature=1.0, top_p=0.5).shape == (0,)
    for wrong, message in (
        ({"logits": torch.zeros(1, 0)}, "no tokens"),
        ({"logits": torch.zeros(2)}, "float32 tensor"),
        ({"logits": torch.zeros(1, 2, dtype=torch.bfloat16)}, "bfloat16"),
        ({"top_k": 6}, "top_k"),
        ({"seed": [1, 2]}, "seed"),
    ):
        given = {"logits": torch.zeros(1, 5), **wrong}
        with pytest.raises(UsageError, match=message):
            select_tokens_cuda(given.pop("logits").to(device), **given)


@SCORE
@pytest.mark.parametrize("V", [1, 3, 64, 511, 2049, 7000])
def test_cuda_scores_are_those_of_the_definition(V, device):
    rng = np.random.default_rng(V)
    x = (rng.standard_normal((5, V)) * 4).astype(np.float32)
    x[1, rng.integers(V)] = np.nan
    x[2] = -np.inf
    x[3, 0] = -np.inf if V > 1 else 0
    targets = rng.integers(0, V, 5)
    targets[3] = 0
    logprobs, best = token_scores_cuda(torch.from_numpy(x).to(device), targets)
    expected, ids = token_scores_reference(x, targets)
    assert best.tolist() == ids.tolist()
    np.testing.assert_allclose(logprobs, expected, rtol=1e-12, atol=1e-12)


@SCORE
def test_cuda_scores_have_the_same_bits_in_any_order_of_threads(device, request):
    if device == "cuda":
        pytest.skip("its own order is the only one")
    x, targets = torch.from_numpy(logits_of("normal", 3, 3001)), np.zeros(3, np.int64)
    first = token_scores_cuda(x, targets)[0]
    request.getfixturevalue("emulator").order(1)
    assert token_scores_cuda(x, targets)[0].tolist() == first.tolist()


def test_cuda_scores_of_no_rows_are_empty_and_bad_arguments_are_named(device):
    assert token_scores_cuda(torch.zeros(0, 5, device=device), np.zeros(0, np.int64))[0].shape == (0,)
    for logits, targets, message in (
        (torch.zeros(2, 5), np.array([0, 5]), "from 0 to 4"),
        (torch.zeros(2, 5), np.zeros(3, np.int64), "one target"),
        (torch.zeros(5), np.zeros(1, np.int64), "of 2 axes"),
        (torch.zeros(1, 5, dtype=torch.bfloat16), np.zeros(1, np.int64), "of float32"),
    ):
        with pytest.raises(UsageError, match=message):
            token_scores_cuda(logits.to(device), targets)


class Device(torch.Tensor):
    """A tensor that says it is on a device, wherever it is."""

    is_cuda = True


@pytest.mark.runs_kernel("select_tokens", "score_logits", on="cuda")
def test_the_ops_take_tensors_on_a_device_there(device):
    x = logits_of("normal", 3, 300)
    there = torch.from_numpy(x).to(device).as_subclass(Device)
    filters = {"temperature": 0.8, "top_k": 20, "seed": 5, "step": 2}
    assert select_tokens(there, **filters).tolist() == select_tokens(x, **filters).tolist()
    targets = np.array([0, 5, 299])
    for ours, cpu in zip(token_scores(there, targets), token_scores(x, targets), strict=True):
        np.testing.assert_allclose(ours, cpu, rtol=1e-12)
