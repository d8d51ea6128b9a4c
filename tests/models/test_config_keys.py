"""Every key of config.json: what is accepted is transformers' model, what is refused is named, and the page is true."""

import contextlib
import copy
import io
import runpy
from pathlib import Path

import pytest
import torch
from mixture_tensors import as_in_memory

from portlm.errors import ConfigError
from portlm.models import FAMILIES, build, config_from_hf
from portlm.models.config_json import HARMLESS, REFUSED, Reader
from portlm.models.mixture import Mixture

ROOT = Path(__file__).resolve().parents[2]


def after_llama(family, **more):
    """Return a small config.json of a family that has LLaMA's keys, with all ids that transformers has defaults for."""
    return {
        "model_type": family, "vocab_size": 99, "max_position_embeddings": 32, "hidden_size": 32,
        "intermediate_size": 44, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, **more,
    }  # fmt: skip


# As transformers would have them without any key that is missing; half of each head of GPT-NeoX is rotated.
BASE = {
    "gpt2": {
        "model_type": "gpt2", "vocab_size": 99, "n_positions": 32, "n_embd": 24, "n_layer": 2, "n_head": 4,
        "bos_token_id": 1, "eos_token_id": 2,
    },
    "llama": {
        "model_type": "llama", "vocab_size": 99, "max_position_embeddings": 32, "hidden_size": 32,
        "intermediate_size": 44, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    },
    "gpt_neox": {
        "model_type": "gpt_neox", "vocab_size": 99, "max_position_embeddings": 32, "hidden_size": 32,
        "intermediate_size": 44, "num_hidden_layers": 2, "num_attention_heads": 4, "rotary_pct": 0.5,
    },
    "opt": {
        "model_type": "opt", "vocab_size": 99, "max_position_embeddings": 32, "hidden_size": 24, "ffn_dim": 44,
        "num_hidden_layers": 2, "num_attention_heads": 4, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    },
    **{family: after_llama(family, **more) for family, more in {
        "qwen2": {}, "qwen3": {"head_dim": 12}, "mistral": {}, "phi3": {"partial_rotary_factor": 0.8},
        "stablelm": {"partial_rotary_factor": 0.5}, "smollm3": {"no_rope_layer_interval": 2}, "olmo2": {},
        "mixtral": {"num_local_experts": 4, "head_dim": 8},  # without it, transformers cannot scale positions
        "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "mlp_only_layers": [0]},
        "gemma2": {"head_dim": 12, "query_pre_attn_scalar": 10, "sliding_window": 5},
        "gemma3_text": {"head_dim": 12, "query_pre_attn_scalar": 10, "sliding_window": 5},
    }.items()},
    "gpt_neo": {
        "model_type": "gpt_neo", "vocab_size": 99, "max_position_embeddings": 32, "hidden_size": 24, "num_layers": 2,
        "num_heads": 4, "window_size": 5, "attention_types": [[["global", "local"], 1]], "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "openai-gpt": {
        "model_type": "openai-gpt", "vocab_size": 99, "n_positions": 32, "n_embd": 24, "n_layer": 2, "n_head": 4,
    },
}  # fmt: skip
ROTARY = ("llama", "gpt_neox")
SCALABLE = ("qwen2", "qwen3", "qwen3_moe", "mistral", "mixtral", "stablelm", "smollm3", "olmo2")
UNKNOWN = ("gpt3",)  # to transformers
WINDOWED = ("mistral", "mixtral", "phi3")  # they compute a window
GEMMA = ("gemma2", "gemma3_text")  # as do these, in some layers
SWITCHED = (
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "smollm3",
)  # they read sliding_window only if use_sliding_window is true
UNSWITCHED = tuple(family for family in BASE if family not in (*SWITCHED, *WINDOWED, *GEMMA))
ALIKE = tuple(family for family in BASE if family not in GEMMA)  # their layers, in the words of layer_types
# Every way in which transformers and portlm scale rotary positions, in both spellings of its name.
SCALED = (
    {"rope_type": "linear", "factor": 4.0},
    {"type": "linear", "factor": 2.5},
    {"rope_type": "dynamic", "factor": 4.0},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 16},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8},
    {"type": "yarn", "factor": 4.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "beta_fast": 4, "beta_slow": 0.5,
     "truncate": False, "attention_factor": 1.5},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "mscale": 0.7, "mscale_all_dim": 1.2},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "mscale": 0.7},
)  # fmt: skip
# Encoders, whose classes tests/models/test_encoders.py compares.
READERS = {
    name: {
        "model_type": name, "vocab_size": 99, "max_position_embeddings": 34, "hidden_size": 24,
        "num_hidden_layers": 2, "num_attention_heads": 4,
    }
    for name in ("bert", "roberta", "distilbert")
}  # fmt: skip


def cases(table):
    """Return (family, change, ...) for rows of (families, change, ...) as parameters with names."""
    return [
        pytest.param(family, change, *rest, id=f"{family}-{change}")
        for families, change, *rest in table
        for family in families
    ]


def read(family):
    """Return what a family's reader asked for."""
    reader = Reader(FAMILIES[family].config_class().tiny().to_hf())
    config_from_hf(reader)
    return reader.uses


def logits(transformers, data):
    """Return our logits and transformers' for one config.json and the same weights, float64."""
    torch.manual_seed(0)
    model = build(config_from_hf(data)).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    # null counts as missing, and transformers writes into what it is given
    given = {key: copy.deepcopy(value) for key, value in data.items() if value is not None}
    other = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**given)).double()
    state = {}
    if isinstance(model, Mixture):
        other.set_experts_implementation("eager")  # the default has no float64
        state = as_in_memory(model, {name: p.detach().clone() for name, p in model.named_parameters()})
    else:
        for name, p in model.named_parameters():
            hf_name, transposed = model.hf_name(name)
            state[hf_name.replace("embed_out.", "lm_head.")] = (p.t() if transposed else p).detach().clone()
    missing, unexpected = other.load_state_dict(state, strict=False)
    assert set(missing) <= {"lm_head.weight"}
    assert not unexpected
    other.tie_weights()
    ids = torch.arange(60).reshape(2, 30)
    return model(ids), other.eval()(ids).logits


# ---- accepted ----------------------------------------------------------------------------------------------------

ACCEPTED = [
    (BASE, {}),
    *(
        (BASE, change)
        for change in (
            {"n_special": 0, "predict_special_tokens": True},
            {"unk_token_id": 0, "cls_token_id": 3, "mask_token_id": 4, "sep_token_id": 5},
            {"_model_name_or_path": "a/b", "name_or_path": "a/b", "_commit_hash": "0" * 40},
            {"tie_encoder_decoder": False, "cross_attention_hidden_size": None, "add_cross_attention": False},
            {"tie_encoder_decoder": True, "cross_attention_hidden_size": 8},
            {"attn_implementation": "eager"},
            {"use_sliding_window": False, "sliding_window": None, "max_window_layers": 1},
            {"sliding_window": 32, "layer_types": ["full_attention"] * 2},
            {"quantization_config": None, "auto_map": None},
            {"pad_token_id": 7},
            {"pad_token_id": -1},
        )
    ),
    *(
        (("gpt2",), change)
        for change in (
            {"hidden_size": 24},
            {"max_position_embeddings": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "n_ctx": 32},
            {"n_embd": None, "hidden_size": 24},
            {"n_positions": None, "max_position_embeddings": 40},
            {"n_layer": None, "num_hidden_layers": 1, "n_head": None, "num_attention_heads": 3},
            {"resid_pdrop": 0.1, "embd_pdrop": 0.2, "attn_pdrop": 0.3},
            {"n_inner": None, "reorder_and_upcast_attn": True},
            *({"activation_function": name} for name in ("gelu_python", "gelu_fast", "gelu_accurate")),
            *({"activation_function": name} for name in ("gelu_pytorch_tanh", "gelu_python_tanh")),
        )
    ),
    *(
        (ROTARY, change)
        for change in (
            {"rope_scaling": {}},
            {"rope_parameters": {}},
            {"rope_scaling": None, "rope_parameters": None},
            {"rope_parameters": {"rope_theta": 500.0}},
            {"rope_scaling": {"factor": 1.0}},
            {"rope_scaling": {"type": "linear", "factor": 1.0}},
            {"rope_scaling": {"rope_type": "linear", "type": "linear", "factor": 1}},
            {"rope_parameters": {"rope_type": "linear", "factor": 1.0, "rope_theta": 500.0}},
            {"rope_scaling": {"type": "linear", "factor": 1.0}, "rope_parameters": {"rope_type": "default"}},
            {"rope_scaling": {}, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
            {"rope_scaling": {"rope_type": "default", "rope_theta": 500.0}},
            {"attention_dropout": 0.2},
            *({key: scaled} for scaled in SCALED for key in ("rope_scaling", "rope_parameters")),
            {"rope_scaling": SCALED[0], "rope_parameters": {**SCALED[0], "rope_theta": 10000.0}},
            {"rope_scaling": SCALED[2], "rope_parameters": {"rope_theta": 10000.0}},
        )
    ),
    *(
        (SCALABLE, change)
        for change in (
            {"rope_theta": 500.0},
            {"rope_scaling": SCALED[4]},
            {"rope_parameters": {**SCALED[3], "rope_theta": 500.0}},
            {"tie_word_embeddings": True},
        )
    ),
    *(
        (("opt",), change)
        for change in (
            {"word_embed_proj_dim": 24, "enable_bias": True, "_remove_final_layer_norm": False},
            {"word_embed_proj_dim": 20, "do_layer_norm_before": False},
            {"dropout": 0.2, "attention_dropout": 0.1, "layerdrop": 0.1, "init_std": 0.1},
        )
    ),
    (
        ("gpt2", "llama", "gpt_neox", "mistral", "gemma3_text"),
        {"_attn_implementation": "sdpa"},
    ),  # not all can
    (WINDOWED, {"sliding_window": 8}),
    (GEMMA, {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 3}),
    (GEMMA, {"use_bidirectional_attention": False, "attention_bias": False}),
    (("gemma2",), {"attn_logit_softcapping": 1.0, "final_logit_softcapping": 5.0}),
    (("gemma3_text",), {"attn_logit_softcapping": None, "final_logit_softcapping": 3.0}),
    (("gemma3_text",), {"rope_theta": 500.0, "rope_local_base_freq": 100.0}),
    (("gpt_neo",), {"attention_types": [[["local"], 2]], "attention_layers": ["local", "local"]}),
    (("mistral", "mixtral"), {"max_position_embeddings": 4097}),  # 4096 where it is missing
    (SWITCHED, {"sliding_window": 8, "use_sliding_window": False, "max_window_layers": 1}),
    (("qwen3", "qwen3_moe", "smollm3", "olmo2"), {"attention_bias": True}),
    (("qwen2", "qwen3_moe", "mistral", "mixtral", "smollm3", "olmo2"), {"head_dim": 12}),
    (("mixtral",), {"num_experts_per_tok": 3, "router_aux_loss_coef": 0.5, "output_router_logits": True}),
    (("mixtral",), {"num_local_experts": None, "num_experts": 4, "router_jitter_noise": 0.1}),
    (("qwen3_moe",), {"norm_topk_prob": True, "mlp_only_layers": None, "decoder_sparse_step": 2}),
    (("qwen3_moe",), {"moe_intermediate_size": 20, "num_experts_per_tok": 4, "router_aux_loss_coef": 0.5}),
    (("phi3",), {"head_dim": 10}),
    (("phi3",), {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "original_max_position_embeddings": 8}),
    (("phi3",), {"partial_rotary_factor": None}),
    (("stablelm",), {"use_qkv_bias": True, "use_parallel_residual": True, "hidden_dropout": 0.1}),
    (("stablelm",), {"partial_rotary_factor": None}),
    (("smollm3",), {"no_rope_layer_interval": None, "no_rope_layers": [0, 0], "mlp_bias": True}),
    (("smollm3",), {"no_rope_layers": [1, 1], "no_rope_layer_interval": 1}),
    *(
        (("llama",), change)
        for change in (
            {"rope_theta": 500.0},
            {"rope_theta": 500.0, "rope_parameters": {"rope_type": "default"}},
            {"rope_theta": 500, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
            {"partial_rotary_factor": 1.0, "head_dim": 8, "mlp_bias": False, "pretraining_tp": 2},
            {"head_dim": 12, "attention_bias": True, "mlp_bias": True},
            {"num_key_value_heads": None, "hidden_act": "swish"},
            {"tie_word_embeddings": True},
        )
    ),
    *(
        (("gpt_neox",), change)
        for change in (
            {"rotary_emb_base": 500},
            {"rotary_emb_base": 500, "rope_theta": 500.0, "partial_rotary_factor": 0.5},
            {"rotary_pct": None},
            {"tie_word_embeddings": True},
            {"rotary_pct": None, "rope_parameters": {"partial_rotary_factor": 1.0, "rope_theta": 500.0}},
            {"hidden_dropout": 0.1, "attention_probs_dropout_prob": 0, "hidden_dropout_prob": 0},
            *({"hidden_act": name} for name in ("gelu_fast", "gelu_accurate", "gelu_python")),
        )
    ),
]


@pytest.mark.parametrize(("family", "change"), cases(ACCEPTED))
def test_what_is_accepted_is_the_model_that_transformers_computes(transformers, family, change):
    # In float64, save where transformers always computes in float32: each of its norms then errs by 6e-8.
    ours, theirs = logits(transformers, {**BASE[family], **change})
    assert (ours - theirs).abs().max() <= 1e-6 * theirs.abs().max()


@pytest.mark.parametrize("family", [family for family in (*BASE, *READERS) if family not in UNKNOWN])
def test_every_attribute_that_transformers_may_write_is_known(transformers, family):
    base = (BASE | READERS)[family]
    config = transformers.AutoConfig.for_model(**base)
    written = {**config.to_dict(), **{key: getattr(config, key) for key in config.attribute_map}}
    ids = {"bos_token_id": 1, "eos_token_id": 2}  # where none are given, transformers has some of its own
    if family in ("bert", "distilbert"):
        ids["pad_token_id"] = 0
    assert config_from_hf({**written, **ids}) == config_from_hf({**base, **ids})
    # What transformers 4 wrote with use_diff=False, or as generation settings of the model.
    of_version_4 = {
        "return_dict": True, "output_hidden_states": False, "output_attentions": False, "torchscript": False,
        "torch_dtype": None, "use_bfloat16": False, "tf_legacy_loss": False, "pruned_heads": {},
        "chunk_size_feed_forward": 0, "is_encoder_decoder": False, "is_decoder": False,
        "cross_attention_hidden_size": None, "add_cross_attention": False, "tie_encoder_decoder": False,
        "max_length": 20, "min_length": 0, "do_sample": False, "early_stopping": False, "num_beams": 1,
        "num_beam_groups": 1, "diversity_penalty": 0.0, "temperature": 1.0, "top_k": 50, "top_p": 1.0,
        "typical_p": 1.0, "repetition_penalty": 1.0, "length_penalty": 1.0, "no_repeat_ngram_size": 0,
        "encoder_no_repeat_ngram_size": 0, "bad_words_ids": None, "num_return_sequences": 1, "output_scores": False,
        "return_dict_in_generate": False, "forced_bos_token_id": None, "forced_eos_token_id": None,
        "remove_invalid_values": False, "exponential_decay_length_penalty": None, "suppress_tokens": None,
        "begin_suppress_tokens": None, "finetuning_task": None, "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0}, "tokenizer_class": None, "prefix": None, "pad_token_id": None,
        "sep_token_id": None, "decoder_start_token_id": None, "task_specific_params": None, "problem_type": None,
        "_name_or_path": "", "_attn_implementation_autoset": False, "gradient_checkpointing": False, "xla_device": None,
    }  # fmt: skip
    ids = {"pad_token_id": base.get("pad_token_id")}
    assert config_from_hf({**base, **of_version_4, **ids}) == config_from_hf(base)


def test_token_ids_and_dropout_that_are_kept_come_back():
    data = {**BASE["gpt2"], "pad_token_id": 7, "resid_pdrop": 0.2, "embd_pdrop": 0.3}
    written = config_from_hf(data).to_hf()
    assert (written["pad_token_id"], written["resid_pdrop"], written["embd_pdrop"]) == (7, 0.2, 0.2)


@pytest.mark.parametrize(
    ("family", "change", "note"),
    [
        ("gpt2", {"embd_pdrop": 0.2}, "embd_pdrop = 0.2 was left out, portlm drops at one rate, that of resid_pdrop"),
        ("gpt2", {"attn_pdrop": 0.1}, "attn_pdrop = 0.1 was left out, only training reads it"),
        ("llama", {"attention_dropout": 0.1}, "attention_dropout = 0.1 was left out, only training reads it"),
        ("gpt_neox", {"hidden_dropout": 0.1}, "hidden_dropout = 0.1 was left out, only training reads it"),
        ("llama", {"pad_token_id": -1}, "pad_token_id = -1 was left out, the model's ids run from 0 to 98"),
        ("gpt2", {"eos_token_id": 50256}, "eos_token_id = 50256 was left out, the model's ids run from 0 to 98"),
        ("gpt2", {"embd_pdrop": 0.1, "attn_pdrop": 0.0, "pad_token_id": 7}, None),
        ("llama", {"attention_dropout": 0.0, "pad_token_id": 7}, None),
    ],
)  # fmt: skip
def test_what_is_not_kept_of_a_config_json_is_noted(family, change, note):
    reader = Reader({**BASE[family], **change})
    config_from_hf(reader)
    assert len(reader.notes) == (note is not None)
    assert note is None or note in reader.notes[0]


# ---- refused -----------------------------------------------------------------------------------------------------

BOTH = {"rope_type": "default"}
CONTRADICTIONS = [
    (("gpt2",), {"hidden_size": 32}, "n_embd is 24 and hidden_size is 32, but they are two names"),
    (("gpt2",), {"max_position_embeddings": 64}, "n_positions is 32 and max_position_embeddings is 64"),
    (("gpt2",), {"num_hidden_layers": 3}, "n_layer is 2 and num_hidden_layers is 3"),
    (("gpt2",), {"num_attention_heads": 2}, "n_head is 4 and num_attention_heads is 2"),
    (("gpt2",), {"n_ctx": 16}, "n_ctx = 16 is not supported: only 32"),
    (("gpt2",), {"n_inner": 100}, "n_inner = 100 is not supported: only 96"),
    (("llama",), {"num_key_value_heads": 3}, "n_head 4 must be a multiple of n_kv_head 3"),
    (("llama",), {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 is not supported"),
    (("llama",), {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5 is not supported"),
    (
        ("llama",),
        {"rope_theta": 500.0, "rope_parameters": {**BOTH, "rope_theta": 300.0}},
        "rope_theta is 500, but rope_parameters.rope_theta is 300",
    ),
    (
        ("llama",),
        {"rope_scaling": BOTH, "rope_parameters": {**BOTH, "rope_theta": 500.0}},
        "rope_parameters.rope_theta is 500, but rope_theta is missing, which stands for 10000",
    ),
    (
        ROTARY,
        {"rope_scaling": {**BOTH, "rope_theta": 500.0}, "rope_parameters": {**BOTH, "rope_theta": 300.0}},
        "rope_parameters.rope_theta is 300, but rope_scaling.rope_theta is 500",
    ),
    (ROTARY, {"rope_scaling": {**BOTH, "type": "linear", "factor": 1.0}}, "rope_scaling = "),
    (ROTARY, {"rope_scaling": {**BOTH, "factor": 8.0}}, "rope_scaling = "),
    (ROTARY, {"rope_scaling": {"factor": 2.0}}, "rope_scaling = "),
    (ROTARY, {"rope_scaling": {"type": "linear"}}, "rope_scaling = "),
    (ROTARY, {"rope_scaling": {"type": "linear", "factor": True}}, "rope_scaling = "),
    (ROTARY, {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": BOTH}, "rope_scaling = "),
    (ROTARY, {"rope_scaling": BOTH, "rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "rope_parameters = "),
    (ROTARY, {"rope_scaling": {"rope_type": ["default"]}}, "rope_scaling = "),
    (ROTARY, {"rope_scaling": {"rope_type": "longrope", "factor": 4.0}}, "rope_scaling = "),
    (ROTARY, {"rope_scaling": {"type": "linear", "factor": 0.5}}, "linear: factor must be from 1 to 1e+06, got 0.5"),
    (ROTARY, {"rope_scaling": {"type": "linear", "factor": 2.0, "beta_fast": 3}}, "rope_scaling = "),
    (ROTARY, {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "llama3 needs low_freq_factor, high_freq"),
    (ROTARY, {"rope_parameters": {**SCALED[3], "high_freq_factor": 1.0}}, "low_freq_factor 1 must be less than"),
    (ROTARY, {"rope_parameters": {**SCALED[4], "truncate": 1}}, "yarn: truncate must be true or false"),
    (ROTARY, {"rope_parameters": {**SCALED[4], "mscale": 0}}, "yarn: mscale must be from"),
    (ROTARY, {"rope_scaling": SCALED[0], "rope_parameters": SCALED[2]}, "scale positions differently"),
    (ROTARY, {"rope_scaling": []}, "rope_scaling = "),
    # transformers reads rotary_emb_base and rotary_pct alone, whatever stands under the usual names.
    (("gpt_neox",), {"rope_theta": 500.0}, "rope_theta is 500, but rotary_emb_base is missing, which stands for 10000"),
    (("gpt_neox",), {"partial_rotary_factor": 1.0}, "partial_rotary_factor is 1, but rotary_pct is 0.5"),
    (("gpt_neox",), {"rotary_emb_base": 500, "rope_theta": 10000.0}, "rope_theta is 10000, but rotary_emb_base is 500"),
    (("opt",), {"activation_function": "gelu"}, "activation_function = 'gelu' is not supported"),
    (("opt",), {"enable_bias": False}, "enable_bias = False is not supported"),
    (("opt",), {"word_embed_proj_dim": 20}, "norm_first True and token_width 20 of width 24 do not go together"),
    (("opt",), {"do_layer_norm_before": False}, "norm_first False and token_width 24 of width 24 do not go together"),
    (GEMMA, {"layer_types": ["full_attention"]}, "layer_types must be sliding_attention or full_attention for 2"),
    (("gemma3_text",), {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0 is not supported"),
    (GEMMA, {"layer_types": ["chunked_attention"] * 2}, "layer_types must be"),
    (GEMMA, {"use_bidirectional_attention": True}, "use_bidirectional_attention = True is not supported"),
    (GEMMA, {"attention_bias": True}, "attention_bias = True is not supported"),
    (("gemma2",), {"attn_logit_softcapping": -1.0}, "attn_logit_softcapping must be a positive number"),
    (GEMMA, {"hidden_activation": "relu"}, "hidden_activation = 'relu' is not supported"),
    (("gemma3_text",), {"rope_parameters": {"full_attention": {}, "other": {}}}, "rope_parameters = "),
    (("gemma3_text",), {"sliding_window_pattern": 2}, "sliding_window_pattern = 2 is not supported"),
    (("gpt_neo",), {"attention_types": [[["global"], 1]]}, "attention_types must be 2 layers"),
    (("gpt_neo",), {"attention_types": [[["dense"], 2]]}, "attention_types must be 2 layers"),
    (("gpt_neo",), {"attention_types": 3}, "attention_types must be pairs"),
    (("gpt_neo",), {"attention_layers": ["local", "local"]}, "attention_layers = "),
    (WINDOWED, {"sliding_window": 0}, "sliding_window must be a positive integer or null, got 0"),
    (WINDOWED, {"sliding_window": "all"}, "sliding_window must be a positive integer or null, got 'all'"),
    (("phi3",), {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}},
     "longrope: short_factor must have a number for each of 3 pairs, got 1"),
    (("phi3",), {"rope_scaling": {"type": "su"}}, "rope_scaling = "),
    (("phi3",), {"attention_bias": True}, "attention_bias = True is not supported"),
    (("stablelm",), {"qk_layernorm": True}, "qk_layernorm = True is not supported"),
    (("stablelm",), {"head_dim": 12}, "'head_dim' is a key portlm does not know"),
    (("smollm3",), {"num_hidden_layers": 4, "no_rope_layers": [1, 0, 1, 1]}, "no_rope_layers = [1, 0, 1, 1] is not"),
    (("smollm3",), {"no_rope_layers": [1, 0, 1]}, "no_rope_layers = [1, 0, 1] is not supported: only 2 ones"),
    (("smollm3",), {"num_hidden_layers": 10**12, "no_rope_layers": [1, 0]}, "no_rope_layers = [1, 0] is not supported"),
    (("smollm3",), {"no_rope_layer_interval": 0}, "no_rope_layer_interval must be at least 1"),
    ((*SWITCHED, "mistral", "mixtral", "stablelm"), {"num_key_value_heads": None}, "num_key_value_heads is missing"),
    (BASE, {"use_sliding_window": True}, "use_sliding_window = True is not supported"),
    (UNSWITCHED, {"sliding_window": 31}, "sliding_window = 31 is not supported: portlm computes attention over all 32"),
    (UNSWITCHED, {"sliding_window": "all"}, "sliding_window = 'all' is not supported"),
    (ALIKE, {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types is not supported"),
    (BASE, {"add_cross_attention": True}, "add_cross_attention = True is not supported"),
    (BASE, {"is_encoder_decoder": True}, "is_encoder_decoder = True is not supported"),
    (BASE, {"_attn_implementation": "someone/kernels"}, "_attn_implementation = 'someone/kernels' is not supported"),
    (BASE, {"attn_implementation": "someone/kernels"}, "attn_implementation = 'someone/kernels' is not supported"),
    (BASE, {"quantization_config": {"quant_method": "gptq"}}, "quantization_config is not supported: its weights are"),
    (BASE, {"compression_config": {"format": "x"}}, "compression_config is not supported: its weights are quantized"),
    (BASE, {"auto_map": {"AutoModel": "modeling_x.X"}}, "auto_map is not supported: it asks for code"),
    (BASE, {"custom_pipelines": {"x": {"impl": "x.X"}}}, "custom_pipelines is not supported: it asks for code"),
    (BASE, {"per_layer_config": {"0": {}}}, "per_layer_config is not supported"),
    (BASE, {"shiny_new_norm": None}, "'shiny_new_norm' is a key portlm does not know"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "change", "message"), cases(CONTRADICTIONS))
def test_what_contradicts_itself_or_asks_for_another_model_is_refused_by_name(family, change, message):
    with pytest.raises(ConfigError) as error:
        config_from_hf({**BASE[family], **change})
    assert message in str(error.value)


def test_quantized_weights_cannot_be_had_by_removing_the_key():
    with pytest.raises(ConfigError) as error:
        config_from_hf({**BASE["llama"], "quantization_config": {"quant_method": "awq"}})
    assert "remove" not in str(error.value)


# ---- the page ----------------------------------------------------------------------------------------------------


def test_the_page_of_keys_is_what_the_readers_ask_for():
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        runpy.run_path(str(ROOT / "scripts" / "config_table.py"), run_name="__main__")
    page = (ROOT / "docs" / "config-keys.md").read_text()
    assert printed.getvalue() == page, "docs/config-keys.md is out of date: make docs"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_key_of_the_page_does_as_it_says(family):
    data = FAMILIES[family].config_class().tiny().to_hf()
    expected, uses = config_from_hf(data), read(family)
    for key in (
        *(key for keys in HARMLESS.values() for key in keys if key not in uses),
        *(k for k, u in uses.items() if u.how == "harmless"),
    ):
        if key in uses and uses[key].how != "harmless":  # another family reads it
            continue
        for value in (None, True, "x", 3.5, {"a": []}):
            assert config_from_hf({**data, key: value}) == expected, key
    for key, use in uses.items():
        if use.how == "checked":
            with pytest.raises(ConfigError, match=key):
                config_from_hf({**data, key: "something else"})
        if use.how == "training":
            assert config_from_hf({**data, key: 0.25}) == expected, key
            with pytest.raises(ConfigError, match=key):
                config_from_hf({**data, key: "x"})
        if (
            key == "architectures" and FAMILIES[family].kind == "decoder"
        ):  # a class without a head is as any other
            assert config_from_hf({**data, key: ["x"]}) == expected
        elif use.how == "read":
            with pytest.raises(ConfigError, match=key):
                config_from_hf({**data, key: ["x"]})
    for key in REFUSED:
        with pytest.raises(ConfigError, match=key):
            config_from_hf({**data, key: {"x": 1}})
