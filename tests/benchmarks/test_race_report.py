"""benchmarks/race: its table of contenders is whole, and its report leaves nothing out."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from portlm.flows.race.contender import PRECISIONS, Entry, Source
from portlm.flows.race.rounds import Outcome, Round
from portlm.flows.race.summary import summarize

RACE = Path(__file__).resolve().parents[2] / "benchmarks" / "race"


def module(name: str):
    """A file of benchmarks/race under a name that no other test uses."""
    spec = importlib.util.spec_from_file_location(f"race_{name}", RACE / f"{name}.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def contender(name: str, precision: str = "f32", ours: bool = False) -> tuple[Entry, dict]:
    facts = {
        "import_s": 1.0, "load_s": 0.5, "model_mib": 10.0, "peak_mib": 99.0, "choice": None, "weight_bytes": 1000,
        "cache_item": 4.0, "agreement": {"largest": 1e-6, "typical": 1e-7, "top1": 1.0, "kl": 0.0, "tokens": 65},
    }  # fmt: skip
    return Entry(name, precision, "nowhere:X", ours=ours), facts


@pytest.fixture
def result(artifacts):
    """Ours loses to the rival of its precision, except beside a busy thread, and wins against nobody else."""
    pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")
    runners = [
        contender("ours", ours=True),
        contender("slow rival"),
        contender("rival"),
        contender("other", "q4"),
    ]

    def outcome(ours: float, noisy: bool) -> Outcome:
        seconds = {"ours": ours, "slow rival": 9.0, "rival": 2.0, "other": 1.0}
        rounds = [
            Round(
                {n: {"decode@16": s * slow, "prefill@8": s * slow} for n, s in seconds.items()},
                {"read": 4000.0, "flops": 1e9, "byte_ops": 4e9}, 0.5 if noisy else 0.0, noisy,
            )
            for slow in (1.0, 2.0, 3.0)
        ]  # fmt: skip
        return Outcome(rounds, repeated=1, failed={"crashed": "exit code -11"})

    source = Source(artifacts["llama"], artifacts["llama"], artifacts["llama"])
    outcomes = {"quiet": outcome(4.0, False), "busy": outcome(1.0, True)}
    return {
        **summarize(source, runners, outcomes, {"missing": "not installed: pip install missing"}),
        "environment": {
            "cpu": "Some CPU", "isa": "avx2", "cores": 2, "system": "Linux", "versions": {}, "unix_time": 0,
        },
        "rules": {"threads": None, "allowed": 0.02}, "reference": "transformers",
    }  # fmt: skip


def row(result: dict, name: str) -> dict:
    return next(row for row in result["rows"] if row["name"] == name)


def test_a_ratio_is_against_the_fastest_rival_of_the_same_precision_and_of_all(result):
    """The machine slows down threefold from round to round, and the ratios of the same round do not see it."""
    found = row(result, "ours")["measures"]["quiet/decode@16"]
    assert found["against_same"] == {"rival": "rival", "ratio": 0.5, "interval": (0.5, 0.5)}
    assert found["against_any"] == {"rival": "other", "ratio": 0.25, "interval": (0.25, 0.25)}
    assert row(result, "ours")["measures"]["busy/decode@16"]["against_same"]["ratio"] == 2.0


def test_a_share_of_the_limit_counts_weights_and_cache(result):
    found = row(result, "ours")
    rate = found["measures"]["quiet/decode@16"]["rate"]
    assert rate == pytest.approx(1 / 8)
    moved = 1000 + 16 * found["cache_bytes"]
    assert found["measures"]["quiet/decode@16"]["of_limit"] == pytest.approx(rate * moved / 4000)


def test_who_crashed_or_was_missing_is_no_row_but_a_reason(result):
    assert result["absent"] == {"missing": "not installed: pip install missing", "crashed": "exit code -11"}


def test_the_report_names_the_machine_over_every_table_and_keeps_losses_absences_and_noise(result):
    text = module("report").markdown(result, "a model")
    captions = [line for line in text.splitlines() if line.startswith("**") and line.endswith("**")]
    assert len(captions) == 5
    assert all("Some CPU, avx2, 2 cores, 2 threads" in caption for caption in captions)
    assert "| 0.50 [0.50, 0.50] rival |" in text
    assert "**2.00 [2.00, 2.00]** rival" in text
    assert "best rival" in text
    assert "| missing | not installed: pip install missing |" in text
    assert "| crashed | exit code -11 |" in text
    assert "**3 of the 3 were not quiet**" in text


def test_pictures_are_drawn_of_every_measure(result, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is missing: pip install portlm[report]")
    files = module("plots").draw(result, "a model", tmp_path)
    assert {file.name for file in files} == {
        "roofline.png", "quiet-decode-16.png", "quiet-prefill-8.png", "busy-decode-16.png", "busy-prefill-8.png",
    }  # fmt: skip
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)


def test_every_contender_has_a_name_of_its_own_and_a_known_precision():
    table = module("contenders")
    everyone = [*table.CONTENDERS.values(), *table.EXTRAS.values()]
    assert len({entry.name for entry in everyone}) == len(everyone)
    assert {entry.precision for entry in everyone} == set(PRECISIONS)
    assert {*table.SMOKE, *table.WHOLE_LOOP} <= table.CONTENDERS.keys() | table.EXTRAS.keys()


def test_the_command_line_lists_contenders_and_refuses_what_there_is_not():
    pytest.importorskip("matplotlib", reason="matplotlib is missing: pip install portlm[report]")
    race = [sys.executable, RACE / "race.py"]
    listed = subprocess.run([*race, "--list"], capture_output=True, text=True, check=True).stdout
    assert "llama.cpp Q4_0" in listed
    refused = subprocess.run([*race, "1T"], capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "there is no model 1T: choose among 0.6M" in refused.stderr
