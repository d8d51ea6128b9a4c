"""OpenVINO: the model of transformers, converted with its caches inside, as OpenVINO's own exporter makes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from portlm.flows.race.contender import Array, Contender, Source
from portlm.models import load_config

GROUP = 32  # of 4-bit weights, as everybody's


class OpenVino(Contender):
    """A stateful model on the CPU plugin, in float32 or with 4-bit weights from NNCF."""

    def __init__(self, precision: str):
        """Name one of "f32" and "q4"."""
        self._precision = precision

    def _path(self, source: Source, precision: str) -> Path:
        return source.work / f"openvino-{precision}" / "model.xml"

    def prepare(self, source: Source) -> None:
        """Convert the model, and compress its weights."""
        import openvino

        plain, target = self._path(source, "f32"), self._path(source, self._precision)
        if not plain.exists():
            from openvino_convert import stateful

            openvino.save_model(stateful(source.hf), plain, compress_to_fp16=False)
        if not target.exists():
            import nncf

            model = openvino.Core().read_model(plain)
            mode = nncf.CompressWeightsMode.INT4_SYM
            model = nncf.compress_weights(model, mode=mode, group_size=GROUP, ratio=1.0, all_layers=True)
            openvino.save_model(model, target, compress_to_fp16=False)

    def bring(self) -> None:
        """Import the library."""
        import openvino

        self._lib = openvino

    def load(self, source: Source, threads: int | None) -> None:
        """Compile the model for one sequence at a time."""
        options: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
        if threads is not None:
            options["INFERENCE_NUM_THREADS"] = threads
        if self._precision == "f32":
            options |= {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
        path = self._path(source, self._precision)
        compiled = self._lib.Core().compile_model(path, "CPU", options)
        self._request = compiled.create_infer_request()
        self._names = {name for port in compiled.inputs for name in port.names}
        self.cache_item = compiled.get_property("KV_CACHE_PRECISION").bitwidth / 8

    def reset(self) -> None:
        """Forget the state."""
        self._request.reset_state()
        self._past = 0

    def read(self, ids: Array) -> Array:
        """Run the model once."""
        total = self._past + len(ids)
        values = {
            "input_ids": ids[None], "attention_mask": np.ones((1, total), np.int64),
            "position_ids": np.arange(self._past, total)[None], "beam_idx": np.zeros(1, np.int32),
        }  # fmt: skip
        self._request.infer({k: v for k, v in values.items() if k in self._names}, share_inputs=True)
        self._past = total
        logits: Array = self._request.get_tensor("logits").data[0, -1]
        return logits

    def weight_bytes(self, source: Source) -> int:
        """Of its file, less the table, of which a row is read: float32, or 4 bits and a half scale per group."""
        config: Any = load_config(source.hf)
        each = 4 if self._precision == "f32" else 0.5 + 2 / GROUP
        size = self._path(source, self._precision).with_suffix(".bin").stat().st_size
        return int(size - each * config.vocab_size * config.width)
