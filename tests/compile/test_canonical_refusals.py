"""What is wrong with a module is said in one line, before anything is written."""

import math

import pytest

torch = pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")

from torch import nn  # noqa: E402

from portlm.compile.canonical import canonicalise, trace  # noqa: E402
from portlm.errors import UsageError  # noqa: E402


class Places(nn.Module):
    """The least that can be exported: ids and positions."""

    def __init__(self, ids=11, logits=11):
        super().__init__()
        self.tokens, self.places, self.head = nn.Embedding(ids, 8), nn.Embedding(6, 8), nn.Linear(8, logits)

    def forward(self, ids):
        return self.head(self.tokens(ids) + self.places(torch.arange(ids.shape[1])))


def test_torch_export_prints_nothing_beside_the_error(capfd):
    """It would print the whole graph of what it could not record, and a line of log."""

    class Chooses(Places):
        def forward(self, ids):
            return super().forward(ids) * (2 if ids.sum() > 5 else 1)

    with pytest.raises(UsageError, match="decides by the values"):
        trace(Chooses())
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_weight_without_a_finite_value_is_named(value):
    model = Places()
    model.head.weight.data[3, 4] = value
    with pytest.raises(UsageError, match=r"^head\.weight holds NaN or infinity"):
        canonicalise(trace(model))


def test_a_module_without_values_is_refused():
    with pytest.raises(UsageError, match=r"^tokens\.weight is on the device meta.*load its weights"):
        trace(Places().to("meta"))


def test_a_module_that_writes_to_itself_is_named():
    class Counts(Places):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, ids):
            self.seen += 1
            return super().forward(ids)

    model = Counts()
    with pytest.raises(UsageError, match="forward writes to seen"):
        canonicalise(trace(model))
    assert model.seen == 0


def test_a_module_that_cannot_read_what_it_writes_is_refused():
    with pytest.raises(UsageError, match="logits for 13 ids and reads 11"):
        canonicalise(trace(Places(ids=11, logits=13)))
    assert canonicalise(trace(Places(ids=13, logits=11))).vocab_size == 11


def test_every_part_is_put_back_in_its_own_mode():
    model = Places().eval()
    model.places.train()
    trace(model)
    assert [name for name, part in model.named_modules() if part.training] == ["places"]
