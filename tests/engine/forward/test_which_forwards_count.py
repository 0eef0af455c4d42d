"""Which forwards count for a loss: situations × kinds of activations, each against values written by hand."""

import copy
import threading
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import restrain as rs
from restrain.errors import CaptureError

pytestmark = pytest.mark.filterwarnings("ignore:.*overwritten by a later in-place op:restrain.errors.RestrainWarning")
STRENGTH = 0.3


class Net(nn.Module):
    """Three numbers to three, by a hidden layer, which may be checkpointed."""

    def __init__(self, act, reentrant=None):
        super().__init__()
        self.reentrant = reentrant
        self.first, self.act, self.last = nn.Linear(3, 5), act, nn.Linear(5, 3)

    def hidden(self, x):
        return self.act(self.first(x))

    def forward(self, x):
        h = self.hidden(x) if self.reentrant is None else checkpoint(self.hidden, x, use_reentrant=self.reentrant)
        return self.last(h)


@dataclass
class Kind:
    """An activation, the layer whose output is penalised, and the penalty, by us and by hand."""

    act: type
    function: object
    place: str = "act"
    what: object = rs.L2()
    entries: object = torch.square

    def net(self, seed=0, reentrant=None):
        torch.manual_seed(seed)
        act = nn.ReLU(inplace=True) if self.place == "first" else self.act()
        return Net(act, reentrant).double()

    def rule(self, prefix=""):
        return STRENGTH * self.what.on(rs.outputs(prefix + self.place))

    def attach(self, net, optimizer=None):
        return rs.attach(net, self.rule(), optimizer)

    def layers(self, net, x, parameters=None):
        """The output of each layer, by hand."""
        p = dict(net.named_parameters()) if parameters is None else parameters
        first = x @ p["first.weight"].T + p["first.bias"]
        act = self.function(first)
        return {"first": first, "act": act, "last": act @ p["last.weight"].T + p["last.bias"]}

    def out(self, net, x, parameters=None):
        return self.layers(net, x, parameters)["last"]

    def penalty(self, net, *xs, parameters=None):
        """The mean over forwards of strength × the sum over features, averaged over the batch; by hand."""
        seen = [self.layers(net, x, parameters)[self.place] for x in xs]
        return STRENGTH * sum(self.entries(h).sum() / len(h) for h in seen) / len(xs)


KINDS = {
    "Tanh": Kind(nn.Tanh, torch.tanh),
    "ReLU": Kind(nn.ReLU, torch.relu, what=rs.L1(), entries=torch.abs),
    "before an in-place ReLU": Kind(nn.ReLU, torch.relu, place="first", what=rs.L1(), entries=torch.abs),
    "SiLU": Kind(nn.SiLU, lambda z: z * torch.sigmoid(z)),
    "Softplus": Kind(nn.Softplus, lambda z: torch.log1p(z.exp())),
    "linear last layer": Kind(nn.Tanh, torch.tanh, place="last"),
}


def data(seed, rows=4):
    return torch.randn(rows, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


A, B, C = data(1), data(2), data(3, rows=6)


def same(net, found, expected):
    """Compare a loss and its gradients with those by hand."""
    torch.testing.assert_close(found, expected)
    parameters = list(net.parameters())
    by_hand = torch.autograd.grad(expected, parameters, allow_unused=True)
    torch.testing.assert_close(torch.autograd.grad(found, parameters, allow_unused=True), by_hand)


def sgd(*nets):
    return torch.optim.SGD([p for net in nets for p in net.parameters()], lr=0.05)


def step(optimizer, loss):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def equal(*pairs):
    for one, other in pairs:
        torch.testing.assert_close(list(one.parameters()), list(other.parameters()))


SITUATIONS = {}


def situation(function):
    SITUATIONS[function.__name__] = function
    return function


@pytest.fixture(autouse=True)
def _nothing_compiled():
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SITUATIONS)
def test_the_forwards_that_a_loss_depends_on_count(name, kind):
    SITUATIONS[name](KINDS[kind])


# Several models


def gan(kind, forwards):
    """A generator with rules, whose discriminator steps between forward and loss; three rounds against a twin."""
    g, d = kind.net(), nn.Linear(3, 1).double()
    twin_g, twin_d = copy.deepcopy(g), copy.deepcopy(d)
    optimizers, twins = (sgd(g), sgd(d)), (sgd(twin_g), sgd(twin_d))
    reg = kind.attach(g, optimizers[0])
    for seed in range(3):
        z = data(10 + seed)
        fake = g(z)
        step(optimizers[1], d(fake.detach()).mean() - d(A).mean())
        fake = g(z + 1) if forwards == 2 else fake
        step(optimizers[0], reg.loss(-d(fake).square().mean()))
        step(twins[1], twin_d(kind.out(twin_g, z).detach()).mean() - twin_d(A).mean())
        z = z + 1 if forwards == 2 else z
        step(twins[0], -twin_d(kind.out(twin_g, z)).square().mean() + kind.penalty(twin_g, z))
    equal((g, twin_g), (d, twin_d))


@situation
def a_gan_with_one_forward(kind):
    gan(kind, 1)


@situation
def a_gan_with_two_forwards(kind):
    gan(kind, 2)


class Rivals(nn.Module):
    def __init__(self, g):
        super().__init__()
        self.g, self.d = g, nn.Linear(3, 1).double()


@situation
def a_gan_in_one_module(kind):
    """Two losses a step, both by `reg.loss`; the discriminator's doesn't depend on the generator."""
    model = Rivals(kind.net())
    twin = copy.deepcopy(model)
    optimizers, twins = [sgd(part) for part in (model.g, model.d)], [sgd(part) for part in (twin.g, twin.d)]
    reg = rs.attach(model, kind.rule("g."), optimizers)
    for seed in range(3):
        z = data(10 + seed)
        fake = model.g(z)
        step(optimizers[1], reg.loss(model.d(fake.detach()).mean() - model.d(A).mean()))
        step(optimizers[0], reg.loss(-model.d(fake).square().mean()))
        step(twins[1], twin.d(kind.out(twin.g, z).detach()).mean() - twin.d(A).mean())
        step(twins[0], -twin.d(kind.out(twin.g, z)).square().mean() + kind.penalty(twin.g, z))
    equal((model, twin))


@situation
def a_teacher_and_a_student(kind):
    """Both have rules; the teacher's forward is detached. A model that is its own teacher is no other case."""
    student, teacher = kind.net(), kind.net(seed=1)
    reg, of_teacher = kind.attach(student), kind.attach(teacher)
    target, own = teacher(A).detach(), student(B).detach()
    loss = reg.loss((student(A) - target).square().mean() + (student(C)[:4] - own).square().mean())
    by_hand = (kind.out(student, A) - kind.out(teacher, A).detach()).square().mean()
    by_hand = by_hand + (kind.out(student, C)[:4] - kind.out(student, B).detach()).square().mean()
    same(student, loss, by_hand + kind.penalty(student, A, C))
    same(teacher, of_teacher.loss(teacher(B).sum()), kind.out(teacher, B).sum() + kind.penalty(teacher, B))


@situation
def two_models_in_two_threads(kind):
    """They end as if they had been trained one after the other."""

    def train(net, reg, optimizer, turn):
        for seed in range(5):
            out = net(data(seed))
            turn()
            step(optimizer, reg.loss(out.square().mean()))
            turn()

    runs = []
    for threads in (False, True):
        nets = [kind.net(seed) for seed in (0, 1)]
        optimizers = [sgd(net) for net in nets]
        regs = [kind.attach(net, o) for net, o in zip(nets, optimizers, strict=True)]
        barrier = threading.Barrier(2)
        turn = (lambda barrier=barrier: barrier.wait(30)) if threads else (lambda: None)
        jobs = [
            threading.Thread(target=train, args=(*given, turn)) for given in zip(nets, regs, optimizers, strict=True)
        ]
        for job in jobs:
            job.start()
            if not threads:
                job.join()
        for job in jobs:
            job.join()
        runs.append(nets)
    equal(*zip(*runs, strict=True))


# Several forwards


@situation
def a_physics_informed_loss(kind):
    """Derivatives of one batch, first and second, and values of another: the first output isn't in the loss."""
    net, reg = kind.net(), None

    def residual(out, x):
        x = x.clone().requires_grad_()
        slope = torch.autograd.grad(out(x).sum(), x, create_graph=True)[0]
        curve = torch.autograd.grad(slope.sum(), x, create_graph=True)[0] if kind.function is not torch.relu else 0.0
        return (slope + curve - 1).square().mean()

    reg = kind.attach(net)
    found = reg.loss(residual(net, A) + net(B).square().mean())

    def by_hand():
        data = residual(lambda x: kind.out(net, x), A) + kind.out(net, B).square().mean()
        return data + kind.penalty(net, A, B)

    same(net, found, by_hand())
    found = reg.loss(net(B).square().mean() + residual(net, A))  # the derivative last
    same(net, found, by_hand())
    found = reg.loss(residual(net, C))  # and alone, after a look
    same(net, found, residual(lambda x: kind.out(net, x), C) + kind.penalty(net, C))


@situation
def a_rollout(kind):
    net = kind.net()
    reg = kind.attach(net)
    x, states = A, [A]
    for _ in range(3):
        x = x + 0.1 * net(x)
    for _ in range(3):
        states.append(states[-1] + 0.1 * kind.out(net, states[-1]))
    same(net, reg.loss(x.square().mean()), states[-1].square().mean() + kind.penalty(net, *states[:3]))


@situation
def contrastive_views(kind):
    net = kind.net()
    reg = kind.attach(net)
    loss = reg.loss(-F.cosine_similarity(net(A), net(B)).mean())
    same(net, loss, -F.cosine_similarity(kind.out(net, A), kind.out(net, B)).mean() + kind.penalty(net, A, B))


def features(kind, before):
    """A hook takes the penalised layer's output of three forwards; the model's own outputs are thrown away."""
    net, taken = kind.net(), []

    def take():
        layer = net.get_submodule(kind.place)
        return layer.register_forward_hook(lambda m, args, out: taken.append(out.clone().sin()))

    handles = [take()] if before else []
    reg = kind.attach(net)
    handles += [] if before else [take()]
    for x in (A, B, 2 * A):
        net(x)
    loss = reg.loss((taken[0] - taken[1]).square().mean())
    one, other = (kind.layers(net, x)[kind.place].sin() for x in (A, B))
    same(net, loss, (one - other).square().mean() + kind.penalty(net, A, B))
    for handle in handles:
        handle.remove()


@situation
def features_by_a_hook_from_before_attach(kind):
    features(kind, True)


@situation
def features_by_a_hook_from_after_attach(kind):
    features(kind, False)


@situation
def accumulation(kind):
    net = kind.net()
    twin = copy.deepcopy(net)
    optimizer, by_hand = sgd(net), sgd(twin)
    reg = kind.attach(net, optimizer)
    for _ in range(2):
        optimizer.zero_grad()
        by_hand.zero_grad()
        for x in (A, B, C):
            (reg.loss(net(x).square().mean()) / 3).backward()
            ((kind.out(twin, x).square().mean() + kind.penalty(twin, x)) / 3).backward()
        optimizer.step()
        by_hand.step()
    equal((net, twin))


@situation
def a_replay_buffer(kind):
    """Outputs are kept with their graphs; each counts when it is in a loss, in whatever order."""
    net = kind.net()
    reg = kind.attach(net)
    buffer = [net(x) for x in (A, B, C)]
    same(net, reg.loss(buffer[1].sum()), kind.out(net, B).sum() + kind.penalty(net, B))
    by_hand = kind.out(net, A).sum() + kind.out(net, C).square().sum() + kind.penalty(net, A, C)
    same(net, reg.loss(buffer[0].sum() + buffer[2].square().sum()), by_hand)


@situation
def generators_that_yield(kind):
    """Two streams of forwards in turns; the loss is of one of them."""
    net = kind.net()
    reg = kind.attach(net)

    def stream(*xs):
        for x in xs:
            yield net(x)

    one, other = zip(*zip(stream(A, B), stream(2 * A, 3 * B), strict=True), strict=True)
    assert len(other) == 2
    by_hand = kind.out(net, A).sum() + kind.out(net, B).sum() + kind.penalty(net, A, B)
    same(net, reg.loss(sum(out.sum() for out in one)), by_hand)


@situation
def two_losses_a_step(kind):
    """Each carries the penalties of the forwards that it depends on; two losses of one forward, both do."""
    net = kind.net()
    twin = copy.deepcopy(net)
    optimizer, by_hand = sgd(net), sgd(twin)
    reg = kind.attach(net, optimizer)
    for _ in range(2):
        optimizer.zero_grad()
        by_hand.zero_grad()
        one, other = net(A), net(B)
        reg.loss(one.square().mean()).backward(retain_graph=True)
        reg.loss(other.square().mean()).backward()
        reg.loss(one.sum()).backward()
        (kind.out(twin, A).square().mean() + kind.out(twin, B).square().mean() + kind.out(twin, A).sum()).backward()
        (2 * kind.penalty(twin, A) + kind.penalty(twin, B)).backward()
        optimizer.step()
        by_hand.step()
    equal((net, twin))


def meta(kind, second_order):
    net, twin = kind.net(), kind.net()
    reg = kind.attach(net)
    losses = []
    for model, out in ((net, lambda p, x: functional_call(net, p, (x,))), (twin, lambda p, x: kind.out(twin, x, p))):
        own = dict(model.named_parameters())
        inner = out(own, A).square().mean()
        gradients = torch.autograd.grad(inner, list(own.values()), create_graph=second_order)
        fast = {key: p - 0.1 * g for (key, p), g in zip(own.items(), gradients, strict=True)}
        losses.append((out(fast, B).square().mean(), fast))
    (found, _), (by_hand, fast) = losses
    penalty = kind.penalty(twin, B, parameters=fast)
    if second_order:  # the loss depends on the inner forward, too
        penalty = (penalty + kind.penalty(twin, A)) / 2
    found, by_hand = reg.loss(found), by_hand + penalty
    torch.testing.assert_close(found, by_hand)
    gradients = [torch.autograd.grad(loss, list(m.parameters())) for loss, m in ((found, net), (by_hand, twin))]
    torch.testing.assert_close(*gradients)


@situation
def meta_learning_of_second_order(kind):
    meta(kind, True)


@situation
def meta_learning_of_first_order(kind):
    meta(kind, False)


# Looks


@situation
def a_look_before_training(kind):
    """In training mode, with gradients, and what it gave is kept."""
    net = kind.net()
    reg = kind.attach(net)
    kept = net(9 * A), net(5 * B).sum()
    same(net, reg.loss(net(A).square().mean()), kind.out(net, A).square().mean() + kind.penalty(net, A))
    assert kept[1].requires_grad


@situation
def validation_in_between(kind):
    """Between forward and loss, and between loss and step."""
    net = kind.net()
    twin = copy.deepcopy(net)
    optimizer, by_hand = sgd(net), sgd(twin)
    reg = kind.attach(net, optimizer)
    for seed in range(3):
        out = net(data(seed))
        scores = [net(C).square().mean()]
        loss = reg.loss(out.square().mean())
        scores.append(net(2 * C).square().mean())
        step(optimizer, loss)
        step(by_hand, kind.out(twin, data(seed)).square().mean() + kind.penalty(twin, data(seed)))
        assert len(scores) == 2
    equal((net, twin))


@situation
def a_layer_called_alone(kind):
    """It counts for a loss that depends on it, and for no other."""
    net = kind.net()
    reg = kind.attach(net)
    net(A)
    reg.forget()
    alone = net.get_submodule(kind.place)(torch.ones(2, 5 if kind.place == "last" else 3, dtype=torch.float64))
    same(net, reg.loss(net(A).square().mean()), kind.out(net, A).square().mean() + kind.penalty(net, A))
    h = net.last(net.hidden(B))
    same(net, reg.loss(h.square().mean()), kind.out(net, B).square().mean() + kind.penalty(net, B))
    assert alone.shape[0] == 2


# Interrupts


def interrupted(kind, hit):
    """A forward on large inputs that is interrupted; afterwards, all is as if it had never been."""
    net = kind.net()
    reg = kind.attach(net)
    with pytest.raises(KeyboardInterrupt):
        hit(net, reg)
    kept = net(9 * A)
    same(net, reg.loss(net(A).square().mean()), kind.out(net, A).square().mean() + kind.penalty(net, A))
    h = net.last(net.hidden(B))  # by layers, outside of any forward of the model
    same(net, reg.loss(h.square().mean()), kind.out(net, B).square().mean() + kind.penalty(net, B))
    assert kept.shape == (4, 3)
    del kept
    net(A)
    torch.testing.assert_close(reg.penalty(), kind.penalty(net, A))


def stop(*given):
    raise KeyboardInterrupt


@situation
def an_interrupt_in_a_forward(kind):
    def hit(net, reg):
        net.last.forward = stop
        try:
            net(100 * B)
        finally:
            del net.last.forward

    interrupted(kind, hit)


@situation
def an_interrupt_in_a_hook(kind):
    def hit(net, reg):
        handle = net.register_forward_hook(stop)
        try:
            net(100 * B)
        finally:
            handle.remove()

    interrupted(kind, hit)


@situation
def an_interrupt_in_backward(kind):
    def hit(net, reg):
        loss = reg.loss(net(100 * B).square().mean())
        net.first.weight.register_hook(stop)
        loss.backward()

    net = kind.net()
    reg = kind.attach(net)
    with pytest.raises(KeyboardInterrupt):
        hit(net, reg)
    net.first.weight._backward_hooks.clear()
    same(net, reg.loss(net(A).square().mean()), kind.out(net, A).square().mean() + kind.penalty(net, A))


# Ways of running


def checkpointed(kind, reentrant):
    """A look before, two forwards under one loss, and one that is in no loss in between."""
    net = kind.net(reentrant=reentrant)
    reg = kind.attach(net)
    x, y = (t.clone().requires_grad_() for t in (A, B))  # a reentrant checkpoint needs it
    kept = [net((9 * A).requires_grad_())]
    one = net(x)
    kept.append(net((5 * A).requires_grad_()))
    loss = reg.loss(one.square().mean() + net(y).square().mean())
    by_hand = kind.out(net, A).square().mean() + kind.out(net, B).square().mean() + kind.penalty(net, A, B)
    torch.testing.assert_close(loss, by_hand)
    loss.backward()
    torch.testing.assert_close([p.grad for p in net.parameters()], list(torch.autograd.grad(by_hand, net.parameters())))
    net.zero_grad()
    kept[0].sum().backward()  # without the loss, the checkpoint adds nothing
    plain = torch.autograd.grad(kind.out(net, 9 * A).sum(), list(net.parameters()))
    torch.testing.assert_close([p.grad for p in net.parameters()], list(plain))


@situation
def checkpoints_without_reentry(kind):
    checkpointed(kind, False)


@situation
def checkpoints_with_reentry(kind):
    checkpointed(kind, True)


@situation
def compiled_code(kind):
    """A look that is kept, one that isn't, then two forwards under one loss, and one that is in none in between."""
    net = kind.net()
    reg = kind.attach(net)
    run = torch.compile(net, backend="aot_eager", fullgraph=True)
    kept = [run(9 * A)]
    run(7 * A)
    one = run(A)
    kept.append(run(5 * A))
    loss = reg.loss(one.square().mean() + run(B).square().mean())
    by_hand = kind.out(net, A).square().mean() + kind.out(net, B).square().mean() + kind.penalty(net, A, B)
    same(net, loss, by_hand)
    same(net, reg.loss(kept[0].sum()), kind.out(net, 9 * A).sum() + kind.penalty(net, 9 * A))


@situation
def compiled_code_within(kind):
    """The same, where the compiled code calls the model, whose hooks it contains then."""
    net = kind.net()
    reg = kind.attach(net)
    run = torch.compile(lambda x: 2 * net(x), backend="aot_eager", fullgraph=True)
    kept = [run(9 * A)]
    run(7 * A)
    one = run(A)
    kept.append(run(5 * A))
    loss = reg.loss(one.square().mean() + run(B).square().mean())
    by_hand = 4 * kind.out(net, A).square().mean() + 4 * kind.out(net, B).square().mean() + kind.penalty(net, A, B)
    same(net, loss, by_hand)


@situation
def torch_func(kind):
    """Gradients as functions with the loss inside, after a look inside another transform."""
    net = kind.net()
    reg = kind.attach(net)
    own = {key: p.detach() for key, p in net.named_parameters()}
    torch.func.vmap(lambda x: net(x[None]).sum())(C)
    torch.func.grad(lambda p: functional_call(net, p, (9 * A,)).sum())(own)

    def loss(parameters):
        look = functional_call(net, parameters, (5 * A,))
        found = reg.loss(functional_call(net, parameters, (A,)).square().mean())
        return found + 0 * look.sum()

    def by_hand(parameters):
        return kind.out(net, A, parameters).square().mean() + kind.penalty(net, A, parameters=parameters)

    torch.testing.assert_close(torch.func.grad_and_value(loss)(own), torch.func.grad_and_value(by_hand)(own))


# The oracle, and what is refused


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_the_oracle_sees_a_forward_too_many_and_one_too_few(kind):
    net = kind.net()
    reg = kind.attach(net)
    for counted in ((A,), (A, B, C), (A, C)):
        found = reg.loss(net(A).sum() + net(B).sum())
        by_hand = kind.out(net, A).sum() + kind.out(net, B).sum() + kind.penalty(net, *counted)
        with pytest.raises(AssertionError):
            same(net, found, by_hand)


def test_the_table_has_twenty_situations():
    assert len(SITUATIONS) >= 20


def test_a_loss_of_activations_that_were_given_up_is_an_error():
    kind, taken = KINDS["Tanh"], []

    class Leaky(Net):
        """Hands activations on past hooks and attributes."""

        def forward(self, x):
            taken.append(self.hidden(x))
            return self.last(taken[-1])

    net = Leaky(nn.Tanh()).double()
    reg = kind.attach(net)
    for x in (A, B):
        net(x)
    with pytest.raises(CaptureError, match=r"were given up.*Keep what the model returns"):
        reg.loss(taken[0].sum() + taken[1].sum())
    taken.clear()
    same(net, reg.loss(net(A).sum()), kind.out(net, A).sum() + kind.penalty(net, A))
