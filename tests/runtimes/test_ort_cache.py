"""ONNX Runtime's cache in place: where slots are written, and that nobody who holds older ones notices."""

import shutil
from pathlib import Path

import numpy as np
import pytest

import portlm
from portlm.errors import FormatError
from portlm.rows import Rows
from portlm.runtimes.ort_cache import LARGE_PAGE, LINE, Cache, View

TOLERANCE = 4e-5  # of logits, as in tests/compile/test_export.py


@pytest.fixture(scope="module")
def engines(artifacts):
    """The engine under test, and the model's own code in PyTorch."""
    pytest.importorskip("onnxruntime", reason="onnxruntime is missing: pip install portlm[onnx]")
    pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")
    fast = portlm.load(artifacts["llama"], engine="ort", device="cpu", profile="fused")
    with fast, portlm.load(artifacts["llama"], engine="torch", device="cpu") as slow:
        yield fast.engine, slow.engine


def tensors(rows):
    return rows._state.peek()


def read_both(pair, *arguments, real=None, **options):
    """Read with both; return the first one's logits, which agree wherever there is no padding."""
    answers = [rows.read(*arguments, real, **options) for rows in pair]
    keep = np.ones(answers[0].shape[:2], bool) if real is None else real[:, -answers[0].shape[1] :] == 1
    assert np.abs(answers[0] - answers[1])[keep].max() < TOLERANCE
    return answers[0]


def start(engines, batch, tokens):
    pair = [Rows(engine, batch) for engine in engines]
    read_both(pair, tokens)
    return pair


def tokens(batch, count, seed=0):
    return np.random.default_rng(seed).integers(0, 60, (batch, count))


def test_a_step_writes_behind_what_is_there_and_moves_nothing(engines):
    pair = start(engines, 2, tokens(2, 5))
    before = tensors(pair[0])
    cache = {tensor.cache for tensor in before.values()}
    assert len(cache) == 1
    assert all(isinstance(tensor, View) for tensor in before.values())
    read_both(pair, tokens(2, 1))
    after = tensors(pair[0])
    assert {tensor.cache for tensor in after.values()} == cache
    assert {tensor.length for tensor in after.values()} == {6}


def test_several_tokens_of_a_ragged_batch_on_a_filled_cache(engines):
    """ONNX Runtime's operator refuses them in one call, so rows are read one by one, padding and all."""
    pair = [Rows(engine, 3) for engine in engines]
    real = np.ones((3, 6), np.int64)
    real[1, :2], real[2, :5] = 0, 0
    read_both(pair, tokens(3, 6), real=real, every=True)
    read_both(pair, tokens(3, 4), every=True)
    read_both(pair, tokens(3, 1))


def test_logits_of_a_step_are_not_overwritten_by_the_next(engines):
    pair = start(engines, 1, tokens(1, 3))
    first = pair[0].next([1])
    kept = first.copy()
    pair[0].next([2])
    assert np.array_equal(first, kept)


def test_continuations_of_one_prefix_do_not_see_each_other(engines):
    pair = start(engines, 2, tokens(2, 4))
    twins = [rows.copy() for rows in pair]
    for step in range(3):
        read_both(pair, tokens(2, 1, seed=step))
        read_both(twins, tokens(2, 1, seed=step + 10))
    assert (
        tensors(pair[0])["past_key_values.0.key"].cache
        is not tensors(twins[0])["past_key_values.0.key"].cache
    )


def test_a_cache_is_left_when_it_is_full_and_when_rows_change(engines):
    pair = start(engines, 3, tokens(3, 4))
    for rows in pair:
        rows.keep([2, 0])
        rows.crop([3, 2])
    read_both(pair, tokens(2, 2))
    others = start(engines, 1, tokens(1, 9, seed=5))
    for rows, other in zip(pair, others, strict=True):
        rows.join([other])
    for step in range(20):
        read_both(pair, tokens(3, 1, seed=step))


def test_every_state_begins_with_a_cache_line_and_large_caches_with_a_large_page():
    for capacity, unit in ((1, LINE), (3, LINE), (2000, LARGE_PAGE)):
        shapes = {"a": (2, 3, capacity, 8), "b": (1, 1, capacity, 40), "c": (2, 5, capacity, 56)}
        arrays = Cache(shapes, capacity, capacity).arrays
        assert {name: array.shape for name, array in arrays.items()} == shapes
        addresses = [array.ctypes.data for array in arrays.values()]
        assert addresses[0] % unit == 0
        assert all(address % LINE == 0 for address in addresses)
        ends = [array.ctypes.data + array.nbytes for array in arrays.values()]
        assert all(end <= begin for end, begin in zip(ends, addresses[1:], strict=False))


def test_inputs_of_a_call_may_be_changed_afterwards(engines):
    rows = Rows(engines[0], 1)
    ids = tokens(1, 1)
    first = rows.copy().read(ids)
    rows.read(ids)
    ids[:] = 59
    again = Rows(engines[0], 1)
    assert np.array_equal(again.read(tokens(1, 1)), first)


@pytest.mark.parametrize("damage", ["altered", "truncated", "longer", "missing"])
def test_damaged_weights_are_an_error_although_the_graph_was_opened_beside(damage, artifacts, tmp_path):
    pytest.importorskip("onnxruntime", reason="onnxruntime is missing: pip install portlm[onnx]")
    folder = shutil.copytree(artifacts["llama"], tmp_path / "artifact")
    path = folder / "onnx" / "decoder.onnx.data"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes({"truncated": data[:-8], "longer": data + b"\0" * 8, "altered": data}[damage])
    with pytest.raises(FormatError, match=r"missing|truncated|altered"):
        portlm.load(folder, engine="ort", device="cpu", profile="portable")


def test_matrices_are_packed_on_all_threads_where_memory_is_ample(engines, tmp_path):
    from portlm.runtimes.ort_files import PACK_ON_THREADS, has_room

    if not Path("/proc/meminfo").exists():
        pytest.skip("this system does not say what memory is available")
    sizes = {"small": 1 << 10, "large": 1 << 42}
    for name, size in sizes.items():
        with (tmp_path / name).open("wb") as file:
            file.truncate(size)  # takes no space
    assert has_room(tmp_path / "small")
    assert not has_room(tmp_path / "large")
    assert not has_room(tmp_path / "nothing")
    options = engines[0]._session("decoder").get_session_options()
    assert options.get_session_config_entry(PACK_ON_THREADS) == "1"
