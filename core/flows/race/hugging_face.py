"""transformers in eager mode, as `AutoModelForCausalLM.from_pretrained` gives it."""

from __future__ import annotations

import numpy as np

from portlm.flows.race.contender import Array, Contender, Source

NEEDS = {"transformers": "transformers", "torch": "torch"}


class Transformers(Contender):
    """The model with scaled dot product attention and a cache that grows."""

    def __init__(self, dtype: str = "float32"):
        """Name the number format of weights and arithmetic."""
        self._dtype = dtype

    def bring(self) -> None:
        """Import PyTorch and transformers."""
        import torch
        import transformers
        from transformers.cache_utils import DynamicCache

        transformers.utils.logging.set_verbosity_error()
        self._torch, self._cache, self._auto = torch, DynamicCache, transformers.AutoModelForCausalLM

    def load(self, source: Source, threads: int | None) -> None:
        """Open the folder, which has no code of its own."""
        if threads is not None:
            self._torch.set_num_threads(threads)
        dtype = getattr(self._torch, self._dtype)
        self._model = self._auto.from_pretrained(source.hf, dtype=dtype, attn_implementation="sdpa").eval()
        self.cache_item = float(dtype.itemsize)

    def reset(self) -> None:
        """Start with an empty cache."""
        self._past = self._cache(config=self._model.config)

    def read(self, ids: Array) -> Array:
        """Call the model; the head computes the last position alone."""
        with self._torch.inference_mode():
            tokens = self._torch.from_numpy(ids)[None]
            out = self._model(tokens, past_key_values=self._past, use_cache=True, logits_to_keep=1)
            logits: Array = out.logits[0, -1].float().numpy()
        return logits

    def weight_bytes(self, source: Source) -> int:
        """As many numbers as portlm's own graph of the model reads."""
        from portlm.artifact import read_manifest
        from portlm.compile.work import token_work

        numbers = (
            token_work(source.artifact, read_manifest(source.artifact))[0] // np.dtype(np.float32).itemsize
        )
        return int(numbers * self.cache_item)
