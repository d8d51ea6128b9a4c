"""A way to call the command line in this process, and files to call it with."""

import signal
from dataclasses import dataclass

import pytest

from portlm import cli


@dataclass
class Outcome:
    """What a call of the command line left behind."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line that says what is wrong, without its prefix."""
        lines = [line for line in self.err.splitlines() if line.startswith("portlm: error: ")]
        assert len(lines) == 1, self.err
        return lines[0].removeprefix("portlm: error: ")


@pytest.fixture
def portlm(capsys):
    """Return a function that runs one command line and returns its Outcome."""

    def run(*arguments: object) -> Outcome:
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
        try:
            with pytest.raises(SystemExit) as end:
                cli.main([str(a) for a in arguments])
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        captured = capsys.readouterr()
        return Outcome(end.value.code or 0, captured.out, captured.err)

    return run


@pytest.fixture
def text(tmp_path):
    """A text file of a few kilobytes with some structure to learn."""
    path = tmp_path / "text.txt"
    path.write_text(
        "".join(f"line {i}: the quick brown fox jumps over {i % 7} lazy dogs\n" for i in range(120))
    )
    return path
