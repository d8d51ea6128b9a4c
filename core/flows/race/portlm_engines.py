"""portlm itself: an engine's steps, and the whole loop that users call."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from portlm.errors import UsageError
from portlm.flows.race.contender import Array, Contender, Source

if TYPE_CHECKING:
    from portlm.artifact import Manifest
    from portlm.runtimes.session import Session

GROUP = 32  # weights that share a scale, as in the formats of others


def cache_item(manifest: Manifest) -> float:
    """Bytes of one number of an artifact's key/value cache: 4, or 1 and its share of its vector's scale."""
    widths = [s.shape[-1] for role in manifest.roles.values() for s in role.state if s.dtype == "int8"]
    return 1 + 4 / int(widths[0]) if widths else 4.0


class PortlmEngine(Contender):
    """An engine of portlm, driven as a session drives it."""

    def __init__(
        self, engine: str, device: str = "cpu", profile: str = "auto", quantize: str = "",
        activations: str | None = None, cache: str | None = None,
    ):  # fmt: skip
        """Name the target, and how its weights are quantized ("int8", "int4"; "" for as they are).

        Its activations are those that PORTLM_ACTIVATIONS would name ("int8"; None for the engine's own), and its keys
        and values are kept in `cache` ("int8"; None for as the artifact has them).
        """
        self._engine, self._device, self._profile, self._quantize = engine, device, profile, quantize
        self._activations, self._cache = activations, cache

    def _folder(self, source: Source) -> Path:
        forms = [self._quantize, f"cache-{self._cache}" if self._cache else ""]
        made = "-".join(filter(None, ("portlm", *forms)))
        return source.work / made if any(forms) else source.artifact

    def prepare(self, source: Source) -> None:
        """Export the artifact in its form, and open it once: what an engine needs compiled is compiled then."""
        folder = self._folder(source)
        if folder != source.artifact and not folder.exists():
            from portlm.compile.export import export

            quantize = self._quantize or None
            export(source.hf, folder, quantize=quantize, group=GROUP if quantize else None, cache=self._cache)
        self._open(folder).close()

    def _open(self, folder: Path, threads: int | None = None) -> Session:
        import portlm
        from portlm.quantization import at_activations

        with at_activations(self._activations):
            return portlm.load(
                folder, engine=self._engine, device=self._device, profile=self._profile, threads=threads
            )

    def bring(self) -> None:
        """Import the engine's packages."""
        from portlm.runtimes import engine_class
        from portlm.threads import bound_spinning

        bound_spinning()
        engine_class(self._engine)
        if self._engine == "tvm":
            from portlm.runtimes.tvm import connect_kernels

            connect_kernels()
        elif self._engine == "torch":
            import torch  # noqa: F401

    def load(self, source: Source, threads: int | None) -> None:
        """Open a session."""
        from portlm.artifact import read_manifest

        folder = self._folder(source)
        self.session = self._open(folder, threads)
        self.cache_item = cache_item(read_manifest(folder))

    def reset(self) -> None:
        """Start one empty row."""
        from portlm.rows import Rows

        self._rows = Rows(self.session.engine, 1)

    def read(self, ids: Array) -> Array:
        """Read through the row."""
        logits: Array = self._rows.read(ids[None])[0, -1]
        return logits

    def weight_bytes(self, source: Source) -> int:
        """As `portlm bench` counts them."""
        from portlm.artifact import read_manifest
        from portlm.compile.work import token_work, widens

        folder = self._folder(source)
        own = self._engine != "ort"
        wide = widens(self._engine, self.session.engine.profile)
        return token_work(folder, read_manifest(folder), half_scales=own, widened=wide)[0]


class PortlmGenerate(PortlmEngine):
    """The same engine behind `session.generate`: choosing tokens, bookkeeping and text included."""

    def reset(self) -> None:
        """Forget the prompt, too."""
        super().reset()
        self._ids: list[int] = []

    def read(self, ids: Array) -> Array:
        """Keep what is read: generate reads it again, from the start."""
        self._ids += ids.tolist()
        return super().read(ids)

    def decode(self, logits: Array, count: int) -> float:
        """What generate says of its decoding, which is all tokens but the first."""
        done = self.session.generate(self._ids, max_new_tokens=count + 1, ignore_eos=True)
        if done.new_tokens != count + 1:
            raise UsageError(f"generate gave {done.new_tokens} tokens, not {count + 1}")
        return done.stats.decode_seconds
