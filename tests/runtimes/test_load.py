"""Which engine a folder is loaded on, what that imports, and one sentence where it cannot be."""

import importlib.util
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from engine_cases import needs_ort

import portlm
from portlm.engines import DEVICES, ENGINES, resolve
from portlm.errors import (
    ContextLengthError,
    EngineUnavailableError,
    FormatError,
    UsageError,
)
from portlm.flows.load import load
from portlm.runtimes import engine_class
from portlm.tokenizer import byte_tokenizer


@pytest.fixture
def missing(monkeypatch):
    """Make packages look as if they were not installed."""
    real = importlib.util.find_spec

    def hide(*names):
        monkeypatch.setattr(
            importlib.util,
            "find_spec",
            lambda name, package=None: None if name in names else real(name, package),
        )

    return hide


def test_importing_portlm_and_its_runtimes_loads_no_heavy_package():
    program = (
        "import sys, portlm, portlm.runtimes, portlm.runtimes.session, portlm.runtimes.null, portlm.runtimes.probe\n"
        "import portlm.flows.load, portlm.flows.compile_cache\n"
        "heavy = {'torch', 'onnx', 'onnxruntime', 'tvm', 'matplotlib', 'transformers', 'numba'} & sys.modules.keys()\n"
        "sys.exit(', '.join(sorted(heavy)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_a_packed_model_is_loaded_without_the_compiler_and_its_packages(packed):
    program = (
        "import sys\n"
        "before = set(sys.modules)\n"  # what the environment imports at its start
        "import portlm\n"
        "session = portlm.load(sys.argv[1], 'packed')\n"
        "assert session.generate([1, 2], max_new_tokens=3).new_tokens == 3\n"
        "heavy = {'torch', 'onnx', 'onnxruntime', 'tvm', 'matplotlib', 'transformers', 'numba', 'tokenizers',\n"
        "         'importlib.metadata', 'subprocess', 'email', 'portlm.compile.build', 'portlm.compile.check'}\n"
        "sys.exit(', '.join(sorted(heavy & (sys.modules.keys() - before))) or 0)"
    )
    command = [sys.executable, "-c", program, str(packed["gpt2"])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("engine", [name for name in ENGINES if name not in ("torch", "tvm")])
def test_an_engine_other_than_torch_runs_without_torch(engine, artifacts):
    if ENGINES[engine].package and importlib.util.find_spec(ENGINES[engine].package) is None:
        pytest.skip(f"{ENGINES[engine].package} is missing")
    program = (
        "import sys, portlm\n"
        "session = portlm.load(sys.argv[1], sys.argv[2])\n"
        "assert session.generate('hello', max_new_tokens=3).new_tokens == 3\n"
        "sys.exit('torch' in sys.modules)"
    )
    command = [sys.executable, "-c", program, str(artifacts["gpt2"]), engine]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_load_is_reached_from_the_package(artifacts):
    with portlm.load(artifacts["gpt2"], engine="null") as session:
        assert session.generate("abc", max_new_tokens=3).text == "def"
    assert portlm.load is load


@needs_ort
def test_auto_takes_onnx_runtime_for_an_artifact_and_torch_for_a_checkpoint(artifacts, checkpoints):
    with load(artifacts["llama"]) as session:
        assert (session.engine.name, session.engine.device) == ("ort", "cpu")
        expected = session.generate("hello", max_new_tokens=8).token_ids
    with load(checkpoints["llama"]) as session:
        assert (session.engine.name, session.engine.profile) == ("torch", "native")
        assert session.generate("hello", max_new_tokens=8).token_ids == expected


def test_auto_takes_packed_where_it_is_compiled_and_of_this_version(compiled, tmp_path):
    with load(compiled["gpt2"]) as session:
        assert (session.engine.name, session.engine.device, session.engine.profile) == (
            "packed",
            "cpu",
            "fused",
        )
    with load(compiled["gpt2"], profile="native") as session:
        assert session.engine.name == "torch"
    folder = shutil.copytree(compiled["gpt2"], tmp_path / "older")
    raw = bytearray((folder / "packed.portlm").read_bytes())
    raw[12] = 1
    (folder / "packed.portlm").write_bytes(raw)
    with load(folder) as session:
        assert session.engine.name != "packed"


def test_auto_takes_the_next_engine_when_a_package_is_missing(artifacts, missing):
    missing("onnxruntime")
    with load(artifacts["gpt2"]) as session:
        assert session.engine.name == "torch"
    missing("onnxruntime", "torch")
    with pytest.raises(EngineUnavailableError, match=r"ort \(pip install 'portlm\[onnx\]'\) or torch"):
        load(artifacts["gpt2"])


@pytest.mark.parametrize("engine", [name for name, entry in ENGINES.items() if entry.package])
def test_a_missing_package_is_one_sentence_with_the_command(engine, artifacts, missing):
    entry = ENGINES[engine]
    missing(entry.package)
    words = rf"^{engine}: {entry.package} is not installed, try pip install 'portlm\[{entry.extra}\]'$"
    with pytest.raises(EngineUnavailableError, match=words):
        load(artifacts["gpt2"], engine)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"engine": "tensorrt"}, "no engine 'tensorrt': choose one of auto, torch, ort, tvm, packed, null"),
        ({"device": "tpu"}, "no device 'tpu': choose one of auto, cpu, cuda, vulkan, opencl"),
        ({"profile": "best"}, "no profile 'best': choose one of auto, portable, fused, native"),
        ({"engine": "null", "device": "cuda"}, "null does not run on cuda: choose cpu"),
        ({"engine": "torch", "device": "vulkan"}, "torch does not run on vulkan: choose cpu or cuda"),
        ({"engine": "ort", "device": "opencl"}, "ort does not run on opencl: choose cpu or cuda or vulkan"),
        ({"threads": 0}, "threads must be"),
        ({"threads": 1.0}, "threads must be"),
        ({"threads": True}, "threads must be"),
        ({"threads": 10**9}, "threads must be a whole number from 1 to 4096"),
        ({"threads": 2**99}, "threads must be"),
        ({"engine": None}, "no engine None"),
        ({"device": ["cpu"]}, "no device"),
        ({"profile": np.array(["auto"])}, "no profile an array"),
        ({"allow_fallback": "no"}, "allow_fallback must be True or False"),
        ({"threads": 10**5000}, "threads must be"),
    ],
)
def test_an_unknown_choice_lists_the_known_ones(options, words, artifacts):
    with pytest.raises(UsageError, match=words):
        load(artifacts["gpt2"], **options)


@needs_ort
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"profile": "native"}, "choose portable or fused"),
        ({"profile": "fused", "device": "cuda"}, "run portlm compile .* --engine ort"),
    ],
)
def test_a_profile_that_was_not_made_is_an_error_with_the_command(options, words, artifacts):
    with pytest.raises(UsageError, match=words):
        load(artifacts["gpt2"], "ort", **options)


def test_a_plain_checkpoint_runs_on_torch_alone(checkpoints):
    for engine in ("ort", "tvm"):
        if importlib.util.find_spec(ENGINES[engine].package) is not None:
            with pytest.raises(UsageError, match=r"run portlm export .* first"):
                load(checkpoints["gpt2"], engine)
    with load(checkpoints["gpt2"], "null") as session:
        assert (session.engine.vocab_size, session.engine.context_length) == (257, 48)


@pytest.fixture
def without_text(checkpoints, tmp_path):
    """Function: content of tokenizer.json -> a folder that the null engine runs, with that tokenizer."""

    def make(tokenizer=None):
        shutil.copy(checkpoints["gpt2"] / "config.json", tmp_path)
        if tokenizer is not None:
            (tmp_path / "tokenizer.json").write_text(tokenizer)
        return tmp_path

    return make


OTHER_KIND = json.dumps({"version": "1.0", "model": {"type": "Unigram", "vocab": [["a", 0.0]]}})


@pytest.mark.parametrize(
    ("tokenizer", "why"),
    [
        (None, r"this model has no tokenizer \(portlm reads tokenizer"),
        (OTHER_KIND, r"this model's tokenizer cannot be used: .*tokenizer\.json"),
        ("{", r"this model's tokenizer cannot be used: .*tokenizer\.json"),
        (
            "larger",
            "this model's tokenizer cannot be used: the tokenizer has 258 tokens and the model 257",
        ),
    ],
    ids=["none", "of another kind", "damaged", "larger"],
)
def test_a_model_without_a_tokenizer_that_fits_takes_token_ids_and_says_why_no_text(
    without_text, tokenizer, why
):
    folder = without_text(tokenizer if tokenizer != "larger" else None)
    if tokenizer == "larger":
        byte_tokenizer("<|endoftext|>").save(folder)
        content = json.loads((folder / "tokenizer.json").read_text())
        content["added_tokens"].append(
            {**content["added_tokens"][0], "id": 257, "content": "more", "special": False}
        )
        (folder / "tokenizer.json").write_text(json.dumps(content))
    with load(folder, "null") as session:
        answer = session.generate([1, 2, 3], max_new_tokens=4)
        assert (answer.token_ids, answer.text) == ((4, 5, 6, 7), "")
        stream = session.stream([1], max_new_tokens=4)
        assert list(stream.ids()) == [2, 3, 4, 5]
        assert stream.generation.token_ids == (2, 3, 4, 5)
        assert session.score([1, 2, 3]).greedy == (True, True)
        with pytest.raises(
            UsageError, match=f"^{why}.*, so it writes no text that a stop string could be in$"
        ):
            session.generate([1, 2, 3], stop="x")
        for text in ("abc", ""):
            with pytest.raises(
                UsageError, match=f"^{why}.*: give token ids: a list of them, or --ids on the command"
            ):
                session.generate(text)
        with pytest.raises(UsageError, match=f"^{why}.*; a stream has them in ids"):
            next(session.stream([1], max_new_tokens=4))


@pytest.mark.parametrize(
    ("eos", "fine"), [(100, True), ([100, 101], True), (None, True), ("x", False), (-1, False)]
)
def test_generation_config_says_which_tokens_end_a_text(checkpoints, tmp_path, eos, fine):
    folder = shutil.copytree(checkpoints["gpt2"], tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    if not fine:
        with pytest.raises(FormatError, match=r"generation_config\.json: eos_token_id"):
            load(folder, "null")
        return
    with load(folder, "null") as session:
        result = session.generate("a", max_new_tokens=10)
    assert result.text == ("bcdefghijk" if eos is None else "bc")


def test_cuda_without_a_device_is_an_error_that_says_so(artifacts):
    torch = pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(EngineUnavailableError, match="finds no CUDA device"):
        load(artifacts["gpt2"], "torch", "cuda")
    with pytest.raises(EngineUnavailableError, match="finds no CUDA device"):
        load(artifacts["gpt2"], device="cuda")


def test_a_long_prompt_is_never_truncated(artifacts):
    with (
        load(artifacts["gpt2"], "torch", "cpu") as session,
        pytest.raises(ContextLengthError, match=r"49 .*48"),
    ):
        session.generate("x" * 49, max_new_tokens=1)


def test_every_engine_of_the_table_exists():
    for name, entry in ENGINES.items():
        if entry.package is None or importlib.util.find_spec(entry.package) is not None:
            assert engine_class(name).name == name
        assert set(entry.devices) <= set(DEVICES)
        places = [entry.probe, *entry.compilers.values(), *([entry.runner] if entry.runner else [])]
        assert all(callable(resolve(place)) for place in places)
