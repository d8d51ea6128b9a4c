"""A checkpoint as llama.cpp reads it: the same numbers in GGUF, under the names and in the order that it expects.

The format and the names are those of the package `gguf`, which llama.cpp's authors publish. The file carries no
tokenizer: contenders get token ids.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from portlm.errors import UsageError
from portlm.models import WEIGHTS, load_config
from portlm.weights import load_numpy

Array = np.ndarray
F32 = 0  # of GGUF's general.file_type

_LAYER = re.compile(r"(?:transformer\.h|model\.layers|gpt_neox\.layers)\.(\d+)\.(.+)\.(weight|bias)")

# Names in Hugging Face's files -> names in GGUF, per family: whole tensors, and modules of a layer.
_WHOLE = {
    "gpt2": {
        "transformer.wte": "token_embd",
        "transformer.wpe": "position_embd",
        "transformer.ln_f": "output_norm",
    },
    "llama": {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"},
    "gpt_neox": {
        "gpt_neox.embed_in": "token_embd",
        "gpt_neox.final_layer_norm": "output_norm",
        "embed_out": "output",
    },
}
_MODULES = {
    "gpt2": {
        "ln_1": "attn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "ln_2": "ffn_norm",
        "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down",
    },
    "llama": {
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    },
    "gpt_neox": {
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "attention.query_key_value": "attn_qkv",
        "attention.dense": "attn_output", "mlp.dense_h_to_4h": "ffn_up", "mlp.dense_4h_to_h": "ffn_down",
    },
}  # fmt: skip
ARCHITECTURES = {"gpt2": "gpt2", "llama": "llama", "gpt_neox": "gptneox"}
"""portlm's family -> what llama.cpp calls it."""


def neighbours(matrix: Array, heads: int) -> Array:
    """Rows of a query or key matrix (heads * D, C), from pairs (i, i + D/2) of a head to pairs (2i, 2i + 1).

    llama.cpp rotates neighbours in the architecture llama, Hugging Face's files the halves of a head.
    """
    D = len(matrix) // heads
    return matrix.reshape(heads, 2, D // 2, -1).swapaxes(1, 2).reshape(matrix.shape)


def apart(tensor: Array, heads: int) -> Array:
    """Rows of a joint matrix or bias (3 * C, ...), from (q, k, v) of each head in turn to all q, all k, all v."""
    return tensor.reshape(heads, 3, len(tensor) // heads // 3, -1).swapaxes(0, 1).reshape(tensor.shape)


def gguf_tensors(tensors: Mapping[str, Array], config: Any) -> dict[str, Array]:
    """The tensors of model.safetensors under GGUF's names, each (out, in) float32.

    Raises:
        UsageError: a family or a tensor that has no name there, or a shape that is not written.
    """
    family = config.family
    if family not in ARCHITECTURES:
        raise UsageError(
            f"llama.cpp: no GGUF is written for the family {family}, only {', '.join(ARCHITECTURES)}"
        )
    if getattr(config, "rope_scaling", None) is not None or getattr(config, "head_width", 0):
        raise UsageError(
            "llama.cpp: no GGUF is written for scaled rotary positions or a head width of its own"
        )
    turned: dict[str, Callable[[Array], Array]] = {
        "gpt_neox.attn_qkv": lambda x: apart(x, config.n_head),
        "llama.attn_q": lambda x: neighbours(x, config.n_head),
        "llama.attn_k": lambda x: neighbours(x, getattr(config, "n_kv_head", config.n_head)),
    }
    found = {}
    for name, tensor in tensors.items():
        whole, _, kind = name.rpartition(".")
        if match := _LAYER.fullmatch(name):
            layer, module, kind = match.groups()
            part = _MODULES[family].get(module)
            target = f"blk.{layer}.{part}"
            if family == "gpt2" and tensor.ndim == 2:
                tensor = tensor.T  # their Conv1D keeps its matrices (in, out)
            tensor = turned.get(f"{family}.{part}", lambda x: x)(tensor)
        else:
            part = _WHOLE[family].get(whole)
            target = f"{part}"
        if part is None:
            raise UsageError(f"llama.cpp: GGUF has no name for {name} of the family {family}")
        found[f"{target}.{kind}"] = np.ascontiguousarray(tensor, np.float32)
    return found


def write_gguf(checkpoint: Path, target: Path) -> None:
    """Write a checkpoint folder as a GGUF file of float32.

    Raises:
        FormatError: a file of the checkpoint is missing or damaged.
        UsageError: llama.cpp does not know the family.
    """
    import gguf

    config: Any = load_config(checkpoint)
    tensors = gguf_tensors(load_numpy(checkpoint / WEIGHTS), config)
    writer = gguf.GGUFWriter(target, ARCHITECTURES[config.family])
    writer.add_name("portlm")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.context_length)
    writer.add_embedding_length(config.width)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(config.hidden)
    writer.add_head_count(config.n_head)
    writer.add_head_count_kv(getattr(config, "n_kv_head", config.n_head))
    if config.family == "llama":
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_dimension_count(config.head_dim)
        writer.add_rope_freq_base(config.rope_theta)
    else:
        writer.add_layer_norm_eps(config.layer_norm_eps)
    if config.family == "gpt_neox":
        writer.add_parallel_residual(config.parallel_residual)
        writer.add_rope_dimension_count(config.rotary_dim)
        writer.add_rope_freq_base(config.rope_theta)
    writer.add_tokenizer_model("none")
    writer.add_file_type(F32)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
