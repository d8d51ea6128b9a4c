"""How engines are named: ENGINE[:DEVICE[:PROFILE]], the same for every verb."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from portlm.errors import UsageError


@dataclass(frozen=True)
class Target:
    """An engine on a device with a graph profile."""

    engine: str
    device: str
    profile: str = "auto"

    def __str__(self) -> str:
        suffix = "" if self.profile == "auto" else f":{self.profile}"
        return f"{self.engine}:{self.device}{suffix}"

    @staticmethod
    def parse(text: str) -> Target:
        """Read ``engine[:device[:profile]]``; the device is cpu where none is said.

        Raises:
            UsageError: more than three parts, an empty one, or a name that no engine has.
        """
        return Choice.parse(text).target()


@dataclass(frozen=True)
class Choice:
    """What a user said of a target; None is left open."""

    engine: str | None = None
    device: str | None = None
    profile: str | None = None

    @staticmethod
    def parse(text: str) -> Choice:
        """Read ``engine[:device[:profile]]``, and say no more than it does.

        Raises:
            UsageError: more than three parts, an empty one, or a name that no engine has.
        """
        parts = text.split(":")
        if not 1 <= len(parts) <= 3 or not all(parts):
            raise UsageError(
                f"'{text}' is no engine: write engine:device or engine:device:profile, e.g. ort:cpu:fused"
            )
        choice = Choice(*parts)
        choice.check()
        return choice

    def check(self) -> None:
        """Raise UsageError for a name that no engine, or not this one, has."""
        from portlm.engine import PROFILES
        from portlm.engines import DEVICES, ENGINES

        if self.engine is not None and self.engine not in ENGINES:
            raise UsageError(f"there is no engine {self.engine!r}: choose one of {', '.join(ENGINES)}")
        if self.device is not None and self.device not in DEVICES:
            raise UsageError(f"there is no device {self.device!r}: choose one of {', '.join(DEVICES)}")
        if self.engine and self.device and self.device not in ENGINES[self.engine].devices:
            devices = " or ".join(ENGINES[self.engine].devices)
            raise UsageError(f"{self.engine} does not run on {self.device!r}: choose {devices}")
        if self.profile is not None and self.profile not in PROFILES:
            raise UsageError(f"there is no profile {self.profile!r}: choose one of {', '.join(PROFILES)}")

    def narrowed(self, device: str | None, profile: str | None) -> Choice:
        """The choice with a device and a profile that were said elsewhere.

        Raises:
            UsageError: it says another one already.
        """
        for name, here, there in (("device", self.device, device), ("profile", self.profile, profile)):
            if here is not None and there is not None and here != there:
                raise UsageError(f"{name} {here!r} and {name} {there!r} are both asked for: choose one")
        choice = Choice(self.engine, self.device or device, self.profile or profile)
        choice.check()
        return choice

    def fits(self, target: Target) -> bool:
        """Say whether a target is among those left open."""
        pairs = ((self.engine, target.engine), (self.device, target.device), (self.profile, target.profile))
        return all(wanted in (None, "auto", actual) for wanted, actual in pairs)

    def target(self) -> Target:
        """The one target that is meant: on the cpu, with the best profile, unless it says otherwise.

        Raises:
            UsageError: no engine is named.
        """
        if self.engine is None:
            raise UsageError("name an engine, such as ort or ort:cpu:fused")
        return Target(self.engine, self.device or "cpu", self.profile or "auto")


def read_choices(engines: Sequence[str], device: str | None, profile: str | None) -> list[Choice]:
    """Choices of a command line: each of its engines, narrowed by its device and profile.

    Args:
        engines: ``engine[:device[:profile]]`` each; none leaves the engine open.
        device: for those that say none.
        profile: for those that say none.

    Raises:
        UsageError: a name that nothing has, or a contradiction.
    """
    return [
        choice.narrowed(device, profile) for choice in (map(Choice.parse, engines) if engines else [Choice()])
    ]


def read_targets(
    engines: Sequence[str], device: str | None, profile: str | None, default: Sequence[Target]
) -> list[Target]:
    """Targets of a command line: those that it names, or those of `default` that it leaves open.

    Raises:
        UsageError: a name that nothing has, a contradiction, or nothing is left.
    """
    choices = read_choices(engines, device, profile)
    if engines:
        return [choice.target() for choice in choices]
    found = [target for target in default if choices[0].fits(target)]
    if default and not found:
        asked = ":".join(part or "*" for part in ("*", device, profile))
        raise UsageError(f"nothing here is {asked}: choose among {', '.join(map(str, default))}")
    return found


def default_targets(model: Path) -> list[Target]:
    """Return every engine, device and profile that this machine can run, the torch engine first.

    Args:
        model: the artifact: the torch engine runs its checkpoint, or its graphs where there is none.
    """
    from portlm.artifact import MANIFEST, read_manifest
    from portlm.engines import ENGINES
    from portlm.plan import needs_plan
    from portlm.runtimes.probe import probe

    order = {"torch": 0, "ort": 1, "tvm": 2, "packed": 3}
    graphs = ("portable", "fused")
    planned = (model / MANIFEST).exists() and needs_plan(read_manifest(model))
    targets = []
    for row in probe():
        if row["available"] and row["engine"] in order:
            made = ENGINES[row["engine"]].compilers
            profiles = [name for name in graphs if (row["device"], name) in made]
            if row["engine"] == "ort":  # which runs that graph as it is
                profiles = sorted({"portable", *profiles}, key=graphs.index)
            if row["engine"] == "torch" and not planned:
                profiles = ["native"]
            targets += [Target(row["engine"], row["device"], profile) for profile in profiles]
    return sorted(targets, key=lambda t: (order[t.engine], t.device))
