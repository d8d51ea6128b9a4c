"""portlm.export refuses what is not what it takes, in one line and with nothing written."""

import pytest

torch = pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")
pytest.importorskip("onnx", reason="onnx is missing: pip install portlm[onnx]")

from torch import nn  # noqa: E402

import portlm  # noqa: E402
from portlm.artifact import read_manifest  # noqa: E402
from portlm.errors import UsageError  # noqa: E402
from portlm.tokenizer import byte_tokenizer  # noqa: E402


class Bigrams(nn.Module):
    context_length = 8

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(11, 11)

    def forward(self, ids):
        return [self.table(ids), None]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"module": "checkpoint"}, "torch.nn.Module, got str.*portlm export"),
        ({"module": None}, "torch.nn.Module, got NoneType"),
        ({"module": lambda ids: ids}, "torch.nn.Module, got function"),
        ({"example": [[1, 2], [3, 4]]}, "example must be a tensor.*got list"),
        ({"example": (torch.zeros(2, 5),)}, "example must be a tensor.*got tuple"),
        ({"tokenizer": "gpt2"}, "Tokenizer, got str"),
        ({"folder": "n" * 300}, "cannot be the name of a folder: File name too long"),
        ({"folder": "a\0b"}, "cannot be the name of a folder: embedded null byte"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_arguments_are_checked(tmp_path, arguments, words):
    given = {"module": Bigrams(), "folder": "out", **arguments}
    folder = given.pop("folder")
    with pytest.raises(UsageError, match=words):
        portlm.export(given.pop("module"), f"{tmp_path}/{folder}", **given)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore:.*exported without a cache")
def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"has 256 tokens, but the model 11: give .*tokenizer\.within\(11\)"):
        portlm.export(Bigrams(), tmp_path / "out", tokenizer=byte_tokenizer())
    assert list(tmp_path.iterdir()) == []


def test_a_list_of_outputs_begins_with_the_logits(tmp_path):
    with pytest.warns(UserWarning, match="without a cache"):
        folder = portlm.export(Bigrams(), tmp_path / "out")
    assert read_manifest(folder).model.vocab_size == 11
