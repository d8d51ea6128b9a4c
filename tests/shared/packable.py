"""Which decoders have a form in a packed file."""

from portlm.models import DECODERS

UNPACKED = (
    *("gemma2", "gemma3_text"),  # they scale embeddings, and gate by GELU: a packed file has no such steps
    *("mixtral", "qwen3_moe"),  # nor one for experts
)
PACKED = tuple(family for family in DECODERS if family not in UNPACKED)
