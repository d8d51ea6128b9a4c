"""What a model's generation_config.json says of sampling holds where a call says nothing, as with transformers."""

import json
import shutil

import numpy as np
import pytest

import portlm
from portlm.errors import FormatError, UsageError
from portlm.hub import export_hf, import_hf
from portlm.runtimes.decoding import Decoding
from portlm.runtimes.null import NullEngine
from portlm.runtimes.session import Session
from portlm.tokenizer import byte_tokenizer

BYTES = byte_tokenizer("<|endoftext|>")


def null(**defaults):
    return Session(NullEngine(257, 64), BYTES, defaults=defaults)


@pytest.fixture
def folder(checkpoints, tmp_path):
    """Function: settings -> a checkpoint whose generation_config.json has them."""

    def make(**content):
        path = tmp_path / "model"
        if not path.exists():
            shutil.copytree(checkpoints["gpt2"], path)
        (path / "generation_config.json").write_text(json.dumps({"eos_token_id": 256, **content}))
        return path

    return make


def test_the_models_settings_hold_where_a_call_says_nothing(folder):
    settings = {
        "do_sample": True,
        "temperature": 2.5,
        "top_p": 0.95,
        "min_p": 1e-3,
        "repetition_penalty": 1.5,
    }
    with portlm.load(folder(**settings), "torch", "cpu") as session:
        assert session.defaults == {
            "temperature": 2.5, "top_k": 50, "top_p": 0.95, "min_p": 1e-3, "repetition_penalty": 1.5,
        }  # fmt: skip
        said = session.generate("abc", seed=3, max_new_tokens=20).token_ids
        explicit = Decoding(seed=3, max_new_tokens=20, **session.defaults)
        assert session.generate("abc", decoding=explicit).token_ids == said
        stream = session.stream("abc", seed=3, max_new_tokens=20)
        assert list(stream.ids()) == list(said)
        assert session.generate("abc", seed=4, max_new_tokens=20).token_ids != said
        # an argument wins, one by one; a whole Decoding says everything
        greedy = session.generate("abc", temperature=0, repetition_penalty=1, max_new_tokens=20).token_ids
        assert session.generate("abc", decoding=Decoding(), max_new_tokens=20).token_ids == greedy != said
        assert session.decoding(top_k=7) == Decoding(**{**session.defaults, "top_k": 7})
        assert session.decoding(Decoding(), top_k=7) == Decoding(top_k=7)


@pytest.mark.parametrize(
    "settings", [{}, {"do_sample": False, "temperature": 2.0}, {"temperature": 2.0, "top_k": 9}]
)
def test_a_model_that_does_not_ask_for_samples_is_greedy(folder, settings):
    with portlm.load(folder(**settings), "torch", "cpu") as session:
        for seed in (1, 2):
            answer = session.generate("abc", seed=seed, max_new_tokens=20).token_ids
            assert answer == session.generate("abc", decoding=Decoding(max_new_tokens=20)).token_ids
        # a temperature that the call gives samples as the file says for the rest
        assert session.decoding(temperature=1.0).top_k == settings.get("top_k", 0)


def test_a_top_k_beyond_the_vocabulary_keeps_every_token(folder):
    """As in transformers, where 50 is the default whatever the vocabulary is."""
    with portlm.load(folder(do_sample=True, top_k=10**6), "torch", "cpu") as session:
        assert session.defaults["top_k"] == 257
        assert session.generate("abc", max_new_tokens=3).new_tokens == 3
        with pytest.raises(UsageError, match="top_k must be a whole number from 0 to 257, got 300"):
            session.generate("abc", top_k=300)


CASES = [
    {"do_sample": True}, {"do_sample": True, "temperature": 0.7}, {"do_sample": True, "top_k": 0, "top_p": 0.8},
    {"do_sample": True, "top_k": 3, "min_p": 0.05, "temperature": 1.5}, {"temperature": 0.7, "top_k": 5},
    {"do_sample": True, "top_p": 0.0}, {"do_sample": False, "temperature": 0.0}, {"repetition_penalty": 1.3},
    {"do_sample": True, "repetition_penalty": 0.7, "no_repeat_ngram_size": 2, "top_k": 20},
]  # fmt: skip


@pytest.mark.parametrize("settings", CASES, ids=str)
def test_the_tokens_that_may_be_drawn_are_those_of_transformers(folder, settings):
    """And so are their probabilities: transformers' processors for this file, on these logits, beside what is drawn."""
    torch = pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")
    transformers = pytest.importorskip(
        "transformers", reason="transformers is missing: pip install portlm[hf]"
    )
    path, prompt = folder(**settings), [7, 8, 9, 7, 8]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path)
    config, _ = theirs._prepare_generation_config(None)
    ids = torch.tensor([prompt])
    processors = theirs._get_logits_processor(config, input_ids_seq_length=len(prompt), device="cpu")
    with torch.no_grad():
        scores = processors(ids, theirs(ids).logits[:, -1]).double()[0]
    expected = torch.softmax(scores, -1).numpy()
    if config.do_sample is not True:
        expected = np.eye(257)[expected.argmax()]
    draws = 4000 if (expected > 0).sum() > 1 else 40
    with portlm.load(path, "torch", "cpu") as session:
        answers = session.generate([prompt] * draws, max_new_tokens=1, ignore_eos=True, batch_size=500)
    counts = np.bincount([answer.token_ids[0] for answer in answers], minlength=257)
    assert not counts[expected == 0].any()
    # Five standard deviations of a count, for each of some 50 tokens of some ten cases.
    assert (np.abs(counts - draws * expected) <= 5 * np.sqrt(draws * expected * (1 - expected)) + 1).all()


@pytest.mark.parametrize(
    "settings",
    [
        {"max_new_tokens": 6}, {"max_length": 9}, {"max_new_tokens": 6, "max_length": 9}, {"max_length": 30},
        {"num_beams": 3, "max_new_tokens": 9}, {"repetition_penalty": 1.4, "max_length": 20},
        {"num_beams": 2, "length_penalty": -1.0, "early_stopping": True, "max_new_tokens": 12},
        {"no_repeat_ngram_size": 2, "max_new_tokens": 30},
    ],
    ids=str,
)  # fmt: skip
def test_the_text_of_a_model_that_is_not_sampled_is_that_of_transformers(folder, settings):
    torch = pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")
    transformers = pytest.importorskip(
        "transformers", reason="transformers is missing: pip install portlm[hf]"
    )
    path, prompt = folder(pad_token_id=256, **settings), [7, 8, 9]
    expected = transformers.AutoModelForCausalLM.from_pretrained(path).generate(torch.tensor([prompt]))[0, 3:]
    with portlm.load(path, "torch", "cpu") as session:
        assert list(session.generate(prompt).token_ids) == expected.tolist()


def test_the_models_bounds_give_way_to_the_context_and_to_a_number_that_is_asked_for(folder):
    for bound in ({"max_new_tokens": 999}, {"max_length": 999}):
        with portlm.load(folder(**bound), "null") as session:
            assert session.generate("abc", ignore_eos=True).new_tokens == 45  # the context holds 48
            assert session.generate("abc", max_new_tokens=2).new_tokens == 2
            assert session.generate("abc", decoding=Decoding(max_new_tokens=2)).new_tokens == 2
    with portlm.load(folder(max_length=4), "null") as session:
        assert session.generate("abc").new_tokens == 1
        with pytest.raises(
            UsageError, match="the prompt has 4 tokens, and with max_length = 4, this model's default"
        ):
            session.generate("abcd")
        assert session.generate("abcd", max_new_tokens=2).new_tokens == 2
        assert session.generate("abcd", decoding=Decoding(), ignore_eos=True).new_tokens == 44


def test_stop_strings_of_the_model_end_a_text_and_are_nothing_to_token_ids(folder):
    path = folder(stop_strings=["fg", "zz"])
    with portlm.load(path, "null") as session:
        assert session.generate("abc", max_new_tokens=9).text == "de"
        assert session.generate("abc", max_new_tokens=5, stop=()).text == "defgh"
    (path / "tokenizer.json").unlink()
    with portlm.load(path, "null") as session:
        assert session.generate([97], max_new_tokens=9).new_tokens == 9


@pytest.mark.parametrize(
    ("defaults", "options", "words"),
    [
        (
            {"num_beams": 4, "temperature": 0.5},
            {},
            r"\(num_beams = 4, temperature = 0.5 is this model's default",
        ),
        (
            {"num_beams": 4},
            {"temperature": 0.5},
            r"it needs temperature 0 \(num_beams = 4 is this model's default",
        ),
        (
            {"temperature": 0.5},
            {"num_beams": 4},
            r"it needs temperature 0 \(temperature = 0.5 is this model's default",
        ),
        (
            {"num_beams": 4},
            {"stop": "x"},
            r"it needs no stop strings \(num_beams = 4 is this model's default",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_an_error_that_says_which_are_the_models(
    defaults, options, words
):
    with pytest.raises(UsageError, match=words):
        null(**defaults).generate("a", **options)


def test_an_error_of_an_argument_does_not_blame_the_model():
    with pytest.raises(UsageError) as error:
        null(num_beams=4).generate("a", top_p=7)
    assert "model's default" not in str(error.value)


def test_a_model_that_asks_for_beams_is_not_streamed_unless_the_call_says_one():
    session = null(num_beams=4)
    with pytest.raises(UsageError, match=r"cannot be streamed.*num_beams = 4 is this model's default"):
        session.stream("a")
    assert "".join(session.stream("a", num_beams=1, max_new_tokens=2)) == "bc"


@pytest.mark.parametrize("defaults", [{"temperature": -1}, {"max_length": 0}, {"unknown": 1}])
def test_a_default_out_of_range_is_refused_when_the_session_is_made(defaults):
    with pytest.raises(UsageError):
        null(**defaults)


# --- import, export, and what must stay as it is ------------------------------------------------------


def test_an_import_keeps_what_is_used_and_names_what_is_not(folder, tmp_path):
    said = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "stop_strings": ["x"], "pad_token_id": 0}
    report = import_hf(folder(**said, typical_p=0.5, top_k=-3, use_cache=True), tmp_path / "imported")
    mine = [note for note in report.notes if "generation_config" in note]
    assert mine == [
        "generation_config.json: top_k must be a whole number from 0 to 2147483647, got -3, and was left out",
        "generation_config.json: 'typical_p' left out, portlm does not use them",
    ]
    kept = json.loads((tmp_path / "imported" / "generation_config.json").read_text())
    assert kept == {**said, "eos_token_id": 256}
    assert not [
        note for note in export_hf(tmp_path / "imported", tmp_path / "back").notes if "generation" in note
    ]
    assert json.loads((tmp_path / "back" / "generation_config.json").read_text()) == kept
    with portlm.load(tmp_path / "imported", "null") as session:
        assert session.defaults == {"temperature": 0.6, "top_k": 50, "top_p": 0.9, "stop": ("x",)}
    beams = import_hf(folder(do_sample=True, num_beams=3), tmp_path / "beams").notes
    assert any("samples of beams, which portlm does not draw" in note for note in beams)


def test_what_could_not_be_loaded_is_not_exported(folder, tmp_path):
    from portlm.compile.export import export

    for settings in ({"temperature": "hot"}, {"top_k": -1}):
        with pytest.raises(
            FormatError, match=r"generation_config\.json: .* correct the file, or remove the key"
        ):
            portlm.load(folder(**settings), "null")
        with pytest.raises(
            FormatError, match=r"generation_config\.json: .* correct the file, or remove the key"
        ):
            export(folder(**settings), tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_verifying_and_measuring_are_greedy_whatever_the_model_says(folder, tmp_path, monkeypatch):
    """The certificate of a model that asks for hot samples of beams is, to the byte, that of the same without."""
    from portlm.compile.export import export
    from portlm.flows.bench_worker import Worker
    from portlm.flows.targets import Target
    from portlm.flows.verify import verify_artifact

    def refuse(*_, **__):
        raise AssertionError("what is sampled by default is not what is measured")

    monkeypatch.setattr(Session, "generate", refuse)
    monkeypatch.setattr(Session, "stream", refuse)
    answers, settings = [], {"do_sample": True, "temperature": 9.0, "num_beams": 3, "repetition_penalty": 5.0}
    for name, content in (("plain", {}), ("hot", settings)):
        artifact = export(folder(**content), tmp_path / name)
        (result,) = verify_artifact(artifact, [Target("torch", "cpu", "native")], certify=True)
        assert result.problem is None
        answers.append((artifact / "parity.safetensors").read_bytes())
        worker = Worker()
        worker.load(str(artifact), "torch", "cpu", "auto", None)
        assert worker.prefill(4, 0)["seconds"] > 0
        assert worker.decode(4, 4, 0)["seconds"] > 0
        worker.session.close()
    assert answers[0] == answers[1]


def test_an_old_folder_says_it_in_config_json(checkpoints, tmp_path):
    """So did transformers before there was a generation_config.json, and it reads it there to this day."""
    transformers = pytest.importorskip(
        "transformers", reason="transformers is missing: pip install portlm[hf]"
    )
    old = shutil.copytree(checkpoints["gpt2"], tmp_path / "old")
    (old / "generation_config.json").unlink()
    settings = {"do_sample": True, "temperature": 0.5, "top_k": 7, "max_length": 33}
    config = json.loads((old / "config.json").read_text())
    tasks = {"text-generation": {"do_sample": True, "max_length": 50}}  # of pipelines, not of the model
    (old / "config.json").write_text(json.dumps({**config, **settings, "task_specific_params": tasks}))
    import_hf(old, tmp_path / "imported")
    expected = {"temperature": 0.5, "top_k": 7, "max_length": 33}
    for path in (old, tmp_path / "imported"):
        theirs = transformers.AutoModelForCausalLM.from_pretrained(path).generation_config
        assert {name: getattr(theirs, name) for name in settings} == settings
        with portlm.load(path, "null") as session:
            assert session.defaults == expected
            assert 256 in session.eos_ids


@pytest.fixture
def with_bos(checkpoints, tmp_path):
    """A checkpoint whose tokenizer puts <s> before every text, as LLaMA 3's does."""
    folder = shutil.copytree(checkpoints["gpt2"], tmp_path / "bos")
    content = json.loads((folder / "tokenizer.json").read_text())
    bos = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
    text = [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"]
    content["post_processor"] = {
        "type": "TemplateProcessing", "single": [bos, text[0]], "pair": [bos, *text],
        "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [256], "tokens": ["<|endoftext|>"]}},
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


def test_a_text_is_continued_and_scored_behind_the_bos_that_transformers_puts_there(with_bos):
    torch = pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")
    transformers = pytest.importorskip(
        "transformers", reason="transformers is missing: pip install portlm[hf]"
    )
    theirs = transformers.AutoModelForCausalLM.from_pretrained(with_bos)
    tokenizer = transformers.AutoTokenizer.from_pretrained(with_bos)
    with portlm.load(with_bos, "torch", "cpu") as session:
        for bos in (True, False):
            ids = tokenizer("the cat", return_tensors="pt", add_special_tokens=bos)["input_ids"]
            assert ids[0, 0].item() == (256 if bos else ord("t"))
            expected = theirs.generate(ids, max_new_tokens=12, pad_token_id=256)[0, ids.shape[1] :].tolist()
            answer = session.generate("the cat", max_new_tokens=12, add_special_tokens=bos)
            assert (list(answer.token_ids), answer.prompt_tokens) == (expected, ids.shape[1])
            with torch.no_grad():
                wanted = torch.log_softmax(theirs(ids).logits.double(), -1)[0, :-1].gather(
                    1, ids[0, 1:, None]
                )
            score = session.score("the cat", add_special_tokens=bos)
            assert score.token_ids == tuple(ids[0].tolist())
            np.testing.assert_allclose(score.logprobs, wanted[:, 0].numpy(), rtol=0, atol=1e-4)
        assert session.generate("", max_new_tokens=3).prompt_tokens == 1
