"""llama.cpp through its C interface as the package llama-cpp-python carries it, without that package's own loop."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from portlm.errors import PortlmError
from portlm.flows.race.contender import Array, Choice, Contender, Source, new_file

NEEDS = {"llama_cpp": "llama-cpp-python", "gguf": "gguf"}
BATCH = 512  # tokens of a prompt per call, llama.cpp's own default

# llama.cpp's numbers: (llama_ftype, pure); pure is one format for every matrix.
FILES = {"q8_0": (7, True), "q4_0": (2, True), "q4_0_mix": (2, False), "q4_k_m": (15, False)}
CACHES = {"f32": (0, 4.0), "f16": (1, 2.0), "q8_0": (8, 34 / 32)}  # ggml type, bytes of a number
_FLASH = {False: 0, True: 1}


class LlamaCpp(Contender):
    """A GGUF file on the CPU.

    Attributes:
        choices: of a cache and flash attention, for quantized weights. F32 weights have none: flash attention and a
            cache of 16 bits round to half precision inside, which is another model than the one of the other rows.
    """

    choices: Sequence[Choice] = ()
    _QUANTIZED: ClassVar[Sequence[Choice]] = (
        {"cache": "f16", "flash": True}, {"cache": "f16", "flash": False}, {"cache": "q8_0", "flash": True},
    )  # fmt: skip

    def __init__(self, file: str, cache: str = ""):
        """Name the format: "f32", or one of FILES, and for those perhaps the only cache to try, one of CACHES."""
        self._file = file
        self._choice: Choice = {"cache": "f32", "flash": False}
        if file != "f32":
            self.choices = [choice for choice in self._QUANTIZED if cache in ("", choice["cache"])]
            self._choice = self.choices[0]
        self._context: Any = None

    def _path(self, source: Source, file: str | None = None) -> Path:
        return source.work / f"model.{file or self._file}.gguf"

    def prepare(self, source: Source) -> None:
        """Write the F32 file, and have llama.cpp quantize it."""
        from portlm.hub_gguf import export_gguf

        plain = self._path(source, "f32")
        if not plain.exists():
            with new_file(plain) as path:
                export_gguf(source.hf, path, tokenizer=False)
        target = self._path(source)
        if target.exists():
            return
        self.bring()
        lib = self._lib
        options = lib.llama_model_quantize_default_params()
        options.ftype, options.pure = FILES[self._file]
        with new_file(target) as path:
            if code := lib.llama_model_quantize(bytes(plain), bytes(path), options):
                raise PortlmError(f"llama.cpp does not quantize the model to {self._file} (code {code})")

    def bring(self) -> None:
        """Import the library and silence it."""
        import ctypes

        import llama_cpp

        self._lib = llama_cpp
        self._silence = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._silence, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()

    def load(self, source: Source, threads: int | None) -> None:
        """Map the file and make a context."""
        lib = self._lib
        options = lib.llama_model_default_params()
        options.n_gpu_layers = 0
        path = self._path(source)
        self._model = lib.llama_model_load_from_file(bytes(path), options)
        if not self._model:
            raise PortlmError(f"llama.cpp does not load {path.name}")
        self._threads = threads
        self._vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self._model))
        self.configure(self._choice)

    def configure(self, choice: Choice) -> None:
        """Make a context with this cache and flash attention on or off."""
        lib = self._lib
        if self._context is not None:
            lib.llama_free(self._context)
        self._choice = choice
        kind, self.cache_item = CACHES[choice["cache"]]
        options = lib.llama_context_default_params()
        options.n_ctx = lib.llama_model_n_ctx_train(self._model)
        options.n_batch = options.n_ubatch = BATCH
        options.n_seq_max = 1
        if self._threads is not None:
            options.n_threads = options.n_threads_batch = self._threads
        options.type_k = options.type_v = kind
        options.flash_attn_type = _FLASH[choice["flash"]]
        options.no_perf = True
        self._context = lib.llama_init_from_model(self._model, options)
        if not self._context:
            raise PortlmError(f"llama.cpp makes no context with {choice}")
        self._memory = lib.llama_get_memory(self._context)

    def reset(self) -> None:
        """Clear the cache."""
        self._lib.llama_memory_clear(self._memory, True)

    def read(self, ids: Array) -> Array:
        """Decode the tokens in batches; the logits are a view of llama.cpp's own."""
        lib = self._lib
        for begin in range(0, len(ids), BATCH):
            part = ids[begin : begin + BATCH].tolist()
            tokens = (lib.llama_token * len(part))(*part)
            if code := lib.llama_decode(self._context, lib.llama_batch_get_one(tokens, len(part))):
                raise PortlmError(f"llama.cpp: llama_decode returned {code}")
        logits = lib.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(logits, (self._vocab,))

    def weight_bytes(self, source: Source) -> int:
        """Of every tensor of the file but lookup tables; a table without a head beside it is the head, too."""
        import gguf

        sizes = {t.name: int(t.n_bytes) for t in gguf.GGUFReader(self._path(source)).tensors}
        tables = {"position_embd.weight"} | ({"token_embd.weight"} if "output.weight" in sizes else set())
        return sum(size for name, size in sizes.items() if name not in tables)
