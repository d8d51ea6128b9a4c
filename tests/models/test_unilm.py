"""UniLM: who sees whom in each mode, and a target that is written as the masked model says, on every engine."""

import dataclasses
import json

import pytest
import torch

from portlm.control_tokens import for_reading
from portlm.errors import ConfigError, ContextLengthError
from portlm.hub import import_hf
from portlm.models import build, config_from_hf, load_model, preset, save_model
from portlm.models.bert import BertConfig
from portlm.models.unilm import MODES, PARAMETERS, PRESETS, UniLMConfig, bias_of, seen
from portlm.tokenizer import byte_tokenizer

CONFIG = UniLMConfig.tiny()
CLS, SEP, MASK = 257, 258, 259


@pytest.fixture(scope="module")
def model():
    """A model whose every parameter matters to the result."""
    return random_model()


def random_model(config=CONFIG):
    torch.manual_seed(0)
    model = build(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def tokens(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(seed))


def pair(rows: int = 2, S: int = 5, T: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Sources (B, S) and targets (B, T) with their first tokens."""
    source, target = tokens(rows, S), tokens(rows, T, seed=2)
    source[:, 0], target[:, 0] = CLS, SEP
    return source, target


# ---- who sees whom -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_no_logit_depends_on_a_token_that_it_must_not_see(mode):
    """By the gradient: in float64, exactly 0 where a mode hides, and not 0 where it shows."""
    model = random_model().double()
    kinds = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1]])
    T = kinds.shape[1]
    ids, sees = tokens(1, T), seen(mode, kinds)[0]
    bias, x = bias_of(seen(mode, kinds)).double(), model.embed(ids, kinds).detach().requires_grad_()
    y = x
    for layer in model.layers:
        y = layer(y, None, bias)
    logits = model.apply_head("masked_lm", y)
    for i in range(T):
        # A random direction: summed logits of a position would have a small gradient by the norm in the head.
        direction = torch.randn(logits.shape[-1], generator=torch.Generator().manual_seed(i)).double()
        (gradient,) = torch.autograd.grad(logits[0, i] @ direction, x, retain_graph=True)
        reached = gradient[0].abs().amax(-1) > 0
        assert reached.tolist() == sees[i].tolist()


def test_what_each_mode_shows_is_the_papers():
    kinds = torch.tensor([[0, 0, 1, 1]])
    found = {mode: seen(mode, kinds)[0].int().tolist() for mode in MODES}
    assert found["bidirectional"] == [[1, 1, 1, 1]] * 4
    assert found["left_to_right"] == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    assert found["right_to_left"] == [[1, 1, 1, 1], [0, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1]]
    assert found["seq2seq"] == [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]


def test_a_mode_that_there_is_not_is_named_with_those_there_are():
    with pytest.raises(
        ConfigError, match="must be one of bidirectional, seq2seq, left_to_right, right_to_left"
    ):
        seen("sideways", torch.zeros(1, 3, dtype=torch.int64))


def test_without_a_bias_it_is_bert(model):
    """The same weights under the same names: bit for bit."""
    config = BertConfig.tiny()
    bert = build(dataclasses.replace(config, context_length=CONFIG.longest)).eval()
    bert.load_state_dict(
        {n: p for n, p in model.state_dict().items() if not n.startswith("pooler")}, strict=False
    )
    ids = tokens(2, 9)
    assert torch.equal(bert(ids), model(ids))
    names = [bert.hf_name(name) for name, _ in bert.named_parameters() if not name.startswith("pooler")]
    assert names == [model.hf_name(name) for name, _ in model.named_parameters()]


# ---- writing -----------------------------------------------------------------------------------------------------


def by_masks(model, source, target):
    """The definition: one pass for each token, with a mask behind what is written so far; (B, T, V)."""
    found = []
    for t in range(target.shape[1]):
        ids = torch.cat((source, target[:, : t + 1], torch.full((len(source), 1), MASK)), dim=1)
        kinds = torch.zeros_like(ids)
        kinds[:, source.shape[1] :] = 1
        segments = kinds.clone()
        segments[:, source.shape[1]] = 0
        bias = bias_of(seen("seq2seq", kinds)).to(model.tokens.weight.dtype)
        found.append(model(ids, None, None, segments, None, bias)[:, -1])
    return torch.stack(found, dim=1)


def test_all_answers_of_one_pass_are_those_of_a_mask_behind_each_beginning():
    """In float64 only the order of sums differs, so 1e-10 leaves a margin of 1e4; gradients too."""
    model = random_model().double()
    source, target = pair()
    logits, expected = model.write(source, target), by_masks(model, source, target)
    torch.testing.assert_close(logits, expected, atol=1e-10, rtol=1e-10)
    weights = [p for p in model.parameters() if p.requires_grad]
    probe = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0)).double()
    one, other = (torch.autograd.grad((found * probe).sum(), weights) for found in (logits, expected))
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("cuts", [[6], [1] * 6, [2, 1, 3]], ids=str)
def test_rows_of_different_lengths_are_decoded_in_pieces_as_if_alone(model, cuts):
    """Padded on the left, as engines do. Sums run over other lengths: a few units in the last place."""
    lengths, targets = (3, 7, 5), (2, 6, 4)
    S, T = max(lengths), max(targets)
    ids, mask = torch.zeros(3, S, dtype=torch.int64), torch.zeros(3, S, dtype=torch.int64)
    written, visible = torch.zeros(3, T, dtype=torch.int64), torch.zeros(3, T, dtype=torch.int64)
    alone = []
    for row, (s, t) in enumerate(zip(lengths, targets, strict=True)):
        source, target = (tokens(1, n, seed=row + n) for n in (s, t))
        ids[row, S - s :], mask[row, S - s :] = source, 1
        written[row, T - t :], visible[row, T - t :] = target, 1
        alone.append(model.write(source, target)[0])
    _, memory = model.read(ids, mask, (mask.cumsum(1) - 1).clamp(min=0))
    places, past, pieces, done = (visible.cumsum(1) - 1).clamp(min=0), None, [], 0
    for n in cuts:
        new = slice(done, done + n)
        logits, past = model.step(written[:, new], places[:, new], visible[:, : done + n], memory, mask, past)
        pieces.append(logits)
        done += n
    together = torch.cat(pieces, dim=1)
    for row, t in enumerate(targets):
        torch.testing.assert_close(together[row, T - t :], alone[row], atol=5e-5, rtol=1e-5)


def test_a_source_that_is_padded_on_the_right_is_read_as_if_alone(model):
    source, target = pair(1, 5, 4)
    padded = torch.cat((source, torch.full((1, 3), 7)), dim=1)
    mask = torch.tensor([[1] * 5 + [0] * 3])
    torch.testing.assert_close(
        model.write(padded, target, mask), model.write(source, target), atol=5e-5, rtol=1e-5
    )


def test_more_tokens_than_the_context_are_refused(model):
    short, long = tokens(1, 3), tokens(1, CONFIG.context_length + 1)
    for both in ((short, long), (long, short)):
        with pytest.raises(ContextLengthError, match="33 tokens"):
            model.write(*both)
    model.write(tokens(1, 32), tokens(1, 32))  # the mask behind the last token has a place, too


# ---- configurations and files ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_berts_parameters_and_config_json_holds_them(name):
    config = preset(name)
    assert build(config, device="meta").num_parameters() == PARAMETERS[name]
    assert config_from_hf(json.loads(json.dumps(config.to_hf()))) == config
    assert config.longest == 512


def test_a_saved_model_comes_back_equal(model, tmp_path):
    save_model(tmp_path, model)
    loaded = load_model(tmp_path)
    assert loaded.config == CONFIG
    assert torch.equal(loaded.write(*pair()), model.write(*pair()))
    written = json.loads((tmp_path / "generation_config.json").read_text())
    assert (written["decoder_start_token_id"], written["eos_token_id"]) == (SEP, SEP)


def test_a_bert_becomes_one_by_the_type_in_its_config_json(tmp_path):
    bert = build(
        dataclasses.replace(BertConfig.tiny(), context_length=66, heads=("masked_lm", "next_sentence"))
    )
    tokenizer, _ = for_reading(byte_tokenizer())
    save_model(tmp_path / "bert", bert, tokenizer)
    path = tmp_path / "bert" / "config.json"
    ids = {"model_type": "unilm", "decoder_start_token_id": SEP, "mask_token_id": MASK}
    path.write_text(json.dumps(json.loads(path.read_text()) | ids))
    import_hf(tmp_path / "bert", tmp_path / "ours")
    model = load_model(tmp_path / "ours")
    assert (model.config.family, model.config.context_length) == ("unilm", 32)
    assert torch.equal(model(tokens(1, 9)), bert.eval()(tokens(1, 9)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"max_position_embeddings": 65}, "max_position_embeddings = 65 must be even"),
        ({"type_vocab_size": 1}, "segments of a unilm are source and target: write 2, got 1"),
        ({"mask_token_id": SEP}, "decoder_start_token_id and mask_token_id are both 258"),
        ({"mask_token_id": 262}, "mask_token_id"),
        ({"architectures": ["BertForQuestionAnswering"]}, "architectures"),
        ({"surprise": 1}, "surprise"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_config_json_that_asks_for_another_model_is_refused_by_name(change, words):
    with pytest.raises(ConfigError, match=words):
        config_from_hf(CONFIG.to_hf() | change)


# ---- engines -----------------------------------------------------------------------------------------------------


def test_every_engine_writes_what_masks_say(model, tmp_path):
    """Sources of different lengths together, greedily, on each engine: the tokens of one pass for each."""
    import portlm
    from portlm.compile.build import build_choice
    from portlm.flows.export import export_checkpoint

    tokenizer, _ = for_reading(byte_tokenizer(), closed=False)
    save_model(tmp_path / "checkpoint", model, tokenizer)
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "model")
    texts, expected = ["a source", "x", "some more"], []
    for text in texts:
        source = torch.tensor([tokenizer.encode(text)])
        written = torch.tensor([[SEP]])
        for _ in range(6):
            following = by_masks(model, source, written)[:, -1, : tokenizer.vocab_size].argmax(
                -1, keepdim=True
            )
            written = torch.cat((written, following), dim=1)
            if following == SEP:
                break
        expected.append(written[0, 1:].tolist())
    for engine, device, profile in (
        ("torch", "cpu", "auto"),
        ("ort", "cpu", "portable"),
        ("tvm", "cpu", "fused"),
    ):
        try:
            if engine == "tvm":
                build_choice(tmp_path / "model", engine, device, profile, note=lambda text: None)
            session = portlm.load(tmp_path / "model", engine, device, profile)
        except portlm.errors.EngineUnavailableError as error:
            pytest.skip(str(error))
        with session:
            found = session.translate(texts, max_new_tokens=6, ignore_eos=False)
        for result, tokens_ in zip(found, expected, strict=True):
            assert [t for t in result.token_ids if t != SEP] == [t for t in tokens_ if t != SEP], engine
