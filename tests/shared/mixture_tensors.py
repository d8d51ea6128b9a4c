"""Tensors of models with experts as transformers 5 has them in memory, where it joins those of all experts."""

import torch


def as_in_memory(model, values):
    """Return tensors of a model of ours with experts under transformers' names, and as it has them in memory."""
    E, C, found = model.config.n_expert, model.config.width, {}
    for name, value in values.items():
        place, experts, kind = name.rpartition(".experts.")
        if not experts:
            in_file = model.hf_name(name)[0]
            found[f"model.{name}" if in_file.startswith("model.") else in_file] = value
        elif kind == "down_proj.weight":
            found[f"model.{place}.experts.down_proj"] = value.view(C, E, -1).transpose(0, 1)
        elif kind == "gate_proj.weight":
            both = (value, values[f"{place}.experts.up_proj.weight"])
            found[f"model.{place}.experts.gate_up_proj"] = torch.cat(
                [part.view(E, -1, C) for part in both], 1
            )
    return found
