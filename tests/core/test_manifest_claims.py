"""A manifest that says what cannot be is refused, with the place, what was expected and what is there."""

import copy
import json
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from manifest_cases import DECODER, make_manifest, rewrite, set_at

from portlm.artifact import (
    MAX_FILE_BYTES,
    Provenance,
    StateSpec,
    read_manifest,
    replace,
    write_manifest,
)
from portlm.errors import FormatError

PATHS = [
    "..",
    "../x",
    "a/../../x",
    "a/../x",
    "/etc/passwd",
    "//x",
    "C:\\x",
    "C:/x",
    "\\\\?\\x",
    "a\\b",
    "a\0b",
    "a\nb",
    ".",
    "./x",
    "a//b",
    "a/",
    "",
    "x" * 4096,
    "\ud800",
]


@pytest.mark.parametrize("path", PATHS, ids=ascii)
@pytest.mark.parametrize("field", ["files", "profile", "weights", "compiled"])
def test_no_name_in_the_manifest_leaves_the_folder(folder, path, field):
    """The names would also have to be listed under files, which a hostile manifest does."""

    def change(data):
        data["files"][path] = {"size": 1, "sha256": "0" * 64}
        if field == "profile":
            data["roles"]["decoder"]["profiles"]["portable"] = path
        if field == "weights":
            data["roles"]["decoder"]["weights"] = path
        if field == "compiled":
            data["compiled"][0]["files"] = [path]

    if path == "\ud800":  # half a surrogate pair cannot be hashed as UTF-8: only the raw JSON can carry it
        raw = (folder / "manifest.json").read_text()
        (folder / "manifest.json").write_text(raw.replace('"config.json"', '"\\ud800"'))
    else:
        rewrite(folder, change)
    with pytest.raises(FormatError):
        read_manifest(folder)


BOUNDARIES = [
    -1,
    2**31 - 1,
    2**31 + 1,
    2**32,
    2**62,
    2**63 - 1,
    2**63,
    2**64 - 1,
    10**400,
    1.5,
    True,
    None,
    "1",
    [1],
]


@pytest.mark.parametrize("value", BOUNDARIES, ids=lambda v: f"{v!r:.24}")
def test_impossible_sizes_are_refused(folder, value):
    """Every whole number of the manifest. Those within range must still be read as what they are."""
    places = {
        "size": (("files", "config.json", "size"), MAX_FILE_BYTES),
        "parameters": (("model", "parameters"), 2**40),
        "vocab_size": (("model", "vocab_size"), 2**20),
        "context_length": (("model", "context_length"), 2**31),
        "traced": (("roles", "decoder", "provenance", "traced", "input_ids", 0), 2**31),
        "shape": (("roles", "decoder", "state", 0, "shape", 1), 2**31),
        "placement": (("parity", 0, "placement", "cpu"), 2**31),
    }
    original = json.loads((folder / "manifest.json").read_text())
    for place, limit in places.values():

        def change(data, place=place):
            data.clear()
            data.update(copy.deepcopy(original))
            *path, last = place
            for key in path:
                data = data[key]
            data[last] = value

        rewrite(folder, change)
        if type(value) is int and 0 <= value <= limit:
            read_manifest(folder)
        else:
            with pytest.raises(FormatError):
                read_manifest(folder)


def places_of(value, path=()):
    """The path of every object, list and value below a JSON value."""
    yield path
    if isinstance(value, dict):
        for key, item in value.items():
            yield from places_of(item, (*path, key))
    if isinstance(value, list):
        for i, item in enumerate(value):
            yield from places_of(item, (*path, i))


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)


@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_change_to_the_manifest_raises_anything_but_format_error(folder, data):
    """One value anywhere is replaced, removed or added beside, and the digest recomputed."""
    original = json.loads((folder / "original.json").read_text())
    place = data.draw(st.sampled_from(list(places_of(original))[1:]))
    action = data.draw(st.sampled_from(["replace", "remove", "add"]))

    def change(value):
        value.clear()
        value.update(copy.deepcopy(original))
        *path, last = place
        for key in path:
            value = value[key]
        if action == "replace":
            value[last] = data.draw(JSON)
        elif action == "remove":
            del value[last]
        elif isinstance(value, dict):
            value[data.draw(st.text(max_size=6))] = data.draw(JSON)
        else:
            value.append(data.draw(JSON))

    rewrite(folder, change)
    try:
        manifest = read_manifest(folder)
    except FormatError:
        return
    write_manifest(folder, manifest)  # whatever is accepted can be written back and means the same
    assert read_manifest(folder) == manifest


@pytest.mark.parametrize("key", ["model", "roles", "files"])
def test_a_missing_field_is_named(folder, key):
    rewrite(folder, lambda data: data.pop(key))
    with pytest.raises(FormatError, match=key):
        read_manifest(folder)


def test_a_missing_optional_field_has_its_default(folder):
    def change(data):
        for key in ("compiled", "quantization", "parity"):
            del data[key]
        del data["roles"]["decoder"]["dtypes"], data["roles"]["decoder"]["provenance"]

    rewrite(folder, change)
    manifest = read_manifest(folder)
    assert (manifest.compiled, manifest.quantization, manifest.parity) == ((), None, ())
    assert manifest.roles["decoder"].provenance == Provenance()


def test_a_file_of_another_format_is_refused(folder):
    rewrite(folder, lambda data: data.pop("format"))
    with pytest.raises(FormatError, match="not a portlm-artifact manifest"):
        read_manifest(folder)


def test_an_unknown_field_is_ignored_but_under_the_digest(folder):
    """Whoever adds one must say so in the digest: a later version's field is read over, an intruder's is not."""

    def change(data):
        data["adapters"] = {"tone": [1, None]}
        data["roles"]["decoder"]["state"][0]["layout"] = "paged"

    rewrite(folder, change)
    assert read_manifest(folder) == make_manifest(folder)
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace("paged", "blocks"))
    with pytest.raises(FormatError, match="digest does not match"):
        read_manifest(folder)


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (("model", "parameters"), -1, "model.parameters must be `int` >= 1, got -1"),
        (("model", "family"), None, "model.family must be `str`, got None"),
        (("files", "config.json", "size"), 2.5, "files['config.json'].size must be `int`, got 2.5"),
        (("roles", "../decoder"), {}, "the key roles['../decoder'] must be `str` matching regex"),
        (("roles", "head:a/b"), {}, "the key roles['head:a/b'] must be `str` matching regex"),
        (("files", "x" * 1025), {"size": 1, "sha256": "0" * 64}, "the key files['xxx"),
        (
            ("files", "onnx/decoder.onnx.data", "sha256"), "A" * 64,
            "files['onnx/decoder.onnx.data'].sha256 must be `str` matching regex",
        ),
        ((*DECODER, "state", 0, "initial"), "random", "state[0].initial must be `str` matching regex"),
        ((*DECODER, "state", 0, "shape", 2), "a-b", "roles['decoder'].state[0].shape[2] must be `str` matching"),
        ((*DECODER, "inputs", 0), "input_ids", "roles['decoder'].inputs[0] must be `object`, got 'input_ids'"),
        ((*DECODER, "dtypes", "head"), "float4", "roles['decoder'].dtypes['head'] must be"),
        (("parity", 0, "placement", "cpu"), "all", "parity[0].placement['cpu'] must be `int`, got 'all'"),
        (("parity", 0, "greedy_match"), 385, "parity[0].greedy_match must be at most greedy_total = 384, got 385"),
        (("compiled", 0, "target"), "\x1b[2J", "'\\x1b[2J' must be printable"),
        (("compiled", 0), {}, "compiled[0] lacks the key 'engine'"),
    ],
)  # fmt: skip
def test_an_error_says_where_what_was_expected_and_what_is_there(folder, place, value, words):
    rewrite(folder, lambda data: set_at(data, place, value))
    with pytest.raises(FormatError) as caught:
        read_manifest(folder)
    assert str(caught.value).startswith(f"{folder / 'manifest.json'}: ")
    assert words in str(caught.value)


@pytest.mark.parametrize("culprit", range(5))
def test_the_entry_that_is_wrong_is_named_wherever_it_stands(folder, culprit):
    def change(data):
        roles = {f"head:{i}": copy.deepcopy(data["roles"]["decoder"]) for i in range(5)}
        roles[f"head:{culprit}"]["weights"] = 5
        data["roles"] = roles

    rewrite(folder, change)
    with pytest.raises(FormatError, match=rf"roles\['head:{culprit}'\]\.weights must be `str`, got 5"):
        read_manifest(folder)


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (("inputs",), [], "it takes no input"),
        (("outputs",), [], "it returns no output"),
        (("inputs", 0, "dtype"), "bfloat16", "inputs[0].dtype must be `str` matching"),
        (("inputs", 0, "shape", 1), "past + x", "input 'input_ids' has a dimension 'x' that no input has"),
        (("outputs", 0, "shape"), [], """output 'logits' must have "batch" as its first dimension"""),
        (("outputs", 0, "shape", 2), 258, "output 'logits' has 258 values for a vocabulary of 257"),
        (("outputs", 0, "shape", 2), "batch", "output 'logits' has batch values for a vocabulary of 257"),
        (("state", 0, "shape", 2), "past + sequence", "has the dimension 'past + sequence', a sum"),
        (("state", 0, "shape", 0), 1, 'must have "batch" as its first dimension, and only there'),
        (("state", 0, "shape", 1), "batch", 'must have "batch" as its first dimension, and only there'),
        (("state", 0, "initial"), "given", 'is given, and has the dimension "past"'),
    ],
)  # fmt: skip
def test_a_role_that_would_end_in_a_bare_error_is_refused(folder, place, value, words):
    rewrite(folder, lambda data: set_at(data, (*DECODER, *place), value))
    with pytest.raises(FormatError, match=re.escape(words)):
        read_manifest(folder)


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (("inputs", 0, "name"), "past_key_values.0.key", "'past_key_values.0.key' is taken twice"),
        (("outputs", 0, "name"), "present.0.key", "'present.0.key' is returned twice"),
        (("outputs", 0, "shape", 1), "kept", "output 'logits' has a dimension 'kept' that no input has"),
        (("state", 0, "output"), "", "must have an output, unless it is constant"),
        (("state", 0, "update"), "constant", "must have an output, unless it is constant"),
        (("state", 0, "shape", 1), "heads", "begins empty with a dimension 'heads' that nobody says"),
        (("state", 0, "shape", 2), 4, 'must have one dimension "past" to grow'),
        (("state", 0, "shape", 1), "past", 'must have one dimension "past" to grow'),
    ],
)
def test_a_role_that_no_engine_could_carry_out_is_refused(folder, place, value, words):
    rewrite(folder, lambda data: set_at(data, (*DECODER, *place), value))
    with pytest.raises(FormatError, match=words):
        read_manifest(folder)


def test_states_that_are_given_replaced_or_constant_are_accepted(folder):
    role = make_manifest(folder).roles["decoder"]
    states = (
        StateSpec("encoder_hidden_states", "", "float32", ("batch", "source", 32), "given", "constant"),
        StateSpec("memory", "memory.next", "float32", ("batch", 32), "zeros", "replace"),
    )
    role = replace(role, state=states)
    manifest = replace(make_manifest(folder), roles={"decoder": role})
    write_manifest(folder, manifest)
    assert read_manifest(folder).roles["decoder"] == role


@pytest.mark.parametrize("version", [0, 5, "1", None, True, 10**400])
def test_other_versions_are_refused_with_advice(folder, version):
    rewrite(folder, lambda data: data.update(format_version=version))
    with pytest.raises(FormatError, match="export again, or use the portlm that wrote it"):
        read_manifest(folder)


def test_file_that_a_role_needs_must_be_listed(folder):
    rewrite(folder, lambda data: data["files"].pop("onnx/decoder.onnx.data"))
    with pytest.raises(FormatError, match=r"decoder\.onnx\.data' is used but not listed"):
        read_manifest(folder)


def test_a_state_that_grows_by_what_no_input_has_is_refused(folder):
    def change(data):
        for kind in ("inputs", "outputs"):
            set_at(data, (*DECODER, kind, 0, "shape", 1), "tokens")

    rewrite(folder, change)
    with pytest.raises(FormatError, match='no input has the dimension "sequence", by which a state grows'):
        read_manifest(folder)


def test_contradiction_is_not_written(folder):
    before = (folder / "manifest.json").read_bytes()
    manifest = read_manifest(folder)
    for wrong in (
        replace(manifest, files={}),
        replace(manifest, model=replace(manifest.model, vocab_size=0)),
        replace(manifest, model=replace(manifest.model, vocab_size=object())),
        replace(manifest, parity=(replace(manifest.parity[0], kl=float("inf")),)),
        replace(manifest, parity=(replace(manifest.parity[0], greedy_match=385),)),
    ):
        with pytest.raises(FormatError):
            write_manifest(folder, wrong)
    assert (folder / "manifest.json").read_bytes() == before
