"""A model with an encoder reads a source and writes a target: the same on every engine, alone and among others."""

import dataclasses
import json

import pytest
from click.testing import CliRunner

pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")
pytest.importorskip("onnx", reason="onnx is missing: pip install portlm[onnx]")

import torch

import portlm
from portlm.artifact import read_manifest
from portlm.commands.translate import command
from portlm.engine import goes_back
from portlm.errors import ContextLengthError, EngineUnavailableError, UsageError
from portlm.flows.export import export_checkpoint
from portlm.flows.targets import Target
from portlm.flows.verify import verify_artifact
from portlm.memory import read_sources, reads_sources
from portlm.models import FAMILIES, build, load_model, save_model
from portlm.tokenizer import byte_tokenizer

FAMILY = [name for name, family in FAMILIES.items() if family.kind == "encoder-decoder"]
TARGETS = ["torch:cpu:native", "torch:cpu:fused", "ort:cpu:portable", "ort:cpu:fused", "tvm:cpu:fused"]
SOURCES = ["A house.", "x", "a much longer source than the others", "12"]
START, EOS = 258, 256
# Scale of the embedding and seed with which every source has a target of its own: most random models say one thing.
DRAWN = {"marian": (0.5, 0), "bart": (0.05, 3), "encoder-decoder": (0.2, 2)}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Folders of tiny models whose answers depend on the source and on what was written."""
    root, folders = tmp_path_factory.mktemp("checkpoints"), {}
    for name in FAMILY:
        scale, seed = DRAWN.get(name, (0.2, 0))
        torch.manual_seed(seed)
        config = FAMILIES[name].config_class().tiny()
        model = build(dataclasses.replace(config, context_length=48)).eval()
        with torch.no_grad():
            for key, p in model.named_parameters():
                if p.dim() > 1:
                    p.normal_(0.0, scale if key.startswith("shared") else 0.4)
                elif key.endswith("bias"):
                    p.normal_(0.0, 0.3)
                else:
                    p.add_(0.5 * torch.randn_like(p))
        folders[name] = root / name
        save_model(folders[name], model, byte_tokenizer(eos="<|endoftext|>"))
    return folders


@pytest.fixture(scope="module")
def artifacts(checkpoints, tmp_path_factory):
    root = tmp_path_factory.mktemp("artifacts")
    return {name: export_checkpoint(folder, root / name) for name, folder in checkpoints.items()}


@pytest.fixture(scope="module", params=FAMILY)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def open_on(artifacts):
    opened = {}

    def open_one(family, target):
        if (family, target) not in opened:
            engine, device, profile = target.split(":")
            try:
                opened[family, target] = portlm.load(artifacts[family], engine, device, profile)
            except EngineUnavailableError as error:
                pytest.skip(str(error))
        return opened[family, target]

    yield open_one
    for session in opened.values():
        session.close()


def by_hand(model, source: str, count: int) -> list[int]:
    """The greedy target of a source, read again as a whole for every token."""
    ids, written = torch.tensor([list(source.encode())]), [START]
    for _ in range(count):
        with torch.no_grad():
            logits = model(ids, torch.tensor([written]))[0, -1, :257]
        written.append(int(logits.argmax()))
        if written[-1] == EOS:
            break
    return written[1:]


@pytest.mark.parametrize("target", TARGETS)
def test_every_engine_writes_the_targets_of_the_model(checkpoints, open_on, family, target):
    session, model = open_on(family, target), load_model(checkpoints[family])
    expected = [by_hand(model, source, 14) for source in SOURCES]
    assert len({tuple(tokens) for tokens in expected}) == len(SOURCES)  # the source matters
    found = session.translate(SOURCES, max_new_tokens=14)
    assert [list(result.token_ids) for result in found] == expected
    assert [result.prompt_tokens for result in found] == [len(source) for source in SOURCES]
    # alone and in a batch that rows leave and join
    assert [list(session.generate(s, max_new_tokens=14).token_ids) for s in SOURCES] == expected
    few = session.translate(SOURCES, max_new_tokens=[3, 14, 14, 7], batch_size=2)
    assert [list(r.token_ids) for r in few] == [e[:n] for e, n in zip(expected, (3, 14, 14, 7), strict=True)]


@pytest.mark.parametrize("target", TARGETS)
def test_the_certificate_holds_for_encoder_and_decoder(artifacts, open_on, family, target):
    open_on(family, target)  # skips where it is not installed
    results = verify_artifact(artifacts[family], [Target.parse(target)])
    assert [(r.problem, r.row.role) for r in results] == [(None, "encoder"), (None, "decoder")]
    for row in (r.row for r in results):
        assert row.max_logit_error < 1e-4
        assert row.fallback == ()
    assert 0 < results[1].row.greedy_total == results[1].row.greedy_match


def test_a_search_finds_what_transformers_finds(checkpoints, open_on, family):
    if not FAMILIES[family].foreign:
        pytest.skip(f"transformers has no {family}")
    transformers = pytest.importorskip("transformers")
    other = transformers.AutoModelForSeq2SeqLM.from_pretrained(checkpoints[family]).eval()
    session = open_on(family, "torch:cpu:native")
    # Rows that stand for no token: ours never draws them, transformers is told not to.
    banned = list(range(257, load_model(checkpoints[family]).config.vocab_size))
    for penalty in (1.0, 0.4):
        settings = transformers.GenerationConfig(
            decoder_start_token_id=START, pad_token_id=START, eos_token_id=EOS, num_beams=3, length_penalty=penalty,
            max_new_tokens=12, do_sample=False, suppress_tokens=banned,
        )  # fmt: skip
        for source in SOURCES[:3]:
            ids = torch.tensor([list(source.encode())])
            expected = other.generate(ids, generation_config=settings)[0, 1:].tolist()
            options = {"num_beams": 3, "length_penalty": penalty, "max_new_tokens": 12}
            found = list(session.translate(source, **options).token_ids)
            expected = [t for t in expected if t != START]
            if found != expected:  # which is no fault where two hypotheses are as good as each other
                ours, theirs = (goodness(other, ids, tokens, penalty) for tokens in (found, expected))
                # ours are normalised over the tokens of the tokenizer, theirs over all rows of the table
                assert ours >= theirs - 1e-3, (penalty, source)


def goodness(model, ids, tokens: list[int], penalty: float) -> float:
    """The score of a hypothesis: its log-probability, divided by its length to the power of the penalty."""
    with torch.no_grad():
        logits = model(input_ids=ids, decoder_input_ids=torch.tensor([[START, *tokens[:-1]]])).logits[0]
    logprobs = torch.log_softmax(logits.double(), -1)
    return float(logprobs[torch.arange(len(tokens)), tokens].sum()) / len(tokens) ** penalty


def test_guesses_change_nothing(open_on, family):
    session = open_on(family, "torch:cpu:native")
    if not goes_back(session.engine.roles["decoder"]):
        with pytest.raises(UsageError, match="cannot go back"):
            session.generate(SOURCES, lookup=True)
        return
    plain = session.translate(SOURCES, max_new_tokens=20)
    guessed = session.generate(SOURCES, max_new_tokens=20, lookup=True)
    assert [r.token_ids for r in guessed] == [r.token_ids for r in plain]
    with pytest.raises(UsageError, match="translate"):
        session.generate(SOURCES, draft=session)


def test_a_prefix_stands_in_front_of_every_source(open_on, family):
    session = open_on(family, "torch:cpu:native")
    expected = [session.generate(f"de: {source}", max_new_tokens=5).text for source in SOURCES]
    assert [r.text for r in session.translate(SOURCES, prefix="de: ", max_new_tokens=5)] == expected
    assert session.translate(SOURCES[0], prefix="de: ", max_new_tokens=5).text == expected[0]


def test_what_cannot_be_is_said(open_on, family):
    session = open_on(family, "torch:cpu:native")
    with pytest.raises(ContextLengthError, match="49 tokens"):
        session.translate("x" * 49)
    with pytest.raises(ContextLengthError, match="max_new_tokens = 48"):
        session.translate("x", max_new_tokens=48)  # and the token that starts the target
    with pytest.raises(UsageError, match="a score is of a text that a model continues"):
        session.score("abc")
    with pytest.raises(UsageError, match="prefix must be a text"):
        session.translate("x", prefix=3)
    with pytest.raises(UsageError, match="reads a source"):
        read_sources(session.engine, [(), (1,)])


def test_a_model_without_an_encoder_translates_nothing():
    from portlm.runtimes.null import NullEngine
    from portlm.runtimes.session import Session

    engine = NullEngine(257, 32)
    assert not reads_sources(engine.roles)
    with pytest.raises(UsageError, match="no encoder"):
        Session(engine, byte_tokenizer()).translate("x")
    with pytest.raises(UsageError, match="no encoder"):
        read_sources(engine, [(1, 2)])


def test_a_start_that_nobody_says_is_an_error(open_on, family):
    from portlm.runtimes.session import Session

    session = open_on(family, "torch:cpu:native")
    assert session.start_ids == (START,)
    with pytest.raises(UsageError, match="decoder_start_token_id"):
        Session(session.engine, session.tokenizer).generate("x")


def test_the_command_writes_a_line_for_each(checkpoints, open_on, family, tmp_path):
    def run(*arguments, stdin=None):
        given = [str(checkpoints[family]), *arguments, "-e", "torch", "-n", "6"]
        return CliRunner().invoke(command, given, input=stdin, catch_exceptions=False)

    expected = [r.text for r in open_on(family, "torch:cpu:native").translate(SOURCES, max_new_tokens=6)]
    lines = "\n".join(" ".join(text.splitlines()) for text in expected) + "\n"
    assert run(stdin="\n".join(SOURCES) + "\n").stdout_bytes.decode() == lines
    (tmp_path / "sources").write_text("\n".join(SOURCES))
    answer = json.loads(run("--file", str(tmp_path / "sources"), "--json").stdout)
    assert [(t["source"], t["text"]) for t in answer["translations"]] == list(
        zip(SOURCES, expected, strict=True)
    )
    assert (answer["engine"], answer["profile"]) == ("torch", "native")
    assert run(SOURCES[1], "--num-beams", "2").exit_code == 0


def test_a_manifest_says_what_the_decoder_is_given(artifacts, family):
    roles = read_manifest(artifacts[family]).roles
    given = [s for s in roles["decoder"].state if s.initial == "given"]
    names, made = [s.name for s in given], {item.name for item in roles["encoder"].outputs}
    assert set(names) <= {"encoder_attention_mask"} | made
    if family == "seq2seq":
        assert names == ["hidden.0", "cell.0", "hidden.1", "cell.1"]
        assert all(s.update == "replace" for s in given)
    elif family == "bahdanau":
        assert {s.name for s in given if s.update == "replace"} == {"hidden"}
        assert {s.name for s in given if s.update == "constant"} == made - {"hidden"} | {
            "encoder_attention_mask"
        }
    elif family == "luong":
        states = {"hidden.0", "cell.0", "hidden.1", "cell.1"}
        assert {s.name for s in given if s.update == "replace"} == states
        assert {s.name for s in given if s.update == "constant"} == made - states | {"encoder_attention_mask"}
    else:
        assert names[0] == "encoder_attention_mask"
        assert all(s.update == "constant" for s in given)
        assert len(given) == 1 + 2 * 2  # keys and values of two layers


@pytest.mark.parametrize("target", TARGETS[1:])
def test_a_search_is_the_same_on_every_engine(open_on, family, target):
    options = {"num_beams": 3, "length_penalty": 0.6, "max_new_tokens": 10}
    expected = open_on(family, TARGETS[0]).translate(SOURCES, **options)
    found = open_on(family, target).translate(SOURCES, **options)
    assert [r.token_ids for r in found] == [r.token_ids for r in expected]


def test_an_empty_source_and_none_are_refused(open_on, family):
    session = open_on(family, "torch:cpu:native")
    with pytest.raises(UsageError, match="reads a source before it writes, and it was given none"):
        read_sources(session.engine, [()])
    for given, words in (([[]], "source 0"), (["x", ""], "source 1"), ("", "the source")):
        for verb in (session.translate, session.generate):
            with pytest.raises(UsageError, match=f"{words} is empty, and this model reads a source"):
                verb(given)


# ---- what a model looks at ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bahdanau", "luong"])
@pytest.mark.parametrize("target", TARGETS)
def test_every_engine_says_what_the_model_looks_at(checkpoints, open_on, name, target):
    session, model = open_on(name, target), load_model(checkpoints[name])
    for source in SOURCES:
        result = session.translate(source, max_new_tokens=9)
        found = session.align(source, result.token_ids)
        read = torch.tensor([[START, *result.token_ids[:-1]]])
        with torch.no_grad():
            expected = model.align(torch.tensor([list(source.encode())]), read)[0]
        # float32 on both sides: weights of at most 1, after ten steps whose errors add up
        torch.testing.assert_close(torch.from_numpy(found), expected, atol=2e-5, rtol=1e-4)
        assert found.shape == (len(result.token_ids), len(source))


def test_what_cannot_be_aligned_is_said(open_on):
    session = open_on("bahdanau", "torch:cpu:native")
    for source, target, words in (
        ("", [1], "the source is empty"), ("x", [], "the target is empty"), ([300], [1], "the source holds token 300"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=words):
            session.align(source, target)
    with pytest.raises(ContextLengthError, match="49 tokens"):
        session.align("x", [1] * 49)
    with pytest.raises(ContextLengthError, match="the source"):
        session.align("x" * 49, [1])
    with pytest.raises(UsageError, match="does not say what it looks at"):
        open_on("marian", "torch:cpu:native").align("x", [1])


def test_the_command_draws_what_was_looked_at_and_says_it_in_figures(checkpoints, open_on, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is missing: pip install portlm[report]")
    picture, folder = tmp_path / "alignment.png", str(checkpoints["bahdanau"])
    given = [folder, "-e", "torch", "-n", "5", "--attention", str(picture), "--json"]
    answer = json.loads(
        CliRunner().invoke(command, given, input="A house.\n$x_\n", catch_exceptions=False).stdout
    )
    assert picture.read_bytes()[:4] == b"\x89PNG"
    session = open_on("bahdanau", "torch:cpu:native")
    for source, found in zip(("A house.", "$x_"), answer["translations"], strict=True):
        assert found["attention"] == session.align(source, found["token_ids"]).tolist()
    for arguments, words in (
        ([folder, "x", "--attention", str(tmp_path / "a.txt")], "ends in .png, .svg, .pdf"),
        ([str(checkpoints["marian"]), "x", "--attention", str(picture)], "does not say what it looks at"),
    ):
        result = CliRunner().invoke(command, [*arguments, "-e", "torch", "-n", "3"])
        assert result.exit_code != 0
        assert words in str(result.exception)
