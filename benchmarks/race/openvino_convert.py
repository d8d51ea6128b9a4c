"""A LLaMA checkpoint as an OpenVINO model that keeps its own cache.

The layers are spelled out on transformers' modules, with `scaled_dot_product_attention`, because the CPU plugin fuses
attention with a cache in the model's state only in that form. The caches enter and leave the graph as tensors first and
become its state afterwards, with an input `beam_idx` between, as OpenVINO's exporter for transformers has it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import openvino
import torch
import torch.nn.functional as F
from openvino import opset13 as ops
from openvino._offline_transformations import apply_make_stateful_transformation
from torch import Tensor, nn
from transformers import LlamaForCausalLM

INPUTS = ("input_ids", "attention_mask", "position_ids")


class Spelled(nn.Module):
    """One call of the model: new tokens and caches in, the last token's logits and longer caches out."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model
        config = model.config
        self.D = config.hidden_size // config.num_attention_heads
        self.group = config.num_attention_heads // config.num_key_value_heads

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, *past: Tensor
    ) -> tuple[Tensor, ...]:
        """Map ids and positions (B, T), a mask (B, P + T) of ones, and caches (B, K, P, D)."""
        body = self.model.model
        h = body.embed_tokens(input_ids)
        cos, sin = (table.unsqueeze(1) for table in body.rotary_emb(h, position_ids))  # (B, 1, T, D)
        slots = torch.arange(attention_mask.shape[1])
        hidden = slots[None, None, None, :] > position_ids[:, None, :, None]
        mask = torch.zeros(hidden.shape).masked_fill(hidden, torch.finfo(torch.float32).min)
        presents: list[Tensor] = []
        for i, layer in enumerate(body.layers):
            x, attn = layer.input_layernorm(h), layer.self_attn
            q = self._rotated(self._heads(attn.q_proj(x)), cos, sin)
            k = torch.cat((past[2 * i], self._rotated(self._heads(attn.k_proj(x)), cos, sin)), dim=2)
            v = torch.cat((past[2 * i + 1], self._heads(attn.v_proj(x))), dim=2)
            presents += [k, v]
            y = F.scaled_dot_product_attention(q, self._shared(k), self._shared(v), attn_mask=mask)
            h = h + attn.o_proj(y.transpose(1, 2).flatten(2))
            h = h + layer.mlp(layer.post_attention_layernorm(h))
        return self.model.lm_head(body.norm(h[:, -1:])), *presents

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (-1, self.D)).transpose(1, 2)

    def _rotated(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-second, first), dim=-1) * sin

    def _shared(self, x: Tensor) -> Tensor:
        """Repeat each key/value head for the query heads that share it."""
        B, K, S, D = x.shape
        return x[:, :, None].expand(B, K, self.group, S, D).reshape(B, K * self.group, S, D)


def stateful(checkpoint: Path) -> Any:
    """Convert a folder of transformers; return an openvino.Model with the inputs INPUTS and beam_idx."""
    model = LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    layers, K = model.config.num_hidden_layers, model.config.num_key_value_heads
    spelled = Spelled(model)
    caches = tuple(torch.randn(1, K, 3, spelled.D) for _ in range(2 * layers))
    ids = torch.ones(1, 2, dtype=torch.long)
    example = (ids, torch.ones(1, 5, dtype=torch.long), torch.tensor([[3, 4]]), *caches)
    with torch.no_grad():
        converted = openvino.convert_model(spelled, example_input=example)
    kinds = [f"{i}.{kind}" for i in range(layers) for kind in ("key", "value")]
    pasts, presents = [f"past.{kind}" for kind in kinds], [f"present.{kind}" for kind in kinds]
    for port, name in zip(converted.inputs, (*INPUTS, *pasts), strict=True):
        shape = [-1, K, -1, spelled.D] if name in pasts else [-1, -1]
        port.get_tensor().set_names({name})
        port.get_node().set_partial_shape(openvino.PartialShape(shape))
    for port, name in zip(converted.outputs, ("logits", *presents), strict=True):
        port.get_tensor().set_names({name})
    converted.validate_nodes_and_infer_types()
    _put_beams_between(converted, pasts)
    apply_make_stateful_transformation(converted, dict(zip(pasts, presents, strict=True)))
    _begin_empty(converted, K, spelled.D)
    return converted


def _put_beams_between(model: Any, pasts: list[str]) -> None:
    """Let every cache be gathered by beam_idx before it is used."""
    beams = ops.parameter([-1], openvino.Type.i32, name="beam_idx")
    beams.output(0).get_tensor().add_names({"beam_idx"})
    model.add_parameters([beams])
    for name in pasts:
        port = model.input(name)
        readers = list(port.get_target_inputs())
        chosen = ops.gather(port, beams, ops.constant(0, openvino.Type.i64))
        for reader in readers:
            reader.replace_source_output(chosen.output(0))
    model.validate_nodes_and_infer_types()


def _begin_empty(model: Any, heads: int, D: int) -> None:
    """Let every state begin as (batch, heads, 0, D)."""
    zero = ops.constant(0, openvino.Type.i64)
    ids = ops.shape_of(model.input("input_ids"), output_type="i64")
    batch = ops.gather(ids, ops.constant([0], openvino.Type.i64), zero)
    for node in model.get_ops():
        if node.get_type_name() == "ReadValue":
            shape = ops.concat([batch, ops.constant([heads, 0, D], openvino.Type.i64)], 0)
            node.set_arguments([ops.broadcast(ops.constant(0.0, openvino.Type.f32), shape).output(0)])
    model.validate_nodes_and_infer_types()
