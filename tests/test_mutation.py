"""The tests of the ops, run once more with a fault in the product: they have to see it."""

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")

from portlm.ops import registry
from portlm.ops.compiled import kernels

ROOT = Path(__file__).resolve().parents[1]
OPS = [entry for entry in registry.specs() if entry.forward]
# What an op promises first: that its results are right. A few seconds for all of them.
PROMISES = "as_accurate or adds_up or tokens_of_the_reference"

if kernels is None:
    pytest.skip("portlm._C was not built", allow_module_level=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Run the promises of all ops in a new process with such environment variables; each result is made once.

    Returns {test file: {test: "" or why it failed}}, and what pytest printed.
    """
    made = {}

    def results(**environment):
        key = tuple(sorted(environment.items()))
        if key not in made:
            report = tmp_path_factory.mktemp("mutation") / "report.xml"
            clean = {k: v for k, v in os.environ.items() if k not in ("PORTLM_NO_KERNELS", "PYTEST_ADDOPTS")}
            printed = subprocess.run(
                [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}",
                 "-k", PROMISES, *(f"tests/ops/test_{entry.name}.py" for entry in OPS)],
                cwd=ROOT, env={**clean, **environment}, capture_output=True, text=True, timeout=300, check=False,
            ).stdout  # fmt: skip
            files = {}
            for case in ElementTree.parse(report).iter("testcase"):
                faults = [*case.iter("failure"), *case.iter("error")]
                why = "".join(f"{fault.get('message')} {fault.text}" for fault in faults)
                files.setdefault(case.get("classname").rpartition(".")[2], {})[case.get("name")] = why
            made[key] = files, printed
        return made[key]

    return results


@pytest.mark.parametrize("entry", OPS, ids=lambda entry: entry.name)
def test_the_promises_of_an_op_hold_with_its_kernel_and_all_fail_without(entry, run):
    """Its reference gives the same answers: only the count of calls can tell."""
    files, _ = run()
    assert files[f"test_{entry.name}"]
    assert not any(files[f"test_{entry.name}"].values())
    without, _ = run(PORTLM_NO_KERNELS="1")
    assert without[f"test_{entry.name}"].keys() == files[f"test_{entry.name}"].keys()
    for test, why in without[f"test_{entry.name}"].items():
        assert f"no call of kernel {entry.forward[0]}" in why, (test, why)


def test_without_kernels_means_not_one_call(run):
    _, printed = run(PORTLM_NO_KERNELS="1")
    assert "kernel calls: none" in printed
