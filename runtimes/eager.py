"""The torch engine: PyTorch on the CPU with portlm's kernels, or on CUDA.

Of a checkpoint of a known family it runs the model's own code, profile "native": the reference that every other engine
is compared with; where weights are quantized, on what they mean. Of any artifact it runs the graphs as plans
(torch_plan.py), profiles "fused" and "portable": so a model whose code is not here runs, too. PyTorch is imported by
this file, and by those that it imports.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from msgspec.structs import replace
from torch import Tensor

from portlm.artifact import Manifest, check_files
from portlm.engine import Array, CallSpec, OpenRequest, Placement, graph_names
from portlm.errors import EngineUnavailableError, FormatError, PortlmError, UsageError
from portlm.files import safe_join
from portlm.models import load_model
from portlm.ops.byte_cache import rounded_cache
from portlm.ops.kernel_op import available
from portlm.plan import CHECKPOINT, has_code, needs_plan, read_plan
from portlm.roles import StateSpec, difference, interface
from portlm.runtimes.base import ArrayEngine, stack
from portlm.runtimes.dequantized import load_dequantized
from portlm.runtimes.torch_graphs import CudaGraph, Graph, Graphs, Slot, are_wanted
from portlm.runtimes.torch_plan import make_role
from portlm.threads import GovernedThreads

if TYPE_CHECKING:
    from portlm.models.roles import Role

PLANS = ("fused", "portable")  # profiles that are plans, the best first


def cuda_name() -> str | None:
    """Return what PyTorch calls its CUDA device, or None where it finds none."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def try_device(device: str) -> str:
    """Return the name of the CUDA device.

    Raises:
        EngineUnavailableError: PyTorch finds none.
    """
    name = cuda_name()
    if name is None:
        raise EngineUnavailableError("torch:cuda: PyTorch finds no CUDA device, try nvidia-smi")
    return name


def use_threads(count: int) -> int:
    """Set on how many threads PyTorch and the kernels run when called from this thread; return what it was before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    return before


class TorchEngine(ArrayEngine):
    """Roles as functions of PyTorch tensors, in float32 on the CPU, with portlm's kernels, or on a CUDA device.

    Native roles are the functions that the model declares, so their states have the names of the exported graphs.
    """

    name = "torch"
    precision = "fp32"
    rounds_cache = False  # a native one keeps in floats what the artifact's graphs keep in 8 bits

    def __init__(
        self,
        functions: "Mapping[str, Role]",
        vocab_size: int,
        context_length: int,
        device: str,
        profile: str,
        nodes: Mapping[str, int],
        threads: int | None = None,
    ):
        """Take over functions of tensors on a device; use open().

        Args:
            functions: by role.
            vocab_size: V.
            context_length: the largest number of tokens that one row may have.
            device: "cpu" or "cuda".
            profile: "native", "fused" or "portable".
            nodes: how many there are on each device.
            threads: of each call on the CPU; None leaves it to portlm.threads.
        """
        self.device, self.profile = device, profile
        self._functions, self._nodes = dict(functions), dict(nodes)
        self._threads = GovernedThreads(use_threads, threads) if device == "cpu" else None
        specs = {
            name: CallSpec(tuple(role.inputs), tuple(role.outputs), tuple(role.state))
            for name, role in self._functions.items()
        }
        super().__init__(specs, vocab_size, context_length)
        self.use_graphs(CudaGraph if device == "cuda" and are_wanted() else None)

    def use_graphs(self, make: Callable[[], Graph] | None) -> None:
        """Have steps of one token recorded (runtimes/torch_graphs.py), as they are on CUDA; by None no longer."""
        functions = {name: role.function for name, role in self._functions.items()}
        self._graphs = None if make is None else Graphs(make, functions, self.context_length, self.device)

    @classmethod
    def open(cls, request: OpenRequest) -> Self:
        """Load a checkpoint folder, of an artifact or by itself, or the plans of an artifact.

        Args:
            request: device is "cpu" or "cuda". Profile "native" takes config.json and model.safetensors of the folder,
                or what the graphs' weights mean where those are quantized; "fused" and "portable" what portlm compile
                made of the graphs; "auto" the checkpoint, or plans where there is none of a known family. threads are
                those of each call, PyTorch's own setting stays as it is. allow_fallback is without effect, PyTorch
                moves nothing by itself.

        Raises:
            EngineUnavailableError: this PyTorch finds no CUDA device.
            UsageError: the folder has no such profile.
            FormatError: a file is missing or not what it should be.
        """
        if request.device == "cuda" and not torch.cuda.is_available():
            raise EngineUnavailableError(
                f"torch:cuda: PyTorch {torch.__version__} finds no CUDA device, run portlm doctor to see why"
            )
        manifest = request.manifest
        if request.profile not in ("auto", "native", *PLANS):
            raise UsageError(f"torch has no profile {request.profile}: choose native, fused or portable")
        if _is_native(request):
            if request.profile in PLANS:
                raise UsageError(
                    f"{request.folder} is a checkpoint, whose profile is native: "
                    f"run portlm export on it first to have {request.profile}"
                )
            if manifest is not None and not has_code(manifest):
                raise UsageError(
                    f"{request.folder} holds the graphs of a module and no code of it: choose profile fused or portable"
                )
            return cls._native(request)
        assert manifest is not None  # what is not native is an artifact
        return cls._planned(request, manifest)

    @classmethod
    def _native(cls, request: OpenRequest) -> Self:
        manifest = request.manifest
        if manifest is not None and manifest.quantization is not None:
            _, plans = _choose(replace(request, profile="auto"), manifest)
            model = load_dequantized(request.folder, manifest, plans)
        else:
            if manifest is not None:
                check_files(request.folder, CHECKPOINT, manifest)
            model = load_model(request.folder)
        if manifest is not None:
            said = manifest.model.vocab_size, manifest.model.context_length
            found = model.config.vocab_size, model.config.context_length
            if said != found:
                raise FormatError(
                    f"{request.folder}: the manifest says {said[0]} ids and {said[1]} positions, config.json says "
                    f"{found[0]} and {found[1]}; export again"
                )
        engine = cls.of(model, request.device, request.threads)
        if manifest is not None:
            engine.rounds_cache = manifest.cache is not None
            engine.precision = manifest.precision(rounds=False)
        return engine

    @classmethod
    def graphs(cls, request: OpenRequest) -> tuple[str, ...]:
        """Return the graphs that the plans were made of; see Engine."""
        manifest = request.manifest
        if manifest is None or (_is_native(request) and manifest.quantization is None):
            return ()
        plans = replace(request, profile="auto") if _is_native(request) else request
        profile, _ = _choose(plans, manifest)
        return graph_names(manifest, profile)

    @classmethod
    def of(cls, model: Any, device: str, threads: int | None = None) -> Self:
        """Run a model that is in memory, which stays the caller's.

        Args:
            model: a module with a config, which has vocab_size and context_length, and roles().
            device: "cpu" or "cuda"; the model is moved there.
            threads: of each call on the CPU; None leaves it to portlm.threads.
        """
        model = model.to(device).eval()
        nodes = Counter(
            next(module.parameters(recurse=False)).device.type
            for module in model.modules()
            if next(module.parameters(recurse=False), None) is not None
        )
        sizes = model.config.vocab_size, model.config.context_length
        return cls(model.roles(), *sizes, device, "native", nodes, threads)

    @classmethod
    def _planned(cls, request: OpenRequest, manifest: Manifest) -> Self:
        profile, files = _choose(request, manifest)
        functions: dict[str, Role] = {}
        count = 0
        for path in files:
            plan = read_plan(path)
            spec = manifest.roles.get(plan.role)
            if spec is None or plan.role in functions:
                raise FormatError(f"{path}: the artifact has no role of its own for it; compile again")
            described, own = ((x.inputs, x.outputs, x.state) for x in (spec, plan))
            if problem := difference(*described, *interface(*own)):
                raise FormatError(f"{path}: {problem}; compile again")
            if described != own or plan.profile != profile or plan.weights_file != spec.weights:
                raise FormatError(f"{path}: made of another export than this artifact; compile again")
            check_files(request.folder, [spec.weights], manifest)
            weights = safe_join(request.folder, spec.weights)
            functions[plan.role] = make_role(plan, path, weights, request.device)
            count += len(plan.nodes)
        if missing := manifest.roles.keys() - functions.keys():
            raise FormatError(f"{request.folder}: nothing was compiled for its {min(missing)}; compile again")
        sizes = manifest.model.vocab_size, manifest.model.context_length
        engine = cls(functions, *sizes, request.device, profile, {request.device: count}, request.threads)
        engine.precision = manifest.precision(
            rounds=(profile, request.device) == ("fused", "cpu") and available()
        )
        return engine

    def _call(
        self, role: str, inputs: Mapping[str, Array], tensors: dict[str, Any]
    ) -> tuple[dict[str, Array], dict[str, Any]]:
        spec = self.roles[role]
        if self._graphs is not None:
            with torch.inference_mode(), rounded_cache(self.rounds_cache):
                done = self._graphs.call(role, spec, inputs, tensors)
            if done is not None:
                answers, state = done
                return dict(zip((item.name for item in spec.outputs), answers, strict=True)), state
        given = [torch.from_numpy(inputs[item.name].copy()).to(self.device) for item in spec.inputs]
        states = [self._work(tensors[item.name]) for item in spec.state]
        first = next(iter(inputs.values()))
        threads = self._threads.governed_step(role, first) if self._threads else contextlib.nullcontext()
        try:
            with torch.inference_mode(), threads, rounded_cache(self.rounds_cache):
                results = self._functions[role].function(*given, *states)
                outputs = {
                    item.name: result.cpu().numpy()
                    for item, result in zip(spec.outputs, results, strict=False)
                }
        except torch.cuda.OutOfMemoryError as error:
            rows = first.shape[0]
            raise PortlmError(
                f"torch:{self.device}: out of memory with {rows} rows: use a smaller batch"
            ) from error
        changed = [item.name for item in spec.state if item.output]
        return outputs, dict(zip(changed, results[len(spec.outputs) :], strict=True))

    def _work(self, tensor: Any) -> Any:
        return tensor.tensor() if isinstance(tensor, Slot) else tensor

    def _copied(self, role: str, tensors: dict[str, Any]) -> dict[str, Any]:
        """A second state, which shares no memory that a step writes to."""
        return {name: self._work(tensor) for name, tensor in tensors.items()}

    def _settle(self, tensor: Any, spec: StateSpec) -> Any:
        return tensor if isinstance(tensor, Tensor) else torch.from_numpy(tensor).to(self.device)

    def _stack(self, tensors: Sequence[Any], shape: Sequence[int], dtype: str) -> Any:
        return stack(tensors, shape, tensors[0].new_zeros(shape))

    def placement(self) -> Placement:
        """Count what runs, by device: modules that hold parameters, or nodes of plans."""
        if self._closed:
            raise UsageError("this engine is closed: load the model again")
        return Placement(dict(self._nodes))

    def close(self) -> None:
        """Let go of the model."""
        super().close()
        self._functions = {}
        self._graphs = None


def _is_native(request: OpenRequest) -> bool:
    """Whether a checkpoint is asked for, and no plan of a graph."""
    if request.manifest is None or request.profile == "native":
        return True
    return request.profile == "auto" and not needs_plan(request.manifest)


def _choose(request: OpenRequest, manifest: Manifest) -> tuple[str, list[Path]]:
    """The profile to open, and the files of its plans, which are as the manifest says."""
    folder, device = request.folder, request.device
    wanted = PLANS if request.profile == "auto" else (request.profile,)
    for profile in wanted:
        key = ("torch", device, profile)
        names = [
            name
            for entry in manifest.compiled
            if (entry.engine, entry.device, entry.profile) == key
            for name in entry.files
        ]
        if names:
            if request.compiled is None:
                check_files(folder, names, manifest)
            return profile, [safe_join(request.compiled or folder, name) for name in names]
    option = "" if request.profile == "auto" else f" --profile {request.profile}"
    raise UsageError(
        f"{folder} holds nothing compiled for torch on {device}: "
        f"run portlm compile {folder} --engine torch --device {device}{option}"
    )
