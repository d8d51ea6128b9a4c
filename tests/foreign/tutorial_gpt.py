"""A small GPT in one file of plain PyTorch, in the manner of a tutorial. It knows nothing of portlm."""

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F


@dataclass
class Settings:
    vocab_size: int = 65
    block_size: int = 32
    layers: int = 3
    heads: int = 4
    embed: int = 48
    dropout: float = 0.1
    bias: bool = True
    tie: bool = False


class SelfAttention(nn.Module):
    def __init__(self, s: Settings):
        super().__init__()
        assert s.embed % s.heads == 0
        self.heads = s.heads
        self.qkv = nn.Linear(s.embed, 3 * s.embed, bias=s.bias)
        self.out = nn.Linear(s.embed, s.embed, bias=s.bias)
        self.attn_drop = nn.Dropout(s.dropout)
        self.resid_drop = nn.Dropout(s.dropout)
        mask = torch.tril(torch.ones(s.block_size, s.block_size))
        self.register_buffer("mask", mask.view(1, 1, s.block_size, s.block_size))

    def forward(self, x):
        B, T, C = x.size()
        q, k, v = self.qkv(x).split(C, dim=2)
        q = q.view(B, T, self.heads, C // self.heads).transpose(1, 2)
        k = k.view(B, T, self.heads, C // self.heads).transpose(1, 2)
        v = v.view(B, T, self.heads, C // self.heads).transpose(1, 2)

        scores = (q @ k.transpose(-2, -1)) / math.sqrt(k.size(-1))
        scores = scores.masked_fill(self.mask[:, :, :T, :T] == 0, float("-inf"))
        weights = self.attn_drop(F.softmax(scores, dim=-1))
        y = (weights @ v).transpose(1, 2).contiguous().view(B, T, C)
        return self.resid_drop(self.out(y))


class FeedForward(nn.Module):
    def __init__(self, s: Settings):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(s.embed, 4 * s.embed, bias=s.bias),
            nn.GELU(),
            nn.Linear(4 * s.embed, s.embed, bias=s.bias),
            nn.Dropout(s.dropout),
        )

    def forward(self, x):
        return self.net(x)


class Block(nn.Module):
    def __init__(self, s: Settings):
        super().__init__()
        self.norm1 = nn.LayerNorm(s.embed)
        self.attn = SelfAttention(s)
        self.norm2 = nn.LayerNorm(s.embed)
        self.ff = FeedForward(s)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        x = x + self.ff(self.norm2(x))
        return x


class TutorialGPT(nn.Module):
    def __init__(self, s: Settings):
        super().__init__()
        self.settings = s
        self.tokens = nn.Embedding(s.vocab_size, s.embed)
        self.places = nn.Embedding(s.block_size, s.embed)
        self.drop = nn.Dropout(s.dropout)
        self.blocks = nn.ModuleList(Block(s) for _ in range(s.layers))
        self.norm = nn.LayerNorm(s.embed)
        self.head = nn.Linear(s.embed, s.vocab_size, bias=False)
        if s.tie:
            self.head.weight = self.tokens.weight

    def forward(self, idx, targets=None):
        B, T = idx.shape
        assert self.settings.block_size >= T, "too many tokens"
        pos = torch.arange(T, device=idx.device)
        x = self.drop(self.tokens(idx) + self.places(pos))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        if targets is None:
            return logits, None
        loss = F.cross_entropy(logits.view(B * T, -1), targets.view(B * T))
        return logits, loss
