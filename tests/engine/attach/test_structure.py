"""The model changes after attach: rules follow to other layers and tensors, or an error tells the way out."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrize

import restrain as rs
from restrain.engine.attach.structure import Structure
from restrain.errors import DetachedError


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 2)
        self.blocks = nn.ModuleList([nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.Tanh())])

    def forward(self, x):
        x = torch.tanh(self.first(x))
        for block in self.blocks:
            x = block(x)
        return self.last(x)


def sgd(model, lr=0.1):
    return torch.optim.SGD(model.parameters(), lr=lr)


def trained(model, plan, optimizer=None):
    """Attach a plan and take a step."""
    optimizer = optimizer or sgd(model)
    reg = rs.attach(model, plan, optimizer)
    reg.loss(model(torch.randn(3, 4)).square().mean()).backward()
    optimizer.step()
    optimizer.zero_grad()
    return reg


def array(tensor):
    return tensor.detach().double().numpy()


def affine(layer, x):
    return x @ array(layer.weight).T + array(layer.bias)


def by_item(model):
    model.blocks[1][0] = nn.Linear(8, 8)


def by_attribute(model):
    setattr(model.blocks[1], "0", nn.Linear(8, 8))


def by_block(model):
    model.blocks[1] = nn.Sequential(nn.Linear(8, 8), nn.Tanh())


def by_list(model):
    model.blocks = nn.ModuleList([model.blocks[0], nn.Sequential(nn.Linear(8, 8), nn.Tanh())])


def past_hooks(model):
    model.blocks[1]._modules["0"] = nn.Linear(8, 8)


def by_copy(model):
    model.blocks[1] = copy.deepcopy(model.blocks[1])


CHANGES = [by_item, by_attribute, by_block, by_list, past_hooks, by_copy]


@pytest.mark.parametrize("change", CHANGES)
def test_a_penalty_on_outputs_follows_to_another_layer(change):
    model, x = Net(), torch.randn(5, 4)
    reg = trained(model, [rs.L2().on(rs.outputs("blocks.1.0"), name="h"), rs.L1().on(rs.inputs("last"), name="z")])
    change(model)
    loss = model(x).square().mean()
    h = affine(model.blocks[1][0], affine(model.blocks[0], np.tanh(affine(model.first, array(x)))))
    right = np.square(h).sum() / 5 + np.abs(np.tanh(h)).sum() / 5
    assert (reg.loss(loss) - loss).item() == pytest.approx(right, rel=1e-5)
    assert sum(reg.values().values()) == pytest.approx(right, rel=1e-5)


@pytest.mark.parametrize("change", CHANGES)
def test_noise_follows_to_another_layer(change):
    model = Net()
    trained(model, [rs.Dropout(0.5).on(rs.outputs("blocks.1.0"))])
    change(model)
    seen = []
    model.blocks[1][1].register_forward_hook(lambda module, args, output: seen.append(output))
    model(torch.randn(500, 4))
    assert (seen[0] == 0).float().mean().item() == pytest.approx(0.5, abs=0.05)  # 4,000 draws: 0.008


@pytest.mark.parametrize("change", CHANGES)
def test_noise_on_weights_follows_to_another_layer(change):
    model = Net()
    trained(model, [rs.DropConnect(0.5).on("blocks.1.0.weight")])
    before = model.blocks[1][0]
    change(model)
    stored = model.blocks[1][0].weight
    seen = []
    model.blocks[1][0].register_forward_pre_hook(lambda module, args: seen.append(module.weight))
    model(torch.randn(3, 4))
    assert (seen[0] == 0).float().mean().item() == pytest.approx(0.5, abs=0.3)  # 64 draws
    assert model.blocks[1][0].weight is stored
    assert before is model.blocks[1][0] or not before._forward_pre_hooks


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("how", ["loss", "gradient", "decoupled", "proximal"])
def test_a_penalty_on_weights_follows_to_another_layer(change, how):
    model = Net()
    optimizer = sgd(model)
    trained(model, [0.25 * rs.L1().on("blocks.1.0.weight", how=how), rs.L2().on(rs.outputs("last"))], optimizer)
    change(model)
    optimizer.param_groups[0]["params"] = list(model.parameters())
    w = array(model.blocks[1][0].weight)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    if how == "loss":
        reg = rs.attach(model, 0.25 * rs.L1().on("blocks.1.0.weight"))
        reg.penalty().backward()
    optimizer.step()
    right = w - 0.1 * 0.25 * np.sign(w) * (np.abs(w) > 0.025) - w * (np.abs(w) <= 0.025)
    right = w - 0.025 * np.sign(w) if how in ("loss", "gradient") else right
    np.testing.assert_allclose(array(model.blocks[1][0].weight), right, atol=1e-6)


def test_no_hook_stays_at_a_layer_that_was_replaced():
    model = Net()
    before = model.last
    reg = trained(model, [rs.L2().on(rs.outputs("last")), rs.Dropout(0.1).on(rs.inputs("last"))])
    model.last = nn.Linear(8, 2)
    model(torch.randn(3, 4))
    assert not before._forward_hooks
    assert not before._forward_pre_hooks
    assert len(model.last._forward_hooks) == len(model.last._forward_pre_hooks) == 1
    reg.detach()
    assert not model.last._forward_hooks
    assert not model._forward_pre_hooks


def test_a_layer_that_is_wrapped_keeps_its_rules():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model, x = Net(), torch.randn(5, 4)
    reg = trained(model, [rs.L2().on(rs.outputs("blocks.0")), 0.5 * rs.L1().on("blocks.0.weight", how="gradient")])
    model.blocks[0] = checkpoint_wrapper(model.blocks[0])
    layer = model.blocks[0]._checkpoint_wrapped_module
    loss = model(x).square().mean()
    right = np.square(affine(layer, np.tanh(affine(model.first, array(x))))).sum() / 5
    assert (reg.loss(loss) - loss).item() == pytest.approx(right, rel=1e-5)
    assert reg.rules[1].names == ("blocks.0.weight",)


# Parameters


def test_a_parameter_of_another_shape_is_penalised_as_it_is():
    model = Net()
    reg = trained(model, [rs.L2().on("last.weight"), rs.GroupLasso("in").on("last.weight", name="columns")])
    model.last.weight = nn.Parameter(torch.randn(3, 8))
    w = array(model.last.weight)
    right = np.square(w).sum() + 3**0.5 * np.sqrt(np.square(w).sum(0)).sum()
    assert reg.penalty().item() == pytest.approx(right, rel=1e-5)


def test_what_is_kept_of_a_parameter_stays_with_its_name():
    model = Net()
    reg = rs.attach(model, rs.Distance().on("last.weight"), sgd(model))
    start = array(model.last.weight)
    model.last = nn.Linear(8, 2)
    assert reg.penalty().item() == pytest.approx(np.square(array(model.last.weight) - start).sum(), rel=1e-5)


def replaced(model, optimizer, scale=1.0):
    """Another layer in the place of `first`, its parameters in the optimizer."""
    old, model.first = model.first, nn.Linear(4, 8)
    with torch.no_grad():
        model.first.weight.mul_(scale)
    optimizer.param_groups[0]["params"] = list(model.parameters())
    for was, now in zip(old.parameters(), model.first.parameters(), strict=True):
        if was in optimizer.state:
            optimizer.state[now] = optimizer.state.pop(was)
    return old


def step(model, reg, optimizer):
    optimizer.zero_grad()
    reg.loss(model(torch.randn(3, 4)).square().mean()).backward()
    optimizer.step()


def test_entries_that_are_fixed_keep_their_values_in_another_layer():
    model = Net()
    mask, values = torch.zeros(8, 4, dtype=torch.bool), model.first.weight.detach().clone()
    mask[2] = True
    optimizer = sgd(model)
    reg = trained(model, rs.Fixed(mask).on("first.weight"), optimizer)
    replaced(model, optimizer)
    step(model, reg, optimizer)
    assert model.first.weight[2].equal(values[2])
    assert not model.first.weight[3].equal(values[3])


def test_a_norm_that_is_held_is_held_in_another_layer():
    model = Net()
    norm = model.first.weight.detach().norm().item()
    optimizer = sgd(model)
    reg = trained(model, rs.Hyperball().on("first.weight"), optimizer)
    replaced(model, optimizer, scale=3.0)
    step(model, reg, optimizer)
    assert model.first.weight.norm().item() == pytest.approx(norm, rel=1e-6)


def test_forwards_of_another_layer_are_at_the_offset_of_the_momentum():
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    reg = trained(model, rs.MomentumSharpness(0.5).on("first.weight"), optimizer)
    for _ in range(2):  # another layer each time
        replaced(model, optimizer)
        v = optimizer.state[model.first.weight]["momentum_buffer"]
        seen, x = [], torch.randn(3, 4)
        handle = model.first.register_forward_hook(lambda module, given, out, seen=seen: seen.append(out.detach()))
        reg.loss(model(x).square().mean()).backward()
        handle.remove()
        expected = x @ (model.first.weight - 0.5 * v / v.norm()).T + model.first.bias
        torch.testing.assert_close(seen[0], expected.detach())
        optimizer.step()
        optimizer.zero_grad()


def test_what_is_kept_of_a_parameter_is_refused_for_another_shape():
    model = Net()
    reg = rs.attach(model, rs.Distance().on("last.weight", name="stay"), sgd(model))
    model.last = nn.Linear(8, 3)
    with pytest.raises(DetachedError, match=r"'stay' can't follow.*'last\.weight'.*another shape.*reg\.detach\(\)"):
        reg.penalty()


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)

    def forward(self, x):
        return self.head(self.embedding(x))


@pytest.mark.parametrize("how", ["gradient", "decoupled", "proximal"])
def test_weights_tied_after_attach_change_once_at_a_step_without_a_loss(how):
    model = Tied()
    optimizer = sgd(model)
    rs.attach(model, 0.5 * rs.L1().on("*.weight", how=how), optimizer)
    model.head.weight = model.embedding.weight
    with torch.no_grad():
        model.embedding.weight.fill_(2.0)
    model.embedding.weight.grad = torch.zeros(7, 4)
    optimizer.step()
    np.testing.assert_allclose(array(model.head.weight), 1.95, rtol=1e-6)


def test_weights_tied_after_attach_with_a_state_of_each_are_refused():
    model = Tied()
    reg = rs.attach(model, rs.Distance().on("*.weight"))
    model.head.weight = model.embedding.weight
    with pytest.raises(DetachedError, match="one tensor now"):
        reg.penalty()


def test_weights_untied_after_attach_are_refused():
    model = Tied()
    model.head.weight = model.embedding.weight
    reg = rs.attach(model, rs.L2().on("*.weight"))
    model.head.weight = nn.Parameter(torch.ones(7, 4))
    with pytest.raises(DetachedError, match=r"would select \['head\.weight'\] too"):
        reg.penalty()


class Doubled(nn.Module):
    def forward(self, w):
        return 2 * w


def test_a_weight_parametrised_after_attach_is_penalised_as_the_layer_uses_it():
    model = Net()
    reg = trained(model, rs.L2().on("last.weight"))
    parametrize.register_parametrization(model.last, "weight", Doubled())
    right = 4 * np.square(array(model.last.parametrizations.weight.original)).sum()
    assert reg.penalty().item() == pytest.approx(right, rel=1e-5)


@pytest.mark.parametrize("how", ["gradient", "decoupled", "proximal"])
def test_a_weight_parametrised_after_attach_is_refused_at_the_step(how):
    model = Net()
    optimizer = sgd(model)
    trained(model, 0.5 * rs.L1().on("last.weight", how=how), optimizer)
    parametrize.register_parametrization(model.last, "weight", Doubled())
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    with pytest.raises(DetachedError, match=r"'last\.weight'.*parametrised"):
        optimizer.step()


# What can't follow


def grown(model):
    model.blocks.append(nn.Linear(8, 8))


def shrunk(model):
    del model.blocks[1]


def adapted(model):
    model.last.adapter = nn.Linear(8, 2)


def gained(model):
    model.last.register_parameter("scale", nn.Parameter(torch.ones(2)))


@pytest.mark.parametrize(
    ("change", "rule", "named"),
    [
        (grown, rs.L2().on("*.weight"), "blocks.2.weight"),
        (grown, rs.L2().on(rs.outputs("blocks.*")), "blocks.2"),
        (grown, rs.Dropout(0.5).on(rs.outputs(nn.Linear)), "blocks.2"),
        (grown, rs.DropConnect(0.5).on("blocks.*.weight"), "blocks.2.weight"),
        (shrunk, rs.L2().on("*.weight"), "blocks.1.0.weight"),
        (shrunk, rs.L2().on(rs.outputs("blocks.*")), "blocks.1"),
        (adapted, rs.L2().on(nn.Linear), "last.adapter"),
        (gained, rs.L2().on("last.*"), "last.scale"),
    ],
)
def test_rules_that_would_select_more_or_less_are_refused_by_name(change, rule, named):
    model = Net()
    reg = rs.attach(model, [rule, rs.L1().on("first.bias")])
    change(model)

    def step():
        reg.loss(model(torch.randn(3, 4)).square().mean())

    with pytest.raises(DetachedError, match=named.replace(".", r"\.")) as told:
        step()
    assert "reg.detach()" in str(told.value)
    plan = [rule, rs.L1().on("first.bias")]
    reg.detach()
    reg = rs.attach(model, plan)
    step()


@pytest.mark.parametrize("change", [grown, shrunk, adapted, gained])
def test_changes_elsewhere_are_nothing_to_a_rule(change):
    model = Net()
    reg = trained(model, [rs.L2().on("first.weight"), rs.L1().on(rs.outputs("first"))])
    change(model)
    x = torch.randn(5, 4)
    loss = model(x).square().mean()
    right = np.square(array(model.first.weight)).sum() + np.abs(affine(model.first, array(x))).sum() / 5
    assert (reg.loss(loss) - loss).item() == pytest.approx(right, rel=1e-5)


def test_rules_declared_after_attach_are_refused():
    model = Net()
    reg = rs.attach(model, rs.L2().on("first.weight"))
    rs.regularized(nn.Linear(2, 2), weight=rs.L1())  # of no layer of this model
    assert reg.penalty() > 0
    rs.regularized(model.last, weight=rs.L1())
    with pytest.raises(DetachedError, match=r"rs\.regularized.*reg\.detach\(\)"):
        reg.penalty()


def test_a_layer_with_declared_rules_may_not_be_replaced_by_one_without():
    model = Net()
    rs.regularized(model.last, weight=rs.L1())
    reg = rs.attach(model)
    model.last = nn.Linear(8, 2)
    with pytest.raises(DetachedError, match="declarations"):
        reg.penalty()


def test_layers_replaced_between_forward_and_loss_are_told():
    model = Net()
    reg = trained(model, rs.L2().on(rs.outputs("last")))
    loss = model(torch.randn(3, 4)).square().mean()
    model.last = nn.Linear(8, 2)
    with pytest.raises(DetachedError, match="replaced since the last forward"):
        reg.loss(loss)


def test_one_layer_in_the_places_of_two_is_refused():
    model = Net()
    reg = trained(model, rs.L2().on(rs.outputs("blocks.0") | rs.outputs("blocks.1.0")))
    model.blocks[1][0] = model.blocks[0]
    with pytest.raises(DetachedError):
        reg.loss(model(torch.randn(3, 4)).square().mean())


def test_a_refused_change_leaves_all_rules_as_they_were():
    model = Net()
    plan = [rs.L2().on(rs.outputs("last"), name="h"), rs.L1().on("blocks.*.weight", name="w")]
    reg = trained(model, plan)
    last, block = model.last, model.blocks[1]
    model.last = nn.Linear(8, 2)
    model.blocks[1] = nn.Identity()
    with pytest.raises(DetachedError):
        model(torch.randn(3, 4))
    model.last, model.blocks[1] = last, block
    x = torch.randn(5, 4)
    loss = model(x).square().mean()
    right = sum(np.abs(array(w)).sum() for w in (model.blocks[0].weight, block[0].weight))
    right += (model(x).square().sum() / 5).item()
    assert (reg.loss(loss) - loss).item() == pytest.approx(right, rel=1e-5)


# What is no change


def test_tensors_given_to_functional_call_are_no_change():
    model = Net()
    structure = Structure(model)
    given = {name: p.detach().clone() for name, p in model.named_parameters()}
    seen = []
    model.last.register_forward_hook(lambda *args: seen.append(structure.changed()))
    functional_call(model, given, torch.randn(3, 4))
    assert seen == [False]
    assert not structure.changed()


@pytest.mark.parametrize("change", [*CHANGES, grown, shrunk, adapted, gained])
def test_each_change_is_noticed(change):
    model = Net()
    structure = Structure(model)
    assert not structure.changed()
    change(model)
    assert structure.changed()
    structure.remember(model)
    assert not structure.changed()


def test_a_structure_keeps_no_layer_alive():
    import weakref

    model = Net()
    structure, layer = Structure(model), weakref.ref(model.last)
    del model
    assert layer() is None
    assert structure.changed()
