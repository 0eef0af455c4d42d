"""Nothing is silent: what is forgotten, never reached, or can't work as said is an error that says what to write."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import restrain as rs
from restrain.errors import (
    CaptureError,
    HowError,
    NeverFiredError,
    NotCollectedError,
    OptimizerError,
    PlanError,
    RestrainWarning,
)


def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


X, Y = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0, 1])


def sgd(model, **options):
    return torch.optim.SGD(model.parameters(), **{"lr": 0.1, **options})


def step(model, optimizer, loss):
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


RULES = {"parameters": 0.1 * rs.L2().on("0.weight"), "outputs": 0.1 * rs.L1().on(rs.outputs("1"))}


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("kind", RULES)
def test_a_loss_that_was_never_asked_for_is_an_error(kind, given):
    model = make()
    optimizer = sgd(model)
    reg = rs.attach(model, RULES[kind], optimizer if given else None)
    for _ in range(2):
        step(model, optimizer, reg.loss(F.cross_entropy(model(X), Y)))
    with pytest.raises(NotCollectedError, match=r"0.1 \* L.*reg.loss\(data_loss\).*how='gradient'"):
        step(model, optimizer, F.cross_entropy(model(X), Y))
    reg.detach()
    step(model, optimizer, F.cross_entropy(model(X), Y))


@pytest.mark.parametrize("kind", RULES)
def test_what_is_no_forgotten_loss(kind):
    model = make()
    optimizer = sgd(model)
    reg = rs.attach(model, RULES[kind], optimizer)
    model.eval()
    with torch.no_grad():
        model(X)  # evaluation
    optimizer.step()  # no gradients
    model.train()
    optimizer.param_groups[0]["lr"] = 0.0
    F.cross_entropy(model(X), Y).backward()
    optimizer.step()  # as get_optimizer_state_dict does to make the state
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.zero_grad()
    for _ in range(3):  # accumulation
        reg.loss(F.cross_entropy(model(X), Y)).backward()
    optimizer.step()
    optimizer.step()  # again, without a forward
    stranger = nn.Linear(4, 1)
    step(stranger, sgd(stranger), stranger(X).sum())  # an optimizer of another model
    step(model, optimizer, F.cross_entropy(model(X), Y) + reg.penalty())


def test_two_optimizers_for_one_loss_and_one_that_holds_nothing_selected():
    model = make()
    first, second = torch.optim.SGD(model[0].parameters(), lr=0.1), torch.optim.Adam(model[2].parameters())
    reg = rs.attach(model, 0.1 * rs.L2().on("0.weight"), [first, second])
    for _ in range(3):
        reg.loss(F.cross_entropy(model(X), Y)).backward()
        first.step()
        second.step()
        model.zero_grad()
    F.cross_entropy(model(X), Y).backward()
    second.step()  # holds no selected parameter
    model(X)
    with pytest.raises(NotCollectedError):
        first.step()


def test_the_state_dict_helpers_fake_step_is_no_forgotten_loss():
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model = make()
    optimizer = torch.optim.Adam(model.parameters())
    reg = rs.attach(model, [RULES["parameters"], rs.L1().on("2.weight", how="proximal")], optimizer)
    before = [p.detach().clone() for p in model.parameters()]
    model(X)
    get_optimizer_state_dict(model, optimizer)
    torch.testing.assert_close([p.detach() for p in model.parameters()], before, rtol=0, atol=0)
    assert reg.state_dict()["steps"] == 0


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x):
        return F.linear(x, self.unused.weight) + self.used(x)


def test_a_place_that_is_never_reached_is_an_error():
    model = Unused()
    reg = rs.attach(model, rs.L1().on(rs.outputs("u*")))
    with pytest.raises(NeverFiredError, match="no training forward"):
        reg.loss(torch.zeros(()))
    with pytest.raises(NeverFiredError, match=r"'unused'.*F.linear.*optional=True"):
        reg.loss(model(X).sum())
    reg.detach()
    reg = rs.attach(model, rs.L1().on(rs.outputs("u*"), optional=True))
    out = model(X)
    torch.testing.assert_close(reg.penalty(), model.used(X).abs().sum() / len(X))
    assert out.shape == (5, 3)


def test_a_layer_in_eval_mode_is_named():
    model = make()
    model[0].eval()
    reg = rs.attach(model, rs.L1().on(rs.outputs("0")))
    with pytest.raises(NeverFiredError, match=r"eval\(\) mode"):
        reg.loss(model(X).sum())


def test_rules_at_the_step_need_the_optimizer_that_holds_the_parameter():
    model = make()
    for rule in (
        rs.L1().on("0.weight", how="proximal"),
        rs.L1().on("0.weight", how="gradient"),
        rs.NonNegative().on("0.weight"),
    ):
        with pytest.raises(OptimizerError, match=r"'0.weight'.*rs.attach\(model, plan, optimizer\)"):
            rs.attach(model, rule)
        with pytest.raises(OptimizerError, match="no given optimizer holds"):
            rs.attach(model, rule, torch.optim.SGD(model[2].parameters(), lr=0.1))


@pytest.mark.parametrize("name", ["LBFGS", "Rprop", "SparseAdam"])
def test_optimizers_that_a_prox_cannot_follow_are_refused(name):
    model = make()
    optimizer = getattr(torch.optim, name)([model[0].weight])
    with pytest.raises(OptimizerError, match=rf"{name}.*(use|Use)"):
        rs.attach(model, rs.L1().on("0.weight", how="proximal"), optimizer)


def test_the_steps_of_a_subclass_with_a_step_of_its_own_are_measured_and_said_to_be():
    class Mine(torch.optim.SGD):
        def step(self, closure=None):
            return super().step(closure)

    class Same(torch.optim.Adam):
        pass

    model = make()
    rule = rs.L1().on("0.weight", how="proximal", name="sparse")
    with pytest.warns(RestrainWarning, match=r"how='proximal' with Mine: no formula .* measured") as seen:
        reg = rs.attach(model, [rule, rs.L2().on("*", how="proximal")], Mine(model.parameters(), lr=0.1))
    assert len(seen) == 1
    assert "sparse: the steps of Mine are measured" in str(reg)
    reg.detach()
    assert "measured" not in str(rs.attach(model, rule, Same(model.parameters())))


def test_a_prox_that_is_neither_entrywise_nor_by_group_needs_one_step_for_all():
    model = make()
    rule = 0.1 * rs.SLOPE(q=0.1).on("0.weight", how="proximal")
    with pytest.raises(HowError, match="Adam moves each entry"):
        rs.attach(model, rule, torch.optim.Adam(model.parameters()))
    rs.attach(model, rule, sgd(model))


def test_proximal_rules_without_a_prox_of_their_sum_are_refused():
    model = make()
    rules = [
        rs.GroupLasso().on("0.weight", how="proximal"),
        rs.GroupLasso("in").on("0.weight", how="proximal"),
    ]
    with pytest.raises(rs.errors.NoProxError, match=r"'0.weight'"):
        rs.attach(model, rules, sgd(model))


@pytest.mark.parametrize("rule", [rs.L2().on("0.weight"), rs.L2().on(rs.outputs("0")), rs.Contractive().on()])
@pytest.mark.parametrize("known", [True, False])
def test_maximize_is_refused_for_penalties_in_the_loss(rule, known):
    """At attach, or at the first step of an optimizer that wasn't given."""
    model = make()
    optimizer = sgd(model, maximize=True)

    def step():
        reg = rs.attach(model, rule, optimizer if known else None)
        reg.loss(model(torch.randn(3, model[0].in_features)).square().mean()).backward()
        optimizer.step()

    with pytest.raises(OptimizerError, match="maximize"):
        step()


def test_an_optimizer_that_maximises_by_others_of_the_parameters_is_fine():
    """A multiplier that is raised while the weights are trained."""
    model = make()
    down, up = sgd(model[0]), torch.optim.SGD(model[2].parameters(), lr=0.1, maximize=True)
    reg = rs.attach(model, [rs.L2().on("0.weight"), rs.L1().on(rs.outputs("0"))], [down, up])
    reg.loss(model(torch.randn(3, model[0].in_features)).square().mean()).backward()
    down.step()
    up.step()


def test_maximize_is_refused_for_proximal_rules():
    model = make()
    with pytest.raises(OptimizerError, match="maximize"):
        rs.attach(model, rs.L1().on("0.weight", how="proximal"), sgd(model, maximize=True))


def test_sparse_embedding_gradients_are_refused_at_the_step():
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True))
    for how in ("gradient", "proximal"):
        with pytest.raises(HowError, match="sparse=True"):
            rs.attach(model, rs.L2().on("0.weight", how=how), sgd(model))


def test_double_decay_is_warned_of():
    model = make()
    with pytest.warns(
        rs.errors.RestrainWarning, match=r"L2.*decays what the optimizer's weight_decay decays, too: 0.weight, 2.weight"
    ):
        rs.attach(model, rs.L2().on("*.weight"), sgd(model, weight_decay=0.01))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rs.attach(model, rs.L1().on("*.weight"), sgd(model, weight_decay=0.01))


def test_low_precision_weights_are_warned_of():
    model = make().bfloat16()
    with pytest.warns(rs.errors.RestrainWarning) as told:
        rs.attach(model, [rs.L1().on("*", how=how) for how in ("gradient", "proximal", "loss")], sgd(model))
    assert all("lost to rounding" in str(one.message) for one in told)
    assert [str(one.message).partition(":")[0] for one in told] == 2 * ["'0.weight' is bfloat16, like 3 more"]
    assert {one.filename for one in told} == {__file__}  # it is told where attach was called


def test_each_optimizer_is_checked_for_its_own_parameters():
    """What holds of one parameter isn't taken for granted of another that only looks alike."""
    model = make()
    plain, other = sgd(model[0]), torch.optim.SGD(model[2].parameters(), lr=0.1, maximize=True)
    with pytest.raises(OptimizerError, match="maximize"):
        rs.attach(model, rs.L1().on("*", how="proximal"), [plain, other])
    with pytest.raises(OptimizerError, match=r"no given optimizer holds '2.weight'"):
        rs.attach(model, rs.L1().on("*", how="proximal"), plain)
    rs.attach(model, rs.L1().on("0.*", how="proximal"), [plain, other]).detach()


def test_a_rule_that_empties_a_layer_is_warned_of():
    model = make()
    optimizer = sgd(model)
    rs.attach(model, 100.0 * rs.L1().on("2.weight", how="proximal"), optimizer)
    with pytest.warns(rs.errors.RestrainWarning, match=r"'2\.weight' is all zeros") as caught:
        [step(model, optimizer, F.cross_entropy(model(X), Y)) for _ in range(400)]
    assert len(caught) == 1


def test_integer_inputs_take_no_noise():
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2))
    rs.attach(model, rs.GaussianNoise(0.1).on(rs.inputs()))
    with pytest.raises(CaptureError, match="embedding's outputs"):
        model(torch.tensor([1, 2]))


@pytest.mark.parametrize(
    ("make_rule", "error", "message"),
    [
        (
            lambda: rs.L1().on("x", how="project"),
            HowError,
            "'loss' or 'gradient' or 'decoupled' or 'proximal', got how='project'",
        ),
        (lambda: rs.L1().on(rs.outputs("x"), how="proximal"), HowError, "by how='loss'"),
        (lambda: rs.NonNegative().on("x", how="loss"), HowError, "'project'"),
        (lambda: rs.Dropout(0.1).on("x"), rs.errors.SelectionError, r"rs.outputs\('fc\*'\).*rs.inputs\(\)"),
        (
            lambda: rs.attach(make(), rs.Dropout(0.1).on(rs.outputs("0", via=torch.relu))),
            rs.errors.SelectionError,
            "via=",
        ),
        (lambda: rs.MaxNorm(1.0).on(rs.outputs("x")), rs.errors.SelectionError, "parameters"),
        (lambda: rs.GroupLasso().on("x", reduce="mean"), PlanError, "entrywise"),
        (lambda: rs.L1().on("x", reduce="median"), PlanError, "'sum' or 'mean'"),
        (lambda: rs.L1().on("x", every=0), PlanError, "at least 1"),
        (lambda: rs.L1() + rs.L1().on("x"), PlanError, "add penalties before"),
        (lambda: rs.L1().on("x") + rs.L2(), PlanError, "add penalties before"),
        (lambda: -1 * rs.L1().on("x"), rs.errors.PenaltyError, "zero or more"),
        (lambda: 0.1 * rs.Dropout(0.1).on(rs.inputs()), rs.errors.TransformError, "strength"),
        (lambda: rs.attach(make(), rs.L1()), PlanError, "not where"),
        (lambda: rs.attach(make(), []), PlanError, "nothing to attach"),
        (lambda: rs.attach(make(), 3), PlanError, "expected rules"),
        (lambda: rs.attach("model", []), PlanError, "nn.Module"),
        (lambda: rs.attach(make(), rs.L1().on("*"), "adam"), PlanError, "torch optimizer"),
        (
            lambda: rs.attach(make(), rs.L1().on("*")).loss(torch.ones(3)),
            rs.errors.PenaltyError,
            "losses.mean()",
        ),
        (lambda: rs.attach(make(), rs.L1().on("*")).loss(1.0), rs.errors.PenaltyError, "got float"),
        (lambda: rs.regularized(nn.Linear(2, 2), wieght=rs.L2()), rs.errors.SelectionError, "weight, bias"),
        (lambda: rs.regularized(nn.Linear(2, 2), weight=3), PlanError, r"1e-4 \* rs.L2\(\)"),
    ],
)
def test_bad_input_says_what_to_write(make_rule, error, message):
    with pytest.raises(error, match=message):
        make_rule()


def test_the_model_is_held_weakly():
    import gc
    import weakref

    model = make()
    gone = weakref.ref(model)
    reg = rs.attach(model, RULES["outputs"])
    del model
    gc.collect()
    assert gone() is None
    with pytest.raises(rs.errors.DetachedError, match="doesn't exist any more"):
        reg.values()


def test_a_layer_that_was_taken_out_of_the_model_is_missed():
    model = make()
    reg = rs.attach(model, rs.L2().on("2.weight"))
    del model[2]
    with pytest.raises(rs.errors.DetachedError, match=r"'2.weight' selects no parameter"):
        reg.penalty()


def test_the_table_says_that_a_projection_is_euclidean_where_the_optimizers_metric_is_not():
    model = make()
    adam, text = torch.optim.Adam(model.parameters()), "Euclidean projection, while Adam moves"
    in_metric, euclidean = rs.MaxNorm(1.0).on("0.weight"), rs.MaxNorm(1.0).on("0.weight", metric="euclidean")
    for rule, optimizer, said in [(euclidean, adam, True), (in_metric, adam, False), (euclidean, sgd(model), False)]:
        with rs.attach(model, rule, optimizer) as reg:
            assert (text in str(reg)) == said


def test_detached_rules_say_so():
    model = make()
    with rs.attach(model, RULES["parameters"]) as reg:
        pass
    for use in (lambda: reg.loss(torch.zeros(())), reg.penalty):
        with pytest.raises(rs.errors.DetachedError, match="attach the plan again"):
            use()
    assert list(reg.values()) == ["0.1 * L2() on '0.weight'"]
    rs.attach(model, reg.plan).penalty()


def test_a_type_without_parameters_is_told_of_outputs():
    with pytest.raises(rs.errors.SelectionError, match=r"ReLU selects no parameter; .*rs.outputs\(ReLU\)"):
        rs.attach(make(), rs.L1().on(nn.ReLU))
