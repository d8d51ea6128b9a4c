"""Settings: what a user writes is either taken exactly or refused with the key's name."""

import contextlib
import dataclasses
import tomllib
from dataclasses import dataclass, field
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from portlm import settings
from portlm.errors import ConfigError
from portlm.train import presets
from portlm.train.config import PretrainConfig
from portlm.train.presets import PRESETS, preset_settings


@dataclass(frozen=True)
class Inner:
    rate: float = 0.5
    names: tuple[str, ...] = ()
    mode: Literal["fast", "exact"] = "fast"
    label: str = "plain"


@dataclass(frozen=True)
class Outer:
    count: int = 3
    flag: bool = False
    inner: Inner = field(default_factory=Inner)


def test_later_sources_win(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text("count = 5\n[inner]\nrate = 2.5\nlabel = 'file'\n")
    preset = {"count": 4, "flag": True, "inner": {"label": "preset"}}
    got = settings.load(Outer, preset=preset, file=file, overrides=["inner.rate=3"])
    assert got == Outer(5, True, Inner(rate=3.0, label="file"))


def test_loading_does_not_change_the_preset():
    preset = {"inner": {"rate": 1.0}}
    settings.load(Outer, preset=preset, overrides=["inner.rate=9"])
    assert preset == {"inner": {"rate": 1.0}}


@pytest.mark.parametrize(
    ("override", "needle"),
    [
        ("inner.raet=1", "inner.rate"),
        ("rate=1", "inner.rate"),
        ("inner=3", "inner.rate, inner.names"),
        ("zzz=1", "the keys are count"),
        ("count", "has no '='"),
        ("count=many", "expected `int`"),
        ("count=1.5", "expected `int`"),
        ("flag=1", "flag"),
        ("inner.mode=slow", "fast, exact"),
        ("inner.names=[1]", "inner.names[0]"),
    ],
)
def test_a_bad_override_names_the_key_and_the_remedy(override, needle):
    with pytest.raises(ConfigError) as caught:
        settings.load(Outer, overrides=[override])
    assert needle in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_error_says_which_source_the_value_came_from(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text("count = 'x'")
    with pytest.raises(ConfigError, match=r"c\.toml"):
        settings.load(Outer, file=file)


@pytest.mark.parametrize("text", ["count = ", "= 3", "\x00", "a = [[[[", "[inner]\n[inner]\n"])
def test_a_file_that_is_no_toml_is_refused_by_name(tmp_path, text):
    file = tmp_path / "c.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"c\.toml"):
        settings.load(Outer, file=file)


def test_missing_and_non_utf8_files_are_refused_by_name(tmp_path):
    with pytest.raises(ConfigError, match="absent"):
        settings.load(Outer, file=tmp_path / "absent.toml")
    (tmp_path / "latin.toml").write_bytes(b"label = '\xe4'")
    with pytest.raises(ConfigError, match="latin"):
        settings.load(Outer, file=tmp_path / "latin.toml")


def test_a_string_setting_takes_the_bare_word():
    got = settings.load(Outer, overrides=["inner.label=2048", "inner.mode=exact"])
    assert got.inner.label == "2048"
    assert settings.load(Outer, overrides=['inner.label="a b"']).inner.label == "a b"


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda children: st.lists(children) | st.dictionaries(st.text(max_size=8), children),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(["count", "flag", "inner", "x"]), anything))
def test_any_tree_either_loads_or_raises_config_error(tree):
    with contextlib.suppress(ConfigError):
        assert isinstance(settings.load(Outer, preset=tree), Outer)


@given(st.text(max_size=40))
def test_any_override_either_loads_or_raises_config_error(text):
    for key in ("count", "inner.label", "inner.names"):
        with contextlib.suppress(ConfigError):
            assert isinstance(settings.load(Outer, overrides=[f"{key}={text}"]), Outer)


@given(
    st.builds(
        Outer,
        count=st.integers(),
        flag=st.booleans(),
        inner=st.builds(
            Inner,
            rate=st.floats(allow_nan=False, allow_infinity=False),
            names=st.lists(st.text()).map(tuple),
            mode=st.sampled_from(["fast", "exact"]),
            label=st.text(),
        ),
    )
)
def test_toml_text_reads_back_equal(tmp_path_factory, value):
    file = tmp_path_factory.getbasetemp() / "round-trip.toml"
    file.write_text(settings.to_toml(value), encoding="utf-8", newline="")
    assert settings.load(Outer, file=file) == value


def test_differences_lists_exactly_the_changed_leaves():
    assert settings.differences(Outer(), Outer(count=4, inner=Inner(mode="exact"))) == {
        "count": (3, 4),
        "inner.mode": ("fast", "exact"),
    }


def test_the_default_config_survives_its_own_toml():
    text = settings.to_toml(PretrainConfig())
    assert tomllib.loads(text)["model"]["width"] == 128
    assert settings.to_dict(PretrainConfig()) == tomllib.loads(text)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_valid_config(name):
    assert isinstance(settings.load(PretrainConfig, preset=preset_settings(name)), PretrainConfig)


def test_an_unknown_preset_lists_the_known_ones():
    with pytest.raises(ConfigError, match="nanogpt-cpu"):
        preset_settings("huge")


@pytest.mark.parametrize(
    "override",
    [
        "steps=0", "seed=-1", "threads=-1", "log_interval=0", "model.width=130", "model.n_kv_head=2",
        "model.hidden=5", "model.dropout=1", "data.validation_fraction=0", "data.batch_size=0",
        "data.tokenizer=bpe", "data.tokenizer=bpe:x", "data.tokenizer=", "optimizer.lr=0", "optimizer.lr=nan",
        "optimizer.lr=inf", "optimizer.beta1=1", "optimizer.clip=-1", "schedule.min_lr=1", "schedule.warmup=1.5",
        "evaluation.interval=0", "checkpoint.keep=1", "model.n_head=0", "model.family=bert",
    ],
)  # fmt: skip
def test_a_value_out_of_range_is_refused_by_name(override):
    key = override.partition("=")[0]
    with pytest.raises(ConfigError) as caught:
        settings.load(PretrainConfig, overrides=[override])
    assert key in str(caught.value) or key.split(".")[-1] in str(caught.value)


def test_warmup_is_a_share_or_a_number_of_steps():
    assert settings.load(PretrainConfig, overrides=["steps=400"]).warmup_steps == 20
    assert settings.load(PretrainConfig, overrides=["steps=400", "schedule.warmup=7"]).warmup_steps == 7


def test_the_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PretrainConfig().steps = 3
