"""Who takes part in bench_training.py: portlm's GPT-2 and plain PyTorch's, eager and compiled, in fp32 and in bf16."""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from portlm.models.gpt2 import GPT2, GPT2Config
from portlm.ops.precision import Precision, products_in
from portlm.train.config import PretrainConfig
from portlm.train.loop import accumulate_gradients
from portlm.train.setup import make_optimizer

Step = Callable[[Tensor, Tensor], Tensor]


# ---- the rival: GPT-2 as one would write it in PyTorch today ---------------------------------------------------


class EagerGPT2(nn.Module):
    """GPT-2 in plain PyTorch. Parameter names are portlm's, so the weights can be copied by name."""

    def __init__(self, config: GPT2Config):
        super().__init__()
        C = config.width
        self.wte, self.wpe = nn.Embedding(config.vocab_size, C), nn.Embedding(config.context_length, C)
        self.h = nn.ModuleList(EagerBlock(C, config.n_head) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(C)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy of targets (B, T) after ids (B, T)."""
        x = self.wte(ids) + self.wpe.weight[: ids.shape[1]]  # (B, T, C)
        for block in self.h:
            x = block(x)
        logits = F.linear(self.ln_f(x), self.wte.weight)  # (B, T, V)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class EagerBlock(nn.Module):
    """Attention and MLP, each behind a LayerNorm and beside the residual stream."""

    def __init__(self, C: int, n_head: int):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.attn, self.mlp = EagerAttention(C, n_head), EagerMLP(C)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, C) to (B, T, C)."""
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class EagerAttention(nn.Module):
    """Masked self-attention through PyTorch's fused kernel."""

    def __init__(self, C: int, n_head: int):
        super().__init__()
        self.n_head = n_head
        self.c_attn, self.c_proj = nn.Linear(C, 3 * C), nn.Linear(C, C)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, C) to (B, T, C)."""
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class EagerMLP(nn.Module):
    """Linear, GELU, linear."""

    def __init__(self, C: int):
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(C, 4 * C), nn.Linear(4 * C, C)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, C) to (B, T, C)."""
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


# ---- contestants -----------------------------------------------------------------------------------------------


def portlm_step(
    config: GPT2Config, weights: dict[str, Tensor], options: PretrainConfig, precision: Precision = "fp32"
) -> Step:
    """Return a step of portlm, as core/train/loop.py takes it."""
    model = GPT2(config)
    model.load_state_dict(weights)
    optimizer = make_optimizer(model.train(), options.optimizer)

    def step(inputs: Tensor, targets: Tensor) -> Tensor:
        with products_in(precision):
            loss = accumulate_gradients(lambda batch: model(*batch), [(inputs, targets)])
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    return step


def pytorch_step(
    config: GPT2Config,
    weights: dict[str, Tensor],
    options: PretrainConfig,
    mode: str | None = None,
    compiled_update: bool = False,
    bf16: bool = False,
) -> Step:
    """Return a step of plain PyTorch.

    Args:
        config: The shape.
        weights: To begin with.
        options: Of the optimiser.
        mode: Of torch.compile for forward and backward, None for eager.
        compiled_update: Compile clipping and AdamW together instead of calling the fused kernels.
        bf16: Run the forward pass under autocast to bfloat16; weights and their gradients stay float32.
    """
    model = EagerGPT2(config)
    model.load_state_dict(weights)
    parameters = list(model.parameters())
    opt = options.optimizer
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": opt.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    which = {"foreach": True} if compiled_update else {"fused": True}
    optimizer = torch.optim.AdamW(groups, lr=opt.lr, betas=(opt.beta1, opt.beta2), eps=opt.eps, **which)
    forward: Any = model if mode is None else torch.compile(model, mode=mode)

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(parameters, opt.clip, foreach=True)
        optimizer.step()

    apply = torch.compile(update) if compiled_update else update

    def step(inputs: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = forward(inputs, targets)
        loss.backward()
        apply()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


CONTESTANTS: dict[str, Callable[[GPT2Config, dict[str, Tensor], PretrainConfig], Step]] = {
    "portlm": portlm_step,
    "portlm-bf16": functools.partial(portlm_step, precision="bf16"),
    "eager": pytorch_step,
    "eager-bf16": functools.partial(pytorch_step, bf16=True),
    "compile": functools.partial(pytorch_step, mode="default"),
    "compile-bf16": functools.partial(pytorch_step, mode="default", bf16=True),
    "compile+update": functools.partial(pytorch_step, mode="default", compiled_update=True),
    "compile-tuned": functools.partial(pytorch_step, mode="max-autotune-no-cudagraphs"),
    "compile-tuned-bf16": functools.partial(pytorch_step, mode="max-autotune-no-cudagraphs", bf16=True),
}
