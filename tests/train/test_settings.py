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
from portlm.models import FAMILIES
from portlm.train import presets
from portlm.train.config import PretrainConfig
from portlm.train.objectives import OBJECTIVES
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


class Shape(settings.Variants):
    """Keys that depend on the kind."""

    tag = "kind"

    @classmethod
    def variants(cls):
        return ("circle", "box")

    @classmethod
    def variant(cls, name):
        return {"circle": Circle, "box": Box}[name]


@dataclass(frozen=True)
class Circle(Shape):
    kind: Literal["circle"] = "circle"
    radius: float = 1.0


@dataclass(frozen=True)
class Box(Shape):
    kind: Literal["box"] = "box"
    width: int = 2
    round: bool = False


@dataclass(frozen=True)
class Drawing:
    title: str = ""
    shape: Shape = field(default_factory=Circle)


def test_one_key_of_a_section_chooses_the_others(tmp_path):
    assert settings.load(Drawing) == Drawing()
    assert settings.load(Drawing, overrides=["shape.radius=2"]).shape == Circle(radius=2.0)
    file = tmp_path / "c.toml"
    file.write_text("[shape]\nkind = 'box'\nwidth = 5\n")
    assert settings.load(Drawing, file=file).shape == Box(width=5)
    with pytest.raises(ConfigError, match=r"shape.width does not apply to the kind circle.*c\.toml"):
        settings.load(Drawing, file=file, overrides=["shape.kind=circle"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["shape.kind=blob"], "shape.kind: expected one of circle, box, got 'blob' (from override"),
        ([("shape.kind", 3)], "shape.kind: expected one of circle, box, got 3"),
        (["shape.width=3"], "shape.width does not apply to the kind circle: leave it out"),
        (["shape.kind=box", "shape.radius=3"], "shape.radius does not apply to the kind box"),
        (["shape.kind=box", "shape.width=wide"], "shape.width: expected `int`, got `str` (from override"),
        (["shape.kind=box", "shape.wdth=3"], "did you mean shape.width"),
        (["shape=box"], "shape is a section, not a value; its keys are shape.kind, shape.radius"),
    ],
)
def test_a_bad_value_in_a_section_with_variants_is_named(overrides, message):
    with pytest.raises(ConfigError) as caught:
        settings.load(Drawing, overrides=overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_foreign_key_with_its_default_says_nothing_and_is_dropped():
    tree = {"shape": {"kind": "box", "radius": 1.0, "width": 3, "round": True}}
    assert settings.load(Drawing, preset=tree).shape == Box(width=3, round=True)
    assert settings.load(Drawing, overrides=["shape.kind=box", "shape.radius=1"]).shape == Box()


@given(st.dictionaries(st.sampled_from(["title", "shape", "kind"]), anything))
def test_any_tree_with_variants_either_loads_or_raises_config_error(tree):
    with contextlib.suppress(ConfigError):
        assert isinstance(settings.load(Drawing, preset=tree), Drawing)
    with contextlib.suppress(ConfigError):
        assert isinstance(settings.load(Drawing, preset={"shape": tree}), Drawing)


def test_differences_between_variants_name_the_keys_of_both():
    box = Drawing(shape=Box(width=5))
    assert settings.differences(Drawing(), box) == {
        "shape.kind": ("circle", "box"), "shape.radius": (1.0, None), "shape.width": (None, 5),
        "shape.round": (None, False),
    }  # fmt: skip
    assert settings.load(Drawing, preset=settings.to_dict(box)) == box


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
        "data.tokenizer=bpe", "data.tokenizer=bpe:x", "data.tokenizer=word", "data.tokenizer=", "optimizer.lr=0",
        "optimizer.lr=nan", "optimizer.lr=inf", "optimizer.beta1=1", "optimizer.clip=-1", "schedule.min_lr=1",
        "schedule.warmup=1.5", "evaluation.interval=0", "checkpoint.keep=1", "model.n_head=0", "model.family=word2vec",
    ],
)  # fmt: skip
def test_a_value_out_of_range_is_refused_by_name(override):
    key = override.partition("=")[0]
    with pytest.raises(ConfigError) as caught:
        settings.load(PretrainConfig, overrides=[override])
    assert key in str(caught.value) or key.split(".")[-1] in str(caught.value)


def test_a_file_with_the_keys_of_both_families_still_loads():
    """As every config.toml was written once."""
    shape = {
        "n_layer": 2, "n_head": 4, "n_kv_head": 0, "width": 32, "hidden": 0, "context_length": 16, "dropout": 0.0,
        "rope_theta": 10000.0, "tie_embeddings": True,
    }  # fmt: skip
    loaded = settings.load(PretrainConfig, preset={"model": {"family": "gpt2", **shape, "dropout": 0.1}})
    assert loaded.model.config(256).dropout == 0.1
    loaded = settings.load(PretrainConfig, preset={"model": {"family": "llama", **shape, "rope_theta": 500}})
    config = loaded.model.config(256, (3,))
    assert (config.n_kv_head, config.hidden, config.tie_embeddings) == (4, 96, True)
    assert (config.rope_theta, config.vocab_size, config.eos_token_ids) == (500.0, 256, (3,))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["model.family=llama", "model.dropout=0.1"],
            "model.dropout does not apply to the family llama: leave it out",
        ),
        (["model.n_kv_head=2"], "model.n_kv_head does not apply to the family gpt2"),
        (["model.family=word2vec"], f"model.family: expected one of {', '.join(FAMILIES)}, got 'word2vec'"),
        (["model.width=130"], "model.width 130 must be a multiple of n_head 4"),
        (["model.n_layer=0"], "model.n_layer must be an integer from 1 to 1024, got 0"),
        (["model.family=llama", "model.n_kv_head=3"], "model.n_head 4 must be a multiple of n_kv_head 3"),
        (["model.family=llama", "model.n_head=128"], "model: rotary positions turn pairs: they need an even"),
        (["objective=guess"], f"objective must be one of {', '.join(OBJECTIVES)}, got 'guess'"),
    ],
)
def test_the_family_checks_its_own_settings_and_names_them(overrides, message):
    with pytest.raises(ConfigError) as caught:
        settings.load(PretrainConfig, overrides=overrides)
    assert message in str(caught.value)


def test_the_default_preset_is_the_defaults():
    """The command's help takes the model's defaults from it, to show them without PyTorch."""
    assert settings.load(PretrainConfig, preset=preset_settings(presets.DEFAULT)) == PretrainConfig()
    assert PRESETS[presets.DEFAULT]["model"] == settings.to_dict(PretrainConfig().model)


def test_warmup_is_a_share_or_a_number_of_steps():
    assert settings.load(PretrainConfig, overrides=["steps=400"]).warmup_steps == 20
    assert settings.load(PretrainConfig, overrides=["steps=400", "schedule.warmup=7"]).warmup_steps == 7


def test_the_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PretrainConfig().steps = 3


def test_what_a_file_and_overrides_say_of_a_key_is_known_before_anything_is_checked(tmp_path):
    path = tmp_path / "given.toml"
    path.write_text('[schedule]\nshape = "slanted"\n')
    key = "schedule.shape"
    assert settings.said(PretrainConfig, key) is None
    assert settings.said(PretrainConfig, "schedule.warmup", file=path) is None
    assert settings.said(PretrainConfig, key, file=path) == "slanted"
    assert settings.said(PretrainConfig, key, file=path, overrides=["schedule.shape=linear"]) == "linear"
    assert settings.said(PretrainConfig, key, overrides=[(key, "linear"), (key, "cosine")]) == "cosine"
    assert settings.said(PretrainConfig, "schedule.ratio", overrides=["schedule.ratio=8"]) == 8
    with pytest.raises(ConfigError, match="has no '='"):
        settings.said(PretrainConfig, key, overrides=["schedule.shape"])
