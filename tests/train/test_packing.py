"""Packed texts: every token once, few rows, and no text that sees another."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")

from portlm.data.packing import pack  # noqa: E402
from portlm.errors import UsageError  # noqa: E402
from portlm.models import build  # noqa: E402
from portlm.models.bert import BertConfig  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


def texts_of(lengths, seed=0):
    draw = np.random.default_rng(seed)
    return [draw.integers(0, 256, n).tolist() for n in lengths]


def test_every_token_comes_once_in_order_and_texts_do_not_touch_two_rows():
    texts = texts_of(np.random.default_rng(1).integers(1, 33, 100).tolist())
    packed = pack(texts, 32, fill=260)
    for number, text in enumerate(texts):
        rows, places = np.nonzero(packed.texts == number)
        assert len({*rows.tolist()}) == 1
        assert packed.ids[rows, places].tolist() == text
        assert packed.positions[rows, places].tolist() == list(range(len(text)))
    assert (packed.ids[packed.texts == -1] == 260).all()
    least = -(-sum(map(len, texts)) // 32)
    assert len(packed.ids) <= 11 / 9 * least + 1


def test_no_gradient_goes_from_one_packed_text_into_another():
    """By the gradient: in float64, exactly 0 outside of a text, and not 0 for any token of it."""
    torch.manual_seed(0)
    model = build(BertConfig.tiny()).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    packed = pack(texts_of([7, 5, 9, 3, 6]), 16, fill=260)
    ids, positions = torch.from_numpy(packed.ids), torch.from_numpy(packed.positions)
    bias = torch.from_numpy(packed.bias()).double()
    x = model.embed(ids, None, positions).detach().requires_grad_()
    y = x
    for layer in model.layers:
        y = layer(y, None, bias)
    logits = model.apply_head("masked_lm", y)
    which = torch.from_numpy(packed.texts)
    for number in range(5):
        probe = torch.randn(logits.shape, generator=torch.Generator().manual_seed(number)).double()
        (gradient,) = torch.autograd.grad((logits * probe)[which == number].sum(), x, retain_graph=True)
        reached = gradient.abs().amax(-1) > 0
        assert torch.equal(reached, which == number)


def test_a_packed_text_is_computed_as_if_alone():
    """In float64 only the order of sums differs: 1e-10 leaves a margin of 1e4."""
    torch.manual_seed(0)
    model, texts = build(BertConfig.tiny()).double().eval(), texts_of([7, 5, 9, 3, 6])
    packed = pack(texts, 16, fill=260)
    logits = model(
        torch.from_numpy(packed.ids), None, None, None, torch.from_numpy(packed.positions),
        torch.from_numpy(packed.bias()).double(),
    )  # fmt: skip
    for number, text in enumerate(texts):
        alone = model(torch.tensor([text]))[0]
        torch.testing.assert_close(
            logits[torch.from_numpy(packed.texts == number)], alone, atol=1e-10, rtol=1e-10
        )


@pytest.mark.parametrize("texts", [[], [[1], []], [[1] * 9]], ids=["none", "empty", "long"])
def test_what_does_not_fit_a_row_is_refused(texts):
    with pytest.raises(UsageError, match="each text must have 1 to 8 tokens"):
        pack(texts, 8, fill=0)
