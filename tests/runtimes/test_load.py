import importlib.util
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

import portlm
from portlm.artifact import read_manifest, refresh_files, replace, write_manifest
from portlm.engines import DEVICES, ENGINES, resolve
from portlm.errors import (
    ContextLengthError,
    EngineUnavailableError,
    FormatError,
    PlacementError,
    UsageError,
)
from portlm.flows.load import load
from portlm.runtimes import engine_class
from portlm.tokenizer import byte_tokenizer

needs_ort = pytest.mark.skipif(
    importlib.util.find_spec("onnxruntime") is None, reason="onnxruntime is missing: pip install portlm[onnx]"
)


@pytest.fixture
def artifact(artifacts, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(artifacts["gpt2"], tmp_path / "model")


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
        ({"device": "tpu"}, "no device 'tpu': choose one of auto, cpu, cuda, vulkan"),
        ({"profile": "best"}, "no profile 'best': choose one of auto, portable, fused, native"),
        ({"engine": "null", "device": "cuda"}, "null does not run on cuda: choose cpu"),
        ({"engine": "torch", "device": "vulkan"}, "torch does not run on vulkan: choose cpu or cuda"),
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


# --- damaged folders --------------------------------------------------------------------------------


@needs_ort
@pytest.mark.parametrize(
    ("engine", "name"),
    [
        ("ort", "onnx/decoder.portable.onnx"), ("ort", "onnx/decoder.onnx.data"), ("ort", "tokenizer.json"),
        ("ort", "generation_config.json"), ("torch", "model.safetensors"), ("torch", "config.json"),
        ("null", "tokenizer.json"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("damage", ["altered", "truncated", "missing"])
def test_a_damaged_file_is_found_before_it_is_used(artifact, engine, name, damage):
    path = artifact / name
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(content[:-1] if damage == "truncated" else content[:-1] + bytes([content[-1] ^ 1]))
    profile = "portable" if engine == "ort" else "auto"
    with pytest.raises(FormatError, match=f"{path.name}.*{damage}"):
        load(artifact, engine, profile=profile)


def test_what_is_read_of_config_json_is_compared_with_the_manifest(artifact):
    """It may name the class of the tokenizer and, without generation_config.json, say how text is made."""
    content = (artifact / "config.json").read_text()
    (artifact / "config.json").write_text(content + " ")
    with pytest.raises(FormatError, match=r"config\.json: altered"):
        load(artifact, "null")
    (artifact / "config.json").write_text(content)
    manifest = read_manifest(artifact)
    (artifact / "generation_config.json").unlink()
    files = {name: entry for name, entry in manifest.files.items() if name != "generation_config.json"}
    write_manifest(artifact, replace(manifest, files=files))
    load(artifact, "null").close()
    content = json.loads((artifact / "config.json").read_text())
    (artifact / "config.json").write_text(json.dumps({**content, "temperature": 2.0, "do_sample": True}))
    with pytest.raises(FormatError, match=r"config\.json"):
        load(artifact, "null")


TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


@pytest.mark.parametrize("name", TEXT_FILES)
@pytest.mark.parametrize("damage", ["altered", "truncated", "missing"])
def test_every_file_that_a_session_reads_is_compared_with_the_manifest(artifact, name, damage):
    path = artifact / name
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":  # what is written is valid JSON
        path.write_bytes(content + b" " if damage == "altered" else b"{}")
    with pytest.raises(FormatError, match=f"{name}: {damage}"):
        load(artifact, "null")


@pytest.mark.parametrize("name", TEXT_FILES)
@pytest.mark.parametrize("kind", ["file", "link"])
def test_a_file_that_would_be_used_and_is_not_listed_is_refused(artifact, tmp_path, name, kind):
    manifest = read_manifest(artifact)
    files = {other: entry for other, entry in manifest.files.items() if other != name}
    write_manifest(artifact, replace(manifest, files=files))
    if kind == "link":
        (artifact / name).rename(tmp_path / name)
        (artifact / name).symlink_to(tmp_path / name)
    with pytest.raises(FormatError, match=f"{name} is not in the manifest; export again"):
        load(artifact, "null")
    (artifact / name).unlink()
    with load(artifact, "null") as session:  # without it, as if it had never been there
        assert session.generate([[1, 2]], max_new_tokens=2)[0].new_tokens == 2


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer_config.json", "README.md"])
def test_an_artifact_that_a_model_is_taken_from_again_is_compared_with_its_manifest(artifact, tmp_path, name):
    pytest.importorskip("onnx", reason="onnx is missing: pip install portlm[onnx]")
    from portlm.compile.export import export
    from portlm.hub import export_hf, import_hf

    (artifact / "README.md").write_text("its licence")
    write_manifest(artifact, refresh_files(artifact, read_manifest(artifact), ["README.md"]))
    path = artifact / name
    content = path.read_bytes()
    path.write_bytes(content + b" ")
    for again in (export, export_hf, import_hf):
        with pytest.raises(FormatError, match=f"{name}: altered"):
            again(artifact, tmp_path / "out")
    path.write_bytes(content)
    (artifact / "chat_template.jinja").write_text("its user put this here")
    export(artifact, tmp_path / "out")
    assert "chat_template.jinja" in read_manifest(tmp_path / "out").files


def test_bench_compares_the_graph_that_it_counts_in_with_the_manifest(artifact):
    pytest.importorskip("onnx", reason="onnx is missing: pip install portlm[onnx]")
    from portlm.compile.work import token_work

    token_work(artifact, read_manifest(artifact))
    graph = artifact / "onnx/decoder.portable.onnx"
    graph.write_bytes(graph.read_bytes() + b"\x32\x00")
    with pytest.raises(FormatError, match=r"decoder\.portable\.onnx: altered"):
        token_work(artifact, read_manifest(artifact))
    with pytest.raises(FormatError, match="the manifest has no graph of a decoder"):
        token_work(artifact, replace(read_manifest(artifact), roles={}))


@needs_ort
def test_a_file_that_is_not_used_may_be_damaged(artifact):
    (artifact / "model.safetensors").unlink()
    with load(artifact, "ort") as session:
        assert session.generate("hello", max_new_tokens=2).new_tokens == 2


def test_a_damaged_manifest_is_an_error(artifact):
    text = (artifact / "manifest.json").read_text()
    (artifact / "manifest.json").write_text(text.replace('"vocab_size": 257', '"vocab_size": 258'))
    with pytest.raises(FormatError, match=r"manifest\.json"):
        load(artifact, "null")


def test_a_folder_that_is_no_model_is_an_error(tmp_path):
    with pytest.raises(FormatError, match="no such folder"):
        load(tmp_path / "nothing", "null")
    with pytest.raises(FormatError, match=r"neither manifest\.json nor config\.json"):
        load(tmp_path, "null")
    (tmp_path / "file").write_text("")
    with pytest.raises(FormatError, match="no such folder"):
        load(tmp_path / "file", "null")


@pytest.mark.parametrize(
    "path", [None, 5, b"model", ["model"], object()], ids=lambda path: type(path).__name__
)
def test_a_folder_of_another_type_is_an_error(path):
    with pytest.raises(UsageError, match="the folder of a model must be a str or a Path"):
        load(path, "null")


@pytest.mark.parametrize("path", ["x" * 5000, "a\0b", ""], ids=["long", "null", "empty"])
def test_a_folder_that_cannot_be_is_an_error(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FormatError):
        load(path, "null")


@pytest.mark.parametrize("config", ["[]", '{"vocab_size": 0, "n_positions": 8}', '{"vocab_size": 300}'])
def test_sizes_that_cannot_be_are_an_error(checkpoints, tmp_path, config):
    (tmp_path / "config.json").write_text(config)
    shutil.copy(checkpoints["gpt2"] / "tokenizer.json", tmp_path)
    with pytest.raises(FormatError, match=r"config\.json"):
        load(tmp_path, "null")


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
        (None, r"this model has no tokenizer \(portlm uses byte-level BPE"),
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


@needs_ort
@pytest.mark.parametrize(
    "content",
    [b"", b"\x08\x08", b"\x08\x08 this is no graph", b"\x08\x08\x3a\x80", b"\x08\x08\x3a\x05 cut"],
    ids=["empty", "version", "words", "endless", "cut"],
)
def test_a_file_that_is_no_graph_is_an_error_that_names_it(artifact, content):
    path = artifact / "onnx/decoder.portable.onnx"
    path.write_bytes(content)
    from portlm.artifact import refresh_files

    write_manifest(artifact, refresh_files(artifact, read_manifest(artifact)))
    with pytest.raises(FormatError, match=r"decoder\.portable\.onnx: .*; export again"):
        load(artifact, "ort", profile="portable")


# --- where nodes run --------------------------------------------------------------------------------


@pytest.fixture
def det(artifact):
    """The artifact with a node that the WebGPU provider does not have."""
    onnx = pytest.importorskip("onnx", reason="onnx is missing: pip install portlm[onnx]")
    from portlm.artifact import refresh_files

    path = artifact / "onnx/decoder.portable.onnx"
    model = onnx.load_model(path, load_external_data=False)
    graph = model.graph
    logits = next(node for node in graph.node if "logits" in node.output)
    logits.output[list(logits.output).index("logits")] = "raw"
    # The determinant of the 1 x 1 matrix of each logit is the logit.
    graph.node.append(onnx.helper.make_node("Unsqueeze", ["raw", "where"], ["matrices"], name="lift"))
    graph.node.append(onnx.helper.make_node("Det", ["matrices"], ["logits"], name="culprit"))
    graph.initializer.append(onnx.helper.make_tensor("where", onnx.TensorProto.INT64, [2], [3, 4]))
    path.write_bytes(model.SerializeToString())
    write_manifest(artifact, refresh_files(artifact, read_manifest(artifact)))
    return artifact


def load_vulkan(folder, allow_fallback=False):
    """A session on the engine itself, which takes graphs that `load` refuses because portlm never writes them."""
    from portlm.engine import OpenRequest
    from portlm.runtimes.session import Session
    from portlm.tokenizer import Tokenizer

    request = OpenRequest(folder, read_manifest(folder), "vulkan", "portable", allow_fallback)
    try:
        engine = engine_class("ort").open(request)
    except EngineUnavailableError as error:
        pytest.skip(str(error))
    return Session(engine, Tokenizer.load(folder), frozenset())


def test_a_node_that_the_device_lacks_is_an_error_that_names_it(det):
    with pytest.raises(PlacementError, match=r"1 of \d+ nodes cannot run on vulkan.*culprit \(Det\)"):
        load_vulkan(det)


def test_with_allow_fallback_it_runs_on_the_cpu_and_is_reported(det, artifacts):
    with load_vulkan(det, allow_fallback=True) as session:
        placement = session.placement()
        tokens = session.generate("hello", max_new_tokens=6).token_ids
    assert placement.fallback == ("culprit (Det)",)
    assert placement.nodes["cpu"] == 1
    assert placement.nodes["vulkan"] > 50
    with load(artifacts["gpt2"], "torch", "cpu") as session:
        assert session.generate("hello", max_new_tokens=6).token_ids == tokens


def test_a_software_device_is_said_to_be_one(artifacts):
    from portlm.runtimes.vulkan import vulkan_devices

    with load_vulkan(artifacts["gpt2"]) as session:
        software = all(device.kind == "software" for device in vulkan_devices())
        assert ("software device" in session.placement().note) == software


@needs_ort
def test_the_switch_for_software_devices_does_not_stay_in_the_environment(artifacts, monkeypatch):
    import os

    from portlm.runtimes.ort_devices import SOFTWARE_ADAPTER

    monkeypatch.delenv(SOFTWARE_ADAPTER, raising=False)
    load_vulkan(artifacts["gpt2"]).close()
    assert SOFTWARE_ADAPTER not in os.environ


@needs_ort
@pytest.mark.parametrize(
    ("said", "load_average", "spins", "microseconds"),
    [
        (None, 0.0, "1", "1000"),
        (None, 1e3, "0", None),
        ("0", 0.0, "0", None),
        ("1", 1e3, "1", None),
    ],
)
def test_threads_of_onnx_runtime_spin_for_a_bounded_time_unless_asked_or_crowded(
    said, load_average, spins, microseconds, artifacts, monkeypatch
):
    import os

    monkeypatch.setattr(os, "getloadavg", lambda: (load_average,) * 3)
    monkeypatch.delenv("PORTLM_ORT_SPINNING", raising=False)
    if said is not None:
        monkeypatch.setenv("PORTLM_ORT_SPINNING", said)
    with load(artifacts["gpt2"], "ort", threads=1) as session:
        options = session.engine._session("decoder").get_session_options()
    assert options.intra_op_num_threads == 1
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == spins
    duration = "session.intra_op.spin_duration_us"
    if microseconds is None:
        with pytest.raises(RuntimeError, match=duration):
            options.get_session_config_entry(duration)
    else:
        assert options.get_session_config_entry(duration) == microseconds


# --- torch ------------------------------------------------------------------------------------------


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
