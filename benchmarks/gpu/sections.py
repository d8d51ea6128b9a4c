"""The table of the check: what is done, in which order, for how long at most, and what it needs.

A new CUDA kernel gets one row here, with the function in kernels.py that races it; a test compares the rows with
csrc/cuda/kernels.def. Imports nothing beyond Python's own library.
"""

from __future__ import annotations

from typing import NamedTuple


class Section(NamedTuple):
    """One part of the check, run in a process of its own.

    Attributes:
        name: for --only and the table.
        summary: one line for --list.
        seconds: its time limit; what it measured until then is kept.
        function: "module:function" beside this file, called with a Context.
        needs: sections that must not have failed before it.
        kernels: CUDA kernels (as named in kernels.def) whose speed it measures.
    """

    name: str
    summary: str
    seconds: int
    function: str
    needs: tuple[str, ...] = ()
    kernels: tuple[str, ...] = ()


SECTIONS = (
    Section("machine", "the device, the driver, and the packages that are here", 20, "machine:describe"),
    Section("build", "compile portlm._C with its CUDA kernels, unless a current one is there", 180, "machine:build"),
    # Right first: a figure of something wrong is worth nothing.
    Section("twins", "every CUDA kernel against its float64 oracle (tests/ops/test_cuda*.py)", 75, "correct:twins",
            needs=("machine", "build")),
    Section("gpu-tests", "every other test that is marked gpu", 60, "correct:marked_tests",
            needs=("machine", "build")),
    Section("contract", "what every engine promises, on torch, ort and tvm on CUDA (tests/runtimes)", 90,
            "correct:contract", needs=("machine",)),
    Section("models", "checkpoints and artifacts that the next sections open", 120, "engines:make_models",
            needs=("machine",)),
    Section("verify-torch", "torch:cuda, by code and by graphs, against the CPU: logits and 128 greedy tokens",
            90, "engines:verify_torch", needs=("machine", "models")),
    Section("verify-ort", "ort:cuda against the same, and no node elsewhere", 45, "engines:verify_ort",
            needs=("machine", "models")),
    Section("verify-tvm", "tvm:cuda, machine code made by nvcc, against the same", 150, "engines:verify_tvm",
            needs=("machine", "models")),
    Section("kinds-torch", "weights of 8, 4 and 16 bits and a cache of bytes on torch:cuda, against the same", 120,
            "engines:verify_kinds_torch", needs=("machine", "models")),
    Section("kinds-ort", "the same on ort:cuda, and no node elsewhere", 60, "engines:verify_kinds_ort",
            needs=("machine", "models")),
    # Then how fast, beside rivals and the limit of the same minutes.
    Section("layer_norm", "layer_norm with residual, and its gradient", 40, "kernels:layer_norm_race",
            needs=("machine", "build"), kernels=("layer_norm_fwd", "layer_norm_bwd")),
    Section("rms_norm", "rms_norm with residual, and its gradient", 40, "kernels:rms_norm_race",
            needs=("machine", "build"), kernels=("rms_norm_fwd", "rms_norm_bwd")),
    Section("swiglu", "swiglu and its gradient", 40, "kernels:swiglu_race", needs=("machine", "build"),
            kernels=("swiglu_fwd", "swiglu_bwd")),
    Section("cross_entropy", "linear_cross_entropy of GPT-2's vocabulary", 50,
            "kernels:linear_cross_entropy_race", needs=("machine", "build"), kernels=("cross_entropy",)),
    Section("rnn", "Elman's layer over a sequence, and its gradient", 40, "kernels:rnn_race",
            needs=("machine", "build"), kernels=("rnn_fwd", "rnn_bwd")),
    Section("gru", "a GRU layer over a sequence, and its gradient", 40, "kernels:gru_race",
            needs=("machine", "build"), kernels=("gru_fwd", "gru_bwd")),
    Section("lstm", "an LSTM layer over a sequence, and its gradient", 40, "kernels:lstm_race",
            needs=("machine", "build"), kernels=("lstm_fwd", "lstm_bwd")),
    Section("cells", "one step of the three recurrent layers behind its products", 40, "kernels:cell_race",
            needs=("machine", "build"), kernels=("rnn_cell", "gru_cell", "lstm_cell")),
    Section("additive_attention", "Bahdanau's attention, and its gradient", 40, "kernels:additive_attention_race",
            needs=("machine", "build"), kernels=("additive_attention_fwd", "additive_attention_bwd")),
    Section("rotary", "rotary positions of 32 heads, and their gradient", 30, "rows:rotary_race",
            needs=("machine", "build"), kernels=("rotary_fwd", "rotary_heads")),
    Section("embedding", "rows of GPT-2's vocabulary, and their gradient", 30, "rows:embedding_race",
            needs=("machine", "build"), kernels=("embedding_fwd", "embedding_bwd")),
    Section("mlp", "perceptrons with GELU and squared ReLU, and their gradients", 40, "rows:mlp_race",
            needs=("machine", "build"),
            kernels=("gelu_bias_fwd", "gelu_bias_bwd", "relu_squared_bias_fwd", "relu_squared_bias_bwd")),
    Section("experts", "a mixture of experts, and its gradient", 30, "rows:experts_race", needs=("machine", "build"),
            kernels=("experts_choose", "experts_choose_bwd", "experts_gather", "experts_combine",
                     "experts_hidden_fwd", "experts_hidden_bwd")),
    Section("cache", "new positions behind those of a cache", 20, "rows:cache_race", needs=("machine", "build"),
            kernels=("append_cache",)),
    Section("tokens", "choosing and scoring tokens where the logits are", 30, "tokens:tokens_race",
            needs=("machine", "build"), kernels=("select_tokens", "score_logits")),
    Section("attention", "causal attention over 4096 tokens, and its gradient", 50, "attention:attention_race",
            needs=("machine", "build"), kernels=("attention_fwd", "attention_bwd")),
    Section("masked_attention", "attention with a mask and a bias, and its gradient", 40,
            "attention:masked_attention_race", needs=("machine", "build"),
            kernels=("masked_attention_fwd", "masked_attention_bwd")),
    Section("cached_attention", "one token of each sequence over a cache of keys and values", 40,
            "attention:cached_attention_race", needs=("machine", "build"), kernels=("cached_attention",)),
    Section("adamw", "one optimiser step of 124 M parameters, with clipping", 40, "kernels:adamw_race",
            needs=("machine", "build"), kernels=("adamw_step",)),
    Section("packed_linear", "one row and eight with matrices of 4 and 8 bits", 50, "decoding:packed_linear_race",
            needs=("machine", "build"), kernels=("packed_linear",)),
    Section("packed_rows", "rows of tables of 4 and 8 bits", 40, "decoding:packed_rows_race",
            needs=("machine", "build"), kernels=("packed_rows",)),
    Section("dense_linear", "one row and eight with matrices of float32 and bfloat16", 50,
            "decoding:dense_linear_race", needs=("machine", "build"), kernels=("dense_linear",)),
    Section("bytes", "attention of one token over a cache of bytes", 40, "decoding:bytes_race",
            needs=("machine", "build"), kernels=("append_bytes", "quantized_attention")),
    Section("decode", "prefill and decode of GPT-2 small on torch:cuda, also without graphs, and ort and tvm", 110,
            "engines:decode",
            needs=("machine", "models")),
    Section("decode-kinds", "decode of GPT-2 small with weights of 4 and 16 bits on torch:cuda", 120,
            "engines:decode_kinds", needs=("machine", "build", "models")),
    Section("forward", "a forward pass of GPT-2 small beside eager PyTorch, torch.compile and transformers", 50,
            "training:forward_race", needs=("machine",)),
    Section("training", "a training step of GPT-2 small, as a graph or not, beside eager PyTorch and torch.compile", 90,
            "training:step_race", needs=("machine", "build")),
)  # fmt: skip
