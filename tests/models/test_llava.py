"""LLaVA: transformers' model, in and out of its folders, the same with a cache, and on every engine with a picture."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch

import portlm
from portlm.errors import ConfigError, ContextLengthError, EngineUnavailableError, FormatError, UsageError
from portlm.hub import export_hf, import_hf
from portlm.models import build, config_from_hf, load_model, preset, save_model
from portlm.models.llava import PARAMETERS, PRESETS
from portlm.models.llava_config import LlavaConfig
from portlm.pictures import PREPROCESSOR, PROCESSOR, Preprocessing
from portlm.rows import Rows

CONFIG = LlavaConfig.tiny()
IMAGE, P, SIDE = CONFIG.image_token_id, CONFIG.places, CONFIG.vision.image_size


def random_model(config=CONFIG, seed=0):
    """A model whose every parameter matters to the result."""
    torch.manual_seed(seed)
    model = build(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn_like(p)
            p.copy_(1.5 * p.shape[-1] ** -0.5 * noise if p.dim() > 1 else p + 0.1 * noise)
    return model


@pytest.fixture(scope="module")
def model():
    return random_model()


def pixels(rows=2, seed=1):
    return torch.randn(rows, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def tokens(before=2, behind=5, rows=2, places=P):
    """Rows of tokens with a picture's places in them."""
    ids = torch.arange(rows * (before + behind)).reshape(rows, -1) * 37 % 250
    return torch.cat((ids[:, :before], torch.full((rows, places), IMAGE), ids[:, before:]), dim=1)


# ---- transformers' model -----------------------------------------------------------------------------------------

VARIANTS = (
    {},
    {"vision_feature_select_strategy": "full", "multimodal_projector_bias": False},
    {"vision_feature_layer": 1, "vision_config": {"hidden_act": "gelu"}},
    {"vision_feature_layer": -1, "vision_config": {"hidden_act": "gelu_pytorch_tanh"}},
    {"vision_feature_layer": -3, "text_config": {"num_key_value_heads": 4, "tie_word_embeddings": True}},
)


def theirs_of(transformers, change):
    """A small model of transformers' with random weights."""
    vision = {
        "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 3, "num_attention_heads": 2,
        "image_size": SIDE, "patch_size": 3, **change.get("vision_config", {}),
    }  # fmt: skip
    text = {
        "vocab_size": 260, "hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32,
        **change.get("text_config", {}),
    }  # fmt: skip
    more = {key: value for key, value in change.items() if not key.endswith("_config")}
    places = P + (more.get("vision_feature_select_strategy") == "full")
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**vision), text_config=transformers.LlamaConfig(**text),
        image_token_index=IMAGE, image_seq_length=places, **more,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0.0, 0.3)
    return model, places


@pytest.mark.parametrize("change", VARIANTS, ids=lambda change: "-".join(map(str, change)) or "plain")
def test_a_folder_of_transformers_is_the_same_model_and_goes_back(transformers, tmp_path, change):
    theirs, places = theirs_of(transformers, change)
    theirs.save_pretrained(tmp_path / "theirs")
    import_hf(tmp_path / "theirs", tmp_path / "ours")
    ours, ids, shown = load_model(tmp_path / "ours"), tokens(places=places), pixels()
    expected = theirs(input_ids=ids, pixel_values=shown).logits
    assert (ours(ids, None, shown) - expected).abs().max() <= 1e-5
    assert (ours(ids[:, -5:]) - theirs(input_ids=ids[:, -5:]).logits).abs().max() <= 1e-5
    export_hf(tmp_path / "ours", tmp_path / "back")
    back = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "back").eval()
    again = back(input_ids=ids, pixel_values=shown).logits
    # The same weights, of which a layer that nobody reads is gone; GELU by tanh has two spellings, which round apart.
    assert (again - expected).abs().max() <= 1e-6


@pytest.mark.parametrize("change", VARIANTS, ids=lambda change: "-".join(map(str, change)) or "plain")
def test_what_is_seen_is_transformers_in_float64(transformers, tmp_path, change):
    """The rotary tables of the decoder are float32 in transformers; what comes before it can be compared closer."""
    theirs, _ = theirs_of(transformers, change)
    theirs.save_pretrained(tmp_path / "theirs")
    import_hf(tmp_path / "theirs", tmp_path / "ours")
    ours, shown = load_model(tmp_path / "ours").double(), pixels().double()
    features = theirs.double().model.get_image_features(pixel_values=shown).pooler_output
    assert (ours.see(shown) - torch.stack(tuple(features))).abs().max() <= 1e-9


def test_every_attribute_that_transformers_may_write_is_known(transformers):
    theirs, _ = theirs_of(transformers, {})
    written = {**theirs.config.to_dict(), "image_token_id": IMAGE}
    assert config_from_hf(written).vision.n_layer == 2


def test_names_of_three_versions_of_transformers_are_one(model):
    for spelled in (
        "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight",
        "vision_tower.encoder.layers.0.mlp.fc1.weight",
        "model.vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight",
    ):
        assert model.hf_alias(spelled) == model.hf_name("vision.layers.0.fc1.weight")[0]
    for spelled in ("language_model.model.norm.weight", "model.language_model.norm.weight"):
        assert model.hf_alias(spelled) == model.hf_name("norm.weight")[0]
    for spelled in ("language_model.lm_head.weight", "lm_head.weight"):
        assert model.hf_alias(spelled) == model.hf_name("lm_head.weight")[0]


@pytest.mark.parametrize("name", PRESETS)
def test_published_sizes(name):
    assert build(preset(name), device="meta").num_parameters() == PARAMETERS[name]


def test_the_config_of_the_hub_is_the_preset():
    """llava-hf/llava-1.5-7b-hf's config.json, which leaves most to defaults."""
    data = {
        "architectures": ["LlavaForConditionalGeneration"], "ignore_index": -100, "image_token_index": 32000,
        "model_type": "llava", "pad_token_id": 32001, "projector_hidden_act": "gelu", "tie_word_embeddings": False,
        "text_config": {
            "_name_or_path": "lmsys/vicuna-7b-v1.5", "architectures": ["LlamaForCausalLM"],
            "max_position_embeddings": 4096, "model_type": "llama", "rms_norm_eps": 1e-05, "torch_dtype": "float16",
            "vocab_size": 32064,
        },
        "vision_config": {
            "hidden_size": 1024, "image_size": 336, "intermediate_size": 4096, "model_type": "clip_vision_model",
            "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768,
            "vocab_size": 32000,
        },
        "vision_feature_layer": -2, "vision_feature_select_strategy": "default",
    }  # fmt: skip
    assert config_from_hf(data) == dataclasses.replace(preset("llava-1.5-7b"), pad_token_id=32001)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vision_feature_layer": -5}, "vision_feature_layer -5 does not exist"),
        ({"vision_feature_layer": [1, 2]}, "vision_feature_layer must be an integer"),
        ({"projector_hidden_act": "relu"}, "projector_hidden_act"),
        ({"vision_config": 3}, "vision_config must be an object"),
        ({"text_config": {"model_type": "mistral"}}, "text_config: model_type = 'mistral'"),
        ({"vision_config": {"model_type": "siglip_vision_model"}}, "vision_config: model_type"),
        (
            {"vision_config": {"image_size": 10, "patch_size": 3}},
            "image_size 10 must be a multiple of patch_size 3",
        ),
        ({"vision_config": {"surprise": 1}}, "vision_config: 'surprise' is a key portlm does not know"),
        ({"image_seq_length": 9}, "image_seq_length = 9 is not supported: only 4"),
        ({"image_token_index": 260}, "image_token_id holds 260"),
        ({"surprise": 1}, "surprise"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_config_json_that_asks_for_another_model_is_refused_by_name(change, words):
    with pytest.raises(ConfigError, match=words):
        config_from_hf(CONFIG.to_hf() | change)


def test_a_picture_that_leaves_no_room_for_a_text_is_refused():
    with pytest.raises(ConfigError, match="context_length 4 leaves no room for a text behind the 4 places"):
        dataclasses.replace(CONFIG, context_length=4)


def test_a_file_that_lacks_a_layer_that_is_read_is_refused(model, tmp_path):
    save_model(tmp_path / "model", model)
    path = tmp_path / "model" / "config.json"
    data = json.loads(path.read_text())
    data["vision_config"]["num_hidden_layers"] = 3
    path.write_text(json.dumps(data))
    with pytest.raises(FormatError, match=r"vision_model\.encoder\.layers\.2.* is missing"):
        load_model(tmp_path / "model")


# ---- what a picture does -----------------------------------------------------------------------------------------


def test_only_what_is_behind_a_picture_sees_it(model):
    """By the gradient: exactly 0 before its first place, and not 0 at every place from there on."""
    ids, shown = tokens(rows=1), pixels(1).requires_grad_()
    logits = model(ids, None, shown)
    for place in range(ids.shape[1]):
        (gradient,) = torch.autograd.grad(logits[0, place].square().sum(), shown, retain_graph=True)
        assert (gradient.abs().max() > 0) == (place >= 2)


@pytest.mark.runs_kernel(
    "masked_attention_fwd",
    "layer_norm_fwd",
    "gemm",
    "embedding_fwd",
    "rotary_fwd",
    "cached_attention",
    "swiglu_fwd",
)
def test_a_cache_with_pictures_gives_what_one_pass_does(model):
    """In float32 a difference of rounding alone is below 1e-5 of logits around 5."""
    ids, shown = tokens(), pixels()
    places = torch.zeros_like(ids)
    places[:, 2 : 2 + P] = torch.arange(1, P + 1)
    picture, past, found = model.see(shown), None, []
    for begin, end in ((0, 3), (3, 7), (7, 8), (8, 11)):
        part = slice(begin, end)
        positions = torch.arange(begin, end).expand(2, -1)
        mask = torch.ones(2, end, dtype=torch.int64)
        logits, past = model.step(ids[:, part], positions, mask, past, None, places[:, part], picture)
        found.append(logits)
    with torch.no_grad():
        assert (torch.cat(found, dim=1) - model(ids, None, shown)).abs().max() <= 1e-5


@pytest.mark.runs_kernel(
    "masked_attention_fwd", "masked_attention_bwd", "layer_norm_bwd", "linear_bwd", "embedding_bwd", "attention_bwd",
    "swiglu_bwd", "linear_cross_entropy",
)  # fmt: skip
def test_the_id_under_a_picture_has_no_effect_and_no_gradient():
    model, ids, shown = random_model(), tokens(), pixels()
    other = torch.where(ids == IMAGE, 7, ids)
    places = torch.zeros_like(ids)
    places[:, 2 : 2 + P] = torch.arange(1, P + 1)
    picture = model.see(shown)
    a, b = (model.shown(model.embed(each, None), places, picture) for each in (ids, other))
    assert torch.equal(a, b)
    model(ids, ids.roll(-1, 1), shown).backward()
    assert not model.embed_tokens.weight.grad[IMAGE].any()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.vision.parameters())


def test_pixels_of_another_shape_and_rows_that_are_too_long_are_refused(model):
    with pytest.raises(UsageError, match=r"pixel_values must be \(pictures, 3, 6, 6\), got \(1, 3, 6, 5\)"):
        model(tokens(rows=1), None, torch.zeros(1, 3, 6, 5))
    with pytest.raises(ContextLengthError):
        model(tokens(behind=30), None, pixels())


# ---- engines -----------------------------------------------------------------------------------------------------

PROMPTS = [[5, IMAGE, 17, 3], [IMAGE, 7], [9, 8, 7, 6, 5, 4, IMAGE, 200], [40, 41]]


def pictures():
    rng = np.random.default_rng(0)
    return [*rng.integers(0, 256, (3, 9, 14, 3), dtype=np.uint8), None]


@pytest.fixture(scope="module")
def artifact(once, tmp_path_factory):
    from portlm.flows.export import export_checkpoint

    def make(folder):
        checkpoint = tmp_path_factory.mktemp("llava") / "checkpoint"
        save_model(checkpoint, random_model())
        (checkpoint / PREPROCESSOR).write_text(json.dumps(Preprocessing.of_size(SIDE).to_hf()))
        export_checkpoint(checkpoint, folder)

    return once("llava", make)


@pytest.fixture(scope="module")
def expected(artifact):
    """Tokens of one pass for each, without a cache and without neighbours."""
    model, found = random_model(), []
    with torch.no_grad():
        for prompt, picture in zip(PROMPTS, pictures(), strict=True):
            row = [each for token in prompt for each in ([IMAGE] * P if token == IMAGE else [token])]
            shown = None if picture is None else torch.from_numpy(Preprocessing.of_size(SIDE)(picture))[None]
            for _ in range(8):
                row.append(int(model(torch.tensor([row]), None, shown)[0, -1].argmax()))
            found.append(tuple(row[-8:]))
    return found


@pytest.mark.parametrize("target", ["torch:native", "torch:fused", "ort:portable", "ort:fused", "tvm:fused"])
def test_every_engine_writes_behind_pictures_as_one_pass_does(artifact, expected, target):
    """Prompts of different lengths together, one without a picture; with guesses; and each by itself."""
    engine, profile = target.split(":")
    options = {"max_new_tokens": 8, "ignore_eos": True}
    try:
        opened = portlm.load(artifact, engine, "cpu", profile)
    except EngineUnavailableError as error:
        pytest.skip(str(error))
    with opened as session:
        for more in ({}, {"batch_size": 1}, {"lookup": True}):
            found = session.generate(PROMPTS, image=pictures(), **options, **more)
            assert [each.token_ids for each in found] == expected
        one = session.generate(PROMPTS[0], image=pictures()[0], num_beams=3, **options)
        assert one.prompt_tokens == 3 + P
        streamed = session.stream(PROMPTS[1], image=pictures()[1], **options)
        assert tuple(streamed.ids()) == expected[1]
        session.generate(
            PROMPTS[0], image=pictures()[0], repetition_penalty=1.3, no_repeat_ngram_size=2, **options
        )
        assert not session.placement().fallback


def test_rows_of_a_picture_are_read_as_tokens_are(artifact):
    """The ids behind the model's own are a picture's, in any chunk, and further ones are refused."""
    with portlm.load(artifact, "torch", "cpu", "native") as session:
        engine = session.engine
        given = {"picture": random_model().see(pixels(1)).detach().numpy()}
        ids = np.array([[3, *range(260, 260 + P), 5]])
        at_once = Rows(engine, 1, given=given).read(ids, every=True)
        rows = Rows(engine, 1, given=given)
        singly = [rows.read(ids[:, i : i + 1]) for i in range(ids.shape[1])]
        # Between one pass and several, rounding of logits around 5.
        assert np.abs(np.concatenate(singly, axis=1) - at_once).max() <= 1e-5
        with pytest.raises(UsageError, match="picture_ids must be from 0 to 4"):
            rows.read(np.array([[260 + P]]))


def test_verify_finds_every_engine_in_agreement(artifact, tmp_path):
    from portlm.flows.targets import Target
    from portlm.flows.verify import verify_artifact

    folder = shutil.copytree(artifact, tmp_path / "artifact")
    targets = [Target("ort", "cpu", "portable"), Target("torch", "cpu", "portable")]
    results = verify_artifact(folder, targets, search=False)
    assert [result.problem for result in results] == [None] * 4
    for result in results:
        assert result.row.max_logit_error <= 1e-4
        assert (
            result.row.greedy_match == result.row.greedy_total == (20 if result.row.role == "decoder" else 0)
        )


@pytest.mark.parametrize("name", [PREPROCESSOR, PROCESSOR])
def test_what_is_done_to_pictures_is_what_the_manifest_lists(artifact, tmp_path, name):
    folder = shutil.copytree(artifact, tmp_path / "artifact")
    (folder / name).write_text(json.dumps({"do_normalize": False}))
    problem = "truncated" if name == PREPROCESSOR else "is not in the manifest"
    with pytest.raises(FormatError, match=f"{name}.*{problem}"):
        portlm.load(folder, "torch")


def test_pixels_of_another_size_than_the_models_are_refused(artifact):
    with portlm.load(artifact, "torch", "cpu", "native") as session:
        session.pictures = dataclasses.replace(session.pictures, prepare=Preprocessing.of_size(SIDE + 1))
        with pytest.raises(UsageError, match="makes pictures of 7 x 7 pixels, and the model takes 6 x 6"):
            session.generate(PROMPTS[0], image=pictures()[0])


@pytest.mark.parametrize(
    ("prompts", "image", "words"),
    [
        ([1, 2], 0, "the prompt has no place for its picture: write token 259 once"),
        ([IMAGE, 3, IMAGE], 0, "the prompt has 2 places for pictures, and is shown one"),
        ([[1], [IMAGE]], None, "prompt 1 has a place for a picture, token 259, and none is shown"),
        ([IMAGE], [0], "one prompt is shown one picture, got a list of 1"),
        (
            [[IMAGE], [IMAGE]],
            [0],
            "2 prompts are shown as many pictures, None for none, in a list, got 1 pictures",
        ),
        ([[IMAGE]], 0, "1 prompts are shown as many pictures"),
    ],
)
def test_pictures_and_places_that_do_not_fit_are_an_error_that_says_what_to_write(
    artifact, prompts, image, words
):
    shown = (
        [pictures()[i] for i in image]
        if isinstance(image, list)
        else image
        if image is None
        else pictures()[0]
    )
    with portlm.load(artifact, "torch", "cpu", "native") as session, pytest.raises(UsageError, match=words):
        session.generate(prompts, image=shown)


def test_a_model_that_sees_no_pictures_says_so(tmp_path):
    from portlm.models.llama import LlamaConfig

    save_model(tmp_path / "llama", build(LlamaConfig.tiny()))
    with (
        portlm.load(tmp_path / "llama") as session,
        pytest.raises(UsageError, match="this model sees no pictures"),
    ):
        session.generate([1, 2], image=pictures()[0])


def test_the_packed_engine_refuses_by_name(artifact):
    with pytest.raises(EngineUnavailableError, match="has no form in a packed file"):
        portlm.load(artifact, "packed")
