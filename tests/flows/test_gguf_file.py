"""What llama.cpp is given is the same model: names, orientation, and the order of rows that its rotation expects."""

from dataclasses import replace

import numpy as np
import pytest

from portlm.errors import UsageError
from portlm.flows.race.gguf_file import apart, gguf_tensors, neighbours, write_gguf
from portlm.models import WEIGHTS, load_config
from portlm.models.llama import LlamaConfig
from portlm.models.rope import Linear
from portlm.weights import load_numpy

RNG = np.random.default_rng(0)


def rotated(x: np.ndarray, angles: np.ndarray, halves: bool) -> np.ndarray:
    """Rotate pairs of x (D,): (i, i + D/2) if halves, else (2i, 2i + 1)."""
    pairs = x.reshape(2, -1) if halves else x.reshape(-1, 2).T
    a, b = (
        pairs[0] * np.cos(angles) - pairs[1] * np.sin(angles),
        pairs[1] * np.cos(angles) + pairs[0] * np.sin(angles),
    )
    return np.concatenate((a, b)) if halves else np.stack((a, b), 1).ravel()


def test_rotating_neighbours_of_the_turned_rows_gives_the_scores_of_rotating_halves():
    """Query and key of two heads at different positions; the product is what attention sees."""
    heads, D, C = 2, 8, 12
    q, k, x = RNG.standard_normal((heads * D, C)), RNG.standard_normal((heads * D, C)), RNG.standard_normal(C)
    for head in range(heads):
        rows = slice(head * D, (head + 1) * D)
        scores = []
        for halves, a, b in ((True, q, k), (False, neighbours(q, heads), neighbours(k, heads))):
            angles = 10000.0 ** (-2 * np.arange(D // 2) / D)
            scores.append(rotated(a[rows] @ x, 5 * angles, halves) @ rotated(b[rows] @ x, 3 * angles, halves))
        assert scores[0] == pytest.approx(scores[1], rel=1e-12)


def test_joint_rows_come_apart_into_all_queries_all_keys_and_all_values():
    heads, D = 3, 4
    labels = np.array([[kind, head, d] for head in range(heads) for kind in range(3) for d in range(D)])
    assert apart(labels, heads).tolist() == sorted(labels.tolist())


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
def test_every_tensor_of_a_checkpoint_has_one_name_and_lies_out_by_in(family, checkpoints):
    config = load_config(checkpoints[family])
    tensors = load_numpy(checkpoints[family] / WEIGHTS)
    found = gguf_tensors(tensors, config)
    assert len(found) == len(tensors)
    assert sum(t.size for t in found.values()) == sum(t.size for t in tensors.values())
    assert found["token_embd.weight"].shape == (config.vocab_size, config.width)
    assert found["blk.1.ffn_up.weight"].shape == (config.hidden, config.width)
    assert found["blk.1.ffn_down.weight"].shape == (config.width, config.hidden)
    assert all(t.flags.c_contiguous and t.dtype == np.float32 for t in found.values())


@pytest.mark.parametrize("change", [{"head_width": 32}, {"rope_scaling": Linear(2.0)}], ids=str)
def test_a_shape_that_would_not_be_written_whole_is_refused(change):
    with pytest.raises(UsageError, match="no GGUF is written for scaled rotary positions or a head width"):
        gguf_tensors({}, replace(LlamaConfig.tiny(), **change))


def test_a_tensor_without_a_name_is_an_error_and_not_left_out(checkpoints):
    with pytest.raises(UsageError, match=r"no name for model\.extra.weight of the family llama"):
        gguf_tensors({"model.extra.weight": np.zeros(2, np.float32)}, load_config(checkpoints["llama"]))


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
def test_the_file_reads_back_as_it_was_written(family, checkpoints, tmp_path):
    gguf = pytest.importorskip("gguf", reason="gguf is missing: benchmarks/race/install.sh")
    write_gguf(checkpoints[family], tmp_path / "model.gguf")
    wanted = gguf_tensors(load_numpy(checkpoints[family] / WEIGHTS), load_config(checkpoints[family]))
    found = {t.name: t.data for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert found.keys() == wanted.keys()
    assert all(np.array_equal(found[name], wanted[name]) for name in wanted)
