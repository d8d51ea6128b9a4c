"""Pretraining: predict the next token, step after step, so that it can stop and go on at any step.

One optimiser step is: cut B·k windows of text, run k forward and backward passes that add up their gradients,
clip, AdamW. Around it: metrics, held-out loss, a sample to look at, checkpoints. The batch of step s depends on
the seed and s alone, and every other random number comes from PyTorch's generator, whose state each checkpoint
holds: a resumed run on the same CPU with the same threads repeats the uninterrupted one bit for bit.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import portlm
from portlm import models, settings
from portlm.data.batches import BatchSampler
from portlm.errors import DivergenceError, PortlmError
from portlm.train import checkpoint, state
from portlm.train.config import PretrainConfig
from portlm.train.corpus import Corpus, open_corpus
from portlm.train.evaluation import Evaluation, evaluate, prompt_ids, sample
from portlm.train.interrupt import Interrupt, InterruptedTraining
from portlm.train.metrics import MetricsLog
from portlm.train.plot import plot_loss
from portlm.train.progress import ProgressReport, duration
from portlm.train.run_folder import RunFolder, SavedRun, check_same_run
from portlm.train.schedule import WarmupCosine
from portlm.train.setup import make_optimizer, model_config, training_device
from portlm.weights import load_torch, save_tensors

if TYPE_CHECKING:
    from portlm.models import Model

OPTIMIZER, RNG = "optimizer.safetensors", "rng.safetensors"


@dataclass(frozen=True)
class PretrainResult:
    """What a finished run has to show.

    Attributes:
        checkpoint: The trained model, ready for export.
        run: Everything else.
        steps: Optimiser steps taken, over all sessions.
        tokens: Tokens learned from, counted as often as they were seen.
        parameters: Size of the model.
        loss: Held-out loss in nats per token.
        bits_per_byte: Held-out loss in bits per byte of text.
        seconds: Time spent training, over all sessions, without evaluation and saving.
        tokens_per_second: Over that time.
    """

    checkpoint: Path
    run: Path
    steps: int
    tokens: int
    parameters: int
    loss: float
    bits_per_byte: float
    seconds: float
    tokens_per_second: float


def pretrain(
    config: PretrainConfig,
    out: str | Path,
    *,
    resume: str = "none",
    quiet: bool = False,
    plot: bool = True,
) -> PretrainResult:
    """Train a model in the folder ``out`` and return where it is and how good it became.

    Args:
        config: Everything that decides the run.
        out: The run folder (:mod:`portlm.train.run_folder` draws it).
        resume: ``none``, ``auto`` or the path of a checkpoint.
        quiet: Report nothing but warnings on stderr.
        plot: Draw the loss curve when training ends or is interrupted.

    Raises:
        InterruptedTraining: A signal came; the state is saved.
        DivergenceError: The gradient or loss is not finite; the last good checkpoint is kept.
        StorageError: The disk is full or refuses; earlier checkpoints are kept.
        PortlmError: Whatever else is wrong with the text, the settings or the folder.
    """
    folder = RunFolder(out)
    device = training_device(config.device)
    if config.threads:
        torch.set_num_threads(config.threads)
    with ExitStack() as stack:
        stack.enter_context(folder.locked())
        progress = ProgressReport(config.steps, quiet=quiet)
        start = folder.start_point(resume, progress.warn)
        saved = None if start is None else SavedRun.from_checkpoint(start)
        if saved is not None:
            check_same_run(saved, config, progress.note)
        folder.write_config(config)
        corpus = open_corpus(config.data, folder.data, fresh=start is None, note=progress.note)
        metrics = stack.enter_context(_open_metrics(folder, saved))
        trainer = Trainer(config, folder, corpus, device, metrics, progress)
        if start is not None and saved is not None:
            trainer.restore(start.path, saved)
        trainer.describe("run" if start is None else "resume")
        progress.start = trainer.step
        interrupt = stack.enter_context(Interrupt())
        try:
            with progress:
                trainer.run(interrupt)
        finally:
            if plot:
                _draw(folder, progress)
        return trainer.finish()


class Trainer:
    """The state of one run and the things done to it at a step.

    Attributes:
        step: Optimiser steps taken so far.
        model: In training mode.
        evaluation: The latest held-out loss, None before the first.
    """

    def __init__(
        self,
        config: PretrainConfig,
        folder: RunFolder,
        corpus: Corpus,
        device: torch.device,
        metrics: MetricsLog,
        progress: ProgressReport,
    ):
        self.config, self.folder, self.corpus, self.device = config, folder, corpus, device
        self.metrics, self.progress = metrics, progress
        shape = model_config(config.model, corpus.tokenizer)
        prompt_ids(
            corpus.tokenizer, config.evaluation.prompt, shape.context_length
        )  # fail now, not at step 250
        torch.manual_seed(config.seed)
        self.model: Model = models.build(shape).to(device).train()
        self.optimizer = make_optimizer(self.model, config.optimizer)
        self.sampler = BatchSampler(
            corpus.train,
            config.data.batch_size * config.data.accumulate,
            config.model.context_length,
            config.seed,
        )
        self.schedule = WarmupCosine(
            config.optimizer.lr, config.schedule.min_lr, config.warmup_steps, config.steps
        )
        self.step = 0
        self.evaluation: Evaluation | None = None
        self._evaluated_step = self._saved_step = -1
        self._grad_norm = 0.0
        self._seconds = 0.0  # training time until the last log line
        self._loss_sum = torch.zeros((), device=device)  # over the steps since then
        self._loss_count = 0
        self._mark = time.perf_counter()  # when those steps began

    def run(self, interrupt: Interrupt) -> None:
        """Train to the last step, or until a signal comes.

        Raises:
            InterruptedTraining: After the state was saved.
        """
        config = self.config
        self.evaluate_if_due(interrupt)  # a signal may have cut the evaluation of the step resumed from short
        while self.step < config.steps and not interrupt.signal_number:
            self.train_step()
            last = self.step == config.steps
            if last or self.step % config.log_interval == 0:
                self.log()
            self.evaluate_if_due(interrupt)
            if last or self.step % config.checkpoint.interval == 0:
                self.save()
        if self.step < config.steps or self._evaluated_step < self.step:
            self.save()
            raise InterruptedTraining(
                f"stopped after step {self.step} of {config.steps} and saved {self.folder.checkpoints}"
                f"/step-{self.step}: continue with --resume auto",
                interrupt.signal_number,
            )

    def train_step(self) -> None:
        """Take one optimiser step.

        Raises:
            DivergenceError: The gradient is not finite.
        """
        rate = self.schedule(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        inputs, targets = next(self.sampler)
        loss = accumulate_gradients(
            self.model, self._to_device(inputs), self._to_device(targets), self.config.data.accumulate
        )
        norm = self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self._loss_sum += loss
        self._loss_count += 1
        self._grad_norm = float(norm)
        if not math.isfinite(self._grad_norm):
            self._diverged("the gradient norm", self._grad_norm)

    def log(self) -> None:
        """Write the mean loss since the last time.

        Raises:
            DivergenceError: A loss since then was not finite.
        """
        now = time.perf_counter()
        elapsed, loss = now - self._mark, self._loss_sum.item() / self._loss_count
        if not math.isfinite(loss):
            self._diverged("the loss", loss)
        self._mark, self._seconds = now, self._seconds + elapsed
        speed = self._loss_count * self.config.tokens_per_step / elapsed
        self.metrics.write(
            "train", self.step, loss=loss, lr=self.schedule(self.step - 1), grad_norm=self._grad_norm,
            tokens=self.step * self.config.tokens_per_step, seconds=self._seconds, tokens_per_second=speed,
        )  # fmt: skip
        self.progress.update(self.step, loss, speed)
        self._loss_sum.zero_()
        self._loss_count = 0

    def evaluate_if_due(self, interrupt: Interrupt) -> None:
        """Measure the held-out loss and write a sample, if this step asks for it and nobody is waiting to stop.

        Step 0 is asked too: what an untrained model reaches is where the curve begins.
        """
        config = self.config.evaluation
        due = self.step == self.config.steps or self.step % config.interval == 0
        if not due or self._evaluated_step == self.step:
            return

        def stop() -> bool:
            return interrupt.signal_number != 0

        with self._off_the_clock():
            held_out = self.corpus.held_out(config.max_tokens)
            found = evaluate(self.model, held_out, self.config.data.batch_size, self.device, stop)
            length = config.sample_tokens if self.step else 0  # an untrained model has nothing to show
            text = sample(
                self.model, self.corpus.tokenizer, config.prompt, tokens=length, stop=stop,
                temperature=config.temperature, top_k=config.top_k, seed=self.config.seed, device=self.device,
            )  # fmt: skip
            if found is None or stop():
                return  # all of it is done again on resume
            self.evaluation, self._evaluated_step = found, self.step
            self.metrics.write("eval", self.step, **asdict(found))
            self.progress.note(
                f"step {self.step}: held-out loss {found.loss:.4f}, {found.bits_per_byte:.4f} bits per byte"
            )
            if length:
                self.metrics.write("sample", self.step, text=text)
                self.progress.note(_indented(text))

    def save(self) -> None:
        """Save the whole state, unless this step was saved already.

        Raises:
            DivergenceError: A loss since the last log line was not finite.
            StorageError: The disk is full or refuses; earlier checkpoints are kept.
        """
        if self._saved_step == self.step:
            return
        with self._off_the_clock():
            if self._loss_count and not math.isfinite(loss := self._loss_sum.item()):
                self._diverged("the loss", loss)
            moments, numbers = state.optimizer_state(self.model, self.optimizer)
            randoms = state.random_state(self.device)
            self.metrics.sync()

            def fill(folder: Path) -> None:
                models.save_model(folder, self.model, self.corpus.tokenizer)
                save_tensors(folder / OPTIMIZER, moments)
                save_tensors(folder / RNG, randoms)

            checkpoint.save_checkpoint(
                self.folder.checkpoints,
                self.step,
                fill,
                state=self._snapshot(numbers).to_json(),
                estimate=self._bytes(moments),
                keep=self.config.checkpoint.keep,
            )
            self._saved_step = self.step

    def restore(self, folder: Path, saved: SavedRun) -> None:
        """Continue from a verified checkpoint.

        Raises:
            FormatError: Its tensors do not fit this model.
            ConfigError: It was trained on other data.
        """
        self.corpus.check_digest(saved.data)
        self.model.load_state_dict(models.load_model(folder).state_dict())
        state.set_optimizer_state(self.model, self.optimizer, load_torch(folder / OPTIMIZER), saved.optimizer)
        state.set_random_state(load_torch(folder / RNG), self.device)
        self.sampler.load_state_dict(saved.sampler)
        self.step = self._saved_step = saved.step
        self.evaluation, self._evaluated_step = saved.evaluation, saved.evaluated_step
        self._grad_norm, self._seconds = saved.grad_norm, saved.seconds
        self._loss_sum.fill_(saved.loss_sum)
        self._loss_count = saved.loss_count
        self._mark = time.perf_counter() - saved.seconds_since_log
        if saved.threads != torch.get_num_threads():
            self.progress.note(
                f"trained with {saved.threads} threads so far and {torch.get_num_threads()} from now on: "
                "the last digits may differ from an uninterrupted run"
            )

    def describe(self, kind: str) -> None:
        """Write a line about this process and what it is about to do."""
        facts = {
            "parameters": self.model.num_parameters(),
            "vocab_size": self.model.config.vocab_size,
            "train_tokens": len(self.corpus.train),
            "held_out_tokens": len(self.corpus.validation),
            "tokens_per_step": self.config.tokens_per_step,
            "device": str(self.device),
            "threads": torch.get_num_threads(),
            "torch": str(torch.__version__),
            "portlm": portlm.__version__,
        }
        self.metrics.write(kind, self.step, **facts)
        self.progress.note(
            f"{facts['parameters']:,} parameters, vocabulary {facts['vocab_size']:,}, "
            f"{facts['train_tokens']:,} training and {facts['held_out_tokens']:,} held-out tokens, "
            f"{facts['tokens_per_step']:,} tokens per step"
        )
        if self.step:
            self.progress.note(f"resuming after step {self.step}")

    def finish(self) -> PretrainResult:
        """Write the trained model by itself and sum up the run."""
        assert self.evaluation is not None, "the last step is always evaluated"
        final = checkpoint.replace_folder(
            self.folder.final,
            lambda folder: models.save_model(folder, self.model, self.corpus.tokenizer),
            estimate=self._bytes({}),
        )
        tokens = self.step * self.config.tokens_per_step
        result = PretrainResult(
            checkpoint=final,
            run=self.folder.path,
            steps=self.step,
            tokens=tokens,
            parameters=self.model.num_parameters(),
            loss=self.evaluation.loss,
            bits_per_byte=self.evaluation.bits_per_byte,
            seconds=self._seconds,
            tokens_per_second=tokens / self._seconds if self._seconds else 0.0,
        )
        self.progress.note(
            f"trained {self.step} steps in {duration(self._seconds)}: held-out loss {result.loss:.4f}, "
            f"{result.bits_per_byte:.4f} bits per byte, {result.tokens_per_second:,.0f} tokens/s"
        )
        return result

    def _snapshot(self, numbers: dict[str, Any]) -> SavedRun:
        return SavedRun(
            step=self.step,
            config=settings.to_dict(self.config),
            sampler=self.sampler.state_dict(),
            optimizer=numbers,
            data=self.corpus.digest,
            evaluation=self.evaluation,
            evaluated_step=self._evaluated_step,
            loss_sum=self._loss_sum.item(),
            loss_count=self._loss_count,
            grad_norm=self._grad_norm,
            seconds=self._seconds,
            seconds_since_log=time.perf_counter() - self._mark,
            threads=torch.get_num_threads(),
            versions={"portlm": portlm.__version__, "torch": str(torch.__version__)},
        )

    def _bytes(self, tensors: dict[str, Tensor]) -> int:
        """Return about how many bytes the weights and some tensors take on the disk."""
        everything = (*self.model.parameters(), *tensors.values())
        return sum(tensor.numel() * tensor.element_size() for tensor in everything) + (1 << 20)

    def _to_device(self, ids: Any) -> Tensor:
        return torch.from_numpy(ids).to(self.device)

    def _diverged(self, what: str, value: float) -> None:
        kept = checkpoint.list_checkpoints(self.folder.checkpoints)
        advice = f"the last good checkpoint is {kept[-1][1]}" if kept else "there is no checkpoint yet"
        raise DivergenceError(
            f"{what} is {value} at step {self.step}: lower optimizer.lr (now {self.config.optimizer.lr:g}) or "
            f"lengthen schedule.warmup; {advice}"
        )

    @contextmanager
    def _off_the_clock(self) -> Iterator[None]:
        """Leave what happens inside out of the training time."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._mark += time.perf_counter() - begin


def accumulate_gradients(
    model: Callable[[Tensor, Tensor], Tensor], inputs: Tensor, targets: Tensor, passes: int = 1
) -> Tensor:
    """Add the gradient of the mean loss of a batch to every parameter, in ``passes`` equal parts.

    Args:
        model: Maps inputs and targets to a mean loss.
        inputs: (B, T) int64, B divisible by ``passes``.
        targets: (B, T) int64.
        passes: Forward and backward passes: as many times less memory, the same gradient up to rounding.

    Returns:
        The mean loss, a scalar without gradient.
    """
    if passes == 1:
        loss = model(inputs, targets)
        loss.backward()
        return loss.detach()
    total = torch.zeros((), device=inputs.device)
    for part, wanted in zip(inputs.chunk(passes), targets.chunk(passes), strict=True):
        loss = model(part, wanted) / passes
        loss.backward()
        total += loss.detach()
    return total


def _open_metrics(folder: RunFolder, saved: SavedRun | None) -> MetricsLog:
    if saved is None:
        return MetricsLog(folder.metrics)
    done = saved.evaluated_step == saved.step
    return MetricsLog(folder.metrics, saved.step, redo=() if done else ("eval", "sample"))


def _draw(folder: RunFolder, progress: ProgressReport) -> None:
    """Draw the loss curve. A picture is not worth a run: what prevents it is only reported."""
    try:
        plot_loss(folder.path)
    except PortlmError as error:
        progress.note(str(error))


def _indented(text: str) -> str:
    """Return a sample for people: an untrained model also writes the codes that move a terminal's cursor."""
    lines = text.expandtabs().split("\n")
    return "\n".join(
        "    " + "".join(c if c.isprintable() else "\N{MIDDLE DOT}" for c in line) for line in lines
    )
