"""What changes around a model in training: other models, threads, interrupts, other layers, another default device."""

import copy
import threading
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn import functional as F

import restrain as rs
from everywhere.column import column
from everywhere.training import SAMPLES, Net, Run, attached, fresh, plain, sgd

GROUP = "Changes around the model"


def alone(kind, run, **options):
    """The result of a run of this class, and that of the plain one."""
    return run(**vars(attached(kind, fresh(), **options))).steps().result(), plain(kind, **options)


# Others


class Another:
    """Another model, which trains with rules of its own; it draws no random numbers."""

    def __init__(self):
        self.model = Net().double()
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.1)
        rules = [0.1 * rs.L1().on(rs.outputs("act")), rs.MaxNorm(1.0).on("first.weight"), 0.1 * rs.L2().on("*")]
        self.reg = rs.attach(self.model, rules, self.optimizer)
        self.x = torch.ones(SAMPLES, 4, dtype=torch.float64)

    def step(self):
        self.optimizer.zero_grad()
        self.reg.loss(self.model(self.x).square().mean()).backward()
        self.optimizer.step()


@dataclass
class Between(Run):
    """Between the forward and the loss, and between the backward and the step, another model takes a step."""

    other: Another = field(default_factory=Another)

    def loss(self, x, y):
        out = self.model(x)
        self.other.step()
        return self.reg.loss(F.cross_entropy(out, y))

    def backward(self, step):
        super().backward(step)
        self.other.step()


@column("steps of another model between forward and loss, and before the step", GROUP, fast=True)
def other_model(kind):
    return alone(kind, Between)


class InThreads(Run):
    """Each step is taken in a thread of its own, while another model trains in another thread."""

    def step(self, step):
        failed, over = [], threading.Event()

        def here():
            try:
                super(InThreads, self).step(step)
            except BaseException as error:
                failed.append(error)

        def there():
            try:
                while not over.is_set():
                    self.other.step()
            except BaseException as error:
                failed.append(error)

        threads = [threading.Thread(target=here), threading.Thread(target=there)]
        for thread in threads:
            thread.start()
        threads[0].join()
        over.set()
        threads[1].join()
        for error in failed:
            raise error


@column("each step in a new thread, while another model trains in another", GROUP, fast=True)
def other_threads(kind):
    def run(**given):
        made = InThreads(**given)
        made.other = Another()
        return made

    return alone(kind, run)


# Interrupts


class Interrupted(Run):
    """Before each forward, another one is broken off by Ctrl-C within the last layer."""

    def backward(self, step):
        def stop(module, args):
            raise KeyboardInterrupt

        handle = self.model.head.register_forward_pre_hook(stop)
        try:
            self.model(torch.zeros(SAMPLES, 4, dtype=torch.float64))
        except KeyboardInterrupt:
            pass
        finally:
            handle.remove()
        super().backward(step)


@column("forwards that an interrupt breaks off", GROUP, fast=True)
def interrupted_forward(kind):
    return alone(kind, Interrupted)


class CalledAgain(Run):
    """Each step is broken off by Ctrl-C before the optimizer's own code, and called again."""

    def step(self, step):
        self.optimizer.zero_grad()
        self.backward(step)
        inits = type(self.optimizer)._init_group

        def stop(*given):
            type(self.optimizer)._init_group = inits
            raise KeyboardInterrupt

        type(self.optimizer)._init_group = stop
        try:
            self.optimizer.step()
        except KeyboardInterrupt:
            pass
        finally:
            type(self.optimizer)._init_group = inits
        self.optimizer.step()


@column("steps that an interrupt breaks off, called again", GROUP, fast=True)
def interrupted_step(kind):
    return alone(kind, CalledAgain)


# Layers


class Replaced(Run):
    """Before each step, all layers are replaced by copies, whose parameters take the places in the optimizer."""

    def step(self, step):
        before = dict(self.model.named_parameters())
        for name, layer in list(self.model.named_children()):
            setattr(self.model, name, copy.deepcopy(layer))
        optimizer, now = self.optimizer, dict(self.model.named_parameters())
        for name, p in before.items():
            if p in optimizer.state:
                optimizer.state[now[name]] = optimizer.state.pop(p)
        optimizer.param_groups[0]["params"] = list(now.values())
        super().step(step)


@column(
    "layers that are replaced by copies before each step",
    GROUP,
    fast=True,
    refuses={"parametrisation": "'head.weight' belongs to another layer.*reg.detach"},
)
def replaced_layers(kind):
    return alone(kind, Replaced)


class Two(Net):
    """A network with a second layer, to be tied to the first."""

    def __init__(self):
        super().__init__()
        self.second = nn.Linear(4, 6, bias=False)

    def block(self, x):
        return self.act(self.first(x) + self.second(x))


class Tied(Two):
    """The same, tied from the beginning."""

    def __init__(self):
        super().__init__()
        self.second.weight = self.first.weight


@column(
    "weights that are tied after attach",
    GROUP,
    fast=True,
    refuses=dict.fromkeys(("norms-held", "sharpness"), "are one tensor now, and it keeps a state of each")
    | {"weight-noise": "its weights are used at other places now"},
)
def tied_after_attach(kind):
    model = fresh(Two)
    run = attached(kind, model)
    model.second.weight = model.first.weight
    return run.steps().result(), plain(kind, Tied)


# Devices


class Elsewhere(Run):
    """Forwards, losses and steps run while tensors without a device land on "meta", where they have no values."""

    def loss(self, x, y):
        with torch.device("meta"):
            return super().loss(x, y)

    def step(self, step):
        self.optimizer.zero_grad()
        self.backward(step)
        with torch.device("meta"):
            self.optimizer.step()


@column("another default device", GROUP, fast=True)
def default_device(kind):
    model = fresh()
    optimizer = sgd(model.parameters())
    torch.manual_seed(5)
    with torch.device("meta"):
        reg = rs.attach(model, kind.make(), optimizer)
    return Elsewhere(model, optimizer, reg).steps().result(), plain(kind, optimizer=sgd)
