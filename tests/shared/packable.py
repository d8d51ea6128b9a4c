"""Which decoders have a form in a packed file."""

from portlm.models import DECODERS

UNPACKED = {  # the first node of each for which a packed file has no step: scaled embeddings, experts
    **dict.fromkeys(("gemma2", "gemma3_text"), r"'model\.mul' \(Mul\)"),
    "mixtral": r"'model\.layers\.0\.block_sparse_moe\.experts\.w2' \(Experts\)",
    "qwen3_moe": r"'model\.layers\.1\.mlp\.experts\.down_proj' \(Experts\)",
}
PACKED = tuple(family for family in DECODERS if family not in UNPACKED)
PACKED_KINDS = ("gpt2", "llama", "gpt_neo", "opt")
"""One of each kind of them: learned positions, rotary ones and grouped heads, windows, ReLU inside a map.

For loops that write many tokens, which know steps and no family. test_every_decoder.py compares the tokens of all."""
