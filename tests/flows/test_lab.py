"""The lab keeps each result, goes on where it stopped, reports failures and misses, and lists only what loads."""

import json
import sys
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")

import torch
from coins import Broken, Coin

from portlm.commands.lab import command
from portlm.errors import FormatError, UsageError
from portlm.flows import lab
from portlm.flows.lab.experiment import Bar
from portlm.flows.lab.fitting import accuracy, bits_per_token, fit, fresh, rows_of, seeded, windows
from portlm.flows.lab.report import write_report
from portlm.flows.lab.runner import run_lab, source_digest


@pytest.fixture(autouse=True)
def tosses(monkeypatch):
    """The seeds that were run, and PyTorch's threads as they were."""
    runs = []
    monkeypatch.setattr(Coin, "runs", runs)
    threads = torch.get_num_threads()
    yield runs
    torch.set_num_threads(threads)


@pytest.fixture
def listed(monkeypatch):
    """A table of experiments that has only the two above."""
    monkeypatch.setattr(lab, "EXPERIMENTS", {"coin": "of_coins:Coin", "broken": "of_coins:Broken"})
    monkeypatch.setitem(sys.modules, "of_coins", SimpleNamespace(Coin=Coin, Broken=Broken))


def outcomes(*experiments, out, **options):
    return run_lab(experiments, out, **options)


@pytest.mark.parametrize(
    ("relation", "below", "at", "above"),
    [(">=", False, True, True), ("<=", True, True, False), (">", False, False, True), ("<", True, False, False),
     ("==", False, True, False)],
)  # fmt: skip
def test_a_bar_compares_as_it_says_and_no_nan_meets_it(relation, below, at, above):
    bar = Bar("share", relation, 0.5)
    assert [bar.met(0.4), bar.met(0.5), bar.met(0.6)] == [below, at, above]
    assert not bar.met(float("nan"))
    assert str(bar) == f"share {relation} 0.5"


@pytest.mark.parametrize(("relation", "bound"), [("=>", 1.0), (">=", float("nan")), ("<=", float("inf"))])
def test_a_bar_that_nothing_can_meet_is_refused(relation, bound):
    with pytest.raises(ValueError, match="the bar of share"):
        Bar("share", relation, bound)


@pytest.mark.parametrize("name", lab.EXPERIMENTS)
def test_every_experiment_in_the_table_loads_and_has_bars_and_seeds(name):
    found = lab.find(name)
    assert found.name == name
    assert found.shows.endswith(".")
    assert found.source
    assert found.bars
    assert len(set(found.seeds)) == len(found.seeds) > 0
    assert all(isinstance(bar, Bar) for bar in found.bars)
    assert callable(found.run)
    assert callable(found.draw)
    assert len(source_digest(type(found))) == 64


def test_an_unknown_name_is_an_error_that_lists_the_known_ones():
    with pytest.raises(UsageError, match=r"there is no experiment 'alchemy': choose one of .*gradients"):
        lab.find("alchemy")


def test_a_second_run_takes_what_is_there(tmp_path, tosses):
    (first,) = outcomes(Coin(), out=tmp_path, seeds=1)
    assert tosses == [3]
    (second,) = outcomes(Coin(), out=tmp_path)
    assert tosses == [3, 4]
    assert second.results[0] == first.results[0]
    assert second.measured[4]["tosses"] == [4, 4, 4]
    outcomes(Coin(), out=tmp_path, anew=True)
    assert tosses == [3, 4, 3, 4]


def test_results_of_another_source_are_measured_again(tmp_path, tosses):
    outcomes(Coin(), out=tmp_path, seeds=1)
    path = tmp_path / "coin" / "3.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"digest": "0" * 64}))
    outcomes(Coin(), out=tmp_path, seeds=1)
    assert tosses == [3, 3]
    assert json.loads(path.read_text())["digest"] == record["digest"]


def test_a_digest_follows_what_an_experiment_imports_from_the_lab(tmp_path, monkeypatch):
    kind, digest = type(lab.find("gradients")), source_digest(type(lab.find("gradients")))
    assert source_digest(kind) == digest
    fitting = tmp_path / "fitting.py"
    fitting.write_text("")
    find = lab.importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec",
        lambda name: SimpleNamespace(origin=str(fitting)) if name.endswith(".fitting") else find(name),
    )
    assert source_digest(kind) != digest


def test_a_damaged_result_is_an_error_that_names_the_file(tmp_path):
    outcomes(Coin(), out=tmp_path, seeds=1)
    (tmp_path / "coin" / "3.json").write_text('{"experiment": "coin"}')
    with pytest.raises(FormatError, match=r"3\.json is no result of the lab"):
        outcomes(Coin(), out=tmp_path, seeds=1)


def test_a_seed_that_fails_is_recorded_and_the_others_go_on(tmp_path, tosses):
    broken, coin = outcomes(Broken(), Coin(), out=tmp_path)
    assert broken.failed == {3: "ArithmeticError: the coin is on its edge"}
    assert list(broken.measured) == [4]
    assert not broken.met(Broken.bars[0])
    assert coin.met(Coin.bars[0])
    assert tosses == [4, 3, 4]
    assert "ArithmeticError" in json.loads((tmp_path / "broken" / "3.json").read_text())["trace"]
    outcomes(Broken(), out=tmp_path)  # a failure is tried again, a result is not
    assert tosses == [4, 3, 4]


@pytest.mark.parametrize(
    ("figures", "problem"),
    [({"share": 1.0}, "needs a number sides"), ({"share": True, "sides": 2}, "needs a number share"),
     ({"share": float("nan"), "sides": 2}, "not JSON compliant"),
     ({"share": {1}, "sides": 2}, "not JSON serializable")],
)  # fmt: skip
def test_figures_that_are_missing_or_no_json_are_a_failure(tmp_path, monkeypatch, figures, problem):
    monkeypatch.setattr(Coin, "run", lambda self, seed, tell: figures)
    (outcome,) = outcomes(Coin(), out=tmp_path, seeds=1)
    assert problem in outcome.failed[3]


def test_an_interruption_goes_through_and_leaves_what_was_done(tmp_path, monkeypatch):
    def run(self, seed, tell):
        if seed == 4:
            raise KeyboardInterrupt
        return {"share": 1.0, "sides": 2}

    monkeypatch.setattr(Coin, "run", run)
    with pytest.raises(KeyboardInterrupt):
        outcomes(Coin(), out=tmp_path)
    assert [path.name for path in (tmp_path / "coin").iterdir()] == ["3.json"]


@pytest.mark.parametrize("option", ["seeds", "threads", "jobs"])
def test_a_number_below_one_is_refused_by_name(tmp_path, option):
    with pytest.raises(UsageError, match=f"--{option} must be at least 1, got 0"):
        outcomes(Coin(), out=tmp_path, **{option: 0})


def test_the_report_shows_each_figure_beside_its_bar(tmp_path):
    page = write_report(tmp_path, outcomes(Coin(), Broken(), out=tmp_path)).read_text()
    assert "| coin | `share >= 0.25` | 0.3, 0.4 | met | 0 |" in page
    assert "| broken | `share >= 0.25` | –, 0.4 | failed | 0 |" in page
    assert "Seed 3 failed: ArithmeticError: the coin is on its edge" in page
    assert "![coin](coin/coin.png)" in page
    assert (tmp_path / "coin" / "coin.png").read_bytes() == b"[3, 4]"


def test_the_report_says_where_pictures_are_missing(tmp_path, monkeypatch):
    monkeypatch.setattr("portlm.flows.lab.report.find_spec", lambda name: None)
    page = write_report(tmp_path, outcomes(Coin(), out=tmp_path)).read_text()
    assert "matplotlib is missing" in page
    assert not (tmp_path / "coin" / "coin.png").exists()


def test_the_command_prints_json_and_says_by_its_code_what_failed_or_was_missed(
    tmp_path, listed, monkeypatch
):
    call = ["coin", "--out", str(tmp_path), "--json"]
    result = CliRunner().invoke(command, call, standalone_mode=False)
    assert result.return_value == 0
    (told,) = json.loads(result.stdout)
    assert told["bars"][0] == {
        "figure": "share", "relation": ">=", "bound": 0.25, "values": [pytest.approx(0.3), 0.4], "met": True
    }  # fmt: skip
    assert told["results"]["4"]["tosses"] == [4, 4, 4]
    assert "lab: 1/2" in result.stderr
    assert "ETA" in result.stderr
    monkeypatch.setattr(Coin, "bars", (Bar("share", ">=", 0.35),))
    assert CliRunner().invoke(command, call, standalone_mode=False).return_value == 0
    assert CliRunner().invoke(command, [*call, "--check"], standalone_mode=False).return_value == 1
    everything = CliRunner().invoke(command, ["all", "--out", str(tmp_path)], standalone_mode=False)
    assert everything.return_value == 1
    assert "on its edge" in everything.stdout


def test_the_list_names_every_experiment_with_its_bars(listed):
    result = CliRunner().invoke(command, ["list"], standalone_mode=False)
    assert "coin: A coin has two sides." in result.stdout
    assert "share >= 0.25, sides == 2" in result.stdout
    told = json.loads(CliRunner().invoke(command, ["list", "--json"], standalone_mode=False).stdout)
    assert [row["name"] for row in told] == ["coin", "broken"]


def test_a_model_learns_a_text_that_repeats_and_is_measured_in_bits():
    from portlm.models.gpt2 import GPT2Config

    generator = seeded(0)
    tokens = torch.arange(4).repeat(100).numpy()
    model = fresh(GPT2Config(vocab_size=4, context_length=16, n_layer=1, n_head=2, width=16), 0)
    inputs, targets = rows_of(tokens, 16)
    assert inputs.shape == targets.shape == (24, 16)
    assert torch.equal(inputs[0, 1:], targets[0, :-1])
    before = bits_per_token(model, inputs, targets, rows=7)
    whole = torch.nn.functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
    assert before == pytest.approx(whole.item() / 0.6931472, rel=1e-5)  # sums in another order
    told = []
    losses = fit(model, windows(generator, tokens, 8, 16), 40, lr=1e-2, tell=told.append)
    assert len(losses) == 40
    assert len(told) == 10
    assert losses[-1] < 0.2 < 1.0 < losses[0]
    assert bits_per_token(model, inputs, targets) < 0.3
    assert accuracy(model, inputs, targets) > 0.95


def test_the_same_seed_gives_the_same_model_whatever_was_drawn_before():
    from portlm.models.nplm import NPLMConfig

    first = fresh(NPLMConfig.tiny(), 5).state_dict()
    torch.rand(3)
    assert all(torch.equal(first[name], p) for name, p in fresh(NPLMConfig.tiny(), 5).state_dict().items())


def test_layers_and_a_schedule_are_those_that_were_asked_for():
    from portlm.models.gpt2 import GPT2Config
    from portlm.train.config import LayerSettings
    from portlm.train.layers import layer_groups

    ids = torch.arange(4).repeat(8).view(2, 16)

    def moved(steps, rates, layers):
        model = fresh(GPT2Config(vocab_size=4, context_length=16, n_layer=2, n_head=2, width=16), 0)
        before = [[p.detach().clone() for p in group] for group in layer_groups(model)]
        fit(
            model,
            iter([(ids, ids)] * steps),
            steps,
            schedule=rates.__getitem__,
            layers=layers,
            weight_decay=0.0,
        )
        return [
            max(((p - b).abs().max().item() for p, b in zip(group, old, strict=True)), default=0.0)
            for group, old in zip(layer_groups(model), before, strict=True)
        ]

    gradual = LayerSettings(unfreeze=2)
    assert [amount > 0 for amount in moved(2, [0.1, 0.1], gradual)[:3]] == [False, False, True]
    assert [amount > 0 for amount in moved(3, [0.1] * 3, gradual)[:3]] == [False, True, True]
    assert max(moved(2, [0.0, 0.0], None)) == 0
    # The first step of AdamW is about as long as the rate, whatever the gradient is.
    below, lower, upper, _ = moved(1, [0.1], LayerSettings(decay=2.0))
    assert (upper, lower, below) == pytest.approx((0.1, 0.05, 0.025), rel=1e-3)


def test_training_that_diverges_says_at_which_step():
    model = torch.nn.Linear(1, 1)
    with pytest.raises(FloatingPointError, match="the loss of step 1 is nan"):
        fit(model, iter([torch.tensor([[float("nan")]])]), 1, loss=lambda x: model(x).sum())
