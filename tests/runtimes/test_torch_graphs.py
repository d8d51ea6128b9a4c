"""Steps of the torch engine as recorded graphs: with what stands for CUDA's, and with those where there is a GPU."""

from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")
from random_weights import randomise  # noqa: E402
from recorded_graph import RecordedGraph  # noqa: E402
from torch_plans import open_engine  # noqa: E402

from portlm.engine import CallSpec  # noqa: E402
from portlm.models import DECODERS, build  # noqa: E402
from portlm.ops.kernel_op import without_kernels  # noqa: E402
from portlm.rows import Rows  # noqa: E402
from portlm.runtimes import torch_graphs  # noqa: E402
from portlm.runtimes.eager import TorchEngine  # noqa: E402
from portlm.runtimes.torch_graphs import CudaGraph, Slot, takes  # noqa: E402

TOLERANCE = 1e-4  # of fp32 logits of size 10, over sums that padding makes longer
TEXTS = [[5, 17, 200, 3, 77, 42, 9], [9, 8], [250, 1, 2, 3]]
GRAPHS = [
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")],
    ),
    "cpu",
]


def make(family, device, **sizes):
    """An engine of a tiny model, without graphs."""
    config = replace(DECODERS[family].config_class().tiny(), vocab_size=257, context_length=90, **sizes)
    engine = TorchEngine.of(randomise(build(config), 0.3, seed=1), device)
    engine.use_graphs(None)
    return engine


@pytest.fixture(params=GRAPHS, ids=["gpu", "recorded"])
def device(request, monkeypatch):
    """Where the engines are; a step is recorded at once there, and for few slots."""
    monkeypatch.setattr(torch_graphs, "FEWEST_SLOTS", 8)
    monkeypatch.setattr(torch_graphs, "PATIENCE", 0)
    if request.param == "cuda":
        yield request.param
    else:
        with without_kernels():
            yield request.param


def use(engine):
    engine.use_graphs(CudaGraph if engine.device == "cuda" else RecordedGraph)
    return engine._graphs


def read(engine, texts):
    rows = Rows(engine, len(texts))
    rows.read_texts(texts)
    return rows


def tokens_of(rows, count, start=0):
    return [(np.arange(rows) * 31 + 7 * i + start) % 250 for i in range(count)]


def held(rows):
    return all(isinstance(tensor, Slot) for tensor in rows._state.peek().values())


def assert_same(found, wanted):
    np.testing.assert_allclose(found, wanted, rtol=0, atol=TOLERANCE, equal_nan=False)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3_text"])
def test_recorded_steps_answer_as_steps_do_while_the_cache_outgrows_one_recording_after_another(
    family, device
):
    """Learned positions, rotary ones, and windows: all have to leave the padding out."""
    engine = make(family, device)
    tokens = tokens_of(3, 30)
    plain = read(engine, TEXTS)
    wanted = [plain.next(t) for t in tokens]
    graphs = use(engine)
    rows = read(engine, TEXTS)
    for t, logits in zip(tokens, wanted, strict=True):
        assert_same(rows.next(t), logits)
    assert held(rows)
    assert not graphs.problems
    assert [key[1:] for key in graphs._steps] == [(3, 8), (3, 16), (3, 32), (3, 64)]


def test_rows_leave_change_places_go_back_and_join_others_between_recorded_steps(device):
    engine = make("llama", device)

    def tell(engine):
        rows, found = read(engine, TEXTS), []
        found += [rows.next(t) for t in tokens_of(3, 3)]
        twin = rows.copy()
        found += [rows.next(t) for t in tokens_of(3, 2, start=50)]
        found += [twin.next(t) for t in tokens_of(3, 2, start=90)]  # in the same step's memory
        rows.keep([2, 0])
        found += [rows.next(t) for t in tokens_of(2, 2)]
        rows.crop([5, 9])
        found += [rows.next(t) for t in tokens_of(2, 2)]
        rows.join([twin])
        found += [rows.next(t) for t in tokens_of(5, 2)]
        return found

    wanted = tell(engine)
    graphs = use(engine)
    for found, logits in zip(tell(engine), wanted, strict=True):
        assert_same(found, logits)
    assert {rows for _, rows, _ in graphs._steps} == {2, 3, 5}


def test_two_texts_take_turns_in_one_recorded_step(device, monkeypatch):
    monkeypatch.setattr(torch_graphs, "FEWEST_SLOTS", 16)
    engine = make("gpt2", device)
    alone = [read(engine, [text]) for text in TEXTS[:2]]
    alone = [[rows.next(t) for t in tokens_of(1, 4)] for rows in alone]
    graphs = use(engine)
    pair = [read(engine, [text]) for text in TEXTS[:2]]
    for i, t in enumerate(tokens_of(1, 4)):
        for rows, logits in zip(pair, alone, strict=True):
            assert_same(rows.next(t), logits[i])
    assert len(graphs._steps) == 1


def test_the_oldest_of_too_many_recordings_goes_and_its_state_stays(device, monkeypatch):
    monkeypatch.setattr(torch_graphs, "MOST_STEPS", 1)
    engine = make("gpt2", device)
    tokens = tokens_of(1, 2)
    plain = read(engine, TEXTS[:1])
    wanted = [plain.next(t) for t in tokens]
    graphs = use(engine)
    rows, others = read(engine, TEXTS[:1]), read(engine, TEXTS)
    assert_same(rows.next(tokens[0]), wanted[0])
    others.next(tokens_of(3, 1)[0])
    assert [key[1] for key in graphs._steps] == [3]
    assert_same(rows.next(tokens[1]), wanted[1])


def test_a_step_is_recorded_when_enough_came_before_and_the_cache_is_small_enough(device, monkeypatch):
    monkeypatch.setattr(torch_graphs, "PATIENCE", 2)
    engine = make("gpt2", device)
    graphs = use(engine)
    rows = read(engine, TEXTS)
    for count, t in enumerate(tokens_of(3, 4), 1):
        rows.next(t)
        assert held(rows) is (count > 2)
    others = read(engine, TEXTS)  # several tokens at once, after which there may be more
    others.next([1, 2, 3])
    assert not held(others)
    rows.next([1, 2, 3])
    assert held(rows)  # which it was before
    monkeypatch.setattr(torch_graphs, "MOST_BYTES", 0)
    rows.next([1, 2, 3])
    assert not held(rows)
    assert not graphs.problems


def test_several_tokens_at_once_are_no_recorded_step(device):
    engine = make("gpt2", device)
    use(engine)
    rows = read(engine, TEXTS)
    rows.read(np.ones((3, 2), np.int64))
    assert not held(rows)
    assert not engine._graphs._steps


@pytest.mark.parametrize("context", [16, 90])
def test_recorded_steps_go_to_the_end_of_the_context(context, device):
    engine = make("llama", device)
    engine = TorchEngine.of(randomise(build(replace(DECODERS["llama"].config_class().tiny(), vocab_size=257,
                                                     context_length=context)), 0.3, seed=1), device)  # fmt: skip
    graphs = use(engine)
    rows = read(engine, [[1]])
    for t in tokens_of(1, context - 2):
        rows.next(t)
    assert held(rows)
    assert np.isfinite(rows.next([1])).all()  # of the last one there is no state to go on with
    assert max(slots for *_, slots in graphs._steps) == context - 1


def test_a_step_that_looks_at_its_results_is_not_recorded_and_the_engine_says_why(device):
    engine = make("gpt2", device)
    function = engine._functions["decoder"].function

    def looking(*tensors):
        assert int(tensors[0].sum()) >= 0
        return function(*tensors)

    tokens = tokens_of(3, 3)
    plain = read(engine, TEXTS)
    wanted = [plain.next(t) for t in tokens]
    engine._functions["decoder"] = replace(engine._functions["decoder"], function=looking)
    graphs = use(engine)
    rows = read(engine, TEXTS)
    for t, logits in zip(tokens, wanted, strict=True):
        assert_same(rows.next(t), logits)
    assert not held(rows)
    assert "decoder" in graphs.problems


@pytest.mark.no_kernel("it looks at descriptions")
def test_roles_without_a_mask_of_all_slots_or_with_a_state_of_one_size_are_left_alone():
    spec = make("gpt2", "cpu").roles["decoder"]
    assert takes(spec)
    assert not takes(
        CallSpec(tuple(i for i in spec.inputs if i.name != "attention_mask"), spec.outputs, spec.state)
    )
    assert not takes(CallSpec(spec.inputs, spec.outputs))
    for changed in (
        {"update": "replace"},
        {"shape": ("batch", 4)},
        {"shape": ("batch", "source", "past", 4)},
    ):
        state = (replace_struct(spec.state[0], **changed), *spec.state[1:])
        assert not takes(CallSpec(spec.inputs, spec.outputs, state))


@pytest.mark.no_kernel("nothing is run")
def test_engines_on_cuda_record_steps_unless_they_are_told_not_to(monkeypatch):
    def graphs(device):
        return TorchEngine({}, 10, 20, device, "native", {})._graphs

    assert graphs("cuda") is not None
    assert graphs("cpu") is None
    monkeypatch.setenv("PORTLM_NO_CUDA_GRAPHS", "1")
    assert graphs("cuda") is None
    monkeypatch.setenv("PORTLM_NO_CUDA_GRAPHS", "0")
    assert graphs("cuda") is not None


def replace_struct(item, **changes):
    from msgspec.structs import replace as change

    return change(item, **changes)


@pytest.mark.no_kernel("PyTorch's operators are what can be recorded without a GPU")
@pytest.mark.parametrize("profile", ["portable", "fused"])
def test_recorded_steps_of_plans_answer_as_steps_do_over_a_cache_of_bytes(profile, byte_cache, monkeypatch):
    """Padding is zeros there, whose scales are 0: the plan has to leave it out, too."""
    monkeypatch.setattr(torch_graphs, "FEWEST_SLOTS", 8)
    monkeypatch.setattr(torch_graphs, "PATIENCE", 0)
    with without_kernels():
        engine = open_engine(byte_cache, profile)
        tokens = tokens_of(3, 12)
        plain = read(engine, TEXTS)
        wanted = [plain.next(t) for t in tokens]
        graphs = use(engine)
        rows = read(engine, TEXTS)
        for t, logits in zip(tokens, wanted, strict=True):
            # another order of sums may round a kept number to its other neighbour
            np.testing.assert_allclose(rows.next(t), logits, rtol=0, atol=0.1, equal_nan=False)
    assert held(rows)
    assert not graphs.problems
