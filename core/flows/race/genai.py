"""onnxruntime-genai: the files that its own builder makes, and its own greedy loop."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from portlm.errors import PortlmError, UsageError
from portlm.flows.race.contender import Array, Contender, Source
from portlm.models import load_config

NEEDS = {"onnxruntime_genai": "onnxruntime-genai", "onnx_ir": "onnx_ir", "transformers": "transformers"}
FAMILIES = ("llama",)  # of portlm's, those that the builder knows
# Blocks of 32 are the bytes of Q4_0, accuracy level 4 is ONNX Runtime's int8 arithmetic, and the head is computed for
# the last position, as every loop that generates needs it.
OPTIONS = {"fp32": (), "int4": ("block_size=32", "accuracy_level=4")}


class Genai(Contender):
    """A folder made by `onnxruntime_genai.models.builder` for the CPU."""

    def __init__(self, precision: str):
        """Name the builder's precision, one of OPTIONS."""
        self._precision = precision

    def _folder(self, source: Source) -> Path:
        return source.work / f"genai-{self._precision}"

    def prepare(self, source: Source) -> None:
        """Run the builder, offline.

        Raises:
            UsageError: it does not know the family.
            PortlmError: it failed; with its last line.
        """
        folder = self._folder(source)
        if folder.exists():
            return
        family = load_config(source.hf).family
        if family not in FAMILIES:
            raise UsageError(
                f"its builder knows no models of the family {family}, only {', '.join(FAMILIES)}"
            )
        temporary, cache = folder.with_suffix(".part"), folder.with_suffix(".cache")
        options = ("prune_lm_head=true", "hf_token=false", *OPTIONS[self._precision])
        # The builder is a script: run as a module it would not find its neighbours.
        package = importlib.util.find_spec("onnxruntime_genai")
        assert package is not None, "prepare is called where the package is"
        assert package.origin is not None
        done = subprocess.run(
            [
                sys.executable, Path(package.origin).parent / "models" / "builder.py", "--model_name", source.hf,
                "-i", source.hf, "-o", temporary, "-p", self._precision, "-e", "cpu", "-c", cache,
                "--extra_options", *options,
            ],
            env=os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        shutil.rmtree(cache, ignore_errors=True)
        if done.returncode:
            shutil.rmtree(temporary, ignore_errors=True)
            said = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()[-1]
            raise PortlmError(f"the builder of onnxruntime-genai failed: {said}")
        temporary.rename(folder)

    def bring(self) -> None:
        """Import the library."""
        import onnxruntime_genai

        self._lib = onnxruntime_genai

    def load(self, source: Source, threads: int | None) -> None:
        """Open the folder; the number of threads is a setting of its file."""
        folder = self._folder(source)
        path = folder / "genai_config.json"
        config = json.loads(path.read_text())
        settings = config["model"]["decoder"]["session_options"]
        if threads is not None and settings.get("intra_op_num_threads") != threads:
            settings["intra_op_num_threads"] = threads
            path.write_text(json.dumps(config, indent=1))
        self._model = self._lib.Model(str(folder))
        # A cache of the whole context is allocated at once and shared by past and present.
        self._length = int(config["search"]["max_length"])
        self._generator: Any = None

    def reset(self) -> None:
        """Make a new generator."""
        self._generator = None  # the old cache goes first
        options = self._lib.GeneratorParams(self._model)
        # Its loop stands still behind an end of text, without a word: min_length keeps that from being chosen.
        options.set_search_options(
            max_length=self._length, min_length=self._length, do_sample=False, batch_size=1, num_beams=1
        )
        self._generator = self._lib.Generator(self._model, options)

    def read(self, ids: Array) -> Array:
        """Append the tokens."""
        self._generator.append_tokens(ids.astype(np.int32)[None])
        return np.asarray(self._generator.get_logits(), np.float32).reshape(-1)

    def decode(self, logits: Array, count: int) -> float:
        """Its own loop: the first call only chooses a token, each further one is a step and a choice.

        Raises:
            PortlmError: it wrote another number of tokens.
        """
        before = self._generator.token_count()
        self._generator.generate_next_token()
        begin = time.perf_counter()
        for _ in range(count):
            self._generator.generate_next_token()
        seconds = time.perf_counter() - begin
        if (written := self._generator.token_count() - before) != count + 1:
            raise PortlmError(f"onnxruntime-genai wrote {written} tokens in {count + 1} steps")
        return seconds

    def weight_bytes(self, source: Source) -> int:
        """Of every initializer of its graph but lookup tables."""
        from portlm.compile.foreign_work import weight_bytes

        return weight_bytes(self._folder(source) / "model.onnx")
