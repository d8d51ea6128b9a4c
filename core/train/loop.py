"""The training loop: step after step, so that it can stop and go on at any of them. What is learned is an objective's.

One optimiser step is: take the objective's batch in parts, run a forward and a backward pass for each, which add up
their gradients, clip, AdamW (and Muon). Around it: metrics, evaluation, a sample to look at, checkpoints. All random
numbers come from the seed and the step, or from PyTorch's generators, whose state each checkpoint holds: a resumed run
on the same CPU with the same threads repeats the uninterrupted one bit for bit.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

import portlm
from portlm import settings
from portlm.errors import ConfigError, DivergenceError, PortlmError
from portlm.extension import problem
from portlm.ops.precision import products_in
from portlm.train import checkpoint, state
from portlm.train.config import RunConfig
from portlm.train.interrupt import Interrupt, InterruptedTraining
from portlm.train.layers import Layers
from portlm.train.metrics import MetricsLog
from portlm.train.nt_asgd import averages_in, observe
from portlm.train.objectives import Objective
from portlm.train.plot import plot_loss
from portlm.train.progress import ProgressReport, duration
from portlm.train.recompute import recompute_blocks
from portlm.train.run_folder import RunFolder, SavedRun, check_same_run
from portlm.train.setup import make_optimizer, make_schedule, training_device
from portlm.train.step_graph import StepGraph
from portlm.weights import load_torch, save_tensors

OPTIMIZER, RNG, OBJECTIVE = "optimizer.safetensors", "rng.safetensors", "objective.safetensors"

Batch = TypeVar("Batch")


@dataclass(frozen=True)
class Start:
    """What an objective is made with.

    Attributes:
        folder: Of the run.
        device: Where to train.
        fresh: Whether the folder has no checkpoint yet; else the data that they were trained on are there.
        note: Told what is being done.
    """

    folder: RunFolder
    device: torch.device
    fresh: bool
    note: Callable[[str], None]


@dataclass(frozen=True)
class Finished:
    """What a finished run has to show.

    Attributes:
        checkpoint: The trained model.
        run: Everything else.
        steps: Optimiser steps taken, over all sessions.
        tokens: Tokens learned from, counted as often as they were seen.
        parameters: Size of the model.
        trained: Of these, how many were trained.
        evaluation: The last one.
        seconds: Time spent training, over all sessions, without evaluation and saving.
    """

    checkpoint: Path
    run: Path
    steps: int
    tokens: int
    parameters: int
    trained: int
    evaluation: dict[str, float]
    seconds: float


def train(
    config: RunConfig,
    out: str | Path,
    make_objective: Callable[[Start], Objective],
    *,
    resume: str = "none",
    quiet: bool = False,
    plot: bool = True,
) -> Finished:
    """Train in the folder ``out``, from the beginning or from a checkpoint, to the last step.

    Args:
        config: Everything that decides the run.
        out: The run folder (:mod:`portlm.train.run_folder` draws it).
        make_objective: Called once; PyTorch's generators are seeded before.
        resume: ``none``, ``auto`` or the path of a checkpoint.
        quiet: Report nothing but warnings on stderr.
        plot: Draw the loss curve when training ends or is interrupted.

    Raises:
        InterruptedTraining: A signal came; the state is saved.
        DivergenceError: The gradient or loss is not finite; the last good checkpoint is kept.
        StorageError: The disk is full or refuses; earlier checkpoints are kept.
        PortlmError: Whatever else is wrong with the data, the settings or the folder.
    """
    folder = RunFolder(out)
    device = training_device(config.device)
    if config.threads:
        torch.set_num_threads(config.threads)
    with ExitStack() as stack:
        stack.enter_context(folder.locked())
        progress = ProgressReport(config.steps, quiet=quiet)
        if missing := problem():
            progress.warn(f"training is slow: {missing}")
        found = folder.start_point(resume, progress.warn)
        saved = None if found is None else SavedRun.from_checkpoint(found)
        if saved is not None:
            check_same_run(saved, config, progress.note)
        else:
            folder.write_config(config)
        torch.manual_seed(config.seed)
        fresh = found is None or not folder.owns(found)
        objective = make_objective(Start(folder, device, fresh, progress.note))
        if saved is not None and saved.kind != objective.kind:
            raise ConfigError(
                f"the checkpoint is of a run of kind {saved.kind}, this one is of kind {objective.kind}: "
                "choose another --out"
            )
        trainer = Trainer(config, folder, objective, device, progress)
        if found is not None and saved is not None:
            trainer.restore(found.path, saved)
            # Only now: a resume that is refused leaves settings, later checkpoints and metrics as they were.
            checkpoint.set_aside_newer(folder.checkpoints, found.step, progress.warn)
            folder.write_config(config)
        trainer.metrics = stack.enter_context(_open_metrics(folder, saved))
        trainer.describe("run" if found is None else "resume")
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
        objective: What is learned; its model is in training mode.
        evaluation: The latest, None before the first.
        metrics: Where every event is written; to be set before anything is done.
    """

    metrics: MetricsLog

    def __init__(
        self,
        config: RunConfig,
        folder: RunFolder,
        objective: Objective,
        device: torch.device,
        progress: ProgressReport,
    ):
        self.config, self.folder, self.objective, self.device = config, folder, objective, device
        self.progress = progress
        objective.model.train()
        if config.recompute:
            recompute_blocks(objective.model)
        self.layers = Layers(objective.model, config.layers)
        self.optimizer = make_optimizer(objective.model, config.optimizer, self.layers.scale)
        self.schedule = make_schedule(config)
        self._gradients: Callable[[Sequence[Any]], Tensor] = partial(accumulate_gradients, objective.loss)
        if config.cuda_graph:
            self._gradients = StepGraph(self._gradients, objective.model)
        self.step = 0
        self.evaluation: dict[str, float] | None = None
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
            group["lr"] = rate * group["scale"]
        self.layers.set_learning(self.step)
        parts = self.objective.batches()
        with products_in(self.config.precision):
            loss = self._gradients(parts)
            norm = self.optimizer.step()
        if not self.config.cuda_graph:  # which writes them where they are
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
        speed = self._loss_count * self.objective.tokens_per_step / elapsed
        self.metrics.write(
            "train", self.step, loss=loss, lr=self.schedule(self.step - 1), grad_norm=self._grad_norm,
            **self.objective.metrics(), tokens=self.step * self.objective.tokens_per_step, seconds=self._seconds,
            tokens_per_second=speed,
        )  # fmt: skip
        self.progress.update(self.step, loss, speed)
        self._loss_sum.zero_()
        self._loss_count = 0

    def evaluate_if_due(self, interrupt: Interrupt) -> None:
        """Evaluate and write a sample, if this step asks for it and nobody is waiting to stop.

        Step 0 is asked too: what an untrained model reaches is where the curve begins. It has no sample to show.
        """
        due = self.step == self.config.steps or self.step % self.config.evaluation.interval == 0
        if not due or self._evaluated_step == self.step:
            return

        def stop() -> bool:
            return interrupt.signal_number != 0

        with self._off_the_clock(), averages_in(self.optimizer):
            found = self.objective.evaluate(stop)
            text = self.objective.sample(stop) if self.step and found is not None else None
            if found is None or stop():
                return  # all of it is done again on resume
            self.evaluation, self._evaluated_step = found, self.step
            self.metrics.write("eval", self.step, **found)
            self.progress.note(f"step {self.step}: {_held_out(found)}")
            if text is not None:
                self.metrics.write("sample", self.step, text=text)
                self.progress.note(_indented(text))
        if observe(self.optimizer, found["loss"]):
            self.progress.note(
                f"step {self.step}: the loss gets no better, weights are averaged from here on"
            )

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
            moments, numbers = state.optimizer_state(self.objective.model, self.optimizer)
            randoms = state.random_state(self.device)
            own, tensors = self.objective.state()
            self.metrics.sync()

            def fill(folder: Path) -> None:
                self.objective.save(folder)
                save_tensors(folder / OPTIMIZER, moments)
                save_tensors(folder / RNG, randoms)
                if tensors:
                    save_tensors(folder / OBJECTIVE, tensors)

            checkpoint.save_checkpoint(
                self.folder.checkpoints,
                self.step,
                fill,
                state=self._snapshot(numbers, own).to_json(),
                estimate=self._bytes(*moments.values(), *tensors.values()),
                keep=self.config.checkpoint.keep,
            )
            self._saved_step = self.step

    def restore(self, folder: Path, saved: SavedRun) -> None:
        """Continue from a verified checkpoint.

        Raises:
            FormatError: Its tensors do not fit this model.
            ConfigError: It was trained on other data.
        """
        tensors = load_torch(folder / OBJECTIVE) if (folder / OBJECTIVE).exists() else {}
        self.objective.restore(folder, saved.objective, tensors)
        moments = load_torch(folder / OPTIMIZER)
        state.set_optimizer_state(self.objective.model, self.optimizer, moments, saved.optimizer)
        state.set_random_state(load_torch(folder / RNG), self.device)
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
        sizes = {
            "parameters": self._parameters(),
            **self.objective.facts(),
            "tokens_per_step": self.objective.tokens_per_step,
        }
        where = {
            "device": str(self.device),
            "threads": torch.get_num_threads(),
            "torch": str(torch.__version__),
            "portlm": portlm.__version__,
        }
        self.metrics.write(kind, self.step, **sizes, **where)
        self.progress.note(", ".join(f"{name.replace('_', ' ')} {size:,}" for name, size in sizes.items()))
        if self.step:
            self.progress.note(f"resuming after step {self.step}")

    def finish(self) -> Finished:
        """Write the trained model by itself and sum up the run."""
        assert self.evaluation is not None, "the last step is always evaluated"
        with averages_in(self.optimizer):
            final = checkpoint.replace_folder(self.folder.final, self.objective.save, estimate=self._bytes())
        tokens = self.step * self.objective.tokens_per_step
        speed = f", {tokens / self._seconds:,.0f} tokens/s" if self._seconds else ""
        self.progress.note(
            f"trained {self.step} steps in {duration(self._seconds)}: {_held_out(self.evaluation)}{speed}"
        )
        return Finished(
            checkpoint=final,
            run=self.folder.path,
            steps=self.step,
            tokens=tokens,
            parameters=self._parameters(),
            trained=self._trained(),
            evaluation=self.evaluation,
            seconds=self._seconds,
        )

    def _snapshot(self, numbers: dict[str, Any], own: dict[str, Any]) -> SavedRun:
        return SavedRun(
            step=self.step,
            config=settings.to_dict(self.config),
            kind=self.objective.kind,
            objective=own,
            optimizer=numbers,
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

    def _parameters(self) -> int:
        """Return how many parameters there are, a shared one counted once."""
        return sum(parameter.numel() for parameter in self.objective.model.parameters())

    def _trained(self) -> int:
        """Return how many of them the optimiser has."""
        return sum(p.numel() for group in self.optimizer.param_groups for p in group["params"])

    def _bytes(self, *tensors: Tensor) -> int:
        """Return about how many bytes the weights and some tensors take on the disk."""
        everything = (*self.objective.model.parameters(), *tensors)
        return sum(tensor.numel() * tensor.element_size() for tensor in everything) + (1 << 20)

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


def accumulate_gradients(loss: Callable[[Batch], Tensor], parts: Sequence[Batch]) -> Tensor:
    """Add the gradient of the sum of some losses to every parameter: less memory than all of them at once.

    Args:
        loss: The share of one part, a scalar.
        parts: At least one.

    Returns:
        The sum, a scalar without gradient.
    """
    first, *rest = parts
    share = loss(first)
    share.backward()
    total = share.detach()
    for part in rest:
        share = loss(part)
        share.backward()
        total = total + share.detach()
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


def _held_out(evaluation: dict[str, float]) -> str:
    """Return an evaluation for people."""
    figures = (f"{name.replace('_', ' ')} {value:.4f}" for name, value in evaluation.items())
    return f"held-out {', '.join(figures)}"


def _indented(text: str) -> str:
    """Return a sample for people: an untrained model also writes the codes that move a terminal's cursor."""
    lines = text.expandtabs().split("\n")
    return "\n".join(
        "    " + "".join(c if c.isprintable() else "\N{MIDDLE DOT}" for c in line) for line in lines
    )
