"""GGUF out and in: the same numbers under llama.cpp's names and in its order of rows, and back to the last bit."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import tokenizer_files
from click.testing import CliRunner

from portlm.cli import cli
from portlm.errors import FormatError, UsageError
from portlm.gguf_architectures import ARCHITECTURES, apart, halves, in_turn, neighbours
from portlm.gguf_file import GgufFile
from portlm.gguf_models import gguf_name, gguf_settings, gguf_tensors, hf_config
from portlm.gguf_writer import write_gguf
from portlm.hub_gguf import export_gguf, import_gguf
from portlm.models import CONFIG, FAMILIES, WEIGHTS, config_from_hf, load_config, load_model, write_config
from portlm.models.rope import Linear, Yarn
from portlm.tokenizer import Tokenizer
from portlm.weights import load_numpy, read_header, save_tensors

RNG = np.random.default_rng(0)


def rotated(x: np.ndarray, angles: np.ndarray, halves: bool) -> np.ndarray:
    """Rotate pairs of x (D,): (i, i + D/2) if halves, else (2i, 2i + 1)."""
    pairs = x.reshape(2, -1) if halves else x.reshape(-1, 2).T
    a, b = (
        pairs[0] * np.cos(angles) - pairs[1] * np.sin(angles),
        pairs[1] * np.cos(angles) + pairs[0] * np.sin(angles),
    )
    return np.concatenate((a, b)) if halves else np.stack((a, b), 1).ravel()


def test_rotating_neighbours_of_the_turned_rows_gives_the_scores_of_rotating_halves():
    """Query and key of two heads at different positions; the product is what attention sees."""
    heads, D, C = 2, 8, 12
    q, k, x = RNG.standard_normal((heads * D, C)), RNG.standard_normal((heads * D, C)), RNG.standard_normal(C)
    for head in range(heads):
        rows = slice(head * D, (head + 1) * D)
        scores = []
        for apart_by_half, a, b in ((True, q, k), (False, neighbours(q, heads), neighbours(k, heads))):
            angles = 10000.0 ** (-2 * np.arange(D // 2) / D)
            scores.append(
                rotated(a[rows] @ x, 5 * angles, apart_by_half)
                @ rotated(b[rows] @ x, 3 * angles, apart_by_half)
            )
        assert scores[0] == pytest.approx(scores[1], rel=1e-12)


def test_joint_rows_come_apart_into_all_queries_all_keys_and_all_values():
    heads, D = 3, 4
    labels = np.array([[kind, head, d] for head in range(heads) for kind in range(3) for d in range(D)])
    assert apart(labels, heads).tolist() == sorted(labels.tolist())


def test_turning_rows_back_gives_the_rows():
    matrix = RNG.standard_normal((24, 5))
    for there, back in ((neighbours, halves), (apart, in_turn)):
        for heads in (1, 2, 4):
            assert np.array_equal(back(there(matrix, heads), heads), matrix)
            if heads > 1 or there is neighbours:
                assert not np.array_equal(there(matrix, heads), matrix)


FAMILY_NAMES = list(ARCHITECTURES)
# What a tiny model must have for llama.cpp to know it: it takes some numbers of a family for given.
KNOWN = {"gemma2": {"query_scalar": 16},
         "gemma3_text": {"query_scalar": 16, "n_layer": 6, "layers": ("sliding_attention",) * 5 + ("full_attention",)},
         "smollm3": {"unplaced_interval": 4, "n_layer": 4}}  # fmt: skip


def test_every_family_that_is_known_here_is_one_of_portlm():
    assert set(FAMILY_NAMES) <= FAMILIES.keys()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Each family, tiny, with random weights: the checkpoint, its GGUF file, and the checkpoint of that."""
    import torch

    from portlm.models import build, save_model

    found = {}
    for i, family in enumerate(FAMILY_NAMES):
        folder = tmp_path_factory.mktemp(family)
        torch.manual_seed(i)
        model = build(replace(FAMILIES[family].config_class().tiny(), **KNOWN.get(family, {})))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0.1, 0.3)
        save_model(folder / "there", model)
        export_gguf(folder / "there", folder / "model.gguf")
        import_gguf(folder / "model.gguf", folder / "back")
        found[family] = folder
    return found


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_every_tensor_of_a_checkpoint_has_one_name_and_lies_out_by_in(family, written):
    config = load_config(written[family] / "there")
    tensors = load_numpy(written[family] / "there" / WEIGHTS)
    found = gguf_tensors(tensors, config)
    assert len(found) == len(tensors)
    assert sum(t.size for t in found.values()) == sum(t.size for t in tensors.values())
    assert found["token_embd.weight"].shape == (config.vocab_size, config.width)
    assert found["blk.1.ffn_down.weight"].shape == (config.width, config.hidden)
    assert all(t.flags.c_contiguous and t.dtype == np.float32 for t in found.values())


def test_a_tensor_without_a_name_is_an_error_and_not_left_out(written):
    with pytest.raises(UsageError, match=r"no name for model\.extra.weight of the family llama"):
        gguf_tensors({"model.extra.weight": np.zeros(2, np.float32)}, load_config(written["llama"] / "there"))


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_there_and_back_is_the_same_checkpoint(family, written):
    there, back = written[family] / "there", written[family] / "back"
    one, other = load_numpy(there / WEIGHTS), load_numpy(back / WEIGHTS)
    assert list(one) == list(other)
    # llama.cpp keeps the gains of Gemma's norms as 1 + weight, which rounds the last bits of a weight.
    for name in one:
        close = 2.0**-24 * (1 + abs(one[name])) if family.startswith("gemma") and one[name].ndim == 1 else 0
        assert np.all(abs(one[name] - other[name]) <= close)
    config = json.loads((back / CONFIG).read_text())
    if family == "mistral":  # is what llama.cpp calls llama
        assert config["model_type"] == "llama"
    else:
        assert config == json.loads((there / CONFIG).read_text())
    file = GgufFile.open(written[family] / "model.gguf")
    wanted = gguf_tensors(load_numpy(there / WEIGHTS), load_config(there))
    assert file.tensors.keys() == wanted.keys()
    assert all(np.array_equal(file.numbers(name), wanted[name]) for name in wanted)
    assert {tensor.kind for tensor in file.tensors.values()} == {"F32"}


SHAPES = {
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "llama3": {"rope_scaling": {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                "original_max_position_embeddings": 8192}, "rope_theta": 500000.0},
    "wide heads and biases": {"head_dim": 12, "attention_bias": True, "mlp_bias": True},
    "untied": {"tie_word_embeddings": False},
}  # fmt: skip


@pytest.mark.parametrize("what", SHAPES)
def test_llamas_of_every_shape_come_through(what, tmp_path):
    from portlm.models import build, save_model
    from portlm.models.llama import LlamaConfig

    data = LlamaConfig.tiny().to_hf()
    data.pop("rope_parameters")
    if "head_dim" not in SHAPES[what]:
        data.pop("head_dim")
    save_model(tmp_path / "there", build(data | SHAPES[what]))
    export_gguf(tmp_path / "there", tmp_path / "model.gguf")
    import_gguf(tmp_path / "model.gguf", tmp_path / "back")
    assert load_config(tmp_path / "back") == load_config(tmp_path / "there")
    assert (tmp_path / "back" / WEIGHTS).read_bytes() == (tmp_path / "there" / WEIGHTS).read_bytes()


YARNS = {
    "as it is": (Yarn(4.0, 8), {"factor": 4.0, "original_context_length": 8}),
    "another size": (Yarn(4.0, 8, attention_factor=1.5), {"attn_factor": 1.5 / (0.1 * np.log(4) + 1)}),
    "two mscales": (Yarn(2.0, 16, mscale=1.0, mscale_all_dim=0.5),
                    {"factor": 2.0, "attn_factor": 1 / (0.05 * np.log(2) + 1)}),
}  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("what", YARNS)
def test_yarn_is_told_and_read_back(what, family, tmp_path):
    """llama.cpp multiplies by 0.1 ln(factor) + 1 and by attn_factor; the entries are those that its package names."""
    gguf = pytest.importorskip("gguf", reason="gguf is missing: pip install portlm[gguf]")
    from portlm.models import build, save_model

    scaling, told = YARNS[what]
    save_model(
        tmp_path / "there", build(replace(FAMILIES[family].config_class().tiny(), rope_scaling=scaling))
    )
    export_gguf(tmp_path / "there", tmp_path / "model.gguf")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    assert (
        reader.fields[gguf.Keys.Rope.SCALING_TYPE.format(arch=family)].contents()
        == gguf.RopeScalingType.YARN.value
    )
    for key, value in told.items():
        name = f"{family}.rope.scaling.{key}"
        assert name in {
            key.format(arch=family) for key in vars(gguf.Keys.Rope).values() if isinstance(key, str)
        }
        assert reader.fields[name].contents() == pytest.approx(value, rel=1e-7)
    if "attn_factor" not in told:
        assert f"{family}.rope.scaling.attn_factor" not in reader.fields
    import_gguf(tmp_path / "model.gguf", tmp_path / "back")
    found = load_config(tmp_path / "back").rope_scaling
    assert found.size == pytest.approx(scaling.size, rel=1e-6)
    plain = {"attention_factor": None, "mscale": None, "mscale_all_dim": None}
    assert replace(found, **plain) == replace(scaling, **plain)


# What llama.cpp does not look at (a file says it, or a model has it): entries of a file, and the error.
UNREAD = {
    "bounds": ({"llama.rope.scaling.yarn_beta_fast": 8.0}, "yarn_beta_fast 8, for which llama.cpp takes 32"),
    "another kind": ({"llama.rope.scaling.type": "longrope"}, "'longrope', and portlm reads linear and yarn"),
    "an unknown entry": (
        {"llama.rope.scaling.yarn_ext_factor": 1.0},
        "yarn_ext_factor = 1.0 is not supported",
    ),
}


@pytest.mark.parametrize("what", UNREAD)
def test_other_forms_of_yarn_are_refused(what, written, tmp_path):
    entries, message = UNREAD[what]
    stretched = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}
    changed(written["llama"] / "model.gguf", tmp_path / "bad.gguf", stretched | entries)
    with pytest.raises(FormatError, match=message):
        import_gguf(tmp_path / "bad.gguf", tmp_path / "out")


# What llama.cpp takes for given, and a model that is otherwise: family, fields, the error.
OTHERWISE = {
    "a window": ("mistral", {"window": 5}, "a sliding window, here of 5 positions"),
    "scores by another number": ("gemma2", {}, "divided by the root of 10: llama.cpp takes that of 16"),
    "no cap": ("gemma2", {"query_scalar": 16, "score_cap": 0.0}, "without a soft cap"),
    "windows everywhere": ("gemma3_text", {"query_scalar": 16, "n_layer": 6}, "all but every 6th"),
    "positions everywhere": ("smollm3", {"unplaced_interval": 0}, "than every fourth"),
    "biases": ("smollm3", {"unplaced_interval": 4, "mlp_bias": True}, "SmolLM3 with biases"),
    "another stretch": ("gpt_neox", {"rope_scaling": Yarn(4.0, 8)}, "stretched by yarn"),
    "other bounds": ("llama", {"rope_scaling": Yarn(4.0, 8, beta_fast=8.0)}, "YaRN with other bounds"),
    "bounds that are not rounded": (
        "qwen2",
        {"rope_scaling": Yarn(4.0, 8, truncate=False)},
        "YaRN with other bounds",
    ),
}


@pytest.mark.parametrize("what", OTHERWISE)
def test_what_llama_cpp_cannot_be_told_is_refused(what):
    family, changes, message = OTHERWISE[what]
    with pytest.raises(UsageError, match=f"no GGUF is written for .*{message}"):
        gguf_settings(replace(FAMILIES[family].config_class().tiny(), **changes))


def test_evenly_stretched_positions_of_gpt_neox_come_through():
    config = replace(FAMILIES["gpt_neox"].config_class().tiny(), rope_scaling=Linear(4.0))
    entries = {f"gptneox.{key}": value for key, value in gguf_settings(config).items()}
    tensors = {"token_embd.weight": np.zeros((config.vocab_size, 1)), "output.weight": np.zeros(1)}
    found = hf_config(entries | {"general.architecture": "gptneox"}, tensors, "model.gguf")
    assert config_from_hf(found).rope_scaling == Linear(4.0)


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
def test_every_gain_of_gemma_is_kept_as_one_more(family, written):
    """llama.cpp multiplies by what the file has; a norm that is left out computes another model."""
    tensors = load_numpy(written[family] / "there" / WEIGHTS)
    found = GgufFile.open(written[family] / "model.gguf")
    gains = [name for name, values in tensors.items() if values.ndim == 1]
    assert all("norm" in name for name in gains)
    for name in gains:
        kept = found.numbers(gguf_name(name, family)[0])
        assert np.array_equal(kept, tensors[name] + np.float32(1)), name


def test_gains_in_16_bits_are_widened_before_one_is_added(written, tmp_path):
    import torch

    there = written["gemma2"] / "there"
    for kind, dtype in (("F16", torch.float16), ("BF16", torch.bfloat16)):
        halved = {
            name: torch.from_numpy(np.array(x)).to(dtype) for name, x in load_numpy(there / WEIGHTS).items()
        }
        folder = tmp_path / kind
        folder.mkdir()
        save_tensors(folder / WEIGHTS, halved, {"format": "pt"})
        write_config(folder, load_config(there))
        export_gguf(folder, tmp_path / f"{kind}.gguf")
        kept = GgufFile.open(tmp_path / f"{kind}.gguf").numbers("output_norm.weight")
        assert np.array_equal(kept, halved["model.norm.weight"].float().numpy() + np.float32(1))


def test_matrices_of_16_bits_stay_so_and_vectors_are_widened(written, tmp_path):
    import torch

    there = written["llama"] / "there"
    for kind, dtype in (("F16", torch.float16), ("BF16", torch.bfloat16)):
        folder = tmp_path / kind
        folder.mkdir()
        halved = {
            name: torch.from_numpy(np.array(x)).to(dtype) for name, x in load_numpy(there / WEIGHTS).items()
        }
        save_tensors(folder / WEIGHTS, halved, {"format": "pt"})
        write_config(folder, load_config(there))
        export_gguf(folder, tmp_path / f"{kind}.gguf")
        file = GgufFile.open(tmp_path / f"{kind}.gguf")
        assert {(len(t.shape), t.kind) for t in file.tensors.values()} == {(1, "F32"), (2, kind)}
        assert file.entries["general.file_type"] == {"F16": 1, "BF16": 32}[kind]
        back = import_gguf(tmp_path / f"{kind}.gguf", tmp_path / f"{kind}-back").folder
        assert {info.dtype for info in read_header(back / WEIGHTS).values()} == {kind, "F32"}
        one, other = load_model(folder).state_dict(), load_model(back).state_dict()
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", ["gpt2", "llama 3", "qwen 2", "gpt-neox"])
def test_a_byte_level_tokenizer_comes_through(kind, written, tmp_path):
    """Ids and text; of what normalizes by NFC only Qwen's is known to llama.cpp."""
    there = with_tokenizer(written["llama"] / "there", tokenizer_files.document(kind), tmp_path)
    done = export_gguf(there, tmp_path / "model.gguf")
    back = import_gguf(tmp_path / "model.gguf", tmp_path / "back")
    if kind == "gpt-neox":
        assert "llama.cpp has no name for the way in which" in done.notes[0]
        assert "tokenizer.ggml.model is 'none'" in back.notes[0]
        assert not (back.folder / "tokenizer.json").exists()
        return
    same_tokenizer(Tokenizer.load(there), Tokenizer.load(back.folder))
    assert not done.notes + back.notes


@pytest.mark.parametrize("kind", ["llama 2", "gemma"])
def test_a_sentence_piece_tokenizer_comes_through(kind, written, tmp_path):
    """If its merges follow from scores, as SentencePiece's do; of others llama.cpp would make other ids."""
    from portlm.gguf_tokenizer import _merges

    document = tokenizer_files.document(kind)
    document["added_tokens"] = [token for token in document["added_tokens"] if token["id"] < 3]
    there = with_tokenizer(written["llama"] / "there", document, tmp_path)
    assert "do not follow from scores" in export_gguf(there, tmp_path / "model.gguf").notes[0]

    vocab = document["model"]["vocab"]
    scores = [-float(index) for index in range(len(vocab))]
    pieces = {name: index for name, index in vocab.items() if index > 258}
    document["model"]["merges"] = _merges(pieces, scores)
    there = with_tokenizer(written["llama"] / "there", document, tmp_path / "again")
    assert not export_gguf(there, tmp_path / "again.gguf").notes
    entries = GgufFile.open(tmp_path / "again.gguf").entries
    assert entries["tokenizer.ggml.model"] == "llama"
    assert entries["tokenizer.ggml.add_space_prefix"] == (kind == "llama 2")
    back = import_gguf(tmp_path / "again.gguf", tmp_path / "back")
    same_tokenizer(Tokenizer.load(there), Tokenizer.load(back.folder))


@pytest.mark.parametrize("kind", ["bert", "t5", "gpt", "roberta"])
def test_a_tokenizer_that_gguf_has_no_form_for_is_left_out_with_a_note(kind, written, tmp_path):
    there = with_tokenizer(written["gpt2"] / "there", tokenizer_files.document(kind), tmp_path)
    done = export_gguf(there, tmp_path / "model.gguf")
    assert "the tokenizer was left out, so the file takes token ids only" in done.notes[0]


def with_tokenizer(checkpoint, document, tmp_path):
    """A checkpoint with that tokenizer, and as many ids and eight more."""
    import torch

    from portlm.models import build, save_model

    folder = tmp_path / "there"
    tmp_path.mkdir(exist_ok=True)
    size = max([*document["model"]["vocab"].values(), *(t["id"] for t in document["added_tokens"])]
               if isinstance(document["model"]["vocab"], dict) else [len(document["model"]["vocab"])])  # fmt: skip
    data = json.loads((checkpoint / CONFIG).read_text()) | {"vocab_size": size + 9}
    torch.manual_seed(0)
    save_model(folder, build(data))
    (folder / "tokenizer.json").write_text(json.dumps(document))
    names = [token["content"] for token in document["added_tokens"] if token["special"]]
    eos = next((name for name in ("<|endoftext|>", "</s>") if name in names), None)
    bos = next((name for name in ("<|begin_of_text|>", "<s>") if name in names), None)
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos, "bos_token": bos}))
    return folder


def same_tokenizer(one, other):
    assert (one.vocab_size, one.special) == (other.vocab_size, other.special)
    assert (one.bos_id, one.eos_id, one.begin_ids, one.end_ids) == (
        other.bos_id, other.eos_id, other.begin_ids, other.end_ids)  # fmt: skip
    for text in tokenizer_files.texts(80, seed=4):
        for special in (False, True):
            ids = one.encode(text, special=special)
            assert other.encode(text, special=special) == ids
            assert one.decode(ids) == other.decode(ids)


def test_a_chat_template_comes_through(written, tmp_path):
    there = with_tokenizer(written["llama"] / "there", tokenizer_files.document("llama 3"), tmp_path)
    (there / "chat_template.jinja").write_text("{{ messages[0].content }}é")
    export_gguf(there, tmp_path / "model.gguf")
    back = import_gguf(tmp_path / "model.gguf", tmp_path / "back").folder
    assert (back / "chat_template.jinja").read_text() == "{{ messages[0].content }}é"
    entries = GgufFile.open(tmp_path / "model.gguf").entries
    changed(tmp_path / "model.gguf", tmp_path / "bad.gguf", {"tokenizer.chat_template": "{% for %}"})
    notes = import_gguf(tmp_path / "bad.gguf", tmp_path / "bad").notes
    assert "the chat template was left out" in notes[0]
    assert entries["tokenizer.ggml.tokens"][-1].startswith("[PAD")


def changed(path, target, entries=None, tensors=None):
    """Write a file again with other entries (... takes one out) and tensors (None takes one out)."""
    file = GgufFile.open(path)
    every = {k: v for k, v in (file.entries | (entries or {})).items() if v is not ...}
    kinds = {name: (t.kind, t.shape) for name, t in file.tensors.items()}
    raws = {name: file.raw(name) for name in kinds}
    for name, values in (tensors or {}).items():
        kinds.pop(name, None)
        if values is not None:
            kinds[name], raws[name] = ("F32", values.shape), values.astype("<f4").tobytes()
    write_gguf(target, every, kinds, raws.__getitem__)


REFUSED = {
    "another architecture": ({"general.architecture": "mamba"}, {}, "is 'mamba', and portlm reads"),
    "no architecture": ({"general.architecture": ...}, {}, "general.architecture is None"),
    "a part": ({"split.count": 3}, {}, "join the parts first"),
    "an unknown entry": ({"llama.frobnicate": 2}, {}, r"llama\.frobnicate = 2 is not supported"),
    "experts": ({"llama.expert_count": 8}, {}, r"llama\.expert_count = 8 is not supported"),
    "a missing entry": ({"llama.block_count": ...}, {}, r"lacks the entry llama\.block_count"),
    "layers that differ": ({"llama.attention.head_count": [4, 2]}, {}, "differs between layers"),
    "text for a number": ({"llama.block_count": "two"}, {}, "not a number"),
    "heads of two widths": ({"llama.attention.key_length": 16}, {}, "heads of different widths"),
    "heads that do not divide": ({"llama.attention.head_count": 5}, {}, "multiple of n_head 5"),
    "a negative size": ({"llama.embedding_length": 0}, {}, "width must be"),
    "more layers than there are": ({"llama.block_count": 3}, {}, r"model\.layers\.2\."),
    "fewer layers than there are": ({"llama.block_count": 1}, {}, r"model\.layers\.1\."),
    "a tensor too few": ({}, {"blk.0.attn_q.weight": None}, r"self_attn\.q_proj"),
    "a tensor too many": ({}, {"blk.0.attn_sinks.weight": np.zeros(4)}, r"'blk\.0\.attn_sinks\.weight' is none of"),
    "rotary factors": ({}, {"rope_freqs.weight": np.ones(4)}, "not as Llama 3.1 or 3.2 do"),
    "no embedding": ({}, {"token_embd.weight": None}, "no tensor token_embd.weight"),
    "another shape": ({}, {"blk.0.attn_q.weight": np.zeros((30, 32))}, "shape|q_proj"),
}  # fmt: skip


OTHER_FAMILIES = {
    "stretched phi": (
        "phi3", {"phi3.rope.scaling.type": "linear", "phi3.rope.scaling.factor": 2.0}, "rope_scaling|rope_type",
    ),
    "other turns": ("gemma3_text", {"gemma3.attention.sliding_window_pattern": 3}, "a window in 3, not 6"),
    "no window": ("gemma3_text", {"gemma3.attention.sliding_window": ...}, r"lacks the entry gemma3\.attention\.sl"),
    "wide heads": ("stablelm", {"stablelm.attention.key_length": 16, "stablelm.attention.value_length": 16},
                   "width 16, which do not divide"),
    "an unsaid rotation": ("stablelm", {"stablelm.rope.dimension_count": ...}, r"lacks the entry stablelm\.rope"),
}  # fmt: skip


def test_a_window_of_phi_is_read_though_llama_cpp_does_not_compute_it(written, tmp_path):
    changed(written["phi3"] / "model.gguf", tmp_path / "model.gguf", {"phi3.attention.sliding_window": 5})
    import_gguf(tmp_path / "model.gguf", tmp_path / "back")
    assert load_config(tmp_path / "back").window == 5


def test_one_set_of_long_factors_is_refused(written, tmp_path):
    factors = {"rope_factors_long.weight": np.ones(3)}
    changed(written["phi3"] / "model.gguf", tmp_path / "bad.gguf", None, factors)
    with pytest.raises(
        FormatError, match=r"rope_factors_long\.weight stretch positions, and not as Phi-3 does"
    ):
        import_gguf(tmp_path / "bad.gguf", tmp_path / "out")


@pytest.mark.parametrize("what", OTHER_FAMILIES)
def test_so_is_one_of_another_family(what, written, tmp_path):
    family, entries, message = OTHER_FAMILIES[what]
    changed(written[family] / "model.gguf", tmp_path / "bad.gguf", entries)
    with pytest.raises(FormatError, match=message):
        import_gguf(tmp_path / "bad.gguf", tmp_path / "out")


@pytest.mark.parametrize("what", REFUSED)
def test_a_model_that_portlm_does_not_compute_is_refused_by_name(what, written, tmp_path):
    entries, tensors, message = REFUSED[what]
    changed(written["llama"] / "model.gguf", tmp_path / "bad.gguf", entries, tensors)
    with pytest.raises(FormatError, match=message) as caught:
        import_gguf(tmp_path / "bad.gguf", tmp_path / "out")
    assert str(caught.value).isprintable()
    assert not (tmp_path / "out").exists()


TOKENIZERS_REFUSED = {
    "another kind": ({"tokenizer.ggml.model": "bert"}, "tokenizer.ggml.model is 'bert'"),
    "another pattern": ({"tokenizer.ggml.pre": "mine"}, "tokenizer.ggml.pre is 'mine'"),
    "no pattern": ({"tokenizer.ggml.pre": ...}, "tokenizer.ggml.pre is None"),
    "no tokens": ({"tokenizer.ggml.tokens": []}, "no list of texts"),
    "types of others": ({"tokenizer.ggml.token_type": [1, 2]}, "as many numbers"),
    "a token twice": (
        {"tokenizer.ggml.tokens": ["a"] * 602, "tokenizer.ggml.token_type": [1] * 602},
        "a token twice",
    ),
    "an end that is none": ({"tokenizer.ggml.eos_token_id": 10**6}, "eos_token_id is 1000000"),
    "a flag that is none": ({"tokenizer.ggml.add_bos_token": 1}, "not true or false"),
    "merges of nothing": ({"tokenizer.ggml.merges": ["q x"]}, "needs a token that is not in vocab"),
}


@pytest.mark.parametrize("what", TOKENIZERS_REFUSED)
def test_a_tokenizer_that_cannot_be_used_is_left_out_and_the_model_stays(what, written, tmp_path):
    entries, message = TOKENIZERS_REFUSED[what]
    there = with_tokenizer(written["llama"] / "there", tokenizer_files.document("llama 3"), tmp_path)
    export_gguf(there, tmp_path / "model.gguf")
    changed(tmp_path / "model.gguf", tmp_path / "bad.gguf", entries)
    done = import_gguf(tmp_path / "bad.gguf", tmp_path / "out")
    assert any("the tokenizer was left out" in note and message in note for note in done.notes), done.notes
    assert load_model(done.folder).num_parameters() == done.parameters
    assert not (done.folder / "tokenizer.json").exists()


def test_quantized_numbers_are_widened(written, tmp_path):
    gguf = pytest.importorskip("gguf", reason="gguf is missing: pip install portlm[gguf]")
    file = GgufFile.open(written["llama"] / "model.gguf")
    kinds, raws, wanted = {}, {}, {}
    for name, tensor in file.tensors.items():
        values = file.numbers(name)
        kinds[name], raws[name], wanted[name] = (tensor.kind, tensor.shape), file.raw(name), values
        if values.ndim == 2 and values.shape[1] % 32 == 0:
            blocks = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
            kinds[name], raws[name] = ("Q8_0", tensor.shape), blocks.tobytes()
            wanted[name] = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q8_0)
    write_gguf(tmp_path / "q.gguf", file.entries, kinds, raws.__getitem__)
    done = import_gguf(tmp_path / "q.gguf", tmp_path / "out")
    assert "weights in Q8_0 were widened to float32" in done.notes
    found = gguf_tensors(load_numpy(done.folder / WEIGHTS), load_config(done.folder))
    assert all(np.array_equal(found[name], wanted[name]) for name in wanted)


def test_the_command_line_goes_both_ways(written, tmp_path):
    there, file, back = written["gpt2"] / "there", tmp_path / "model.gguf", tmp_path / "back"
    run = CliRunner().invoke(cli, ["export", "--to", "gguf", str(there), str(file)])
    assert (run.exit_code, run.stdout.strip()) == (0, str(file))
    run = CliRunner().invoke(cli, ["import", str(file), str(back)])
    assert (run.exit_code, run.stdout.strip()) == (0, str(back))
    assert (back / WEIGHTS).read_bytes() == (there / WEIGHTS).read_bytes()
    for arguments in (["export", "--to", "gguf", "--quantize", "int8", str(there), str(tmp_path / "x.gguf")],
                      ["export", "--to", "gguf", str(there), str(file)], ["import", str(file), str(back)]):  # fmt: skip
        assert CliRunner().invoke(cli, arguments).exit_code != 0


def test_reading_and_writing_plain_numbers_need_no_package(written, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    export_gguf(written["gpt2"] / "there", tmp_path / "model.gguf")
    import_gguf(tmp_path / "model.gguf", tmp_path / "back")
    assert gguf_settings(load_config(tmp_path / "back"))["block_count"] == 2
