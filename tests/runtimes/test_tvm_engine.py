"""What only the TVM engine has: mapped weights, steps that are checked, threads that share it."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tvm_ffi", reason="TVM is missing: pip install portlm[tvm]")
pytest.importorskip("onnx", reason="onnx is missing: pip install portlm[onnx]")

from tvm_engines import FUSED, call, first_step, open_engine

from portlm import tvm_support
from portlm.errors import PortlmError, UsageError
from portlm.runtimes.tvm_weights import ALIGNMENT, map_weights
from portlm.tvm_support import SIGNATURE, Signature


def test_weights_are_mapped_not_copied(compiled):
    folder = compiled["gpt2"]
    signature = Signature.read(folder / FUSED / SIGNATURE, folder)
    path = (folder / signature.weights_file).resolve()
    tensors = map_weights(path, signature.weights)
    mapped = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(str(path)):
            mapped.append([int(end, 16) for end in line.split()[0].split("-")])
    for weight, value in zip(signature.weights, tensors, strict=True):
        address = np.from_dlpack(value).ctypes.data
        assert any(begin <= address < end for begin, end in mapped), weight.name


def test_a_weight_that_is_not_aligned_is_copied_to_where_it_is(tmp_path):
    values = np.arange(64, dtype=np.float32)
    (tmp_path / "weights").write_bytes(values.tobytes())
    (value,) = map_weights(tmp_path / "weights", (tvm_support.Weight("w", (3, 5), 4),))
    array = np.from_dlpack(value)
    np.testing.assert_array_equal(array, values[1:16].reshape(3, 5))
    assert array.ctypes.data % ALIGNMENT == 0


BAD_STEPS = {
    "no tokens": ((1, 0), (1, 0), (1, 0), 1, "input_ids"),
    "one axis": ((3,), (3,), (1, 3), 1, "input_ids"),
    "positions of another shape": ((1, 3), (1, 2), (1, 3), 1, "position_ids"),
    "a short mask": ((1, 3), (1, 3), (1, 2), 1, "attention_mask"),
    "a mask of another batch": ((2, 3), (2, 3), (1, 3), 2, "attention_mask"),
    "a state of another batch": ((2, 3), (2, 3), (2, 3), 1, "state of 1 rows"),
}


@pytest.mark.parametrize("profile", ["fused", "portable"])
@pytest.mark.parametrize("case", BAD_STEPS)
def test_a_step_of_wrong_shapes_is_an_error_and_the_engine_goes_on(compiled, profile, case):
    ids, positions, mask, batch, name = BAD_STEPS[case]
    engine = open_engine(compiled["llama"], profile)
    expected = first_step(engine).copy()
    arrays = [np.ones(shape, np.int64) for shape in (ids, positions, mask)]
    with pytest.raises(UsageError, match=name):
        call(engine, *arrays, engine.start("decoder", batch))
    np.testing.assert_array_equal(first_step(engine), expected)


@pytest.mark.parametrize("profile", ["fused", "portable"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize(("token", "position"), [(-1, 0), (257, 0), (2**40, 0), (0, -1), (0, 48), (0, 2**40)])
def test_a_token_or_position_out_of_range_is_an_error(compiled, profile, family, token, position):
    engine = open_engine(compiled[family], profile)
    ones = np.ones((1, 1), np.int64)
    with pytest.raises(PortlmError):
        call(engine, token * ones, position * ones, ones, engine.start("decoder", 1))


@pytest.mark.parametrize("profile", ["fused", "portable"])
def test_threads_may_share_an_engine(compiled, profile):
    engine = open_engine(compiled["gpt2"], profile)
    expected = first_step(engine).copy()
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: first_step(engine).copy(), range(40)))
    for answer in answers:
        np.testing.assert_array_equal(answer, expected)
