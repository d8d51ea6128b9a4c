"""Seeds that run at a time, each in a process of its own, give what they give one after the other."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")

from coins import Broken, Coin, Killed

from portlm.flows.lab.runner import run_lab


def without_process(outcome):
    return {
        seed: {name: value for name, value in figures.items() if name != "process"}
        for seed, figures in outcome.measured.items()
    }


def test_processes_of_their_own_give_what_one_process_gives(tmp_path):
    lines = []
    here = run_lab([Broken(), Coin()], tmp_path / "here")
    there = run_lab(
        [Broken(), Coin()],
        tmp_path / "there",
        jobs=3,
        progress=lambda done, total, text: lines.append((done, total, text)),
    )
    assert [outcome.experiment.name for outcome in there] == ["broken", "coin"]
    assert [without_process(outcome) for outcome in there] == [without_process(outcome) for outcome in here]
    assert there[0].failed == here[0].failed == {3: "ArithmeticError: the coin is on its edge"}
    processes = [figures["process"] for outcome in there for figures in outcome.measured.values()]
    assert len({os.getpid(), *processes}) == 4  # three of theirs, and this one
    assert {"broken, seed 4: tossing", "coin, seed 3: tossing", "coin, seed 4: tossing"} <= {
        text for _, _, text in lines
    }
    assert [lines[0][:2], lines[-1][:2]] == [(0, 4), (4, 4)]


def test_results_are_kept_whichever_way_they_were_measured(tmp_path):
    (first,) = run_lab([Coin()], tmp_path, jobs=2)
    (second,) = run_lab([Coin()], tmp_path)
    assert second.results == first.results


def test_a_process_that_dies_is_a_seed_that_failed(tmp_path):
    killed, coin = run_lab([Killed(), Coin()], tmp_path, jobs=2)
    assert killed.failed == {3: "its process ended: SIGKILL"}
    assert list(killed.measured) == [4]
    assert list(coin.measured) == [3, 4]
    assert json.loads((tmp_path / "killed" / "3.json").read_text())["figures"] is None


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_all_processes_and_leaves_what_was_done(tmp_path, number, code):
    program = """
import sys
sys.path.insert(0, sys.argv[1])
from coins import Endless
import portlm.cli, portlm.flows.lab as lab
lab.EXPERIMENTS.clear()
lab.EXPERIMENTS["endless"] = "coins:Endless"
portlm.cli.main(["lab", "endless", "--jobs", "2", "--out", sys.argv[2]])
"""
    script = tmp_path / "program.py"
    script.write_text(f"if __name__ == '__main__':{program.replace(chr(10), chr(10) + '    ')}")
    command = [sys.executable, script, Path(sys.modules[Coin.__module__].__file__).parent, tmp_path / "out"]
    processes = set()
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as lab:
        for line in lab.stderr:
            if "is process" in line:
                processes.add(int(line.rsplit(" ", 1)[1]))
            if len(processes) == 2 and (tmp_path / "out" / "endless" / "3.json").exists():
                break
        lab.send_signal(number)
        rest = lab.stderr.read()
    assert lab.returncode == code, rest
    assert "Traceback" not in rest
    for process in processes:
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)
    assert [path.name for path in (tmp_path / "out" / "endless").iterdir()] == ["3.json"]
