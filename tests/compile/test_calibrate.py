"""Calibration: how a text is read, what is chosen for it, what that gains, and what is refused."""

import dataclasses

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")

from portlm.compile import calibrate as module  # noqa: E402
from portlm.compile.calibrate import Text, calibrated, read, readings, windows  # noqa: E402
from portlm.compile.gptq import gptq  # noqa: E402
from portlm.compile.moments import Reader, Site  # noqa: E402
from portlm.compile.quantize import RoundToNearest, Scheme, dequantize  # noqa: E402
from portlm.compile.sensitivity import sensitivities  # noqa: E402
from portlm.errors import FormatError, UsageError  # noqa: E402
from portlm.models import DECODERS, build  # noqa: E402
from portlm.tokenizer import byte_tokenizer  # noqa: E402

INT4 = Scheme(4, 32)
WIDTHS = {
    "gpt2": {"width": 64},
    "llama": {"width": 64, "hidden": 96},
    "gpt_neox": {"width": 64, "hidden": 96},
}
CONTEXT = 32


def tiny(family, **change):
    """A model whose widths groups of 32 divide, with weights that matter."""
    torch.manual_seed(0)
    config = dataclasses.replace(DECODERS[family].config_class().tiny(), **WIDTHS[family], **change)
    model = build(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def text(tokens=2048, vocab=259, seed=0) -> Text:
    """Ids of which some are much likelier than others, as in a language."""
    rng = np.random.default_rng(seed)
    ids = np.minimum(rng.zipf(1.3, tokens + 64), vocab - 1).astype(np.int64)
    return Text("text.txt", ids[:-64], ids[-64:], int(ids[-65]))


def chosen(model, scheme=INT4, of=None):
    return calibrated(model, model.roles(), of or text(), CONTEXT, scheme)


def with_weights(model, quantizer):
    """A copy of the model that computes with what a quantizer chose for each of its matrices."""
    other = build(model.config).eval()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        for name, p in other.named_parameters():
            if p.dim() == 2 and name != "wpe.weight":
                p.copy_(torch.from_numpy(dequantize(quantizer(name, p.numpy()), quantizer.scheme)))
    return other


def divergence(model, other, ids) -> float:
    """Mean KL from the model's predictions, in float64."""
    window = torch.from_numpy(ids[: len(ids) // CONTEXT * CONTEXT].reshape(-1, CONTEXT))
    with torch.no_grad():
        p, q = (each(window).double().log_softmax(-1) for each in (model, other))
    return (p.exp() * (p - q)).sum(-1).mean().item()


# ---- what is chosen ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", WIDTHS)
@pytest.mark.parametrize("scheme", [INT4, Scheme(4, 32, False), Scheme(8, 32)], ids=str)
def test_predictions_stay_nearer_than_by_rounding_on_text_that_was_not_seen(family, scheme):
    """Measured: 0.20 to 0.40 of the divergence of rounding, of models that have learned nothing."""
    model = tiny(family)
    other = text(4096, seed=1).seen
    plain = divergence(model, with_weights(model, RoundToNearest(scheme)), other)
    assert divergence(model, with_weights(model, chosen(model, scheme)), other) < 0.6 * plain


@pytest.mark.parametrize("tied", [False, True])
def test_a_matrix_is_quantized_for_its_inputs_and_a_table_for_what_its_rows_change(tied):
    """Each against the definition; the table of a tied model is both."""
    model = tiny("llama", n_layer=1, tie_embeddings=tied)
    found = chosen(model)
    reader = Reader(model, model.roles())
    moments = {
        name: value
        for site, value in reader.moments(windows(text().seen, CONTEXT)).items()
        for name in site.names
    }
    tables = sensitivities(model, model.roles(), windows(text().seen, CONTEXT, call=module.SHORT))
    assert tables.keys() == {"embed_tokens.weight"}
    for name, value in tables.items():
        moments[name] = moments.get(name, 0) + value
    assert found.numbers.keys() == moments.keys()
    for name, value in moments.items():
        weight = model.get_parameter(name).detach().numpy()
        assert np.array_equal(found.numbers[name].q, gptq(weight, value.astype(np.float64), INT4).q), name


def test_a_matrix_that_no_token_ids_lead_to_is_rounded_to_nearest():
    weight = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)
    found = module.Calibrated(INT4, {})
    assert np.array_equal(found("other", weight).q, RoundToNearest(INT4)("other", weight).q)


def test_the_same_text_gives_the_same_numbers_and_another_text_others():
    model = tiny("gpt2")
    one, same, other = chosen(model), chosen(model), chosen(model, of=text(seed=5))
    for name, numbers in one.numbers.items():
        assert np.array_equal(numbers.q, same.numbers[name].q), name
    assert any((numbers.q != other.numbers[name].q).any() for name, numbers in one.numbers.items())


def test_the_module_is_not_changed():
    model = tiny("gpt2").train()
    before = {name: (p.data_ptr(), p.clone()) for name, p in model.named_parameters()}
    chosen(model)
    assert model.training
    for name, p in model.named_parameters():
        assert p.data_ptr() == before[name][0], name
        assert torch.equal(p, before[name][1]), name
        assert p.grad is None, name


def test_weights_that_may_not_be_written_to_are_not(tmp_path):
    """Export's parameters are views of a file that is mapped for reading, some of them transposed."""
    from portlm.compile.export import open_mapped
    from portlm.models import save_model

    model = tiny("gpt2")
    save_model(tmp_path / "checkpoint", model)
    mapped, file = open_mapped(tmp_path / "checkpoint")
    found, expected = chosen(mapped), chosen(model)
    assert all(np.array_equal(found.numbers[name].q, numbers.q) for name, numbers in expected.numbers.items())
    del file


# ---- how the text is read ------------------------------------------------------------------------------------------


def test_the_last_tenth_of_the_text_is_kept_to_judge_by(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(bytes(range(32, 122)) * 10)
    found = read(path, byte_tokenizer(), 259)
    assert [*found.seen, *found.held_out] == [*path.read_bytes()]
    assert (len(found.held_out), found.before, found.name) == (90, 121, str(path))


def test_windows_are_spread_over_a_long_text_and_come_in_batches():
    ids = np.arange(100_003)
    found = windows(ids, 50, most=10_000)
    assert {batch.shape for batch in found} == {(40, 50)}
    rows = np.concatenate(found)
    assert len(rows) == 200
    assert np.array_equal(rows, rows[:, :1] + np.arange(50))
    assert (rows[0, 0], rows[-1, 0]) == (0, 99_500)


def test_a_text_shorter_than_the_context_is_one_window():
    assert [batch.tolist() for batch in windows(np.arange(5), 8)] == [[[0, 1, 2, 3, 4]]]
    assert [batch.tolist() for batch in windows(np.arange(17), 8, most=8)] == [[list(range(8))]]


def test_the_moments_of_one_reading_are_bounded(monkeypatch):
    sites = [Site((("decoder", i),), (f"w{i}",), 20 if i == 3 else 10) for i in range(7)]
    assert list(map(len, readings(sites))) == [7]
    for most, expected in ((450, [3, 1, 3]), (500, [3, 2, 2]), (1, [1] * 7)):  # one alone has to do
        monkeypatch.setattr(module, "MOMENTS", most)
        assert list(map(len, readings(sites))) == expected
        assert [site for part in readings(sites) for site in part] == sites


def test_several_readings_choose_what_one_does(monkeypatch):
    model = tiny("gpt_neox")
    one = chosen(model)
    monkeypatch.setattr(module, "MOMENTS", 64 * 64 * 2)
    for name, numbers in chosen(model).numbers.items():
        assert np.array_equal(numbers.q, one.numbers[name].q), name


# ---- what is refused -----------------------------------------------------------------------------------------------


def test_a_text_that_is_too_short_is_refused_with_what_is_needed():
    with pytest.raises(
        UsageError, match=r"text\.txt leaves 224 tokens to calibrate with, and a matrix has 256 inputs"
    ):
        chosen(tiny("gpt2"), of=text(255))


@pytest.mark.parametrize(
    ("raw", "error", "words"),
    [
        (b"", FormatError, "is empty: there is no text to read"),
        (b"\xff\xfe\x00", FormatError, "is not UTF-8 text"),
        (b"short", UsageError, "cannot hold out a fraction of 0.1: give more text"),
    ],
)
def test_what_is_no_text_is_refused(tmp_path, raw, error, words):
    (tmp_path / "text.txt").write_bytes(raw)
    with pytest.raises(error, match=words):
        read(tmp_path / "text.txt", byte_tokenizer(), 259)


def test_a_group_that_does_not_divide_is_refused_by_the_name_of_the_matrix():
    with pytest.raises(UsageError, match=r"q_proj\.weight has 64 inputs, which groups of 128 do not"):
        chosen(tiny("llama"), Scheme(4, 128))


def test_a_module_that_no_token_ids_lead_into_is_refused():
    with pytest.raises(UsageError, match="GPT2 has no matrix that token ids lead to"):
        calibrated(tiny("gpt2"), {}, text(), CONTEXT, INT4)


def test_a_text_needs_the_models_own_tokenizer(tmp_path):
    (tmp_path / "text.txt").write_text("z" * 40)
    with pytest.raises(
        UsageError, match=r"text\.txt cannot be read for the model: it has no tokenizer of portlm's"
    ):
        read(tmp_path / "text.txt", None, 259)
    with pytest.raises(UsageError, match=r"text\.txt holds token 122, and the model 100"):
        read(tmp_path / "text.txt", byte_tokenizer(), 100)
