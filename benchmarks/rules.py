"""What rules on parameters cost: in the loss, at the step, by hand, by peers; against one pass over memory.

    python benchmarks/rules.py [--quick] [--out folder] [--device cuda]

Parameter lists of GPT-2 small, ResNet-50 and an MLP 784-1000-1000-10. A rule at the step is timed as the hooks that it
hangs on the optimizer, whole steps of optimizers are timed after that. The floor is one pass over the bytes that must
be read and written, in the same rounds and over the very memory that the rule works on, as pages of memory differ in
speed: the weights of a list lie in one flat tensor, their gradients in another. It is `a += b` for rules that read
weights and change gradients (a: gradients, b: weights), `a *= c` for those that change weights (a: weights), and
`a += v` for the prox after Adam, which reads second moments besides (a: weights, v: the moments). The numbers are such
that nothing changes: b and v times 1e-30, c = 1. On another device than the CPU the peers and the process without a
C++ compiler are left out; times are taken when the device's work is done.
"""

import functools
import os
import tempfile
import warnings

import torch
from lists import LISTS, RATE, RULES, STRENGTH, beside, model_of, stretch, tiny, twin
from measure import Section, child, digits, judged, options, paired, quartiles, ratios, spread, times

import restrain as rs

GOALS = {"with": {"ResNet-50": 1.3}, "without": {"ResNet-50": 1.6}}  # others: 1.15 and 1.5
SMALL = (75, 300, 1000)
DECAY = STRENGTH * rs.L2().on("w*", how="decoupled")
AFTER_ADAM = {
    'L1, how="proximal"': STRENGTH * rs.L1().on("*", how="proximal"),
    'L2, how="decoupled"': DECAY,
    "L2, corrected decay": rs.schedules.LearningRate() * DECAY,
    "L2, cautious decay": STRENGTH * rs.L2().on("w*", how="decoupled", cautious=True),
    "Hyperball": rs.Hyperball().on("w*"),
    'Hyperball(per="row")': rs.Hyperball(per="row").on("w*"),
}


def hooks(optimizer, how):
    """What the rules of an optimizer do around its step, without the step.

    Those that act before it also need the hook after it: a step that doesn't end is an interrupted one, whose changes
    aren't made again.
    """
    before = how in ("gradient", "decoupled")
    optimizer.register_step_pre_hook(lambda *_: None)  # so that rules aren't folded into the optimizer's own pass
    first, last = optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks  # torch's
    found = [*(first.values() if before else ()), *last.values()]
    return lambda: [hook(optimizer, (), {}) for hook in found]


def attached(model, rule, how, on="*", optimizer=None):
    """A job: what a rule does around a step of an optimizer, plain SGD on the model's memory if none is given."""
    if optimizer is None:
        model = twin(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    scaled = rule if how == "project" else STRENGTH * rule
    rs.attach(model, scaled.on(on, how=how), optimizer, compile=True)  # without a compiler it is done without
    job, optimizer.model = hooks(optimizer, how), model  # attachments hold models weakly
    p = max(model.parameters(), key=torch.Tensor.numel)
    seen = p.grad if how == "gradient" else p
    if how == "project":
        p.detach().mul_(10)  # attaching has put it into the set
    was = seen.detach().clone()
    job()
    if torch.equal(was, seen.detach()):
        raise SystemExit(f"{rule} by how={how!r} did nothing in the optimizer's hooks: this script must be mended")
    return job


def backward(value, ps):
    """A job: a penalty's value and gradient, as they are within a loss."""
    return lambda: (STRENGTH * value(ps)).backward()


def quietly(job):
    """The same without a graph."""

    def run():
        with torch.no_grad():
            job()

    return run


def floors(ps, moments=()):
    """{name: one pass over the memory of parameters}."""
    a, b = stretch([p.grad for p in ps]), stretch([p.detach() for p in ps])
    found = {"a *= c": lambda: b.mul_(1.0), "a += b": lambda: a.add_(b, alpha=1e-30)}
    if moments:
        v = stretch(moments)
        found["a += v"] = lambda: b.add_(v, alpha=1e-30)
    return found


def adam_of(model):
    """Adam after a step, its second moments in one stretch of memory; and these."""
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE, fused=True)
    optimizer.step()
    states = list(optimizer.state.values())
    for state, moment in zip(states, beside([state["exp_avg_sq"].shape for state in states]), strict=True):
        state["exp_avg_sq"] = moment.copy_(state["exp_avg_sq"])
    return optimizer, [state["exp_avg_sq"] for state in states]


def floor_of(how):
    """Which pass a rule can't be faster than."""
    return "a += b" if how in ("loss", "gradient") else "a *= c"


def rounds_of(title, quick):
    return 2 if quick else {"GPT-2 small": 7, "ResNet-50": 15, "MLP": 41}.get(title, 21)


def jobs_of(model, name, compiled):
    """({job: function}, {job: the pass that bounds it}, these passes) of one rule over one list."""
    case = RULES[name]
    ps = [p for key, p in model.named_parameters() if case.on == "*" or key.startswith("w")]
    jobs, bound = {}, {}
    if case.loop:
        jobs["loop in the loss"] = backward(case.loop, ps)
        if case.foreach:
            jobs["loop in the loss, foreach"] = backward(case.foreach, ps)
        if compiled:
            jobs["loop in the loss, torch.compile"] = backward(torch.compile(case.loop), ps)
        jobs['restrain, how="loss"'] = rs.attach(model, STRENGTH * case.ours.on(case.on)).penalty
        penalty = jobs['restrain, how="loss"']
        jobs['restrain, how="loss"'] = lambda: penalty().backward()
    bound |= dict.fromkeys(jobs, floor_of("loss"))
    for label, function in case.by_hand.items():
        jobs[label] = quietly(lambda function=function: function(ps))
        bound[label] = floor_of("gradient" if "in place" in label else "proximal")
    for how in case.hows:
        jobs[f'restrain, how="{how}"'] = attached(model, case.ours, how, case.on)
        bound[f'restrain, how="{how}"'] = floor_of(how)
    moments = ()
    if name == "L1":
        label, own = 'restrain, how="proximal" after Adam', twin(model)
        optimizer, moments = adam_of(own)
        jobs[label], bound[label] = attached(own, case.ours, "proximal", optimizer=optimizer), "a += v"
    return jobs, bound, floors(ps, moments)


def goal_of(label, title, compiler="with"):
    """How many floors a job of ours may take."""
    ours = label.startswith("restrain") and "loss" not in label
    return GOALS[compiler].get(title, 1.15 if compiler == "with" else 1.5) if ours else None


def rows_of(name, title, seconds, bound, compiler="with"):
    """Lines of a table: one a job."""
    loop = "loop in the loss"
    for label, found in seconds.items():
        if label in bound:
            over = ratios(seconds, label, bound[label])
            faster = ratios(seconds, loop, label) if loop in seconds else None
            least = None
            if label.startswith("restrain") and faster:
                least = (2 if title == "GPT-2 small" else 1) if "loss" in label else 5
            goals = [judged(over[1], goal_of(label, title, compiler)), judged(faster and faster[1], at_least=least)]
            verdict = "; ".join(f"{kind} {said}" for kind, said in zip(("floor", "loop"), goals, strict=True) if said)
            yield [name, label, spread(found, 1e3), times(over), times(faster) if faster else "", verdict]


def over_list(section, title, shapes, quick):
    """The table of one list."""
    rows = []
    for name in RULES:
        model = model_of(shapes)
        jobs, bound, floor = jobs_of(model, name, compiled=name == "L1")
        seconds = paired({**jobs, **floor}, rounds_of(title, quick), budget=25)
        rows += rows_of(name, title, seconds, bound)
        if name == "L1":
            rows = [["", f"floor: {key}", spread(seconds[key], 1e3), "", "", ""] for key in floor] + rows
    count = sum(torch.Size(shape).numel() for shape in shapes)
    section.table(
        f"{title}: {len(shapes)} tensors, {count / 1e6:.1f} M entries",
        ["rule", "form", "ms", "× floor", "loop / this", "goal"],
        rows,
        "max-norm holds from the first round on, so that later ones only look.",
    )


def inplace_only(quick):
    """In a child: × floor of rules at the step, for L1, L2 and the elastic net, over all lists."""
    found = {}
    for title, shapes in LISTS.items():
        shapes = tiny(shapes) if quick else shapes
        for name in ("L1", "L2", "elastic net"):
            model = model_of(shapes)
            jobs, bound, floor = jobs_of(model, name, compiled=False)
            jobs = {label: job for label, job in jobs.items() if label.startswith("restrain") and "loss" not in label}
            seconds = paired({**jobs, **floor}, rounds_of(title, quick), budget=8)
            for label in jobs:
                found[f"{title}|{name}|{label}"] = [quartiles(seconds[label]), ratios(seconds, label, bound[label])]
    return {"found": found}


def without_compiler(section, quick):
    """The same where no compiler is found: a child that can't see one, with an empty cache."""
    with tempfile.TemporaryDirectory() as empty:
        hidden = {"PATH": empty, "CXX": None, "CC": None, "TORCHINDUCTOR_CACHE_DIR": os.path.join(empty, "cache")}
        got = child("rules.py", "--part", "inplace", *(["--quick"] if quick else []), environment=hidden)
    rows = [["", "", "", got.get("missing", ""), "", ""]] if "missing" in got else []
    for key, (found, over) in got.get("found", {}).items():
        title, name, label = key.split("|")
        ms = f"{digits(found[1] * 1e3)} ({digits(found[0] * 1e3)} – {digits(found[2] * 1e3)})"
        rows.append([title, name, label, ms, times(over), judged(over[1], goal_of(label, title, "without"))])
    section.table(
        "At the step, without a compiler",
        ["list", "rule", "form", "ms", "× floor", "goal"],
        rows,
        "In a process that finds no C++ compiler (an empty PATH, an empty cache of compiled code).",
    )


def two_rules(section, title, shapes, quick):
    """Two rules on the same tensors by the same how, against one and against the other alone."""
    model, rows, l1, l2 = model_of(shapes), [], STRENGTH * rs.L1(), STRENGTH * rs.L2()
    for how in ("gradient", "decoupled", "proximal"):
        jobs, twins = {}, []
        for label, plan in {"L1": [l1], "L2": [l2], "both": [l1, l2]}.items():
            twins.append(twin(model))
            optimizer = torch.optim.SGD(twins[-1].parameters(), lr=RATE)
            rules = [rule.on("*", how=how, name=f"{label} {n}") for n, rule in enumerate(plan)]
            rs.attach(twins[-1], rules, optimizer, compile=True)
            jobs[label] = hooks(optimizer, how)
        seconds = paired(jobs, rounds_of(title, quick), budget=8)
        over = ratios(seconds, "both", "L1")
        rows.append([title, how, *(spread(seconds[label], 1e3) for label in jobs), times(over), judged(over[1], 1.2)])
    columns = ["list", "how", "L1, ms", "L2, ms", "both, ms", "both / L1", "goal: one pass"]
    section.table(f"Two rules on one tensor, {title}", columns, rows)


def optimizers(model):
    """{whole step: (a function, what it is compared with)}; each optimizer has its own state."""
    ps, made = list(model.parameters()), {}

    def add(label, make, rule=None, against=None):
        own = twin(model)
        optimizer = make(own.parameters())
        if rule is not None:
            rs.attach(own, rule, optimizer, compile=True)
        made[label], optimizer.model = (optimizer.step, against), own

    sgd = functools.partial(torch.optim.SGD, lr=RATE)
    add("SGD", sgd)
    add("SGD, its own weight_decay", functools.partial(sgd, weight_decay=2 * STRENGTH), against="SGD")
    for how in ("gradient", "decoupled"):
        add(f'SGD, restrain L2, how="{how}"', sgd, STRENGTH * rs.L2().on("*", how=how), "SGD")
    add('SGD, restrain L1, how="proximal"', sgd, STRENGTH * rs.L1().on("*", how="proximal"), "SGD")
    adam = functools.partial(torch.optim.Adam, lr=1e-4, fused=True)
    add("Adam, fused", adam)
    for label, rule in AFTER_ADAM.items():
        add(f"Adam, fused, restrain {label}", adam, rule, "Adam, fused")
    try:
        from torchao.prototype.pat.optim import PruneOptimizer

        group = {"params": ps, "prox_type": "ProxLasso", "group_type": "ElemGrouper"}
        made["Adam, fused, torchao PruneOptimizer"] = (
            PruneOptimizer(adam([group]), reg_lambda=STRENGTH).step,
            "Adam, fused",
        )
    except ImportError as error:
        made["torchao PruneOptimizer"] = (None, str(error)[:80])
    return made


def whole_steps(section, title, shapes, quick):
    """Whole steps of optimizers, with and without rules."""
    model = model_of(shapes)
    made = optimizers(model)
    jobs = {label: job for label, (job, _) in made.items() if job is not None}
    seconds = paired(jobs, rounds_of(title, quick), budget=20)
    rows = []
    for label, (job, against) in made.items():
        if job is None:
            rows.append([label, f"missing: {against}", "", ""])
            continue
        over = ratios(seconds, label, against) if against else None
        least = 1.15 if "Hyperball" in label else 1.1 if "proximal" in label else 1.05
        goal = judged(over[1], least) if over and "Adam" in label and "restrain" in label else ""
        rows.append([label, spread(seconds[label], 1e3), times(over) if over else "", goal and f"stretch {goal}"])
    section.table(f"Whole steps of optimizers, {title}", ["step", "ms", "× without", "goal"], rows)


def many_small(section, quick):
    """Microseconds a tensor where there are many small ones."""
    rows = []
    for count in (10,) if quick else SMALL:
        model = model_of([(10, 10)] * count)
        ps = list(model.parameters())
        reg = rs.attach(model, STRENGTH * rs.L1().on("*"))
        jobs = {"loop in the loss": backward(RULES["L1"].loop, ps)}
        jobs["foreach in the loss"] = backward(RULES["L1"].foreach, ps)
        jobs['restrain, how="loss"'] = lambda reg=reg: reg.penalty().backward()
        for how in RULES["L1"].hows:
            jobs[f'restrain, how="{how}"'] = attached(model, rs.L1(), how)
        seconds = paired(jobs, 2 if quick else 31)
        for label, found in seconds.items():
            middle = quartiles(found)[1] * 1e6 / count
            goal = judged(middle, 15 if "loss" in label else 3) if label.startswith("restrain") else ""
            rows.append([count, label, spread(found, 1e6 / count), goal])
    section.table("Many small tensors (10 × 10 each), L1", ["tensors", "form", "µs a tensor", "goal"], rows)


def keras_peers(section, quick):
    """Keras's own regularizers, in processes of their own; the hand-written torch loop takes turns with them there."""
    rows = []
    for backend in ("torch", "jax"):
        chosen = {"KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
        got = child("rules_keras.py", *(["--quick"] if quick else []), environment=chosen)
        if "missing" in got:
            rows.append([backend, "", "", f"missing: {got['missing']}", ""])
        for key, (ms, over) in got.get("found", {}).items():
            rows.append([backend, *key.split("|"), ms, over])
    columns = ["backend", "list", "rule", "ms", "torch loop / this"]
    section.table("Keras 3: regularizers with their gradients; the constraint", columns, rows)


def main():
    given = options(
        __doc__,
        ("--part", {"choices": ("inplace",), "help": "what a child of this script does"}),
        ("--device", {"default": "cpu", "help": "where the lists lie: cpu, cuda"}),
    )
    torch.set_default_device(given.device)
    warnings.simplefilter("ignore", rs.errors.RestrainWarning)  # weights that max-norm and L1 empty in many rounds
    torch.manual_seed(0)
    torch.set_num_threads(given.threads)
    if given.part:
        import json

        print(json.dumps(inplace_only(given.quick)))
        return
    text = (
        f"{given.threads} threads, on {given.device}. A rule at the step is timed as the hooks that it hangs on the "
        "optimizer. × floor: over one pass at the machine's bandwidth, measured in the same rounds."
    )
    section = Section(__file__, "Rules on parameters", text)
    lists = {title: tiny(shapes) if given.quick else shapes for title, shapes in LISTS.items()}
    for title, shapes in lists.items():
        over_list(section, title, shapes, given.quick)
    on_cpu = given.device == "cpu"
    if on_cpu:
        without_compiler(section, given.quick)
    for title in ("GPT-2 small", "ResNet-50"):
        two_rules(section, title, lists[title], given.quick)
        whole_steps(section, title, lists[title], given.quick)
    many_small(section, given.quick)
    if on_cpu:
        keras_peers(section, given.quick)
    section.finish(given.out, given.quick)


if __name__ == "__main__":
    main()
