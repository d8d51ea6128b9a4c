"""Who may be timed: logits against the model's own, and what a wrong or a dead contender becomes."""

import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from portlm.errors import ParityError, PortlmError, UsageError
from portlm.flows.race import gate
from portlm.flows.race.contender import Entry
from portlm.flows.race.race import Rules, run
from portlm.flows.race.rounds import Pass

RNG = np.random.default_rng(0)
LOGITS = RNG.standard_normal((9, 300)).astype(np.float32)

FAKES = """
    import os
    from portlm.flows.race.portlm_engines import PortlmEngine

    class Wrong(PortlmEngine):
        def read(self, ids):
            return super().read(ids)[::-1]

    class WrongCache(PortlmEngine):
        def read(self, ids):
            if len(ids) == 1:
                self.reset()
            return super().read(ids)

    class Dying(PortlmEngine):
        def decode(self, logits, count):
            os._exit(3)

    class Failing(PortlmEngine):
        def load(self, source, threads):
            raise RuntimeError("no such luck")
"""


def test_equal_logits_agree():
    found = gate.compare(LOGITS, LOGITS)
    assert (found.largest, found.typical, found.top1, found.kl, found.tokens) == (0, 0, 1, 0, 9)


def test_figures_are_shares_of_the_spread_of_the_reference():
    """So that a model with large logits has no lower bar than one with small ones."""
    noise = 1e-3 * RNG.standard_normal(LOGITS.shape)
    small, large = gate.compare(LOGITS + noise, LOGITS), gate.compare(50 * (LOGITS + noise), 50 * LOGITS)
    assert small.typical == pytest.approx(large.typical, rel=1e-3)  # float32 of the logits
    assert small.typical == pytest.approx(1e-3, rel=0.1)


@pytest.mark.parametrize(
    ("precision", "error"), [("f32", 1e-4), (gate.BYTE_CACHE, 0.01), ("f16", 0.01), ("q8", 0.05), ("q4", 0.5)]
)
def test_a_bar_lets_its_own_precision_pass_and_no_coarser_one(precision, error):
    """Errors of the size that each was measured to have, and ten times that."""
    noise = RNG.standard_normal(LOGITS.shape)
    gate.check(gate.compare(LOGITS + error * np.clip(noise, -3, 3), LOGITS), precision)
    with pytest.raises(ParityError, match="not timed: its logits are wrong"):
        gate.check(gate.compare(LOGITS + 10 * error * noise, LOGITS), precision)


@pytest.mark.parametrize("precision", gate.BARS)
def test_another_model_passes_no_bar(precision):
    other = RNG.standard_normal(LOGITS.shape).astype(np.float32)
    with pytest.raises(ParityError, match="not timed"):
        gate.check(gate.compare(other, LOGITS), precision)


@pytest.mark.parametrize("precision", gate.BARS)
def test_a_single_nan_passes_no_bar(precision):
    broken = LOGITS.copy()
    broken[3, 7] = np.nan
    with pytest.raises(ParityError, match="nan"):
        gate.check(gate.compare(broken, LOGITS), precision)


def test_another_number_of_logits_is_not_compared():
    with pytest.raises(ParityError, match="its logits are"):
        gate.compare(LOGITS[:, :-1], LOGITS)


@pytest.fixture(scope="module")
def fakes(tmp_path_factory):
    """A folder with the module `racefakes`, on the path of workers."""
    pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")
    folder = tmp_path_factory.mktemp("fakes")
    (folder / "racefakes.py").write_text(textwrap.dedent(FAKES))
    package_root = [entry for entry in sys.path if entry]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", ":".join([str(folder), *package_root]))
        yield folder


def entry(name: str, cls: str = "portlm.flows.race.portlm_engines:PortlmEngine", **changes: object) -> Entry:
    return replace(Entry(name, "f32", cls, {"engine": "ort", "profile": "portable"}), **changes)


RULES = Rules((Pass(1, 1, 2), Pass(8, 16, 2)), rounds=2, loads=1, allowed=1.0, busy=1, busy_rounds=1)


def test_a_race_times_the_right_ones_and_every_other_is_a_row_that_says_why(fakes, artifacts, tmp_path):
    """Wrong logits, a broken cache, a crash, an error, a missing package and a missing feature."""
    entries = [
        entry("ours", ours=True),
        entry("rival"),
        entry("wrong", "racefakes:Wrong"),
        entry("wrong cache", "racefakes:WrongCache"),
        entry("dying", "racefakes:Dying"),
        entry("failing", "racefakes:Failing"),
        entry("missing", needs={"no_such_engine": "no-such-engine"}),
    ]
    result = run(artifacts["llama"], entries, tmp_path / "work", RULES)
    assert [row["name"] for row in result["rows"]] == ["ours", "rival"]
    absent = result["absent"]
    assert set(absent) == {"wrong", "wrong cache", "dying", "failing", "missing"}
    assert "not timed: its logits are wrong" in absent["wrong"]
    assert "not timed: its logits are wrong" in absent["wrong cache"]
    assert "exit code 3" in absent["dying"]
    assert absent["failing"] == "no such luck"
    assert absent["missing"] == "not installed: pip install no-such-engine"
    mine = result["rows"][0]
    assert set(mine["measures"]) == {
        "quiet/decode@1", "quiet/prefill@8", "quiet/decode@16", "busy/prefill@8", "busy/decode@16",
    }  # fmt: skip
    for found in mine["measures"].values():
        assert found["rate"] > 0
        assert found["against_same"]["rival"] == "rival"
        low, high = found["against_same"]["interval"]
        assert low <= found["against_same"]["ratio"] <= high
    assert mine["agreement"]["largest"] < 1e-3
    assert len(result["rounds"]["quiet"]["rounds"]) == 2
    assert all(round_["limits"]["read"] > 0 for round_ in result["rounds"]["quiet"]["rounds"])


def test_files_of_another_model_are_not_taken_for_those_of_this_one(artifacts, tmp_path):
    from portlm.flows.race.race import _source

    _source(artifacts["llama"], tmp_path / "work")
    with pytest.raises(UsageError, match="another model"):
        _source(artifacts["gpt2"], tmp_path / "work")


def test_a_race_that_nobody_can_run_is_one_error_with_every_reason(fakes, artifacts, tmp_path):
    entries = [entry("missing", needs={"no_such_engine": "no-such-engine"}), entry("x", "racefakes:Failing")]
    with pytest.raises(PortlmError, match=r"nobody can race: missing: not installed: .*; x: no such luck"):
        run(artifacts["llama"], entries, tmp_path / "work", RULES)


def test_a_worker_that_does_not_answer_is_ended(tmp_path, monkeypatch):
    from portlm.flows.worker_process import WorkerProcess

    (tmp_path / "sleepy.py").write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    process = WorkerProcess("sleepy", "sleepy")
    try:
        with pytest.raises(PortlmError, match="sleepy: no answer to visit within 0 s"):
            process.call("visit", 0.01)
        assert not Path(f"/proc/{process.pid}").exists()
    finally:
        process.close()
