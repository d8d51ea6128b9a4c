"""A mapped weight file: its tensors go into another file without passing through the process."""

import hashlib

import numpy as np
import pytest

from portlm.compile.graph import WeightFile
from portlm.compile.mapped import MappedFile
from portlm.weights import save_tensors

TENSORS = {
    "matrix": np.arange(12, dtype=np.float32).reshape(3, 4),
    "row": np.linspace(0, 1, 5, dtype=np.float32),
    "empty": np.zeros((0, 4), np.float32),
}


@pytest.fixture
def mapped(tmp_path):
    save_tensors(tmp_path / "model.safetensors", TENSORS)
    return MappedFile(tmp_path / "model.safetensors")


def copied(mapped, array, path):
    with path.open("wb", buffering=0) as file:
        return mapped.copy(array, file), path.read_bytes()


@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_of_the_file_is_copied(mapped, tmp_path, name):
    count, found = copied(mapped, mapped.arrays[name], tmp_path / "out")
    assert (count, found) == (TENSORS[name].nbytes, TENSORS[name].tobytes())


def test_an_array_from_elsewhere_is_left_to_the_caller(mapped, tmp_path):
    assert copied(mapped, np.ones(3, np.float32), tmp_path / "out") == (0, b"")


def test_a_file_that_took_the_name_is_not_copied(mapped, tmp_path):
    save_tensors(tmp_path / "model.safetensors", {name: tensor + 1 for name, tensor in TENSORS.items()})
    assert copied(mapped, mapped.arrays["row"], tmp_path / "out") == (0, b"")
    assert np.array_equal(mapped.arrays["row"], TENSORS["row"])


def test_a_weight_file_is_the_same_with_and_without_the_file_it_comes_from(mapped, tmp_path):
    digests = []
    for source in (None, mapped):
        file = WeightFile("w")
        file.add("turned", mapped.arrays["matrix"].T)  # has to be copied in memory
        file.add("row", mapped.arrays["row"])
        file.add("other", np.full(7, 2.0, np.float32))
        written = file.write(tmp_path / "w", source)
        assert written == hashlib.sha256((tmp_path / "w").read_bytes()).hexdigest()
        digests.append((written, (tmp_path / "w").read_bytes()))
    assert digests[0] == digests[1]
    assert digests[0][1][:48] == np.ascontiguousarray(TENSORS["matrix"].T).tobytes()
