"""Families with experts: their files, the loss that keeps experts busy, and what is refused."""

import dataclasses
import json

import pytest
import torch

from portlm.errors import ConfigError, FormatError
from portlm.hub import export_hf, import_hf
from portlm.models import CONFIG, FAMILIES, WEIGHTS, build, config_from_hf, load_model, save_model
from portlm.models.mixture import load_balancing
from portlm.weights import load_numpy, save_tensors

FAMILY = ("mixtral", "qwen3_moe")
every_family = pytest.mark.parametrize("family", FAMILY)


def tiny(family, **changes):
    torch.manual_seed(0)
    model = build(dataclasses.replace(FAMILIES[family].config_class().tiny(), **changes))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def batch(config):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(config.vocab_size, (2, 3, 11), generator=generator)


# ---- files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "experts", "router"),
    [
        ("mixtral", "block_sparse_moe.experts.3.w2", "block_sparse_moe.gate"),
        ("qwen3_moe", "mlp.experts.3.down_proj", "mlp.gate"),
    ],
)
def test_files_hold_each_expert_by_itself_under_the_published_names(family, experts, router, tmp_path):
    model = tiny(family)
    save_model(tmp_path, model)
    stored = load_numpy(tmp_path / WEIGHTS)
    mine = model.layers[1].mlp.experts.down_proj.weight.detach().numpy()
    assert (stored[f"model.layers.1.{experts}.weight"] == mine[:, 72:96]).all()
    assert stored[f"model.layers.1.{router}.weight"].shape == (4, 32)
    gates = [
        name for name in stored if name.endswith(("w1.weight", "gate_proj.weight")) and ".experts." in name
    ]
    routed = 2 if family == "mixtral" else 1
    assert len(gates) == 4 * routed
    assert stored[gates[0]].shape == (24, 32)


@every_family
def test_transformers_opens_what_is_exported_and_computes_the_same(family, transformers, tmp_path):
    # Two float32 computations of order-one logits.
    model = tiny(family).eval()
    save_model(tmp_path / "ours", model)
    export_hf(tmp_path / "ours", tmp_path / "theirs")
    other, said = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "theirs", output_loading_info=True
    )
    assert not said["missing_keys"]
    assert not said["unexpected_keys"]
    ids = batch(model.config)[0]
    torch.testing.assert_close(other.eval()(ids).logits, model(ids), atol=1e-5, rtol=1e-5)


@every_family
@pytest.mark.parametrize("whole", [False, True], ids=["saved", "as in memory"])
def test_what_transformers_saved_is_imported(family, whole, transformers, tmp_path):
    """It writes an expert's matrices by themselves, and a state_dict holds those of all experts as one."""
    model = tiny(family).eval()
    save_model(tmp_path / "ours", model)
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    other.save_pretrained(tmp_path / "theirs")
    if whole:
        state = {name: tensor.contiguous() for name, tensor in other.state_dict().items()}
        assert any(name.endswith("experts.gate_up_proj") for name in state)
        save_tensors(tmp_path / "theirs" / WEIGHTS, state, metadata={"format": "pt"})
    import_hf(tmp_path / "theirs", tmp_path / "back")
    back = load_model(tmp_path / "back")
    for (name, p), (_, ours) in zip(back.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(p, ours), name


@every_family
def test_a_missing_expert_is_named(family, tmp_path):
    save_model(tmp_path, tiny(family))
    stored = {name: torch.from_numpy(array.copy()) for name, array in load_numpy(tmp_path / WEIGHTS).items()}
    lost = next(name for name in stored if ".experts.2." in name)
    del stored[lost]
    save_tensors(tmp_path / WEIGHTS, stored, metadata={"format": "pt"})
    with pytest.raises(FormatError, match=f"tensor {lost} of shape .* is missing"):
        load_model(tmp_path)


@every_family
def test_experts_of_another_number_are_unexpected(family, tmp_path):
    save_model(tmp_path / "ours", tiny(family))
    data = json.loads((tmp_path / "ours" / CONFIG).read_text())
    key = FAMILIES[family].config_class().EXPERTS[0]
    (tmp_path / "ours" / CONFIG).write_text(json.dumps({**data, key: 3}))
    with pytest.raises(FormatError, match=r"experts\.3\.\w+\.weight|gate\.weight has shape \(4, 32\)"):
        import_hf(tmp_path / "ours", tmp_path / "out")


# ---- training ----------------------------------------------------------------------------------------------------


@every_family
def test_the_balancing_loss_and_its_gradients_are_those_of_transformers(family, transformers):
    # Two float32 computations; gradients of the router are small beside their parts.
    changes = {"output_router_logits": True, "router_aux_loss_coef": 0.5}
    model = tiny(family, **changes).train()
    ids, targets = batch(model.config)
    plain = dataclasses.replace(model.config, output_router_logits=False)
    without = build(plain)
    without.load_state_dict(model.state_dict())
    found = model(ids, targets) - without(ids, targets)
    logits: list[torch.Tensor] = []
    for layer in model.layers:
        if hasattr(layer.mlp, "logits"):
            layer.mlp.register_forward_pre_hook(lambda m, given: logits.append(m.logits(given[0])))
    model(ids, targets)
    module = transformers.models.mixtral.modeling_mixtral
    flat = tuple(layer.flatten(0, 1) for layer in logits)
    expected = module.load_balancing_loss_func(flat, model.config.n_expert, model.config.experts_per_token)
    torch.testing.assert_close(found, 0.5 * expected, atol=1e-6, rtol=1e-5)
    expected.backward(retain_graph=True)
    theirs = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    load_balancing(logits, model.config.experts_per_token).backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(p.grad, theirs[name], atol=1e-6, rtol=1e-5)


@every_family
def test_the_balancing_loss_is_for_training_alone(family):
    model = tiny(family, output_router_logits=True, router_aux_loss_coef=10.0)
    ids, targets = batch(model.config)
    trained = model.train()(ids, targets)
    logits = model(ids)
    judged = model.eval()(ids, targets)
    plain = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(judged, plain, atol=1e-5, rtol=1e-5)
    assert trained > judged + 1


def test_experts_that_are_equally_busy_cost_k_and_one_that_is_always_chosen_costs_more():
    even = torch.eye(4).repeat(3, 1) * 50.0
    assert load_balancing([even], 1).item() == pytest.approx(1.0)
    assert load_balancing([torch.tensor([[50.0, 0.0, 0.0, 0.0]] * 5)], 1).item() == pytest.approx(4.0)
    assert load_balancing([even[:, [0, 1, 2, 3]], even], 1).item() == pytest.approx(1.0)


# ---- configurations ----------------------------------------------------------------------------------------------


@every_family
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_experts_per_tok": 0}, "experts_per_token must be an integer from 1"),
        ({"num_experts_per_tok": 5}, "experts_per_token 5 must be at most n_expert 4"),
        ({"num_experts_per_tok": 2.0}, "num_experts_per_tok must be an integer"),
        ({"router_aux_loss_coef": -1.0}, "router_aux_loss_coef must be a number from 0"),
        ({"output_router_logits": "yes"}, "output_router_logits must be true or false"),
        ({"scoring_func": "sigmoid"}, "'scoring_func' is a key portlm does not know"),
        ({"n_group": 8}, "'n_group' is a key portlm does not know"),
        (
            {"shared_expert_intermediate_size": 64},
            "'shared_expert_intermediate_size' is a key portlm does not know",
        ),
    ],
    ids=str,
)
def test_routers_that_are_not_computed_are_refused_by_name(family, change, message):
    data = FAMILIES[family].config_class().tiny().to_hf()
    with pytest.raises(ConfigError, match=message):
        config_from_hf({**data, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_experts": 0}, "n_expert must be an integer from 1"),
        ({"num_experts": 4, "num_local_experts": 8}, "num_experts is 4 and num_local_experts is 8"),
        ({"decoder_sparse_step": 0}, "sparse_step must be an integer from 1"),
        ({"mlp_only_layers": [2]}, r"mlp_only_layers must be a list of layers from 0 to 1, got \[2\]"),
        ({"mlp_only_layers": 1}, "mlp_only_layers must be a list"),
        ({"moe_intermediate_size": 0}, "expert_hidden must be an integer from 1"),
        ({"norm_topk_prob": 1}, "norm_topk_prob must be true or false"),
        ({"use_sliding_window": True}, "use_sliding_window = True is not supported"),
    ],
    ids=str,
)
def test_what_only_qwen3_says_of_experts_is_checked(change, message):
    data = FAMILIES["qwen3_moe"].config_class().tiny().to_hf()
    with pytest.raises(ConfigError, match=message):
        config_from_hf({**data, **change})


def test_noise_of_the_router_is_noted_as_left_out(tmp_path):
    save_model(tmp_path / "ours", tiny("mixtral"))
    data = json.loads((tmp_path / "ours" / CONFIG).read_text())
    (tmp_path / "ours" / CONFIG).write_text(json.dumps({**data, "router_jitter_noise": 0.1}))
    notes = import_hf(tmp_path / "ours", tmp_path / "out").notes
    assert any("router_jitter_noise = 0.1 was left out" in note for note in notes)


def test_layers_have_experts_where_the_configuration_says_so():
    model = tiny("qwen3_moe", n_layer=6, sparse_step=2, dense_layers=(3,))
    assert [hasattr(layer.mlp, "experts") for layer in model.layers] == [
        False,
        True,
        False,
        False,
        False,
        True,
    ]
