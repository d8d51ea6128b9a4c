"""What the command line says to somebody who gave it the wrong folder, or asked for more than is there."""

import json
import shutil
from dataclasses import replace

import pytest

from portlm import load
from portlm.models import build, load_config, save_model


@pytest.fixture
def run_folder(checkpoints, tmp_path):
    shutil.copytree(checkpoints["gpt2"], tmp_path / "run" / "final")
    return tmp_path / "run"


@pytest.mark.parametrize("verb", ["export", "compile", "verify", "generate", "bench"])
def test_a_run_folder_is_answered_with_the_model_in_it(verb, portlm, run_folder):
    extra = {"export": [run_folder.parent / "out"], "generate": ["hello"], "bench": ["-e", "torch"]}.get(
        verb, []
    )
    outcome = portlm(verb, run_folder, *extra)
    assert outcome.code == 1
    assert f"this is a run folder, the trained model is in {run_folder / 'final'}" in outcome.error


ARGUMENTS = {
    "generate": ["hello"],
    "bench": ["-e", "torch"],
    "export": ["out"],
    "import": ["out"],
}  # after the folder


@pytest.mark.parametrize("verb", ["engines", "export", "import", "compile", "verify", "generate", "bench"])
@pytest.mark.parametrize("name", ["manifest.json", "config.json", "tokenizer.json"])
def test_a_file_of_a_model_is_answered_with_its_folder(verb, name, portlm, artifacts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcome = portlm(verb, artifacts["gpt2"] / name, *ARGUMENTS.get(verb, []))
    assert outcome.code == 1
    file, folder = artifacts["gpt2"] / name, artifacts["gpt2"]
    assert outcome.error == f"{file} is a file: give the folder that holds it, {folder}"


@pytest.mark.parametrize("verb", ["engines", "export", "import", "compile", "verify", "generate", "bench"])
def test_a_folder_that_is_not_there_is_said_so(verb, portlm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcome = portlm(verb, tmp_path / "nowhere", *ARGUMENTS.get(verb, []))
    assert outcome.code == 1
    assert outcome.error == f"{tmp_path / 'nowhere'}: there is no such folder"


@pytest.mark.parametrize("verb", ["compile", "verify"])
def test_a_checkpoint_where_an_artifact_is_needed_is_answered_with_the_command(verb, portlm, run_folder):
    outcome = portlm(verb, run_folder / "final")
    assert outcome.code == 1
    assert f"this is a checkpoint, run portlm export {run_folder / 'final'} OUT first" in outcome.error


def test_generate_fills_a_short_context_when_no_number_is_given(portlm, checkpoints):
    outcome = portlm("generate", checkpoints["gpt2"], "abc", "--engine", "null", "--json")
    assert json.loads(outcome.out)["new_tokens"] == 45  # the context holds 48


def test_compile_leaves_out_what_the_artifact_has_no_graph_of(portlm, checkpoints, tmp_path):
    portlm("export", checkpoints["gpt2"], tmp_path / "model", "--profile", "portable")
    outcome = portlm("compile", tmp_path / "model", "--engine", "ort")
    assert outcome.code == 2
    assert "ort:cpu:fused left out: the artifact has no fused graph" in outcome.err
    assert "there is nothing to compile" in outcome.error


def test_compile_leaves_out_an_engine_that_is_not_installed_unless_it_was_named(
    portlm, artifacts, tmp_path, monkeypatch
):
    from portlm.compile import build
    from portlm.errors import EngineUnavailableError

    def missing(folder, keys, *options):
        if keys[0][0] == "tvm":
            raise EngineUnavailableError("tvm: not installed")
        return original(folder, keys, *options)

    original = build.build
    monkeypatch.setattr(build, "build", missing)
    model = shutil.copytree(artifacts["gpt2"], tmp_path / "model")
    outcome = portlm("compile", model)
    assert outcome.code == 0
    assert "tvm:cpu:portable left out: tvm: not installed" in outcome.err
    assert [line.rpartition("/")[2] for line in outcome.out.splitlines()] == [
        "decoder.ort-cpu-fused.onnx",
        "decoder.ort-cpu-fused-even.onnx",
        "decoder.ort-vulkan-fused.onnx",
        "packed.portlm",
    ]
    assert portlm("compile", model, "--engine", "tvm").error == "tvm: not installed"


def test_import_says_what_it_left_out(portlm, checkpoints, tmp_path):
    hf = shutil.copytree(checkpoints["gpt2"], tmp_path / "hf")
    (hf / "tokenizer.json").unlink()
    outcome = portlm("import", hf, tmp_path / "out", "--json")
    assert json.loads(outcome.out)["notes"] == [
        "the checkpoint takes token ids only: there is no tokenizer.json"
    ]
    assert "import: the checkpoint takes token ids only: there is no tokenizer.json" in outcome.err


@pytest.mark.parametrize(
    ("tokenizer", "words"),
    [
        ({"model": {"type": "Morse", "vocab": {"a": 0}}}, "this is a tokenizer of the kind 'Morse'"),
        ({"model": {"vocab": {chr(33 + i): i for i in range(90)}, "merges": []}}, "has 90 tokens and the model 80"),
    ],
    ids=["another kind", "more tokens than the model"],
)  # fmt: skip
def test_export_leaves_out_a_tokenizer_that_cannot_be_used_and_the_rest_works(
    portlm, checkpoints, tmp_path, tokenizer, words
):
    checkpoint = shutil.copytree(checkpoints["gpt2"], tmp_path / "checkpoint")
    save_model(checkpoint, build(replace(load_config(checkpoint), vocab_size=80, eos_token_ids=())))
    whole = json.loads((checkpoint / "tokenizer.json").read_text()) | {"added_tokens": []} | tokenizer
    (checkpoint / "tokenizer.json").write_text(json.dumps(whole))
    (checkpoint / "tokenizer_config.json").unlink()
    outcome = portlm("export", checkpoint, tmp_path / "out", "--profile", "portable")
    assert (outcome.code, outcome.out.strip()) == (0, str(tmp_path / "out"))
    assert outcome.err.startswith(
        "export: the tokenizer was left out, so the model takes token ids only (--ids): "
    )
    assert words in outcome.err
    assert not list((tmp_path / "out").glob("tokenizer*"))
    with load(tmp_path / "out", "ort", profile="portable") as session:
        assert len(session.generate([[1, 2]], max_new_tokens=3)[0].token_ids) == 3


def test_a_choice_of_graphs_for_a_form_without_graphs_is_an_error(portlm, checkpoints, tmp_path):
    outcome = portlm("export", checkpoints["gpt2"], tmp_path / "out", "--to", "hf", "--profile", "fused")
    assert outcome.code == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("target", ["cuda", "ort:tpu", "torch:vulkan", "ort:opencl", "ort:cpu:best"])
@pytest.mark.parametrize("verb", ["compile", "verify", "bench"])
def test_an_unknown_target_is_refused_before_anything_runs(verb, target, portlm, artifacts):
    outcome = portlm(verb, artifacts["gpt2"], "-e", target)
    assert outcome.code == 2
    assert "choose" in outcome.error
    assert outcome.err.count("\n") == 1


@pytest.mark.parametrize(
    "spelling", [("-e", "ort:cpu"), ("-e", "ort", "-d", "cpu"), ("-d", "cpu", "-p", "fused", "-e", "ort")]
)
def test_compile_takes_an_engine_in_either_spelling(spelling, portlm, artifacts, tmp_path):
    model = shutil.copytree(artifacts["gpt2"], tmp_path / "model")
    outcome = portlm("compile", model, *spelling)
    assert outcome.code == 0, outcome.err
    assert [line.rpartition("/")[2] for line in outcome.out.splitlines()] == [
        "decoder.ort-cpu-fused.onnx",
        "decoder.ort-cpu-fused-even.onnx",
    ]


@pytest.mark.parametrize(
    "spelling", [("-e", "torch:cpu:native"), ("-d", "cpu", "-p", "native"), ("-e", "torch")]
)
def test_verify_takes_an_engine_in_either_spelling(spelling, portlm, artifacts, tmp_path):
    model = shutil.copytree(artifacts["gpt2"], tmp_path / "model")
    outcome = portlm("verify", model, "--json", *spelling)
    assert outcome.code == 0, outcome.err
    assert [row["row"]["engine"] for row in json.loads(outcome.out)] == ["torch"]


@pytest.mark.parametrize("verb", ["compile", "verify", "bench"])
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("-e", "ort:cpu", "-d", "vulkan"), "'cpu' and device 'vulkan' are both asked for"),
        (("-d", "tpu"), "there is no device 'tpu': choose one of"),
        (("-e", "torch", "-d", "vulkan"), "torch does not run on 'vulkan': choose"),
        (("-e", "ort", "-d", "opencl"), "ort does not run on 'opencl': choose"),
        (("-p", "best"), "there is no profile 'best': choose one of"),
    ],
)
def test_a_contradiction_between_options_is_refused(verb, options, words, portlm, artifacts):
    outcome = portlm(verb, artifacts["gpt2"], *options)
    assert outcome.code == 2
    assert words in outcome.error


def test_compile_dumps_the_graph_after_every_pass(portlm, artifacts, tmp_path):
    pytest.importorskip("tvm", reason="TVM is missing: pip install portlm[tvm]")
    import onnx

    model = shutil.copytree(artifacts["gpt2"], tmp_path / "model")
    outcome = portlm("compile", model, "-e", "ort:cpu", "-e", "tvm:cpu", "--dump", tmp_path / "dump")
    assert outcome.code == 0, outcome.err
    folders = {path.name: sorted(p.name for p in path.iterdir()) for path in (tmp_path / "dump").iterdir()}
    assert set(folders) == {"ort-cpu-fused", "tvm-cpu-fused", "tvm-cpu-portable"}
    last = [name for name in folders["ort-cpu-fused"] if name.endswith("portable_form.onnx")]
    for lowered, entry in zip(last, ("ort-cpu-fused", "ort-cpu-fused-even"), strict=True):
        dumped = onnx.load_model(tmp_path / "dump" / "ort-cpu-fused" / lowered, load_external_data=False)
        assert dumped == onnx.load_model(model / f"onnx/decoder.{entry}.onnx", load_external_data=False)
    names = [name.partition("-")[2] for name in folders["tvm-cpu-portable"]]
    assert names[:4] == ["ImportGraph.py", "BoundGathers.py", "ReadBytes.py", "FuseTransposeMatmul.py"]
    assert "ScheduleProducts.py" in names
    assert folders["tvm-cpu-fused"][0] == "00-CallKernels.py"
    assert "panel_linear" in (tmp_path / "dump" / "tvm-cpu-fused" / "00-CallKernels.py").read_text()


def test_a_benchmark_longer_than_the_context_is_refused_before_anything_is_loaded(portlm, artifacts):
    outcome = portlm("bench", artifacts["gpt2"], "-e", "torch")
    assert outcome.code == 2
    assert "the model has 48" in outcome.error
    assert "load" not in outcome.err


@pytest.mark.parametrize("verb", ["verify", "bench", "demo"])
def test_tables_of_figures_fit_80_columns(verb, portlm, capsys, monkeypatch):
    """With the widest names and figures a laptop gives, no cell is cut."""
    monkeypatch.setenv("COLUMNS", "80")
    from portlm.artifact import ParityRow
    from portlm.commands import bench, demo, verify
    from portlm.flows.targets import Target
    from portlm.flows.verify import Result

    figures = {
        "engine": "ort", "device": "vulkan", "profile": "portable", "prefill_tok_s": 123456.0, "prefill_spread": 1e5,
        "prefill_of_limit": 0.123, "decode_tok_s": 12345.0, "decode_spread": 1e4, "decode_of_limit": 0.987,
        "load_s": 12.34, "model_mib": 12345.0, "peak_rss_mib": 12345.0, "max_logit_error": 1.2e-6,
        "greedy_match": 384, "greedy_total": 384, "fallback_nodes": 0,
    }  # fmt: skip
    if verb == "bench":
        bench.print_table(
            {
                "model": "model", "settings": {"prompt": 128, "tokens": 64}, "rows": [figures], "failed": [],
                "limits": {"read_bandwidth_gb_s": 20.0, "fp32_gflop_s": 200.0},
            }
        )  # fmt: skip
        cells = ("ort:vulkan", "portable", "123,456", "12,345", "81%", "12%", "99%", "12.34", "12345")
    elif verb == "demo":
        train = {
            "parameters": 1,
            "tokens": 1,
            "seconds": 1,
            "val_bits_per_byte_start": 8,
            "val_bits_per_byte_end": 2,
            "reference_bits_per_byte": 2,
        }
        from pathlib import Path

        demo._print({"train": train, "engines": [figures], "missing": [], "sample": ""}, Path("demo"))
        cells = ("ort:vulkan", "portable", "1.2e-06", "384/384", "123,456", "12,345", "12.34")
    else:
        row = ParityRow(
            "ort",
            "vulkan",
            "portable",
            "fp32",
            1.2e-6,
            1e-14,
            1.0,
            384,
            384,
            {},
            (),
            {},
            "2026-01-01",
            logit_scale=123.456,
        )
        verify.print_table("model", [Result(Target("ort", "vulkan", "portable"), row, row)])
        cells = ("ort:vulkan", "portable", "1.2e-06", "7.4e-03", "123", "1.0e-14", "100.0%", "384/384")
    lines = capsys.readouterr().out.splitlines()
    line = next(line for line in lines if line.startswith("ort:vulkan"))
    assert len(line) <= 80
    assert all(cell in line for cell in cells), line
