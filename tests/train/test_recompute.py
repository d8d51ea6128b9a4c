"""Recomputed activations: the same run bit for bit, and less that is kept."""

import pytest

torch = pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")

from tiny_runs import digest, newest, pretrain, tiny  # noqa: E402

from portlm import models  # noqa: E402
from portlm.models import DECODERS  # noqa: E402
from portlm.train.recompute import recompute_blocks  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_is_the_same_bit_for_bit_with_recomputed_activations(text, tmp_path, precision):
    """With dropout, whose random numbers have to be those of the first time."""
    runs = [
        pretrain(
            tiny(text, steps=6, model__dropout=0.2, precision=precision, recompute=recompute),
            tmp_path / str(recompute),
            quiet=True,
        )
        for recompute in (False, True)
    ]
    assert digest(newest(runs[0].run)) == digest(newest(runs[1].run))
    assert runs[0].loss == runs[1].loss


@pytest.mark.parametrize("family", DECODERS)
def test_every_family_keeps_less_for_backward(family):
    ids = torch.randint(100, (2, 16))
    kept = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = models.build(DECODERS[family].config_class().tiny()).train()
        if recompute:
            recompute_blocks(model)
        sizes: dict[int, int] = {}

        def keep(t, sizes=sizes):
            sizes[t.data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            loss = model(ids, ids)
        loss.backward()
        parameters = {p.data_ptr() for p in model.parameters()}
        kept.append((sum(n for at, n in sizes.items() if at not in parameters), loss.item()))
    assert kept[0][1] == kept[1][1]
    assert kept[1][0] < kept[0][0] / 2
