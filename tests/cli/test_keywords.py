"""``portlm keywords``: what it prints, and what it says of a package that is not there."""

import json
import sys

import pytest

from portlm.commands.keywords import command
from portlm.keywords import METHODS

TEXTS = ("red fox, red den; a lazy dog", "grey wolf and a lazy dog")


@pytest.fixture
def stops(tmp_path):
    path = tmp_path / "stops.txt"
    path.write_text("a\nand\n\n")
    return path


def test_each_text_has_its_lines(portlm, stops):
    found = portlm("keywords", *TEXTS, "--method", "rake", "--stop-words", stops)
    assert (
        found.out
        == "lazy dog\t4.0000\nred den\t4.0000\nred fox\t4.0000\n\ngrey wolf\t4.0000\nlazy dog\t4.0000\n"
    )


def test_every_method_can_be_chosen():
    (method,) = (option for option in command.params if option.name == "method")
    assert tuple(method.type.choices) == METHODS


def test_json_names_texts_and_topics(portlm, tmp_path, stops):
    pytest.importorskip("sklearn", reason="scikit-learn is missing: pip install portlm[keywords]")
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    asked = ("keywords", "-f", tmp_path / "texts.txt", "--stop-words", stops, "--top", 1, "--json")
    rows = json.loads(portlm(*asked).out)
    assert [row["text"] for row in rows] == ["line 1", "line 2"]
    assert rows[0]["keywords"][0]["text"] == "red"
    rows = json.loads(portlm(*asked, "--method", "lda", "--topics", 2).out)
    assert [row["topic"] for row in rows] == [1, 2]


def test_a_missing_package_is_one_line_with_the_extra(portlm, stops, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] in ("sklearn", "networkx")]:
        monkeypatch.setitem(sys.modules, name, None)
    for package in ("sklearn", "networkx"):
        monkeypatch.setitem(sys.modules, package, None)
    for options in ([], ["--method", "textrank", "--stop-words", stops]):
        outcome = portlm("keywords", "red fox", *options)
        assert outcome.code == 1
        assert "pip install 'portlm[keywords]'" in outcome.error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "yake"], "yake"),
        (["--top", "0"], "top must be a whole number of at least 1, got 0"),
        (["--stop-words", "nowhere.txt"], "nowhere.txt"),
        (["-f", "nowhere.txt"], "give texts or --file, not both"),
    ],
)
def test_bad_options_are_named(portlm, options, message):
    outcome = portlm("keywords", "red fox", *options)
    assert outcome.code in (1, 2)
    assert message in outcome.error
