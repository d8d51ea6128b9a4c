"""Small encoders of every family and class, with what they are asked, for tests of models, graphs and sessions."""

import dataclasses

import pytest
import torch

from portlm.models import FAMILIES, build

ENCODERS = {name: family for name, family in FAMILIES.items() if family.kind == "encoder"}
every_family = pytest.mark.parametrize("family", ENCODERS)


def labelled(config, heads):
    """Return the configuration with other heads, and three labels if these have any."""
    wanted = {"classify", "tag"} & set(heads)
    return dataclasses.replace(config, heads=heads, labels=("a", "b", "c") if wanted else ())


def random_model(config, seed: int = 0):
    """Return a model whose every parameter, biases and gains included, matters to the result."""
    torch.manual_seed(seed)
    model = build(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def batch(config, seed=1):
    """Return tokens of rows of 17, 9 and 4, padded on the right, with segments; no token is that of padding.

    transformers tells padding by its id where it finds positions, and gives that id no gradient.
    """
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(6, config.vocab_size, (3, 17), generator=g)
    mask = (torch.arange(17) < torch.tensor([[17], [9], [4]])).long()
    ids = torch.where(mask == 1, ids, config.pad_token_id or 0)
    kinds = torch.randint(max(1, config.segments), (3, 17), generator=g) if config.segments else None
    return ids, mask, kinds


def answers(model, ids, mask, kinds):
    """Return what the model says, by the names that transformers has for it, where it means something."""
    hidden, pooled = model.encode(ids, mask, kinds)
    found = {"last_hidden_state": hidden} | ({} if pooled is None else {"pooler_output": pooled})
    if model.config.heads:
        heads = {name: model.apply_head(name, found[model.heads[name].reads]) for name in model.config.heads}
        found = {"logits": heads.pop(next(iter(heads)))}
        if heads:
            found = {"prediction_logits": found["logits"], "seq_relationship_logits": heads["next_sentence"]}
    return {name: value[mask == 1] if value.dim() == 3 else value for name, value in found.items()}
