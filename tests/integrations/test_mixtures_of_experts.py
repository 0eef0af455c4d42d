"""Hugging Face's mixtures of experts, untouched: balance and z-loss on their routers, and their own auxiliary loss."""

import numpy as np
import pytest
import torch

import references as ref
import restrain as rs
from restrain.errors import RestrainWarning

transformers = pytest.importorskip("transformers")
SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def mixtral():
    config = transformers.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)
    return transformers.MixtralForCausalLM(config)


def qwen3():
    config = transformers.Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8)
    return transformers.Qwen3MoeForCausalLM(config)


def qwen2():
    sizes = {key: value for key, value in SIZES.items() if key != "head_dim"}
    config = transformers.Qwen2MoeConfig(
        **sizes, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, shared_expert_intermediate_size=8
    )
    return transformers.Qwen2MoeForCausalLM(config)


MODELS = {f.__name__: f for f in (mixtral, qwen3, qwen2)}


def ready(name):
    torch.manual_seed(0)
    return MODELS[name](), torch.randint(50, (3, 7))


def gates(model):
    return [name for name, _ in model.named_modules() if name.endswith(".gate")]


@pytest.mark.parametrize("name", MODELS)
def test_balance_on_routers_is_the_formula_and_trains_them(name):
    model, ids = ready(name)
    model.train()
    assert len(gates(model)) == 2
    plan = [
        0.02 * rs.LoadBalance(2).on(rs.outputs("*.gate"), name="balance"),
        1e-3 * rs.ZLoss().on(rs.outputs("*.gate"), name="z"),
    ]
    reg = rs.attach(model, plan)
    with rs.recording(model, "*.gate") as seen:
        out = model(input_ids=ids, labels=ids)
        logits = [h.detach() for h in seen.values()]
    loss = reg.loss(out.loss)
    (loss - out.loss).backward()
    assert {tuple(z.shape) for z in logits} == {(21, 4)}
    z = [one.double().numpy() for one in logits]
    values = reg.values()
    np.testing.assert_allclose(values["balance"], 0.02 * sum(map(ref.load_balance(2), z)), rtol=1e-5)
    np.testing.assert_allclose(values["z"], 1e-3 * sum(map(ref.z_loss, z)), rtol=1e-5)
    for gate in gates(model):
        assert model.get_submodule(gate).weight.grad.abs().max() > 0


@pytest.mark.parametrize("name", MODELS)
def test_their_own_loss_is_top_k_times_ours_for_a_single_layer(name):
    """Theirs joins the tokens of all layers, so with more layers it is another number (transformers 28255)."""
    model, ids = ready(name)
    model.train()
    reg = rs.attach(model, rs.LoadBalance(2).on(rs.outputs("*.gate"), name="balance"))
    out = model(input_ids=ids, output_router_logits=True)
    of_one = transformers.models.mixtral.modeling_mixtral.load_balancing_loss_func(out.router_logits[:1], 4, 2)
    with rs.attach(model, rs.LoadBalance(2).on(rs.outputs(gates(model)[0]), name="one")) as own:
        loss = own.loss(0 * model(input_ids=ids).logits.sum())
    torch.testing.assert_close(2 * loss, of_one)
    reg.detach()


@pytest.mark.parametrize("name", MODELS)
def test_their_own_loss_beside_ours_is_told(name):
    model, _ = ready(name)
    model.config.output_router_logits = True
    with pytest.warns(RestrainWarning, match=r"output_router_logits=True.*router_aux_loss_coef.*twice"):
        reg = rs.attach(model, rs.LoadBalance(2).on(rs.outputs("*.gate")))
    reg.detach()
    model.config.output_router_logits = False
    rs.attach(model, rs.LoadBalance(2).on(rs.outputs("*.gate"))).detach()
    model.config.output_router_logits, model.config.router_aux_loss_coef = True, 0.0
    rs.attach(model, rs.LoadBalance(2).on(rs.outputs("*.gate"))).detach()


@pytest.mark.parametrize("name", ["mixtral", "qwen3"])
def test_their_gradient_checkpointing_counts_once(name):
    grads = []
    for checkpointing in (False, True):
        model, ids = ready(name)
        model.train()
        if checkpointing:
            # the name since transformers 5; the other one before
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        reg = rs.attach(model, rs.LoadBalance(2).on(rs.outputs("*.gate")))
        reg.loss(0 * model(input_ids=ids, use_cache=False).logits.sum()).backward()
        grads.append([model.get_submodule(gate).weight.grad for gate in gates(model)])
    torch.testing.assert_close(*grads)
