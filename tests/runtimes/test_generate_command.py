import io
import json

import pytest
from click.testing import CliRunner

import portlm
from portlm.cli import main
from portlm.commands.generate import command, write
from portlm.errors import UsageError


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


def test_an_engine_is_named_as_for_the_other_verbs(run):
    answer = json.loads(run("abc", "-n", "4", "-e", "torch:cpu:native", "--json").stdout)
    assert (answer["engine"], answer["device"], answer["profile"]) == ("torch", "cpu", "native")


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
        (["abc", "-e", "nothing"], 2, "choose one of auto, torch, ort, tvm, null"),
        (["abc", "-e", "torch:cpu", "-d", "cuda"], 2, "'cpu' and device 'cuda' are both asked for"),
        (["abc", "-e", "torch:cpu:"], 2, "is no engine"),
        (["abc", "-n", "0"], 2, "max_new_tokens"),
        (["abc", "-t", "-1"], 2, "temperature"),
        (["a" * 60], 2, "the prompt has 60 tokens, but the model's context holds 48"),
        (["abc", "-n", "many"], 2, "'many' is not a valid integer"),
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
