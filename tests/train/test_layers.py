"""Layers that learn at rates of their own, one after the other, or not at all; and the schedules of fine-tuning."""

import math

import pytest

torch = pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")

from portlm.errors import ConfigError  # noqa: E402
from portlm.models import FAMILIES, build  # noqa: E402
from portlm.models.heads import with_labels  # noqa: E402
from portlm.train.config import (  # noqa: E402
    LayerSettings,
    OptimizerSettings,
    RunConfig,
    ScheduleSettings,
)
from portlm.train.layers import Layers, layer_groups  # noqa: E402
from portlm.train.schedule import InverseSqrt, SlantedTriangle, WarmupLinear  # noqa: E402
from portlm.train.setup import make_optimizer, make_schedule  # noqa: E402

CLASSIFIERS = [name for name, family in FAMILIES.items() if family.kind in ("decoder", "encoder")]


def classifier(family):
    return build(with_labels(FAMILIES[family].config_class().tiny(), ("a", "b")))


# ---- the order of layers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_groups_are_embeddings_then_each_block_then_what_is_on_top(family):
    model = classifier(family)
    names = {p: name for name, p in model.named_parameters()}
    groups = [[names[p] for p in group] for group in layer_groups(model)]
    assert len(groups) == model.config.n_layer + 2
    assert sorted(name for group in groups for name in group) == sorted(names.values())
    assert all(name.startswith(("heads.", "pooler.")) for name in groups[-1])
    assert any(name.startswith("heads.classify") for name in groups[-1])
    for i, group in enumerate(groups[1:-1]):
        inside = [name for name in group if f".{i}." in name]
        behind = [name for name in group if f".{i}." not in name]
        assert inside
        assert not behind or i == model.config.n_layer - 1  # the norm behind the blocks belongs to the last
    tables = [p for p, name in names.items() if name in groups[0] and p.shape[0] == model.config.vocab_size]
    assert tables


def test_a_model_of_two_stacks_has_no_order_of_layers():
    model = build(FAMILIES["t5"].config_class().tiny())
    with pytest.raises(
        ConfigError, match="for a model with one stack of blocks, and this one has 0: leave them out"
    ):
        Layers(model, LayerSettings(decay=2.6))
    Layers(model, LayerSettings())  # which asks for none


# ---- rates of their own ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_layer_learns_at_the_rate_of_the_one_above_it_divided_by_decay(name):
    """Howard and Ruder: eta of layer l - 1 is eta of layer l divided by 2.6."""
    model = classifier("bert")
    layers = Layers(model, LayerSettings(decay=2.6))
    optimizer = make_optimizer(model, OptimizerSettings(name=name), layers.scale)
    scale = {p: group["scale"] for group in optimizer.param_groups for p in group["params"]}
    groups = layer_groups(model)
    assert scale.keys() == {*model.parameters()}
    for height, group in enumerate(reversed(groups)):
        assert [scale[p] for p in group] == pytest.approx([2.6**-height] * len(group), rel=1e-12)


def test_without_decay_all_learn_alike_in_as_many_groups_as_before():
    model = classifier("gpt2")
    optimizer = make_optimizer(model, OptimizerSettings(), Layers(model, LayerSettings()).scale)
    assert [group["scale"] for group in optimizer.param_groups] == [
        1.0,
        1.0,
    ]  # matrices decay, vectors do not


def test_a_frozen_backbone_takes_no_gradient_and_no_room_in_the_optimizer():
    model = classifier("openai-gpt")
    layers = Layers(model, LayerSettings(freeze="backbone"))
    optimizer = make_optimizer(model, OptimizerSettings(), layers.scale)
    trained = {p for group in optimizer.param_groups for p in group["params"]}
    assert trained == {*layer_groups(model)[-1]} == {p for p in model.parameters() if p.requires_grad}


def test_nothing_on_top_of_the_blocks_is_refused_to_be_trained_alone():
    model = build(FAMILIES["gpt2"].config_class().tiny())  # its output matrix is the token table
    with pytest.raises(
        ConfigError, match="trains what is on top of the blocks, and this model has nothing there"
    ):
        Layers(model, LayerSettings(freeze="backbone"))


def test_layers_begin_to_learn_from_the_top_one_after_the_other():
    model = classifier("gpt2")
    groups, layers = layer_groups(model), Layers(model, LayerSettings(unfreeze=3))
    for step in range(15):
        layers.set_learning(step)
        learning = [all(p.requires_grad for p in group) for group in groups]
        still = [not any(p.requires_grad for p in group) for group in groups]
        count = min(1 + step // 3, len(groups))
        assert learning == [False] * (len(groups) - count) + [True] * count
        assert still == [not each for each in learning]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"freeze": "backbone", "unfreeze": 3}, "layers.unfreeze is for layers that learn"),
        ({"freeze": "backbone", "decay": 2.6}, "layers.decay is for layers that learn"),
        ({"decay": 0.5}, "layers.decay must be at least 1"),
        ({"unfreeze": -1}, "layers.unfreeze must be at least 0"),
    ],
    ids=str,
)
def test_settings_of_layers_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        LayerSettings(**settings)


# ---- schedules ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "fraction", "ratio"), [(1000, 0.1, 32), (70, 0.3, 5), (500, 0.02, 32)])
def test_the_slanted_triangle_is_that_of_the_paper(steps, fraction, ratio):
    """Equation 3 of arXiv:1801.06146, written down again; where cut is a whole number it is the same to rounding."""
    rate = make_schedule(
        RunConfig(
            steps=steps,
            optimizer=OptimizerSettings(lr=0.01),
            schedule=ScheduleSettings(shape="slanted", warmup=fraction, ratio=ratio),
        )
    )
    cut = math.floor(steps * fraction)
    for t in range(steps + 1):
        p = t / cut if t < cut else 1 - (t - cut) / (cut * (1 / fraction - 1))
        assert rate(t) == pytest.approx(0.01 * (1 + p * (ratio - 1)) / ratio, rel=1e-12)
    assert rate(cut) == 0.01
    assert rate(0) == rate(steps) == pytest.approx(0.01 / ratio)
    assert rate(10 * steps) == rate(steps)


def test_a_slanted_triangle_without_a_rise_begins_at_its_peak():
    rate = SlantedTriangle(1.0, 4.0, 0, 8)
    assert [rate(step) for step in (0, 4, 8)] == [1.0, 0.625, 0.25]


def test_a_line_falls_evenly_to_its_floor():
    rate = WarmupLinear(peak=1.0, floor=0.2, warmup=4, steps=12)
    assert [rate(step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert [rate(step) for step in (3, 7, 11, 50)] == pytest.approx([1.0, 0.6, 0.2, 0.2])
    falls = [rate(step) - rate(step + 1) for step in range(3, 11)]
    assert falls == pytest.approx([0.1] * 8)


@pytest.mark.parametrize(("warmup", "steps"), [(0.25, 10), (40.0, 40), (0.0, 1)])
def test_an_inverse_root_begins_where_the_settings_say(warmup, steps):
    schedule = ScheduleSettings(shape="inverse-sqrt", warmup=warmup)
    rate = make_schedule(RunConfig(steps=40, optimizer=OptimizerSettings(lr=7e-4), schedule=schedule))
    assert rate == InverseSqrt(7e-4, steps)
    assert rate(steps - 1) == 7e-4
    assert rate(4 * steps - 1) == 3.5e-4


def test_a_setting_of_another_shape_is_refused():
    with pytest.raises(ConfigError, match=r"schedule.min_lr is not read with schedule.shape = slanted"):
        ScheduleSettings(shape="slanted", min_lr=0.0)
    with pytest.raises(
        ConfigError, match=r"schedule.min_lr .* schedule.shape = inverse-sqrt: leave it at 0.0001"
    ):
        ScheduleSettings(shape="inverse-sqrt", min_lr=0.0)
    with pytest.raises(ConfigError, match=r"schedule.ratio is read with schedule.shape = slanted alone"):
        ScheduleSettings(ratio=8.0)
    for shape in ("inverse-sqrt", "slanted"):  # a peak below min_lr
        RunConfig(optimizer=OptimizerSettings(lr=1e-5), schedule=ScheduleSettings(shape=shape))
