import subprocess
import sys

import pytest

from portlm.data import python_docstrings as module
from portlm.data.python_docstrings import python_docstrings
from portlm.data.text import split_text
from portlm.errors import FormatError


@pytest.fixture
def library(tmp_path, monkeypatch):
    """Function: relative path -> source; a standard library of these files alone."""
    monkeypatch.setattr(module.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "lib")})

    def write(**sources):
        for name, text in sources.items():
            path = tmp_path / "lib" / name.replace("__", "/").replace("_py", ".py")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text if isinstance(text, bytes) else text.encode())

    return write


def says(what):
    """A docstring of one sentence that is long enough to count."""
    return f"{what} is told here, in one sentence that is long enough to learn from."


def test_every_python_has_a_megabyte_of_it_and_it_is_the_same_each_time():
    text = python_docstrings()
    assert 2**20 < len(text.encode()) <= module.MAX_BYTES
    assert text == python_docstrings()
    headings = [line for line in text.splitlines() if line.startswith("# json")]
    assert headings[0] == "# json"
    assert "# json.decoder.JSONDecoder.raw_decode" in headings
    assert "Decode a JSON document from ``s`` (a ``str`` beginning with" in text


def test_what_some_systems_leave_out_or_change_is_not_read():
    names = {line.split()[1].split(".")[0] for line in python_docstrings().splitlines() if line.startswith("# _") or
             line.startswith("# u")}  # fmt: skip
    assert "unittest" in names
    text = python_docstrings()
    assert "\n# unittest.test" not in text
    assert "\n# ctypes.macholib" not in text
    for name in module.ABSENT:
        assert f"\n# {name}\n" not in text
        assert f"\n# {name}." not in text


def test_nothing_is_imported():
    """antigravity opens a browser, and this prints a poem."""
    done = subprocess.run(
        [sys.executable, "-c", "import sys; from portlm.data.python_docstrings import python_docstrings as f; f(); "
         "print(sorted({'antigravity', 'this', 'telnetlib', 'turtle', 'unittest'} & sys.modules.keys()))"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "[]\n"


def test_names_and_texts_come_in_the_order_of_the_source(library):
    source = f'''"""{says("Module")}"""
class B:
    """{says("B")}"""
    def b(self):
        """{says("b")}"""
        def inner():
            """{says("inner")}"""
if True:
    async def a():
        """{says("a")}"""
def short():
    """Too short."""
'''
    library(json_py=source, os__decoder_py="x = 1\n", abc_py=f'"""{says("abc")}"""')
    names = ("json", "json.B", "json.B.b", "json.B.b.inner", "json.a")
    texts = (says(name) for name in ("Module", "B", "b", "inner", "a"))
    expected = "".join(f"# {name}\n\n{text}\n\n" for name, text in zip(names, texts, strict=True))
    assert python_docstrings() == f"# abc\n\n{says('abc')}\n\n{expected}"


def test_files_that_are_none_of_the_librarys_or_not_of_this_python_are_passed_over(library):
    good = f'"""{says("Good")}"""'
    library(
        json_py=good, stranger_py=f'"""{says("Stranger")}"""', xml__tests__x_py=f'"""{says("Test")}"""',
        abc_py="match = ?\n", ast_py=b'"""\xff\xfe"""', bdb_py=f'"""{says("Half")} \\ud800"""', cmd_py="",
        csv_py=f'"""{says("Large")}"""' + "#" * module.MAX_SOURCE_BYTES, dis_py=b"\0",
        io_py=f'"""{says("An escape")} \\d"""',
    )  # fmt: skip
    assert python_docstrings() == f"# io\n\n{says('An escape')} \\d\n\n# json\n\n{says('Good')}\n\n"


def test_size_is_bounded_at_the_end_of_a_module(library):
    library(abc_py=f'"""{says("abc")}"""', ast_py=f'"""{says("ast")}"""')
    whole = python_docstrings()
    assert python_docstrings(len(whole)) == whole
    first = python_docstrings(len(whole) - 1)
    assert first == whole[: len(first)]
    assert "ast" not in first


def test_python_without_sources_is_an_error_that_says_so(library):
    library(other_py="")
    with pytest.raises(FormatError, match="no source files to read docstrings from"):
        python_docstrings()


def test_the_demonstration_holds_out_the_last_tenth_of_both_texts():
    """The language reference's last tenth is what it held out when it had no other text: so the two compare."""
    from portlm.data.python_topics import python_topics
    from portlm.flows.demo import PROMPT, corpus

    held_out = split_text(corpus())[1]
    topics = split_text(python_topics())[1]
    assert held_out.endswith(topics)
    docstrings = split_text(python_docstrings())[1]
    assert abs(len(held_out) - len(docstrings) - len(topics)) <= 4
    assert docstrings[4:] in held_out
    assert PROMPT in topics
