"""The options that name engines, the same for every verb that takes several."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click


def engine_options(what: str, default: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add -e, -d and -p to a command, which gets `engines`, `device` and `profile`.

    Args:
        what: the verb's word for what it does to them, such as "measure".
        default: what it does without them.
    """
    on = what if what.endswith(" for") else f"{what} on"

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in (
            click.option("--profile", "-p", help=f"{what} this profile: portable, fused or native."),
            click.option("--device", "-d", help=f"{on} this device: cpu, cuda, vulkan or opencl."),
            click.option(
                "--engine", "-e", "engines", multiple=True, metavar="ENGINE[:DEVICE[:PROFILE]]",
                help=f"{what} this; repeat for several (default: {default}).",
            ),
        ):  # fmt: skip
            command = option(command)
        return command

    return add
