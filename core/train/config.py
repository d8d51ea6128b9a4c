"""Everything a training run is told, as frozen dataclasses with defaults for a laptop CPU.

The defaults are nanoGPT's CPU setting (4 layers, 4 heads, width 128, context 64, batch 12, 2000 steps), which
learns Shakespeare's bytes in about a minute. :func:`portlm.settings.load` fills the classes from a preset,
a TOML file and ``--set`` overrides; every run folder keeps the resolved result as ``config.toml``. What ``[model]``
may hold is up to the model's family (:mod:`portlm.train.model_settings`).
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from portlm.data.noising import NOISES
from portlm.errors import ConfigError
from portlm.models import FAMILIES
from portlm.ops.precision import Precision
from portlm.settings import require_range
from portlm.train.model_settings import ModelSettings, default_model
from portlm.train.objectives import LEARNERS, OBJECTIVES, learns
from portlm.train.vector_settings import GloveSettings, SkipgramSettings

TRAINED = ("bpe", "word")  # kinds of tokenizers that a run can make from its text
# Objectives that may begin with a checkpoint.
BEGINNING = ("causal", "masked", "classify", "answer", "caption", "seq2seq")
JUDGED = ("classify", "answer")  # those with a file of their own to judge by

__all__ = [
    "CheckpointSettings",
    "DataSettings",
    "EvaluationSettings",
    "LayerSettings",
    "NoiseSettings",
    "OptimizerSettings",
    "PretrainConfig",
    "RunConfig",
    "ScheduleSettings",
]


@dataclass(frozen=True)
class DataSettings:
    """What the model reads."""

    texts: tuple[str, ...] = ()  # UTF-8 text files, or one folder of prepared shards
    held_out: str = ""  # of texts with labels, or questions: a file of others to judge by
    source: str = ""  # of pairs: a file of lines
    target: str = ""  # a file with as many
    tokenizer: str = "byte"  # "byte", "bpe:2048" or "word:2048" (train one of that size), or a tokenizer.json
    packing: Literal["stream", "documents"] = "stream"  # windows of one long text, or rows of whole documents
    separator: str = "\n\n"  # what stands between two documents in a text file
    validation_fraction: float = 0.1  # the last part of the text, never trained on
    batch_size: int = 12  # sequences per forward pass
    accumulate: int = 1  # forward passes per optimiser step

    def __post_init__(self) -> None:
        require_range("data.validation_fraction", self.validation_fraction, 0, 0.5, open_low=True)
        require_range("data.batch_size", self.batch_size, 1, 1 << 20)
        require_range("data.accumulate", self.accumulate, 1, 1 << 20)
        kind, separator, size = self.tokenizer.partition(":")
        if kind in TRAINED and not (separator and size.isascii() and size.isdigit()):
            raise ConfigError(
                f"data.tokenizer {self.tokenizer!r}: write {kind}:SIZE, for example {kind}:2048"
            )
        if not self.separator:
            raise ConfigError("data.separator is empty: give what stands between two documents")
        if self.packing == "stream" and self.separator != DataSettings.separator:
            raise ConfigError("data.separator is for data.packing = documents: leave it out")
        if bool(self.source) != bool(self.target):
            raise ConfigError("data.source and data.target are two sides of pairs: give both, or neither")
        if not self.tokenizer:
            raise ConfigError(
                "data.tokenizer is empty: write byte, bpe:SIZE, word:SIZE or the path of a tokenizer.json"
            )


@dataclass(frozen=True)
class NoiseSettings:
    """What a text loses before it is to be said again.

    Attributes:
        READERS: Which objectives each setting is for.
    """

    READERS: ClassVar[dict[str, tuple[str, ...]]] = {
        **dict.fromkeys(("kinds", "share", "span"), ("denoise",)),
        "fragment": ("mass",),
    }

    kinds: tuple[str, ...] = ("infilling", "permutation")  # keys of portlm.data.noising.NOISES
    share: float = 0.3  # of the tokens that masking, deletion and infilling take
    span: float = 3.0  # tokens of a span of infilling on average
    fragment: float = 0.5  # share of a text that mass hides, in one piece

    def __post_init__(self) -> None:
        if not self.kinds:
            raise ConfigError(f"noise.kinds is empty: name some of {', '.join(NOISES)}")
        for name in self.kinds:
            if name not in NOISES:
                raise ConfigError(f"noise.kinds must be of {', '.join(NOISES)}, got {name!r}")
            if self.kinds.count(name) > 1:
                raise ConfigError(f"noise.kinds names {name} twice: each noise is applied once")
        require_range("noise.share", self.share, 0, 0.95, open_low=True)
        require_range("noise.span", self.span, 0.1, 1000)
        require_range("noise.fragment", self.fragment, 0, 1, open_low=True)


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW (Loshchilov and Hutter 2019), AdaGrad, NT-ASGD, or Muon (Jordan et al. 2024) for hidden matrices.

    Weight decay is on matrices only. ``momentum`` is Muon's; beta1, beta2 and eps hold for what Muon leaves, eps for
    AdaGrad (Duchi et al. 2011), too. NT-ASGD (Merity et al. 2017) has a rate, decay, clip and ``patience``.
    """

    name: Literal["adamw", "muon", "adagrad", "nt-asgd"] = (
        "adamw"  # "muon" takes the matrices inside the blocks, and leaves all else to AdamW
    )
    lr: float = 1e-3  # peak learning rate
    beta1: float = 0.9
    beta2: float = 0.99  # shorter memory than 0.999, since a step sees few tokens
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0  # largest global gradient norm; 0 means no clipping
    momentum: float = 0.95  # of Muon
    patience: int = 5  # of NT-ASGD: evaluations that a loss above an earlier one is not compared with

    def __post_init__(self) -> None:
        require_range("optimizer.lr", self.lr, 0, open_low=True)
        require_range("optimizer.beta1", self.beta1, 0, 0.999999)
        require_range("optimizer.beta2", self.beta2, 0, 0.999999)
        require_range("optimizer.eps", self.eps, 0, open_low=True)
        require_range("optimizer.weight_decay", self.weight_decay, 0)
        require_range("optimizer.clip", self.clip, 0)
        require_range("optimizer.momentum", self.momentum, 0, 0.999999)
        if self.name != "muon" and self.momentum != OptimizerSettings.momentum:
            raise ConfigError("optimizer.momentum is Muon's: leave it out, or set optimizer.name = muon")
        require_range("optimizer.patience", self.patience, 1, 1 << 20)
        if self.name != "nt-asgd" and self.patience != OptimizerSettings.patience:
            raise ConfigError(
                "optimizer.patience is NT-ASGD's: leave it out, or set optimizer.name = nt-asgd"
            )
        if self.name == "nt-asgd" and self.lr * self.weight_decay >= 1:
            raise ConfigError(
                f"optimizer.weight_decay {self.weight_decay:g} times optimizer.lr {self.lr:g} takes all of a weight at "
                "each step: lower it (1.2e-6 for AWD-LSTM)"
            )


FLOORED = ("cosine", "linear")  # shapes of the schedule that end at min_lr


@dataclass(frozen=True)
class ScheduleSettings:
    """Linear warm-up, then down to a floor that is reached at the last step, along a cosine or a line.

    "inverse-sqrt" is the Transformer's fall after the warm-up (Vaswani et al. 2017), which has no floor and does not
    depend on how many steps there are. "slanted" is ULMFiT's triangle (Howard and Ruder 2018), which begins and ends at
    the peak divided by ``ratio``.
    """

    shape: Literal["cosine", "linear", "inverse-sqrt", "slanted"] = "cosine"
    warmup: float = 0.05  # below 1: share of all steps; from 1: a number of steps
    min_lr: float = 1e-4  # the floor, of "cosine" and "linear"
    ratio: float = 32.0  # of "slanted"

    def __post_init__(self) -> None:
        require_range("schedule.warmup", self.warmup, 0)
        require_range("schedule.min_lr", self.min_lr, 0)
        require_range("schedule.ratio", self.ratio, 1)
        if not self.has_floor and self.min_lr != ScheduleSettings.min_lr:
            instead = (
                "set schedule.ratio"
                if self.shape == "slanted"
                else f"leave it at {ScheduleSettings.min_lr:g}"
            )
            raise ConfigError(f"schedule.min_lr is not read with schedule.shape = {self.shape}: {instead}")
        if self.shape != "slanted" and self.ratio != ScheduleSettings.ratio:
            raise ConfigError(
                "schedule.ratio is read with schedule.shape = slanted alone: set schedule.min_lr"
            )
        if self.warmup >= 1 and self.warmup != int(self.warmup):
            raise ConfigError(
                f"schedule.warmup {self.warmup} must be a share below 1 or a whole number of steps"
            )

    @property
    def has_floor(self) -> bool:
        """Whether min_lr is where the rate ends."""
        return self.shape in FLOORED


@dataclass(frozen=True)
class LayerSettings:
    """Which layers learn, and how fast (portlm.train.layers), counted from the top: heads, blocks, embeddings."""

    freeze: Literal["none", "backbone"] = "none"  # "backbone" trains what is on top of the blocks alone
    decay: float = (
        1.0  # the learning rate of a layer is that of the layer above it divided by this; ULMFiT's is 2.6
    )
    unfreeze: int = 0  # steps after which one more layer learns, from the top; 0 for all at once

    def __post_init__(self) -> None:
        require_range("layers.decay", self.decay, 1, 1000)
        require_range("layers.unfreeze", self.unfreeze, 0)
        if self.freeze == "backbone" and (self.unfreeze or self.decay != 1):
            what = "layers.unfreeze" if self.unfreeze else "layers.decay"
            raise ConfigError(
                f"{what} is for layers that learn, and layers.freeze = backbone leaves one: leave it out"
            )


@dataclass(frozen=True)
class EvaluationSettings:
    """How progress is judged: the loss on held-out text, and a sample to look at."""

    interval: int = 250  # steps between evaluations; the last step is always evaluated
    max_tokens: int = 0  # held-out tokens to use; 0 means all of them
    prompt: str = "\n"  # the start of every sample
    sample_tokens: int = 200  # length of a sample; 0 means none
    temperature: float = 0.8
    top_k: int = 0  # 0 means no limit
    translations: int = (
        0  # of seq2seq: held-out pairs whose greedy translation is judged by BLEU; 0 means none
    )

    def __post_init__(self) -> None:
        require_range("evaluation.interval", self.interval, 1)
        require_range("evaluation.max_tokens", self.max_tokens, 0)
        require_range("evaluation.sample_tokens", self.sample_tokens, 0, 1 << 20)
        require_range("evaluation.temperature", self.temperature, 0)
        require_range("evaluation.top_k", self.top_k, 0)
        require_range("evaluation.translations", self.translations, 0)


@dataclass(frozen=True)
class CheckpointSettings:
    """When the whole state is saved, and how much of the past is kept."""

    interval: int = 250  # steps between checkpoints; the last step is always saved
    keep: int = 2  # newest checkpoints that stay on disk, at least 2

    def __post_init__(self) -> None:
        require_range("checkpoint.interval", self.interval, 1)
        require_range("checkpoint.keep", self.keep, 2)


@dataclass(frozen=True)
class RunConfig:
    """What the loop needs to know, whatever is learned. Every kind of training adds its own sections.

    Attributes:
        FIXED: Beginnings of the keys that decide every number of a run: a resumed one must not change them.
        FREE: Those among them that it may change after all.
    """

    FIXED: ClassVar[tuple[str, ...]] = ("seed", "optimizer.name", "layers.")
    FREE: ClassVar[tuple[str, ...]] = ()

    steps: int = 2000
    seed: int = 1337
    threads: int = 0  # CPU threads; 0 means what PyTorch chooses
    device: str = "cpu"  # "cpu", "cuda" or "cuda:1"
    precision: Precision = (
        "fp32"  # of matrix products while training; "bf16" rounds their operands, on the CPU
    )
    recompute: bool = (
        False  # compute activations again in backward instead of keeping them: less memory, more time
    )
    cuda_graph: bool = False  # forward and backward of a step are one CUDA graph, for models of small kernels
    log_interval: int = 10  # steps between lines of metrics
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)
    layers: LayerSettings = field(default_factory=LayerSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)

    def __post_init__(self) -> None:
        require_range("steps", self.steps, 1, 1 << 40)
        require_range("seed", self.seed, 0, (1 << 63) - 1)
        require_range("threads", self.threads, 0, 4096)
        require_range("log_interval", self.log_interval, 1)
        if self.precision == "bf16" and self.device != "cpu":
            raise ConfigError(
                f"precision bf16 is for device cpu, not {self.device!r}: leave precision out, or train on the CPU"
            )
        if self.cuda_graph:
            self._check_graph()
        if self.schedule.has_floor and self.schedule.min_lr > self.optimizer.lr:
            raise ConfigError(
                f"schedule.min_lr {self.schedule.min_lr:g} is above "
                f"optimizer.lr {self.optimizer.lr:g}: lower it"
            )

    def _check_graph(self) -> None:
        """Refuse what makes steps differ in more than their tokens, or what no graph of CUDA can hold."""
        if self.device.partition(":")[0] != "cuda":
            raise ConfigError(f"cuda_graph is for device cuda, not {self.device!r}: leave it out")
        for name, value, problem in (
            ("recompute", self.recompute, "asks for the state of random numbers in the middle of a step"),
            ("layers.unfreeze", self.layers.unfreeze, "changes what a step computes"),
        ):
            if value:
                raise ConfigError(f"{name} {problem}, which cuda_graph = true cannot: leave one of them out")

    @property
    def warmup_steps(self) -> int:
        """Steps of linear warm-up."""
        warmup = self.schedule.warmup
        return int(warmup) if warmup >= 1 else round(warmup * self.steps)


@dataclass(frozen=True)
class PretrainConfig(RunConfig):
    """A pretraining run; ``portlm pretrain --set section.key=value`` reaches every field of every section."""

    # The text may lie elsewhere now: its tokens are compared by content.
    FIXED: ClassVar[tuple[str, ...]] = (
        *RunConfig.FIXED,
        "objective",
        "label_smoothing",
        "lm_coef",
        "skipgram.",
        "glove.",
        "model.",
        "noise.",
        "data.",
    )
    FREE: ClassVar[tuple[str, ...]] = ("data.texts", "data.held_out", "data.source", "data.target")

    objective: str = (
        "causal"  # what is predicted: "causal" the next token, "masked" hidden ones (a key of OBJECTIVES)
    )
    label_smoothing: float = (
        0.0  # share of a target's probability that all tokens have in equal parts; of seq2seq
    )
    init: str = ""  # a checkpoint to begin with, whose model and tokenizer stand in the place of [model]
    lm_coef: float = 0.5  # of classify with a decoder: how much predicting the text counts beside its label
    skipgram: SkipgramSettings = field(default_factory=SkipgramSettings)
    glove: GloveSettings = field(default_factory=GloveSettings)
    model: ModelSettings = field(default_factory=default_model)
    noise: NoiseSettings = field(default_factory=NoiseSettings)
    data: DataSettings = field(default_factory=DataSettings)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.objective not in OBJECTIVES:
            raise ConfigError(f"objective must be one of {', '.join(OBJECTIVES)}, got {self.objective!r}")
        require_range("label_smoothing", self.label_smoothing, 0, 0.99)
        if verb := FAMILIES[self.model.family].counted:
            raise ConfigError(
                f"model.family {self.model.family} does not learn by gradients: its numbers are counts of a text, and "
                f"portlm {verb} makes one"
            )
        require_range("lm_coef", self.lm_coef, 0)
        self._check_init()
        self._check_family()
        for name, default in (("skipgram", SkipgramSettings()), ("glove", GloveSettings())):
            if self.objective != name and getattr(self, name) != default:
                raise ConfigError(f"the settings of [{name}] are for objective {name}: leave them out")
        if self.objective != "seq2seq" and (self.label_smoothing or self.data.source):
            what = "label_smoothing" if self.label_smoothing else "data.source"
            raise ConfigError(f"{what} is for objective seq2seq: leave it out")
        if self.objective != "causal" and self.data.packing != "stream":
            raise ConfigError(f"data.packing = {self.data.packing} is for objective causal: leave it out")
        if self.objective != "seq2seq" and self.evaluation.translations:
            raise ConfigError("evaluation.translations is for objective seq2seq: leave it out")
        for name in vars(self.noise):
            said = getattr(self.noise, name) != getattr(NoiseSettings, name)
            if said and self.objective not in NoiseSettings.READERS[name]:
                raise ConfigError(
                    f"noise.{name} is for objective {' or '.join(NoiseSettings.READERS[name])}: leave it out"
                )

    def _check_graph(self) -> None:
        super()._check_graph()
        kind = FAMILIES[self.model.family].kind
        if self.objective != "causal" or self.data.packing != "stream" or kind != "decoder":
            raise ConfigError(
                "cuda_graph = true is for decoders of objective causal with data.packing = stream, whose steps "
                "have one shape: leave it out"
            )

    def _check_family(self) -> None:
        """Refuse an objective that the family cannot learn; the message says which it can, or who can.

        The family of a checkpoint to begin with is known, and looked at, by the objective.
        """
        family = self.model.family
        kind = FAMILIES[family].kind
        if self.init or learns(kind, self.objective):
            return
        wanted = (
            f"model.family = {' or '.join(n for n, f in FAMILIES.items() if learns(f.kind, self.objective))}"
            if self.objective in LEARNERS
            else f"objective = {' or '.join(name for name in OBJECTIVES if learns(kind, name))}"
        )
        raise ConfigError(f"objective {self.objective} is not for the family {family}: set {wanted}")

    def _check_init(self) -> None:
        """Refuse settings that a checkpoint to begin with decides, and those of labels without any."""
        if self.init and self.objective not in BEGINNING:
            raise ConfigError(f"init is for objectives {', '.join(BEGINNING)}: leave it out")
        if self.init and self.model != default_model():
            raise ConfigError("the model is that of init: leave out what is set of [model]")
        if self.init and self.data.tokenizer != DataSettings.tokenizer:
            raise ConfigError("the tokenizer is that of init: leave out data.tokenizer")
        if self.data.held_out and self.objective not in JUDGED:
            raise ConfigError(f"data.held_out is for objective {' or '.join(JUDGED)}: leave it out")
        if self.lm_coef != type(self).lm_coef and self.objective != "classify":
            raise ConfigError("lm_coef is for objective classify: leave it out")

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one optimiser step learns from."""
        return self.data.batch_size * self.data.accumulate * self.model.context_length
