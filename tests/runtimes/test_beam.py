"""Beam search and penalties give what transformers' generate gives on the same weights."""

import numpy as np
import pytest

import portlm
from portlm.errors import UsageError
from portlm.runtimes.base import ArrayEngine
from portlm.runtimes.beam import largest
from portlm.runtimes.decoding import Decoding
from portlm.runtimes.null import DECODER, NullEngine
from portlm.runtimes.penalties import penalise
from portlm.runtimes.session import Session
from portlm.tokenizer import byte_tokenizer

torch = pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")
transformers = pytest.importorskip("transformers", reason="transformers is missing: pip install portlm[hf]")

V = 61
EOS = {"gpt2": [60, 10, 20, 30, 40, 50], "llama": [21, 8]}
PROMPTS = [[3, 7, 7, 11], [40, 41], [9] * 9]


def foreign(family):
    """A random model of transformers whose end of text is likely enough to come at any time."""
    torch.manual_seed(4)
    special = {"bos_token_id": None, "eos_token_id": EOS[family], "pad_token_id": None}
    if family == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=V, n_positions=64, n_embd=32, n_layer=2, n_head=4,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **special,
        )  # fmt: skip
        model = transformers.GPT2LMHeadModel(config)
    else:
        config = transformers.LlamaConfig(
            vocab_size=V, max_position_embeddings=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False, **special,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.25 * torch.randn(p.shape, generator=generator) + (p if p.dim() == 1 else 0))
    return model.eval()


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def pair(request, tmp_path_factory):
    """The same weights in transformers, and in a session of ours."""
    from portlm.hub import import_hf

    folder = tmp_path_factory.mktemp("beam")
    model = foreign(request.param)
    model.save_pretrained(folder / "theirs")
    import_hf(folder / "theirs", folder / "ours")
    with portlm.load(folder / "ours", "torch", "cpu") as session:
        yield model, session


def theirs(model, prompt, new, **options):
    ids = torch.tensor([prompt])
    with torch.no_grad():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
            **options,
        )
    tokens = out[0, len(prompt) :].tolist()
    ends = [i for i, token in enumerate(tokens) if token in model.config.eos_token_id]
    return tuple(tokens[: ends[0] + 1] if ends else tokens)


@pytest.mark.parametrize("early_stopping", [True, False, "never"])
@pytest.mark.parametrize(("num_beams", "length_penalty"), [(2, 1.0), (4, 0.0), (4, 2.0), (5, -1.0)])
def test_hypotheses_are_those_of_transformers(pair, num_beams, length_penalty, early_stopping):
    model, session = pair
    options = {
        "num_beams": num_beams, "length_penalty": length_penalty, "early_stopping": early_stopping,
    }  # fmt: skip
    ours = session.generate(PROMPTS, max_new_tokens=20, **options)
    assert [r.token_ids for r in ours] == [theirs(model, prompt, 20, **options) for prompt in PROMPTS]


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.3}, {"repetition_penalty": 0.8}, {"no_repeat_ngram_size": 2},
        {"no_repeat_ngram_size": 1}, {"repetition_penalty": 1.7, "no_repeat_ngram_size": 3},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("num_beams", [1, 3])
def test_penalties_are_those_of_transformers(pair, options, num_beams):
    model, session = pair
    ours = session.generate(PROMPTS, max_new_tokens=24, num_beams=num_beams, **options)
    assert [r.token_ids for r in ours] == [
        theirs(model, prompt, 24, num_beams=num_beams, **options) for prompt in PROMPTS
    ]


def test_the_settings_of_these_tests_matter(pair):
    """Otherwise equal hypotheses would prove little: searches end early and late, and differ from greedy decoding."""
    model, _ = pair
    texts = {
        name: [theirs(model, prompt, 20, **options) for prompt in PROMPTS]
        for name, options in {
            "greedy": {},
            "short": {"num_beams": 5, "length_penalty": -1.0, "early_stopping": True},
            "long": {"num_beams": 4, "length_penalty": 2.0, "early_stopping": "never"},
        }.items()
    }
    assert texts["greedy"] != texts["long"] != texts["short"] != texts["greedy"]
    assert min(len(tokens) for tokens in texts["short"]) < 20  # some end by themselves


def test_a_search_does_not_depend_on_the_batch(pair):
    _, session = pair
    options = {"num_beams": 3, "max_new_tokens": 16}
    together = session.generate(PROMPTS, batch_size=64, **options)
    assert [r.token_ids for r in together] == [
        session.generate([prompt], **options)[0].token_ids for prompt in PROMPTS
    ]
    assert [r.token_ids for r in session.generate(PROMPTS, batch_size=1, **options)] == [
        r.token_ids for r in together
    ]


class Garden(ArrayEngine):
    """A model of four tokens whose most probable first token leads to nothing: a search finds the better path."""

    name, device, profile, precision = "garden", "cpu", "native", "fp32"

    def __init__(self):
        super().__init__({"decoder": DECODER}, 4, 16)

    def _call(self, role, inputs, tensors):
        ids = np.concatenate([tensors["past_ids"], inputs["input_ids"]], axis=1)
        p = {0: [0.1, 0.5, 0.4, 1e-9], 1: [0.25, 0.25, 0.25, 0.25], 2: [0.01, 0.01, 0.97, 0.01]}
        logits = np.log(np.array([p.get(int(row[-1]), p[1]) for row in ids], np.float32))
        return {"logits": logits[:, None]}, {"past_ids": ids}


def test_a_search_finds_what_greedy_decoding_misses():
    from portlm.runtimes.no_tokenizer import NoTokenizer

    session = Session(Garden(), NoTokenizer(4))
    assert session.generate([[0]], max_new_tokens=3)[0].token_ids == (1, 0, 1)
    assert session.generate([[0]], max_new_tokens=3, num_beams=2)[0].token_ids == (2, 2, 2)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_rules_that_leave_no_token_are_one_error(num_beams):
    """A search ended in an IndexError, and greedy decoding blamed the weights."""
    from portlm.runtimes.no_tokenizer import NoTokenizer

    session = Session(Garden(), NoTokenizer(4))
    options = {"no_repeat_ngram_size": 1, "num_beams": num_beams}
    assert len(session.generate([[0]], max_new_tokens=3, **options)[0].token_ids) == 3
    with pytest.raises(UsageError, match="no_repeat_ngram_size = 1 forbids every token"):
        session.generate([[0]], max_new_tokens=4, **options)


def test_stop_strings_need_a_tokenizer():
    from portlm.runtimes.no_tokenizer import NoTokenizer

    with pytest.raises(UsageError, match=r"no tokenizer.*stop string"):
        Session(Garden(), NoTokenizer(4)).generate([[0]], max_new_tokens=3, stop="x")


def test_a_search_ends_texts_and_reports_them_as_any_other():
    session = Session(NullEngine(257, 64), byte_tokenizer(eos="<|endoftext|>"))
    result = session.generate("abc", max_new_tokens=4, num_beams=3)
    assert (result.text, result.finish_reason, result.stats.new_tokens) == ("defg", "length", 4)
    result = session.generate([[254]], max_new_tokens=8, num_beams=3, length_penalty=0.0)[0]
    assert (result.token_ids, result.finish_reason) == ((255, 256), "eos")


def test_a_search_with_something_else_is_refused():
    session = Session(NullEngine(257, 64), byte_tokenizer(eos="<|endoftext|>"))
    for options, words in (
        ({"temperature": 1.0}, "needs temperature 0"), ({"stop": "x"}, "no stop strings"),
        ({"num_beams": 0}, "num_beams"), ({"num_beams": 1000}, "from 1 to 256"),
        ({"early_stopping": "soon"}, "early_stopping"),
        ({"length_penalty": float("nan")}, "length_penalty"), ({"length_penalty": -1e308}, "from -32 to 32"),
        ({"length_penalty": 33}, "from -32 to 32"), ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size"), ({"num_beam": 2}, "did you mean num_beams"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=words):
            session.generate("a", **{"max_new_tokens": 2, "num_beams": 2, **options})
    with pytest.raises(UsageError, match="cannot be streamed"):
        session.stream("a", num_beams=2)


def test_penalties_by_hand():
    scores = np.array([2.0, -2.0, 1.0, 4.0], np.float32)
    penalise(scores, [0, 1, 0], Decoding(repetition_penalty=2.0))
    assert scores.tolist() == [1.0, -4.0, 1.0, 4.0]
    scores = np.zeros(4, np.float32)
    penalise(scores, [1, 2, 3, 1], Decoding(no_repeat_ngram_size=2))
    assert np.isneginf(scores).tolist() == [False, False, True, False]
    penalise(scores, [], Decoding(no_repeat_ngram_size=1, repetition_penalty=1.5))  # nothing was said yet


def test_options_are_the_fields_of_one_dataclass():
    from dataclasses import fields

    from portlm.runtimes.decoding import Options

    assert list(Options.__annotations__) == [field.name for field in fields(Decoding)]


@pytest.mark.parametrize(
    ("size", "count"), [(7, 7), (64 * 10, 10), (64 * 11 + 5, 10), (64 * 300 + 63, 15), (64, 1)]
)
def test_the_largest_values_are_found_wherever_they_stand(size, count):
    generator = np.random.default_rng(size)
    for drawn in (
        generator.normal(size=size),
        generator.integers(0, 3, size).astype(np.float64),  # ties
        np.sort(generator.normal(size=size)),  # all of them in the last blocks, and behind those
        np.where(np.arange(size) == size // 2, 0.0, -np.inf),
    ):
        found = largest(drawn, count)
        assert len(set(found.tolist())) == count
        assert drawn[found].tolist() == np.sort(drawn)[::-1][:count].tolist()
