"""What rules cost in whole training steps: of large models, on outputs of small ones, on derivatives.

    python benchmarks/steps.py [--quick] [--out folder]

ResNet-50 (batch 16 of 64 × 64 images, SGD with momentum; written here, as torchvision's wheels need the very build of
torch that they were made for) and GPT-2 small (transformers, from its configuration, batch 4 of 64 tokens, fused
AdamW). The variants of a model share weights, gradients and the optimizer's
state, so that they differ in the rule only. Peak memory is the most that torch's allocator held at a time during one
step, of what was taken in that step, as its profiler reports it.
"""

import time
import warnings
from unittest import mock

import lists
import torch
from lists import twin
from measure import Section, digits, judged, options, paired, quartiles, ratios, spread, times
from torch import nn
from torch._C._profiler import _EventType
from torch.autograd import profiler
from torch.nn import functional as F
from torch.profiler._utils import traverse_dfs

import restrain as rs
from restrain.engine.forward import forwards

STRENGTH = 1e-6
HEAD = ["step", "ms", "× plain", "goal"]


class Bottleneck(nn.Module):
    """He and others (2016), with the stride in the 3 × 3 convolution, as torchvision has it."""

    def __init__(self, into, planes, stride, first):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(into, planes, 1, bias=False), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = nn.Conv2d(planes, planes, 3, stride, 1, bias=False), nn.BatchNorm2d(planes)
        self.conv3, self.bn3 = nn.Conv2d(planes, 4 * planes, 1, bias=False), nn.BatchNorm2d(4 * planes)
        short = (nn.Conv2d(into, 4 * planes, 1, stride, bias=False), nn.BatchNorm2d(4 * planes)) if first else ()
        self.short, self.relu = nn.Sequential(*short), nn.ReLU(inplace=True)

    def forward(self, x):
        h = self.relu(self.bn1(self.conv1(x)))
        h = self.relu(self.bn2(self.conv2(h)))
        return self.relu(self.bn3(self.conv3(h)) + self.short(x))


def resnet50(quick):
    """(a model, its loss of a batch, its optimizer)."""
    layers = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    width = 64
    for stage, (blocks, planes) in enumerate([(1, 64)] if quick else [(3, 64), (4, 128), (6, 256), (3, 512)]):
        for block in range(blocks):
            layers.append(Bottleneck(width, planes, 2 if stage and not block else 1, block == 0))
            width = 4 * planes
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 1000)).train()
    if not quick and sorted(tuple(p.shape) for p in model.parameters()) != sorted(lists.resnet50()):
        raise SystemExit("this isn't ResNet-50")
    size = 2 if quick else 16
    x, y = torch.randn(size, 3, 64, 64), torch.randint(1000, (size,))
    return model, lambda net: F.cross_entropy(net(x), y), lambda ps: torch.optim.SGD(ps, lr=1e-4, momentum=0.9)


def gpt2(quick):
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(**({"n_layer": 1, "n_embd": 48} if quick else {}))).train()
    tokens = torch.randint(50257, (4, 8 if quick else 64))
    make = lambda ps: torch.optim.AdamW(ps, lr=1e-6, weight_decay=0.0, fused=True)  # noqa: E731
    return model, lambda net: net(tokens, labels=tokens).loss, make


def mixture(quick):
    """Mixtral of 8 experts, of which a token takes 2, with a small vocabulary, as in a layer of a large one."""
    from transformers import MixtralConfig, MixtralForCausalLM

    width, layers = (32, 1) if quick else (512, 4)
    shape = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers, "vocab_size": 2000}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "attn_implementation": "eager"}
    model = MixtralForCausalLM(MixtralConfig(**shape, **heads)).train()
    tokens = torch.randint(2000, (4, 8 if quick else 128))
    make = lambda ps: torch.optim.AdamW(ps, lr=1e-6, weight_decay=0.0, fused=True)  # noqa: E731
    return model, lambda net: net(tokens, labels=tokens).loss, make


CLASSIC = {
    f'{name}, how="{how}"': STRENGTH * penalty.on("*.weight", how=how)
    for name, penalty, how in (
        ("L2", rs.L2(), "loss"),
        ("L2", rs.L2(), "gradient"),
        ("L2", rs.L2(), "decoupled"),
        ("L1", rs.L1(), "proximal"),
    )
}
ROUTERS, FEATURES = rs.outputs("*.gate"), rs.outputs(nn.Flatten)
LANGUAGE = {
    "ZLoss": STRENGTH * rs.ZLoss().on(rs.outputs("lm_head")),
    "logit norm": STRENGTH * rs.L2().on(rs.outputs("lm_head", average="tokens")),
    "corrected decay": rs.schedules.LearningRate() * (STRENGTH * rs.L2().on(rs.weights, how="decoupled")),
    "cautious decay": STRENGTH * rs.L2().on(rs.weights, how="decoupled", cautious=True),
    "Hyperball": rs.Hyperball().on(rs.weights & rs.glob("transformer.h.*")),
    "MomentumSharpness": rs.MomentumSharpness(0.1).on(rs.weights & rs.glob("transformer.h.*")),
}
EXPERTS = {
    "LoadBalance": STRENGTH * rs.LoadBalance(2).on(ROUTERS),
    'LoadBalance(statistics="batch")': STRENGTH * rs.LoadBalance(2, statistics="batch").on(ROUTERS),
    "ZLoss of routers": STRENGTH * rs.ZLoss().on(ROUTERS),
    "AttentionEntropy": STRENGTH * rs.AttentionEntropy(1.0).on(rs.outputs("*.self_attn", index=1)),
}
EMBEDDINGS = {
    "Variance": STRENGTH * rs.Variance().on(FEATURES),
    "Covariance": STRENGTH * rs.Covariance().on(FEATURES),
    "SIGReg": STRENGTH * rs.SIGReg().on(FEATURES),
}


def large(section, title, load, quick, rules, goal=1.02):
    """The table of one large model."""
    try:
        model, loss, make = load(quick)
    except (ImportError, RuntimeError) as error:
        section.table(f"Whole training steps of {title}", HEAD, [[f"missing: {error}", "", "", ""]])
        return
    rules = {"plain": None, "plain again": None} | rules
    jobs = {}
    for label, rule in rules.items():
        net = twin(model)
        optimizer = make(net.parameters())
        reg = None if rule is None else rs.attach(net, rule, optimizer, compile=True)

        def step(net=net, optimizer=optimizer, reg=reg):
            optimizer.zero_grad()
            value = loss(net)
            (value if reg is None else reg.loss(value)).backward()
            optimizer.step()

        jobs[label] = step
    seconds = paired(jobs, 2 if quick else 15, budget=55)
    rows = []
    for label, found in seconds.items():
        over = ratios(seconds, label, "plain")
        verdict = judged(over[1], goal) if rules[label] is not None else ""
        rows.append([label, spread(found, 1e3), times(over), verdict])
    note = '"plain again" is a second plain step: it says how far the ratios can be trusted.'
    section.table(f"Whole training steps of {title}", HEAD, rows, note)


def peak(job):
    """The most bytes that one run holds at a time of memory that it has taken itself.

    The profiler also tells of memory given back that was taken while it looked at an earlier run.
    """
    with profiler.profile(profile_memory=True, use_kineto=True) as prof:
        job()
    events = [e for e in traverse_dfs(prof.kineto_results.experimental_event_tree()) if e.tag == _EventType.Allocation]
    taken, most = {}, 0
    for event in sorted(events, key=lambda e: e.start_time_ns):
        at, size = event.extra_fields.ptr, event.extra_fields.alloc_size
        if size > 0:
            taken[at] = size
            most = max(most, sum(taken.values()))
        else:
            taken.pop(at, None)
    return most


def mlp(quick):
    """(a model, a batch, the layers whose outputs are penalised)."""
    width = 20 if quick else 1000
    made = [nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)]
    return nn.Sequential(*made), torch.randn(64, 784), nn.ReLU


def cnn(quick, inplace=False):
    width = 4 if quick else 32
    act = lambda: nn.ReLU(inplace=inplace)  # noqa: E731
    made = [nn.Conv2d(3, width, 3, padding=1), act(), nn.Conv2d(width, 2 * width, 3, padding=1, stride=2), act()]
    made += [nn.Conv2d(2 * width, 2 * width, 3, padding=1, stride=2), act(), nn.AvgPool2d(8), nn.Flatten()]
    return nn.Sequential(*made, nn.Linear(2 * width, 10)), torch.randn(64, 3, 32, 32), nn.Conv2d if inplace else nn.ReLU


def cnn_inplace(quick):
    return cnn(quick, inplace=True)


def by_hand(net, kind):
    """Outputs of layers kept by hooks, as one writes it; a function that sums their L1 and forgets them."""
    kept, overwritten = [], kind is nn.Conv2d
    for module in net:
        if isinstance(module, kind):
            module.register_forward_hook(lambda m, args, out: kept.append(out.clone() if overwritten else out))

    def value():
        total = sum(output.abs().flatten(1).sum(1).mean() for output in kept)
        kept.clear()
        return total

    return value


def step_of(load, quick, form, compiled):
    """A job: one training step."""
    torch.manual_seed(0)
    net, x, kind = load(quick)
    y = torch.randint(10, (len(x),))
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-6)
    reg = rs.attach(net, STRENGTH * rs.L1().on(rs.outputs(kind)), optimizer) if form == "restrain" else None
    hand = by_hand(net, kind) if form == "hooks by hand" else None
    run = torch.compile(net) if compiled else net

    def step():
        optimizer.zero_grad()
        loss = F.cross_entropy(run(x), y)
        if hand is not None:
            loss = loss + STRENGTH * hand()
        (loss if reg is None else reg.loss(loss)).backward()
        optimizer.step()

    return step


def outputs(section, quick):
    """Output penalties in eager and compiled steps."""
    rows = []
    for title, load in {"MLP": mlp, "CNN": cnn, "CNN, ReLU in place": cnn_inplace}.items():
        for compiled in (False, True):
            forms = ["plain", "plain again", "restrain"] + ([] if compiled else ["hooks by hand"])
            jobs = {form: step_of(load, quick, form, compiled) for form in forms}
            seconds = paired(jobs, 2 if quick else 41, budget=5)
            peaks = {form: peak(job) for form, job in jobs.items()}
            for form in forms:
                over = ratios(seconds, form, "plain")
                ours = form == "restrain"
                memory = f"{peaks[form] / 2**20:.1f}" + (f" ({peaks[form] / peaks['plain'] - 1:+.1%})" if ours else "")
                cells = [spread(seconds[form], 1e3), times(over), judged(over[1], 1.05) if ours else "", memory]
                rows.append([title, "compiled" if compiled else "eager", form, *cells])
    columns = ["model", "", "step", "ms", "× plain", "goal", "peak memory, MiB"]
    note = (
        "L1 on the outputs of all ReLU layers; where ReLU works in place, on those of the convolutions before, which "
        "it overwrites. Goal for memory: none extra, one copy in the last case. By hand, it is cloned there. "
        '"plain again" is a second plain step: it says how far the ratios can be trusted.'
    )
    section.table("Penalties on outputs", columns, rows, note)


def closed_form(layer, act):
    """Rifai and others (2011): Σ_j σ'(a_j)² Σ_i w_ji², its mean over the batch."""

    def value(net, x):
        h = net[:2](x)
        slope = h * (1 - h) if act is nn.Sigmoid else 1 - h.square()
        return net[2](h), (slope.square() @ layer.weight.square().sum(1)).mean()

    return value


def signs(like):
    return torch.randint_like(like, 2).mul_(2).sub_(1)


def jvp(net, x):
    y, along = torch.func.jvp(net, (x,), (signs(x),))
    return y, along.square().sum(1).mean()


def chain(net, x):
    h, along = x, signs(x)
    for module in net:
        h = module(h)
        along = along @ module.weight.t() if isinstance(module, nn.Linear) else along * (1 - h.square())
    return h, along.square().sum(1).mean()


def vjp(net, x):
    x = x.detach().requires_grad_()
    y = net(x)
    (along,) = torch.autograd.grad(y, x, signs(y), create_graph=True)
    return y, along.square().sum(1).mean()


def derivatives(section, quick):
    """Contractive and Jacobian penalties against the cheapest form that is known of each."""
    sizes = (20, 10) if quick else (784, 500)
    cases = []
    for name, act in (("sigmoid", nn.Sigmoid), ("tanh", nn.Tanh)):
        net = nn.Sequential(nn.Linear(*sizes), act(), nn.Linear(sizes[1], sizes[0]))
        label = f"Contractive of one {name} layer, {sizes[0]}-{sizes[1]}"
        cases.append((label, net, rs.Contractive().on(rs.outputs("1")), "closed form", closed_form(net[0], act)))
    jacobians = (("jvp", "torch.func.jvp", jvp), ("jvp", "chain rule by hand", chain), ("vjp", "vjp by hand", vjp))
    for name, form, hand in jacobians:
        net = nn.Sequential(nn.Linear(*sizes), nn.Tanh(), nn.Linear(sizes[1], sizes[1]), nn.Tanh())
        net.append(nn.Linear(sizes[1], 10))
        label = f'JacobianNorm(estimator="{name}"), {sizes[0]}-{sizes[1]}-{sizes[1]}-10'
        cases.append((label, net, rs.JacobianNorm(estimator=name).on(), form, hand))
    rows, x = [], torch.randn(64, sizes[0])
    for label, net, rule, form, hand in cases:
        reg = rs.attach(net, STRENGTH * rule)

        def ours(net=net, reg=reg):
            reg.loss(net(x).square().mean()).backward()

        ghost = twin(net)  # without our hooks

        def theirs(net=ghost, hand=hand):
            y, value = hand(net, x)
            (y.square().mean() + STRENGTH * value).backward()

        jobs = {"ours": ours, "hand": theirs, "plain": lambda net=ghost: net(x).square().mean().backward()}
        seconds = paired(jobs, 2 if quick else 31, budget=6)
        over = ratios(seconds, "ours", "hand")
        cells = [spread(seconds[name], 1e3) for name in ("plain", "hand", "ours")]
        rows.append([label, form, *cells, times(over), judged(over[1], 1.2)])
    columns = ["rule", "cheapest form", "no penalty, ms", "by hand, ms", "restrain, ms", "restrain / by hand", "goal"]
    section.table("Penalties on derivatives: forward, loss, penalty, backward", columns, rows)


def deep(quick):
    """(a model, its loss of a batch, its optimizer)."""
    width, depth = (8, 4) if quick else (256, 50)
    model = nn.Sequential(*[layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.ReLU())])
    x = torch.randn(64, width)
    return model, lambda net: net(x).square().mean(), lambda ps: torch.optim.SGD(ps, lr=1e-4)


def walked(rule, load, quick, whole):
    """Seconds of training steps, and of the search over the loss's ancestors in each."""
    (model, loss, make), walk, spent = load(quick), forwards.marks_before, []
    optimizer = make(model.parameters())

    def timed(data, key, wanted):
        start = time.perf_counter()
        found = walk(data, key, () if whole else wanted)
        spent.append(time.perf_counter() - start)
        return found

    with rs.attach(model, STRENGTH * rule(model), optimizer) as reg:

        def step():
            optimizer.zero_grad()
            reg.loss(loss(model)).backward()
            optimizer.step()

        with mock.patch.object(forwards, "marks_before", timed):
            seconds = paired({"step": step}, 2 if quick else 15, budget=20)["step"]
    return seconds, spent[1:]


def walks(section, quick):
    """What it costs to ask the graph of a loss which forwards it depends on, in a step with a rule on each output."""
    models = {
        "MLP, 50 layers of 256": (deep, lambda model: nn.ReLU),
        "ResNet-50": (resnet50, lambda model: Bottleneck),
        "GPT-2 small": (gpt2, lambda model: type(model.transformer.h[0].mlp.act)),
    }
    rows = []
    for title, (load, kind) in models.items():
        for whole in (False, True):
            seconds, spent = walked(lambda model, kind=kind: rs.L1().on(rs.outputs(kind(model))), load, quick, whole)
            share = [a / b for a, b in zip(spent, seconds, strict=True)]
            cells = [spread(seconds, 1e3), spread(spent, 1e3), spread(share, 100)]
            rows.append([title, "whole graph" if whole else "usual", *cells, judged(quartiles(share)[1], 0.01)])
    note = (
        "The search ends where the forwards in question are found; it goes over the whole graph where the loss "
        "depends on none, and as long as a forward was given up of which something is left."
    )
    columns = ["model", "search", "step, ms", "search, ms", "share, %", "goal"]
    section.table("Which forwards count: the search over the loss's ancestors", columns, rows, note)


def main():
    given = options(__doc__, ("--part", {"choices": ("modern",), "help": "only docs/modern-training.md's rules"}))
    warnings.simplefilter("ignore", FutureWarning)
    warnings.simplefilter("ignore", rs.errors.RestrainWarning)  # that it compiles anew, that it copies: both are wanted
    torch.manual_seed(0)
    torch.set_num_threads(given.threads)
    torch._dynamo.config.skip_nnmodule_hook_guards = False  # models of one shape with and without hooks, side by side
    text = f"{given.threads} threads. Rules of strength {digits(STRENGTH)} in whole training steps."
    section = Section(__file__, "Training steps", text)
    if given.part != "modern":
        large(section, "ResNet-50, batch 16 of 64 × 64 images", resnet50, given.quick, CLASSIC)
        large(section, "GPT-2 small, batch 4 of 64 tokens", gpt2, given.quick, CLASSIC)
    large(section, "GPT-2 small: language models' rules", gpt2, given.quick, LANGUAGE, 1.05)
    large(section, "Mixtral of 4 layers, width 512, 4 × 128 tokens", mixture, given.quick, EXPERTS, 1.05)
    large(section, "ResNet-50: rules on 2,048 features", resnet50, given.quick, EMBEDDINGS, 1.05)
    if given.part == "modern":
        section.finish()
        return
    outputs(section, given.quick)
    derivatives(section, given.quick)
    walks(section, given.quick)
    section.finish(given.out, given.quick)


if __name__ == "__main__":
    main()
