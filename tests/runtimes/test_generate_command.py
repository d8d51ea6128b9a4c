import io
import json
import shutil

import pytest
from click.testing import CliRunner

import portlm
from portlm.cli import main
from portlm.commands.generate import command, defaults_in_use, write
from portlm.errors import UsageError
from portlm.runtimes.session import Session


@pytest.fixture
def run(artifacts):
    """Run the command on an artifact with the engine that continues abc with def."""

    def run(*arguments, stdin=None):
        options = [] if "-e" in arguments else ["-e", "null"]
        return CliRunner().invoke(
            command, [str(artifacts["gpt2"]), *arguments, *options], input=stdin, catch_exceptions=False
        )

    return run


@pytest.mark.parametrize("stream", ["--stream", "--no-stream"])
def test_stdout_has_the_new_text_and_nothing_else(run, stream):
    result = run("abc", "-n", "4", stream)
    assert (result.exit_code, result.stdout, result.stderr) == (0, "defg\n", "")


def test_the_prompt_may_come_from_stdin_or_a_file(run, tmp_path):
    assert run("-n", "2", stdin="abc\n").stdout == "de\n"
    assert run("-", "-n", "2", stdin="abc").stdout == "de\n"
    (tmp_path / "prompt").write_bytes(b"xyz\n\n")  # one newline belongs to the file, the other to the prompt
    assert run("--prompt-file", str(tmp_path / "prompt"), "-n", "2").stdout == "\x0b\x0c\n"


def test_a_prompt_need_not_be_utf_8(run):
    assert run("-n", "2", stdin=b"\xfe").stdout == "\ufffd\n"  # 255, then the end of text
    assert run("-n", "2", stdin=b"\x80\x40").stdout == "AB\n"


def test_sampling_options_reach_the_session(run, artifacts):
    options = ["-n", "8", "-t", "1.5", "--top-k", "50", "--top-p", "0.9", "--min-p", "0.01", "--seed", "7"]
    answer = json.loads(run("abc", *options, "--json").stdout)
    with portlm.load(artifacts["gpt2"], "null") as session:
        expected = session.generate(
            "abc", max_new_tokens=8, temperature=1.5, top_k=50, top_p=0.9, min_p=0.01, seed=7
        )
    assert answer["token_ids"] == list(expected.token_ids)
    assert answer["text"] == expected.text


def test_stop_strings_may_be_several(run):
    assert run("abc", "-n", "9", "--stop", "zz", "--stop", "hi").stdout == "defg\n"


def test_json_says_what_ran_where_and_how_fast(run):
    answer = json.loads(run("abc", "-n", "4", "--stop", "g", "--json").stdout)
    assert answer["text"] == "def"
    assert (answer["finish_reason"], answer["stop"]) == ("stop", "g")
    assert (answer["prompt_tokens"], answer["new_tokens"]) == (3, 4)
    assert (answer["engine"], answer["device"], answer["profile"]) == ("null", "cpu", "native")
    assert answer["placement"] == {"nodes": {"cpu": 0}, "fallback": [], "note": ""}
    assert answer["prefill_seconds"] > 0


@pytest.mark.usefixtures("free_passes")
def test_guesses_by_lookup_or_a_smaller_model_change_no_text(run, artifacts):
    plain = json.loads(run("abc", "-n", "30", "--json").stdout)
    assert (plain["passes"], plain["tokens_per_pass"], plain["drafted"], plain["accepted"]) == (29, 1, 0, 0)
    assert run("abc", "-n", "30", "--lookup").stdout.strip("\n") == plain["text"]
    drafted = json.loads(run("abc", "-n", "30", "--draft", str(artifacts["llama"]), "--json").stdout)
    assert drafted["text"] == plain["text"]
    assert drafted["drafted"] == drafted["accepted"] == 29 - drafted["passes"] > 15
    refused = CliRunner().invoke(
        command, [str(artifacts["gpt2"]), "a", "-e", "null", "--lookup", "--num-beams", "2"]
    )
    assert isinstance(refused.exception, UsageError)


def test_an_engine_is_named_as_for_the_other_verbs(run):
    answer = json.loads(run("abc", "-n", "4", "-e", "torch:cpu:native", "--json").stdout)
    assert (answer["engine"], answer["device"], answer["profile"]) == ("torch", "cpu", "native")


@pytest.mark.parametrize("prompt", ["97 98 99", "97,98,99", "[97, 98, 99]", " 97\n98 , 99 "])
@pytest.mark.parametrize("stream", ["--stream", "--no-stream"])
def test_token_ids_in_give_token_ids_out(run, prompt, stream):
    result = run("--ids", prompt, "-n", "4", stream)
    assert (result.exit_code, result.stdout, result.stderr) == (0, "100 101 102 103\n", "")


def test_token_ids_come_from_stdin_or_a_file_as_text_does_and_from_another_answer(run, tmp_path):
    assert run("--ids", "-n", "2", stdin="97 98\n").stdout == "99 100\n"
    (tmp_path / "prompt").write_text("97\n98\n")
    assert run("--ids", "--prompt-file", str(tmp_path / "prompt"), "-n", "2").stdout == "99 100\n"
    first = json.loads(run("--ids", "97", "-n", "2", "--json").stdout)
    assert first["text"] == "bc"
    assert run("--ids", "-n", "2", stdin=json.dumps(first["token_ids"])).stdout == "100 101\n"
    assert run("--ids", "255", "-n", "3").stdout == "256\n"  # the end of text is an id as well
    assert run("--ids", "", "-n", "1").stdout == "0\n"  # what follows the end of text, as for an empty text


def test_a_model_without_a_tokenizer_is_used_with_ids_and_says_so_when_it_is_given_text(
    artifacts, tmp_path, capsys
):
    shutil.copy(artifacts["gpt2"] / "config.json", tmp_path)
    options = ["-e", "null", "-n", "3"]
    for extra, out in (([], "2 3 4\n"), (["--no-stream"], "2 3 4\n")):
        with pytest.raises(SystemExit) as end:
            main(["generate", str(tmp_path), "--ids", "1", *extra, *options])
        assert (end.value.code, capsys.readouterr().out) == (0, out)
    with pytest.raises(SystemExit):
        main(["generate", str(tmp_path), "--ids", "1", "--json", *options])
    answer = json.loads(capsys.readouterr().out)
    assert (answer["text"], answer["token_ids"]) == (None, [2, 3, 4])
    with pytest.raises(SystemExit) as end:
        main(["generate", str(tmp_path), "abc", *options])
    assert end.value.code == 2
    assert "this model has no tokenizer" in (error := capsys.readouterr().err)
    assert error.endswith("give token ids: a list of them, or --ids on the command line\n")


@pytest.fixture
def sampled(artifacts, checkpoints, tmp_path):
    """A checkpoint whose generation_config.json asks for samples."""
    folder = shutil.copytree(checkpoints["gpt2"], tmp_path / "model")
    content = {"eos_token_id": 256, "do_sample": True, "temperature": 3.0, "top_p": 0.99, "max_new_tokens": 7}
    (folder / "generation_config.json").write_text(json.dumps(content))
    return folder


def test_the_models_settings_are_used_and_shown_and_an_option_wins(sampled):
    def ask(*options):
        arguments = [str(sampled), "abc", "-e", "torch:cpu", "--json", *options]
        return json.loads(CliRunner().invoke(command, arguments, catch_exceptions=False).stdout)

    answer = ask("--seed", "5")
    assert answer["defaults"] == {"temperature": 3.0, "top_k": 50, "top_p": 0.99, "max_new_tokens": 7}
    assert {name: answer["decoding"][name] for name in ("temperature", "top_k", "top_p", "seed")} == {
        "temperature": 3.0, "top_k": 50, "top_p": 0.99, "seed": 5,
    }  # fmt: skip
    with portlm.load(sampled, "torch", "cpu") as session:
        assert answer["token_ids"] == list(session.generate("abc", seed=5).token_ids)
        greedy = list(session.generate("abc", temperature=0).token_ids)
    assert len(answer["token_ids"]) == 7
    assert answer["token_ids"] != greedy
    answer = ask("-t", "0", "-n", "5")
    assert (answer["token_ids"], answer["decoding"]["temperature"]) == (greedy[:5], 0)


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ({}, "temperature = 3.0, top_k = 50, top_p = 0.99, max_new_tokens = 7"),
        ({"top_k": 9, "max_new_tokens": 2}, "temperature = 3.0, top_p = 0.99"),
        ({"temperature": 0.0}, "max_new_tokens = 7"),  # of the others nothing is read
    ],
)
def test_a_terminal_is_told_which_settings_are_the_models(sampled, options, shown):
    with portlm.load(sampled, "null") as session:
        assert defaults_in_use(session, options) == shown


def test_special_tokens_can_be_left_off(run, monkeypatch):
    said = []

    def generate(self, prompt, **options):
        said.append(options.pop("add_special_tokens"))
        return original(self, prompt, **options)

    original = Session.generate
    monkeypatch.setattr(Session, "generate", generate)
    run("abc", "-n", "1", "--json")
    run("abc", "-n", "1", "--json", "--no-special-tokens")
    assert said == [True, False]


@pytest.mark.parametrize("stream", [True, False])
def test_a_terminal_is_not_given_control_characters(artifacts, stream):
    class Terminal(io.BytesIO):
        def isatty(self):
            return True

    terminal, file = Terminal(), io.BytesIO()
    with portlm.load(artifacts["gpt2"], "null") as session:
        for out in (terminal, file):
            write(session, "\x06", stream, {"max_new_tokens": 6}, out)
            write(session, "\x19", stream, {"max_new_tokens": 3}, out)
    assert file.getvalue() == b"\x07\x08\t\n\x0b\x0c\n\x1a\x1b\x1c\n"
    assert terminal.getvalue().decode() == "\ufffd\ufffd\t\n\ufffd\ufffd\n\ufffd\ufffd\ufffd\n"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["abc", "--prompt-file", "x"], 2, "not both"),
        (["--prompt-file", "no-such-file"], 1, "no-such-file: cannot be read"),
        (["abc", "-e", "nothing"], 2, "choose one of auto, torch, ort, tvm, packed, null"),
        (["abc", "-e", "torch:cpu", "-d", "cuda"], 2, "'cpu' and device 'cuda' are both asked for"),
        (["abc", "-e", "torch:cpu:"], 2, "is no engine"),
        (["abc", "-n", "0"], 2, "max_new_tokens"),
        (["abc", "-t", "-1"], 2, "temperature"),
        (["a" * 60], 2, "the prompt has 60 tokens, but the model's context holds 48"),
        (["abc", "-n", "many"], 2, "'many' is not a valid integer"),
        (["--ids", "97 x"], 2, "--ids: 'x' is no token id: give whole numbers"),
        (["--ids", "abc"], 2, "--ids: 'abc' is no token id"),
        (["--ids", "9" * 9000], 2, "is no token id"),
        (["--ids", "97 300"], 2, "the prompt holds token 300, but ids run from 0 to 256"),
        (["--ids", "97, -1"], 2, "the prompt holds token -1"),
        (["abc", "--top-k", "300"], 2, "top_k must be a whole number from 0 to 257"),
        (["abc", "-t", "1e400"], 2, "temperature must be a finite number of at least 0, got inf"),
        (
            ["abc", "--repetition-penalty", "1e-320"],
            2,
            "repetition_penalty must be a finite number from 1e-06",
        ),
        (["abc", "--seed", "9" * 400], 2, "seed must be a whole number from 0 to 18446744073709551615"),
    ],
)
def test_an_error_is_one_line_on_stderr_and_an_exit_code(arguments, code, words, artifacts, capsys):
    options = [] if "-e" in arguments else ["-e", "null"]
    with pytest.raises(SystemExit) as end:
        main(["generate", str(artifacts["gpt2"]), *arguments, *options])
    out, err = capsys.readouterr()
    assert (end.value.code, out) == (code, "")
    assert words in err
    assert err.count("\n") == 1


def test_a_beam_search_prints_its_text_at_the_end(run, artifacts):
    options = [
        "--num-beams",
        "3",
        "--length-penalty",
        "0.5",
        "--early-stopping",
        "yes",
        "--no-repeat-ngram-size",
        "2",
    ]
    assert run("abc", "-n", "4", *options, "--repetition-penalty", "1.1").stdout == "defg\n"
    answer = json.loads(run("abc", "-n", "4", *options, "--json").stdout)
    with portlm.load(artifacts["gpt2"], "null") as session:
        expected = session.generate(
            "abc",
            max_new_tokens=4,
            num_beams=3,
            length_penalty=0.5,
            early_stopping=True,
            no_repeat_ngram_size=2,
        )
    assert answer["token_ids"] == list(expected.token_ids)
    with pytest.raises(UsageError, match="needs temperature 0"):
        run("abc", "--num-beams", "3", "-t", "1")
