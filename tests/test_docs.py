"""The documentation is true: its Python runs, its commands exist, its links lead somewhere, and the examples run."""

import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import click
import pytest

from portlm.cli import cli

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = [*sorted(DOCS.glob("*.md")), *(page for page in [ROOT / "README.md"] if page.exists())]
GENERATED = DOCS / "ops.md"  # by `make docs`; tests/ops/test_registry.py says whether it is there and right
LANGUAGES = {"python", "sh", "console", "toml", "json", ""}
TEXT = "First the cat sat on the mat; then the dog sat on the log, and the cat saw the dog.\n"


class Block(NamedTuple):
    """A fenced block of a page: its language, what else the fence says, the line it begins on, and its text."""

    language: str
    options: str
    line: int
    text: str


def blocks(page: Path) -> list[Block]:
    found, lines, start = [], [], None
    for number, line in enumerate(page.read_text().splitlines(), start=1):
        if not line.startswith("```"):
            lines.append(line)
        elif start is None:
            start, lines = (number + 1, line.removeprefix("```")), []
        else:
            language, _, options = start[1].partition(" ")
            found.append(Block(language, options.strip(), start[0], "\n".join(lines) + "\n"))
            start = None
    assert start is None, f"{page.name}: the block that begins before line {start} does not end"
    return found


def commands(page: Path) -> list[tuple[int, list[str]]]:
    """(line, words after "portlm") of every portlm command line on a page."""
    found = []
    for block in blocks(page):
        if block.language not in ("sh", "console"):
            continue
        text = block.text.replace("\\\n", "  ")  # keeps later line numbers right to within the joined lines
        for number, line in enumerate(text.splitlines(), start=block.line):
            if block.language == "console":
                if not line.startswith("$ "):
                    continue  # output
                line = line.removeprefix("$ ")
            words = shlex.shlex(line, posix=True, punctuation_chars="|;&<>")
            words.whitespace_split = True
            call: list[str] | None = None
            for word in [*words, ";"]:
                if set(word) <= set("|;&<>"):
                    if call is not None:
                        found.append((number, call))
                    call = None
                elif call is not None:
                    call.append(word)
                elif word.rpartition("/")[2] == "portlm":
                    call = []
    return found


def slug(heading: str) -> str:
    """The anchor that a heading gets on the web."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.fixture(scope="session")
def model(artifacts, tmp_path_factory):
    """An artifact with what compiling gives in no time: ONNX Runtime's graphs. An example compiles for TVM."""
    from portlm.compile.build import build_choice

    folder = shutil.copytree(artifacts["gpt2"], tmp_path_factory.mktemp("docs") / "model")
    build_choice(folder, engine="ort")
    return folder


@pytest.fixture
def workplace(model, checkpoints, tmp_path, monkeypatch):
    """A folder as the pages assume it: model/ an artifact, checkpoint/, and text.txt."""
    shutil.copytree(model, tmp_path / "model")
    shutil.copytree(checkpoints["gpt2"], tmp_path / "checkpoint")
    (tmp_path / "text.txt").write_text(TEXT * 40)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_says_in_which_language_it_is(page):
    for block in blocks(page):
        assert block.language in LANGUAGES, f"{page.name}, line {block.line}: language {block.language!r}"


@pytest.mark.parametrize(
    "page",
    [p for p in PAGES if any(b.language == "python" for b in blocks(p))],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_the_python_of_a_page_runs(page, workplace):
    """The blocks of a page run in order and share their names, as they would for somebody who types them."""
    names: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(page):
        if block.language == "python" and block.options != "no-run":
            assert not block.options, f"{page.name}, line {block.line}: unknown option {block.options!r}"
            source = "\n" * (block.line - 1) + block.text  # so that a traceback shows the line of the page
            exec(compile(source, str(page), "exec"), names)


@pytest.mark.parametrize(
    ("page", "line", "words"),
    [
        pytest.param(page, line, words, id=f"{page.relative_to(ROOT)}:{line}")
        for page in PAGES
        for line, words in commands(page)
    ],
)
def test_a_command_line_parses(page, line, words):
    """Its verb exists, and so do its options, with values of their type; nothing is run."""
    command: click.Command = cli
    context = click.Context(cli, info_name="portlm")
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        found = command.get_command(context, words[0])
        assert found is not None, f"there is no command {words[0]!r}"
        command, words = found, words[1:]
    try:
        command.make_context("portlm", list(words), parent=context)
    except click.exceptions.Exit:
        pass  # --help or --version
    except click.UsageError as error:
        pytest.fail(error.format_message())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists() or path == GENERATED, f"{page.name}: {target} leads nowhere"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
            assert anchor in map(slug, headings), f"{page.name}: {target} has no such heading"


def test_the_index_has_every_page():
    index = (DOCS / "README.md").read_text()
    for page in (*PAGES, GENERATED):
        if page.parent == DOCS and page.name != "README.md":
            assert f"({page.name})" in index, f"{page.name} is not in docs/README.md"


def test_the_presets_are_as_large_as_the_page_says():
    pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")
    from portlm import models, settings
    from portlm.tokenizer import byte_tokenizer
    from portlm.train.config import PretrainConfig
    from portlm.train.presets import PRESETS

    page = (DOCS / "pretrain.md").read_text()
    rows = re.findall(r"^\| `([\w-]+)` \| ([\d,]+) \| (\d+) \| (\d+) \|", page, re.MULTILINE)
    assert {name for name, *_ in rows} == set(PRESETS)
    for name, parameters, context, steps in rows:
        config = settings.load(PretrainConfig, preset=PRESETS[name])
        model = models.build(config.model.config(byte_tokenizer().vocab_size), device="meta")
        assert f"{model.num_parameters():,}" == parameters, name
        assert (str(config.model.context_length), str(config.steps)) == (context, steps), name


EXAMPLES = {
    "train_and_ship.py": ["text.txt", "--out", "shipped", "--steps", "12"],
    "huggingface_roundtrip.py": ["--out", "roundtrip"],
    "custom_sampling.py": ["model", "the cat", "--tokens", "12"],
}


def test_every_example_is_run():
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == set(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs(name, workplace, monkeypatch, capsys):
    if name == "huggingface_roundtrip.py":
        pytest.importorskip("transformers", reason="transformers is missing: pip install portlm[hf]")
    monkeypatch.setattr(sys, "argv", [name, *EXAMPLES[name]])
    runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
    assert capsys.readouterr().out.strip()


def test_the_page_of_own_models_names_every_operator_that_a_graph_may_hold():
    pytest.importorskip("onnx", reason="onnx is missing: pip install portlm[onnx]")
    from portlm.compile.forms import PORTABLE_OPS

    rows = [line for line in (DOCS / "own-models.md").read_text().splitlines() if line.startswith("| ")]
    named = {name for row in rows[2:] for name in re.findall(r"[A-Z][A-Za-z]+", row.split("|")[2])}
    assert named == set(PORTABLE_OPS)
