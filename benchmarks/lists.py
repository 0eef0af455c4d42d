"""Lists of parameters as real models have them, and the forms that one writes by hand for rules on them."""

import copy
from dataclasses import dataclass, field

import torch
from torch import nn

import restrain as rs

STRENGTH, RATE, LARGEST = 1e-3, 1e-2, 0.5

MLP = [(1000, 784), (1000,), (1000, 1000), (1000,), (10, 1000), (10,)]
GPT2 = [(50257, 768), (1024, 768), (768,), (768,)] + 12 * [
    *[(768,), (768,), (2304, 768), (2304,), (768, 768), (768,)],
    *[(768,), (768,), (3072, 768), (3072,), (768, 3072), (768,)],
]


def resnet50():
    """The 161 shapes of ResNet-50's parameters."""
    shapes, width = [(64, 3, 7, 7), (64,), (64,)], 64
    for blocks, planes in ((3, 64), (4, 128), (6, 256), (3, 512)):
        for block in range(blocks):
            for out, into, k in ((planes, width, 1), (planes, planes, 3), (4 * planes, planes, 1)):
                shapes += [(out, into, k, k), (out,), (out,)]
            if block == 0:
                shapes += [(4 * planes, width, 1, 1), (4 * planes,), (4 * planes,)]
            width = 4 * planes
    return [*shapes, (1000, 2048), (1000,)]


LISTS = {"GPT-2 small": GPT2, "ResNet-50": resnet50(), "MLP": MLP}


def tiny(shapes):
    """Like a list, a few entries a tensor: to see that a script runs."""
    return [tuple(min(size, 8) for size in shape) for shape in shapes[:12]]


def beside(shapes):
    """Tensors of these shapes, beside each other in one stretch of memory, each from a multiple of 64 bytes on."""
    sizes = [-(-torch.Size(shape).numel() // 16) * 16 for shape in shapes]
    parts = (torch.randn(sum(sizes)) / 30).split(sizes)
    return [part[: torch.Size(shape).numel()].view(shape) for part, shape in zip(parts, shapes, strict=True)]


def stretch(tensors):
    """The memory in which tensors lie beside each other, as one flat tensor."""
    starts = [t.storage_offset() for t in tensors]
    end = max(start + t.numel() for start, t in zip(starts, tensors, strict=True))
    return torch.empty(0).set_(tensors[0].untyped_storage(), min(starts), (end - min(starts),))


def model_of(shapes):
    """A model that holds parameters of these shapes, with gradients; matrices are called w*, vectors b*.

    All weights are in one stretch of memory, all gradients in another, matrices first.
    """
    model = nn.Module()
    shapes = sorted(shapes, key=lambda shape: len(shape) < 2)
    for number, (w, grad) in enumerate(zip(beside(shapes), beside(shapes), strict=True)):
        p = nn.Parameter(w)
        p.grad = grad
        model.register_parameter(f"{'w' if w.dim() > 1 else 'b'}{number}", p)
    return model


def twin(model):
    """The same memory as parameters of another model: what is attached to one is nothing to the other."""
    known = {id(b): b for b in model.buffers()}
    for p in model.parameters():
        known[id(p)] = nn.Parameter(p.detach())
        known[id(p)].grad = p.grad
    return copy.deepcopy(model, known)


def soft_threshold(ps, threshold=STRENGTH * RATE):
    """What one writes by hand for a proximal L1, by torch's foreach forms."""
    cut = torch._foreach_clamp_max(ps, threshold)
    torch._foreach_clamp_min_(cut, -threshold)
    torch._foreach_sub_(ps, cut)


def add_signs(ps, factor=STRENGTH):
    torch._foreach_add_([p.grad for p in ps], torch._foreach_sign(ps), alpha=factor)


def add_multiples(ps, factor=2 * STRENGTH):
    torch._foreach_add_([p.grad for p in ps], ps, alpha=factor)


def add_both(ps):
    add_signs(ps, STRENGTH / 2)
    add_multiples(ps, STRENGTH)


def add_row_gradients(ps):
    for p in ps:
        rows = p.flatten(1)
        p.grad.flatten(1).add_(rows / rows.norm(dim=1, keepdim=True), alpha=STRENGTH * rows.shape[1] ** 0.5)


def renorm(ps):
    for p in ps:
        p.copy_(torch.renorm(p, 2, 0, LARGEST))


def rows_loss(ps):
    return sum(p[0].numel() ** 0.5 * p.flatten(1).norm(dim=1).sum() for p in ps)


def elastic(ps):
    return sum(p.abs().sum() for p in ps) / 2 + sum(p.square().sum() for p in ps) / 2


@dataclass(frozen=True)
class Case:
    """A rule: ours, and how it is written by hand."""

    ours: object
    on: str = "*"
    hows: tuple = ("gradient", "decoupled", "proximal")
    loop: object = None  # the loop that everybody writes in the loss
    foreach: object = None  # the same by torch's foreach forms
    by_hand: dict = field(default_factory=dict)  # {name: in place}


RULES = {
    "L1": Case(
        rs.L1(),
        loop=lambda ps: sum(p.abs().sum() for p in ps),
        foreach=lambda ps: torch.stack(torch._foreach_norm(ps, 1)).sum(),
        by_hand={"by hand, foreach sign, in place": add_signs, "by hand, foreach soft threshold": soft_threshold},
    ),
    "L2": Case(
        rs.L2(),
        loop=lambda ps: sum(p.square().sum() for p in ps),
        foreach=lambda ps: torch.stack(torch._foreach_norm(ps)).square().sum(),
        by_hand={"by hand, foreach add, in place": add_multiples},
    ),
    "elastic net": Case(
        rs.ElasticNet(0.5, 0.5), loop=elastic, by_hand={"by hand, foreach sign and add, in place": add_both}
    ),
    "group lasso per row": Case(
        rs.GroupLasso(per="row"), "w*", loop=rows_loss, by_hand={"by hand, norms and add, in place": add_row_gradients}
    ),
    "max-norm": Case(rs.MaxNorm(LARGEST, per="row"), "w*", ("project",), by_hand={"by hand, torch.renorm": renorm}),
}
