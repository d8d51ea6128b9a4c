"""Prints which commit added each family, and what it touched outside of where a family belongs, from git's history.

A new family should need files in core/models, core/ops and csrc, its row in the table, tests, documentation and
experiments, and nothing else. Usage: python scripts/family_commits.py
"""

import subprocess
from pathlib import Path

from portlm.models import FAMILIES

ROOT = Path(__file__).resolve().parent.parent
OWN = ("core/models/", "core/ops/", "csrc/", "core/flows/lab/", "tests/", "docs/")
PAGES = ("README.md", "CHANGELOG.md", "ARCHITECTURE.md")


def git(*arguments: str) -> list[str]:
    """Return the lines that a git command prints."""
    call = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(call, capture_output=True, text=True, check=True).stdout.splitlines()


def added_by(path: str) -> tuple[str, str] | None:
    """Return the commit that added a file and its subject, or None if none has yet."""
    found = git("log", "--diff-filter=A", "--format=%h %s", "--", path)
    if not found:
        return None
    commit, _, subject = found[-1].partition(" ")
    return commit, subject


def outside(commit: str) -> list[str]:
    """Return the files of a commit that do not belong to a family."""
    files = git("show", "--first-parent", "--name-only", "--format=", commit)
    return [name for name in files if not name.startswith(OWN) and name not in PAGES]


def table() -> list[str]:
    """Return the lines of a Markdown table, one row for each commit, in the order of the families."""
    families: dict[tuple[str, str] | None, list[str]] = {}
    for name, family in FAMILIES.items():
        path = family.module.replace("portlm.", "core/", 1).replace(".", "/") + ".py"
        families.setdefault(added_by(path), []).append(name)
    lines = ["| families | added by | files outside |", "|---|---|---|"]
    for found, names in families.items():
        what = ", ".join(f"`{name}`" for name in names)
        if found is None:
            lines.append(f"| {what} | not committed | |")
            continue
        commit, subject = found
        files = outside(commit)
        shown = ", ".join(f"`{name}`" for name in files) if len(files) <= 12 else f"{len(files)} files"
        lines.append(f"| {what} | {commit} {subject} | {shown or 'none'} |")
    return lines


if __name__ == "__main__":
    print("\n".join(table()))
