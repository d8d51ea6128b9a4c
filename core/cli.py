"""The command line: names to verbs, errors to exit codes.

stdout carries the result, stderr everything else. Exit codes: 0 done, 1 the input or the machine is at fault,
2 the call is wrong, 129 the terminal was closed, 130 interrupted, 143 terminated.
"""

from __future__ import annotations

import importlib
import signal
import sys
from collections.abc import Sequence
from typing import Any, NoReturn, TextIO

import click

import portlm
from portlm.errors import PortlmError
from portlm.threads import bound_spinning

# verb -> (module under portlm.commands, one line for --help); modules load when their verb is used
VERBS = {
    "demo": ("demo", "Train a small GPT on Python's documentation and run it on every engine here."),
    "doctor": ("doctor", "List every engine and device: available, or why not and what adds it."),
    "tokenizer": ("tokenizer", "Train a tokenizer."),
    "pretrain": ("pretrain", "Train a language model on text files."),
    "finetune": ("finetune", "Train a classifier on texts with labels, from a checkpoint or afresh."),
    "average": ("average", "Average the weights of the last checkpoints of a run."),
    "ngram": ("ngram", "Count an n-gram model of text files."),
    "import": ("import_", "Turn a Hugging Face folder into a portlm checkpoint."),
    "export": ("export", "Write a checkpoint as ONNX or as a Hugging Face folder."),
    "compile": ("compile", "Compile an exported model for an engine and a device."),
    "engines": ("contents", "List the engines that run an exported model here, and what its weights are."),
    "verify": ("verify", "Prove that every engine gives the same answer here."),
    "matrix": ("matrix", "Compare small models of every family on every engine here with eager PyTorch."),
    "generate": ("generate", "Continue a prompt."),
    "score": ("score", "Say how probable a text is: log-probability, perplexity, bits per byte."),
    "embed": ("embed", "Turn texts into vectors."),
    "neighbours": ("neighbours", "List the words whose vectors are near that of a word."),
    "analogy": ("analogy", "Complete an analogy of words by their vectors."),
    "keywords": ("keywords", "List the words that say what a text is about."),
    "classify": ("classify", "Say which label a text has."),
    "choose": ("choose", "Say which of several answers goes with a context."),
    "tag": ("tag", "Label each word of a text."),
    "span": ("span", "Find the part of a text that answers a question."),
    "fill": ("fill", "Guess what a mask in a text stands for."),
    "translate": ("translate", "Write the target of each line, with a model that reads a source first."),
    "bench": ("bench", "Measure prefill, decode, load and memory of every engine."),
    "lab": ("lab", "Repeat what papers claim at a size of minutes, each figure beside its bar."),
    "ops": ("ops", "Print the table of fused operations and the forms they have."),
}

# package -> the extra that brings it, for the one-line answer to a missing import
EXTRAS = {
    "torch": "train",
    "numba": "train",
    "onnx": "onnx",
    "onnxruntime": "onnx",
    "onnxruntime_ep_webgpu": "vulkan",
    "tvm": "tvm",
    "tvm_ffi": "tvm",
    "matplotlib": "report",
    "transformers": "hf",
    "sklearn": "keywords",
    "networkx": "keywords",
    "scipy": "keywords",
    "sacrebleu": "translation",
}


class Verbs(click.Group):
    """A group whose commands are imported when they are called, so that --help needs none of them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Name the verbs in the order of a model's life."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one verb."""
        if cmd_name not in VERBS:
            return None
        module = importlib.import_module(f"portlm.commands.{VERBS[cmd_name][0]}")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the verbs without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in VERBS.items()])


@click.command(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(portlm.__version__, prog_name="portlm")
def cli() -> None:
    """Train a language model of the GPT lineage, and run it anywhere with proof that the answer is the same."""


def _fail(message: str, code: int) -> NoReturn:
    try:
        click.echo(f"portlm: error: {message}", err=True)
    except OSError:
        _let_go(sys.stderr)  # the terminal was closed; the code is still an answer to whoever waits for it
    sys.exit(code)


def _let_go(stream: TextIO) -> None:
    """Silence a stream whose reader has gone, for the flush at exit as well."""
    from portlm.train.progress import let_go

    let_go(stream)


def _terminate(number: int, _: Any) -> NoReturn:
    raise SystemExit(128 + number)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one verb and exit with its code."""
    bound_spinning()
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it
            signal.signal(number, _terminate)
    try:
        result = cli.main(args=arguments, prog_name="portlm", standalone_mode=False)
    except click.exceptions.Exit as exit_request:
        sys.exit(exit_request.exit_code)
    except (click.Abort, KeyboardInterrupt):
        _fail("interrupted", 130)
    except click.ClickException as error:
        _fail(" ".join(error.format_message().split()), error.exit_code)
    except PortlmError as error:
        _fail(" ".join(str(error).split()), error.exit_code)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        _fail(f"this needs {package}, which is not installed: pip install 'portlm[{EXTRAS[package]}]'", 1)
    except BrokenPipeError:
        _let_go(sys.stdout)  # `portlm ... | head`
        sys.exit(1)
    except OSError as error:
        _fail(f"{error.filename or 'system'}: {error.strerror or error}", 1)
    sys.exit(result if isinstance(result, int) else 0)
