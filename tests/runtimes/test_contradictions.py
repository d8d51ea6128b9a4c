"""A manifest that says something else than its graphs: a clear error, or the right answer all the same."""

import copy
import hashlib
import json
import shutil

import pytest

pytest.importorskip("onnx", reason="onnx is missing: pip install portlm[onnx]")

from portlm.artifact import read_manifest, refresh_files, write_manifest
from portlm.compile.build import build
from portlm.errors import EngineUnavailableError, FormatError, PortlmError
from portlm.flows.load import load

PROMPT = [[5, 17, 20, 3], [7]]
TARGETS = [
    ("torch", "native"), ("torch", "portable"), ("torch", "fused"), ("ort", "portable"), ("ort", "fused"),
    ("tvm", "portable"), ("tvm", "fused"), ("null", "auto"),
]  # fmt: skip


def sign(data):
    """The digest that the changed manifest must have: whoever changes one can compute it."""
    body = {key: value for key, value in data.items() if key != "sha256"}
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return {**body, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def write(folder, data):
    (folder / "manifest.json").write_text(json.dumps(sign(data)))


def dimensions(dim):
    """What else a dimension could be said to be."""
    if isinstance(dim, int):
        return [dim + 1, 1, 2**31, "sequence", "heads"]
    return [
        other for other in (3, "batch", "sequence", "past", "kept", "past + sequence", "x") if other != dim
    ]


def changes_of_tensor(kind, i):
    """(name, change of the role) for one input, output or state."""

    def at(field, value):
        return f"{kind}[{i}].{field} = {value}", lambda role: role[kind][i].__setitem__(field, value)

    for dtype in ("float32", "float16", "bfloat16", "int64", "int32", "int8", "uint8"):
        yield at("dtype", dtype)
    for name in ("x", "input_ids", "position_ids", "logits", "present.0.key", "past_key_values.1.value"):
        yield at("name", name)
    if kind == "state":
        for output in ("", "x", "logits", "present.0.value"):
            yield at("output", output)
        for initial in ("empty", "zeros", "given"):
            yield at("initial", initial)
        for update in ("append", "replace", "constant"):
            yield at("update", update)
    yield f"{kind}[{i}] is gone", lambda role: role[kind].pop(i)
    yield f"{kind}[{i}] is there twice", lambda role: role[kind].append(copy.deepcopy(role[kind][i]))
    yield f"{kind}[{i}] comes last", lambda role: role[kind].append(role[kind].pop(i))


def changes_of_shape(kind, i, shape):
    """(name, change of the role) for the shape of one input, output or state."""

    def becomes(value):
        return f"{kind}[{i}].shape = {value}", lambda role: role[kind][i].update(shape=value)

    for axis, dim in enumerate(shape):
        for other in dimensions(dim):
            yield becomes([*shape[:axis], other, *shape[axis + 1 :]])
    for other in (shape[:-1], [*shape, 1], shape[::-1], [], ["batch"]):
        yield becomes(list(other))


def swap_outputs(role):
    """Each key becomes the value of its layer."""
    for key, value in zip(role["state"][::2], role["state"][1::2], strict=True):
        key["output"], value["output"] = value["output"], key["output"]


def rename(old, new):
    """The change that says a symbol otherwise wherever it stands."""

    def change(role):
        for tensor in (*role["inputs"], *role["outputs"], *role["state"]):
            tensor["shape"] = [
                " + ".join(new if part == old else part for part in dim.split(" + ")) if isinstance(dim, str) else dim
                for dim in tensor["shape"]
            ]  # fmt: skip

    return change


def changes(data):
    """(name, change of the manifest) for every field that an engine goes by."""
    for field, values in {
        "vocab_size": (1, 128, 256, 258, 2**20),
        "context_length": (1, 5, 47, 49, 2**31),
        "family": ("llama", "module", "none"),
        "parameters": (1,),
    }.items():
        for value in values:
            yield f"{field} = {value}", lambda d, f=field, v=value: d["model"].__setitem__(f, v)

    def widen(d, width):
        d["model"]["vocab_size"] = d["roles"]["decoder"]["outputs"][0]["shape"][-1] = width

    for width in (256, 258):
        yield f"{width} ids in the model and in the role", lambda d, width=width: widen(d, width)
    yield "the role is called otherwise", lambda d: d["roles"].update(other=d["roles"].pop("decoder"))
    yield "a second role", lambda d: d["roles"].update(other=d["roles"]["decoder"])
    yield "no role", lambda d: d["roles"].clear()

    role = data["roles"]["decoder"]
    of_role = []
    for kind, places in (("inputs", range(4)), ("outputs", (0,)), ("state", (0, 3))):
        for i in places:
            of_role += changes_of_tensor(kind, i)
            of_role += changes_of_shape(kind, i, role[kind][i]["shape"])
    for old in ("batch", "sequence", "past", "kept"):
        of_role += [
            (f"{old} is called {new}", rename(old, new)) for new in ("x", "batch", "sequence", "past")
        ]
    of_role.append(("keys and values are exchanged", swap_outputs))
    for name in ("model.safetensors", "config.json", "onnx/decoder.portable.onnx"):
        of_role.append((f"weights = {name}", lambda r, name=name: r.update(weights=name)))
    exchanged = {"portable": role["profiles"]["fused"], "fused": role["profiles"]["portable"]}
    of_role.append(("profiles are exchanged", lambda r: r.update(profiles=exchanged)))
    for name, change in of_role:
        yield name, lambda d, change=change: change(d["roles"]["decoder"])


@pytest.fixture(scope="module")
def original(compiled, tmp_path_factory):
    """An artifact that this module may change, compiled for every engine, and what its manifest says."""
    folder = shutil.copytree(compiled["gpt2"], tmp_path_factory.mktemp("contradictions") / "model")
    return folder, json.loads((folder / "manifest.json").read_text())


@pytest.fixture(scope="module")
def accepted(original):
    """Those changes that leave a manifest which can be read: all others are the same error on every engine."""
    folder, data = original
    found, refused = [], 0
    for name, change in changes(data):
        changed = copy.deepcopy(data)
        change(changed)
        if sign(changed)["sha256"] == data["sha256"]:
            continue
        write(folder, changed)
        try:
            read_manifest(folder)
        except FormatError:
            refused += 1
        else:
            found.append((name, changed))
    assert refused > 100
    assert len(found) > 40
    return found


@pytest.fixture(params=TARGETS, ids=":".join)
def target(request):
    return request.param


def answers(folder, engine, profile):
    with load(folder, engine, "cpu", profile) as session:
        return [found.token_ids for found in session.generate(PROMPT, max_new_tokens=5)]


def test_a_changed_manifest_is_an_error_of_ours_or_the_right_answer(original, accepted, target, monkeypatch):
    folder, data = original
    write(folder, data)
    try:
        expected = answers(folder, *target)
    except EngineUnavailableError as error:
        pytest.skip(str(error))
    # A change that makes an engine look for something else to compile is the next test's.
    monkeypatch.setattr("portlm.flows.compile_cache.needed", lambda *arguments: None)
    wrong = []
    right = 0
    for name, changed in accepted:
        write(folder, changed)
        try:
            found = answers(folder, *target)
        except PortlmError as error:
            if "\n" in str(error):
                wrong.append(f"{name}: {error}")
        except Exception as error:
            wrong.append(f"{name}: {error!r}")
        else:
            right += found == expected
            if found != expected:
                wrong.append(f"{name}: answers {found} instead of {expected}")
    assert not wrong, "\n".join(wrong)
    assert right < len(accepted) / 2 or target[1] in ("native", "auto")  # which do not go by the roles


@pytest.mark.parametrize(
    "key", [("torch", "cpu", "portable"), ("ort", "cpu", "fused"), ("tvm", "cpu", "fused")]
)
def test_nothing_is_compiled_from_a_graph_that_the_manifest_contradicts(original, accepted, key, tmp_path):
    folder, data = shutil.copytree(original[0], tmp_path / "model"), original[1]
    write(folder, data)
    try:
        build(folder, [key])
    except EngineUnavailableError as error:
        pytest.skip(str(error))
    wrong = []
    for name, changed in accepted:
        same = changed["roles"].get("decoder") in (None, data["roles"]["decoder"])
        if same or "initial" in name or "update" in name:
            continue  # of these a graph says nothing
        write(folder, changed)
        try:
            build(folder, [key])
        except PortlmError as error:
            if "\n" in str(error):
                wrong.append(f"{name}: {error}")
        else:
            wrong.append(f"{name}: is compiled")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("engine", [("ort", "portable"), ("tvm", "fused"), ("torch", "fused")], ids=":".join)
@pytest.mark.parametrize(
    ("kind", "place", "field", "value", "words"),
    [
        ("inputs", 2, "dtype", "int32", "position_ids int32 (batch, sequence)"),
        ("outputs", 0, "shape", ["batch", "sequence", 257], "logits float32 (batch, sequence, 257)"),
        ("state", 0, "shape", ["batch", 5, "past", 8], "past_key_values.0.key float32 (batch, 5, past, 8)"),
        ("state", 1, "output", "x", "x float32 (batch, 4, past + sequence, 8)"),
    ],
)
def test_the_error_says_what_the_manifest_says_and_what_the_graph_says(
    original, engine, kind, place, field, value, words
):
    folder, data = original
    changed = copy.deepcopy(data)
    tensor = changed["roles"]["decoder"][kind][place]
    was = tensor[field]
    tensor[field] = value
    write(folder, changed)
    with pytest.raises(FormatError) as caught:
        load(folder, engine[0], "cpu", engine[1])
    assert f"is {words} in the manifest and " in str(caught.value)
    assert str(was).strip("[]").replace("'", "") in str(caught.value).split("in the manifest")[1]


def test_weights_in_a_file_that_the_manifest_does_not_name_are_refused(original, tmp_path):
    """The graph names another file than its role: one that nobody has compared with anything."""
    import onnx

    folder, data = original
    write(folder, data)
    other = shutil.copytree(folder, tmp_path / "model")
    shutil.copy(other / "onnx/decoder.onnx.data", other / "onnx/other.data")
    for form in ("portable", "ort-cpu-fused", "ort-cpu-fused-even"):
        name = f"onnx/decoder.{form}.onnx"
        model = onnx.load(other / name, load_external_data=False)
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = "other.data"
        (other / name).write_bytes(model.SerializeToString())
    write_manifest(other, refresh_files(other, read_manifest(other), data["files"]))
    for profile in ("portable", "fused"):
        with pytest.raises(FormatError, match=r"weights in 'other\.data', and the manifest says"):
            load(other, "ort", "cpu", profile)
    for key in (("torch", "cpu", "portable"), ("tvm", "cpu", "portable")):
        with pytest.raises((FormatError, EngineUnavailableError), match=r"is in other\.data|tvm:"):
            build(other, [key])
