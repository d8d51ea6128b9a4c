"""Nothing that portlm starts leaves anything in the user's folders but its own cache, ONNX Runtime included."""

import os
import shutil
import subprocess
import sys

import pytest

pytest.importorskip("onnxruntime", reason="onnxruntime is missing: pip install portlm[onnx]")

GENERATE = (
    "import sys, portlm\n"
    "with portlm.load(sys.argv[1], engine='ort', device='cpu', profile='portable') as session:\n"
    "    assert session.generate('hello', max_new_tokens=3).new_tokens == 3\n"
)


@pytest.fixture
def fresh_home(tmp_path, tmp_path_factory):
    """A new user's environment: a home and a folder for temporary files, both empty, and portlm's cache elsewhere."""
    home, temporary = tmp_path / "home", tmp_path / "temporary"
    home.mkdir(), temporary.mkdir()
    own = {"HOME": home, "TMPDIR": temporary, "PYTHONDONTWRITEBYTECODE": 1}
    own["PORTLM_HOME"] = tmp_path_factory.mktemp("cache")
    own |= {f"XDG_{kind}_HOME": home / kind for kind in ("CACHE", "CONFIG", "DATA", "STATE")}
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "ORT_"))}
    return tmp_path, inherited | {name: str(value) for name, value in own.items()}


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(["-c", GENERATE, "ARTIFACT"], id="load"),
        pytest.param(["-m", "portlm", "verify", "ARTIFACT", "-e", "ort:cpu:portable"], id="verify"),
        pytest.param(["-m", "portlm.runtimes.probe", "ort", "cpu"], id="doctor's child"),
    ],
)
def test_a_first_session_leaves_nothing_in_a_fresh_home(command, artifacts, fresh_home, tmp_path_factory):
    root, environment = fresh_home
    model = shutil.copytree(
        artifacts["gpt2"], tmp_path_factory.mktemp("copy") / "model"
    )  # verify writes into it
    command = [str(model) if word == "ARTIFACT" else word for word in command]
    done = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    own = root / "home" / "CACHE" / "portlm"  # that a graph from elsewhere was checked
    assert sorted(path for path in root.rglob("*") if not path.is_dir() and own not in path.parents) == []


@pytest.mark.parametrize(("said", "seen"), [(None, "1"), ("0", "0"), ("", "")])
def test_telemetry_is_off_at_the_import_unless_the_user_says_otherwise(said, seen, tmp_path):
    """A module in onnxruntime's place sees what that would."""
    program = (
        "import os, sys, types, importlib.abc, importlib.machinery\n"
        "class Stub(importlib.abc.MetaPathFinder, importlib.abc.Loader):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        return importlib.machinery.ModuleSpec(name, self) if name == 'onnxruntime' else None\n"
        "    def create_module(self, spec): return None\n"
        "    def exec_module(self, module): print(os.environ['ORT_DISABLE_TELEMETRY'])\n"
        "sys.meta_path.insert(0, Stub())\n"
        "import portlm.runtimes.ort\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    environment |= {} if said is None else {"ORT_DISABLE_TELEMETRY": said}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == f"{seen}\n", done.stderr
