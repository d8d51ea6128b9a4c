"""ngram: its tables in files, and what is refused of them."""

import dataclasses

import numpy as np
import pytest
import torch
from ngram_trees import random_ngrams

from portlm.compile.export import export
from portlm.errors import FormatError
from portlm.models import WEIGHTS, load_model, save_model
from portlm.models.ngram import NGramConfig
from portlm.weights import load_numpy, read_header, save_tensors

TINY = NGramConfig.tiny()


@pytest.fixture
def folder(tmp_path):
    save_model(tmp_path / "model", random_ngrams(TINY))
    return tmp_path / "model"


def change(folder, name, value):
    """Write a checkpoint again with another tensor."""
    tensors = {key: np.array(array) for key, array in load_numpy(folder / WEIGHTS).items()}
    tensors[name] = value(tensors[name])
    save_tensors(folder / WEIGHTS, tensors)


def at(place, number):
    def put(array):
        array[place] = number
        return array

    return put


def test_tables_of_whole_numbers_are_saved_as_they_are(folder):
    formats = {name: info.dtype for name, info in read_header(folder / WEIGHTS).items()}
    assert formats == {"base": "I32", "parents": "I32", "log_probs": "F32", "back_offs": "F32"}
    model, expected = load_model(folder), random_ngrams(TINY)
    assert torch.equal(model.base, expected.base)
    assert torch.equal(model.parents, expected.parents)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("base", at(300, 1445), r"base leads outside of the 1703 places, with 259 words from \d+ to 1445"),
        ("base", at(3, -1), "base leads outside of the 1703 places, with 259 words from -1 to"),
        ("base", at(0, 2**31 - 1), "base leads outside of the 1703 places"),
        ("parents", at(1000, 1201), "parents holds -1 to 1201, and histories are at places below 1201"),
        ("parents", at(1000, -2), "parents holds -2 to"),
        (
            "parents",
            at(1000, 0),
            "parents says that single words, or what is at place 0, belong to a history",
        ),
        ("parents", at(7, 5), "parents says that single words, or what is at place 0, belong to a history"),
        ("parents", at(1702, 260), "parents names histories whose children are elsewhere, by base"),
        (
            "base",
            lambda array: array.astype(np.float32),
            "tensor base is F32, but must be I32: it is a table of whole",
        ),
        ("base", lambda array: array.astype(np.int64), "tensor base is I64, but must be I32"),
        ("back_offs", lambda array: array.astype(np.int32), "tensor back_offs is I32, but must be F32"),
        ("parents", lambda array: array[:-1], r"tensor parents has shape \(1702,\)"),
    ],
)
def test_tables_that_are_no_tree_are_refused_before_anything_is_looked_up(
    folder, tmp_path, name, value, message
):
    change(folder, name, value)
    with pytest.raises(FormatError, match=message):
        load_model(folder)
    with pytest.raises(FormatError, match=message):
        export(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_of_sixteen_bits_leave_the_tables_as_they_are(folder, tmp_path):
    """Only matrices are rounded, and there are none."""
    export(folder, tmp_path / "half", weights="bfloat16")
    export(folder, tmp_path / "whole")
    files = ("onnx/decoder.weights", "model.safetensors")
    for name in files:
        if (tmp_path / "whole" / name).exists():
            assert (tmp_path / "half" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_the_model_reads_a_text_as_it_reads_its_words_one_after_the_other():
    """All lengths of one word at once, and all words of one length at once: the same whole numbers."""
    model = random_ngrams(dataclasses.replace(TINY, context_length=1 << 12))
    ids = torch.randint(259, (2, 400), generator=torch.Generator().manual_seed(3))
    ids[:, ::3] = 0  # whose children are sure to be there
    together = model._read(ids, torch.ones_like(ids), torch.zeros(2, 1, TINY.words))
    past, one = torch.zeros(2, 1, TINY.words), torch.ones(2, 1, dtype=torch.int64)
    for t in range(ids.shape[1]):
        past = model._next(ids[:, t : t + 1], one, past)
        assert torch.equal(past[:, 0], together[:, t])
    assert (together[..., 1] > 0).sum() > 5
