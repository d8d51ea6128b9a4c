"""What another form of a model costs on a text: the numbers against a float64 computation, windows, refusals."""

import dataclasses
import math

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")

from portlm.errors import PortlmError, UsageError  # noqa: E402
from portlm.flows import quality as module  # noqa: E402
from portlm.flows.quality import quality  # noqa: E402
from portlm.models import DECODERS, build  # noqa: E402
from portlm.runtimes.eager import TorchEngine  # noqa: E402
from portlm.runtimes.no_tokenizer import NoTokenizer  # noqa: E402
from portlm.runtimes.null import NullEngine  # noqa: E402
from portlm.runtimes.session import Session  # noqa: E402


def tiny(family="gpt2", seed=0, noise=0.3):
    """A model that has opinions: its logits differ from token to token."""
    torch.manual_seed(seed)
    model = build(dataclasses.replace(DECODERS[family].config_class().tiny(), n_layer=1)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(noise * torch.randn_like(p))
    return model


def changed(model, amount=0.02):
    """The same model with a little noise in its weights, which stands for what quantizing does."""
    torch.manual_seed(7)
    other = build(model.config).eval()
    with torch.no_grad():
        for p, own in zip(other.parameters(), model.parameters(), strict=True):
            p.copy_(own + amount * torch.randn_like(own))
    return other


def engine(model):
    return TorchEngine.of(model, "cpu")


def text(model, count, seed=1):
    return np.random.default_rng(seed).integers(0, model.config.vocab_size, count)


def oracle(model, other, ids, before, behind=0):
    """The same in float64, window by window, through the models' own forward."""
    T = model.config.context_length
    inputs = ids[:-1] if before is None else np.concatenate([[before], ids[:-1]])
    targets = ids[1:] if before is None else ids
    totals, same, tokens = [0.0, 0.0, 0.0], 0, 0
    for begin in range(0, len(targets), T):
        window = torch.from_numpy(inputs[begin : begin + T])[None]
        with torch.no_grad():
            p, q = (m.double()(window)[0].log_softmax(-1)[behind:] for m in (model, other))
        wanted = torch.from_numpy(targets[begin : begin + T])[behind:, None]
        tokens += len(wanted)
        totals[0] -= p.gather(1, wanted).sum().item()
        totals[1] -= q.gather(1, wanted).sum().item()
        totals[2] += (p.exp() * (p - q)).sum().item()
        same += (p.argmax(1) == q.argmax(1)).sum().item()
    nll, other_nll, kl = (value / tokens for value in totals)
    return math.exp(nll), math.exp(other_nll), kl, same / tokens


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize(("count", "before"), [(150, None), (150, 3), (33, None), (2, None), (1, 0)], ids=str)
def test_the_numbers_are_those_of_float64(family, count, before):
    """Windows that the context divides, a last one that is shorter, one token. The bound is of logits in float32."""
    model = tiny(family)
    other, ids = changed(model), text(model, count)
    found = quality(engine(model), engine(other), ids, before=before, batch_size=3)
    perplexity, other_perplexity, kl, top1 = oracle(model, other, ids, before)
    assert found.tokens == count - (before is None)
    assert found.perplexity == pytest.approx(perplexity, rel=1e-5)
    assert found.quantized_perplexity == pytest.approx(other_perplexity, rel=1e-5)
    assert found.kl == pytest.approx(kl, rel=1e-4, abs=1e-7)
    assert found.top1 == pytest.approx(top1, abs=1e-12)
    assert found.ratio == pytest.approx(other_perplexity / perplexity, rel=2e-5)


@pytest.mark.parametrize(("count", "behind", "tokens"), [(150, 31, 4), (150, 20, 50), (40, 12, 20)])
def test_what_is_predicted_from_less_may_be_left_out(count, behind, tokens):
    """Of windows of 32 tokens, the last of which is shorter or, in two of the cases, too short."""
    model = tiny()
    other, ids = changed(model), text(model, count)
    found = quality(engine(model), engine(other), ids, before=3, behind=behind)
    expected = oracle(model, other, ids, 3, behind)
    assert found.tokens == tokens
    assert (found.perplexity, found.quantized_perplexity, found.kl) == pytest.approx(expected[:3], rel=1e-4)
    assert found.top1 == pytest.approx(expected[3], abs=1e-12)
    with pytest.raises(UsageError, match="nothing to predict behind 32 tokens"):
        quality(engine(model), engine(other), ids, before=3, behind=32)


def test_a_model_costs_nothing_beside_itself():
    model = tiny()
    found = quality(engine(model), engine(model), text(model, 70))
    assert (found.ratio, found.kl, found.top1) == (1.0, 0.0, 1.0)


def test_the_same_text_gives_the_same_bits():
    model = tiny()
    other, ids = changed(model), text(model, 100)
    assert quality(engine(model), engine(other), ids) == quality(engine(model), engine(other), ids)


@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_batches_and_parts_of_the_comparison_change_rounding_only(batch_size, monkeypatch):
    model = tiny()
    other, ids = changed(model), text(model, 131)
    expected = quality(engine(model), engine(other), ids)
    monkeypatch.setattr(module, "_NUMBERS", 259 * 5)
    found = quality(engine(model), engine(other), ids, batch_size=batch_size)
    assert dataclasses.astuple(found) == pytest.approx(dataclasses.astuple(expected), rel=1e-6)


def test_sessions_are_taken_as_the_engines_in_them():
    model = tiny()
    other, ids = changed(model), text(model, 40)
    sessions = [Session(engine(m), NoTokenizer(model.config.vocab_size, "")) for m in (model, other)]
    assert quality(*sessions, ids) == quality(engine(model), engine(other), ids)


def test_logits_far_apart_do_not_overflow():
    model, other = tiny(), tiny()
    with torch.no_grad():
        other.ln_f.weight.mul_(1e4)
    found = quality(engine(model), engine(other), text(model, 40))
    assert 1e3 < found.kl < math.inf


def test_what_cannot_be_compared_is_refused():
    model = tiny()
    with pytest.raises(UsageError, match=r"one model has 259 ids and 32 positions, the other 259 and 31"):
        quality(engine(model), NullEngine(259, 31), text(model, 40))
    with pytest.raises(UsageError, match="nothing to predict"):
        quality(engine(model), engine(model), [5])
    with pytest.raises(UsageError, match="from 0 to 258"):
        quality(engine(model), engine(model), [5, 259, 3])


def test_logits_that_are_not_numbers_are_refused():
    model, other = tiny(), tiny()
    with torch.no_grad():
        other.ln_f.bias[0] = torch.nan
    with pytest.raises(PortlmError, match="torch:cpu native: its logits on this text are not numbers"):
        quality(engine(model), engine(other), text(model, 40))
