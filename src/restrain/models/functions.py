"""Activation functions of layers, by name.

name                                  function of x, along the last axis for norm:*
linear, relu, tanh, sigmoid,
softplus, elu, gelu, silu             as in torch
leaky_relu                            max(x, 0.01 x)
rect:max (= relu), rect:min,
rect:minmax                           max(x, 0), min(x, 1), both
norm:mean, norm:max                   x - mean, x / (max |x| + 1e-8)
norm:std, norm:z                      x / (std + 1e-8), (x - mean) / (std + 1e-8)
prelu                                 max(x, 0) - r max(-x, 0); each unit learns r
lgrelu                                g max(x, 0) - r max(-x, 0); each unit learns g and r
maxout:k                              the greatest of k lines m x + b; each unit learns m and b
a+b                                   b(a(x))
"""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from restrain.errors import PlanError

_SMALL = 1e-8


def _centred(x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True)


def _over_std(x: Tensor, of: Tensor) -> Tensor:
    return x / (of.std(-1, correction=0, keepdim=True) + _SMALL)


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda x: x,
    "relu": torch.relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
    "elu": F.elu,
    "gelu": F.gelu,
    "silu": F.silu,
    "leaky_relu": F.leaky_relu,
    "rect:min": lambda x: x.clamp(max=1),
    "rect:minmax": lambda x: x.clamp(0, 1),
    "norm:mean": _centred,
    "norm:max": lambda x: x / (x.abs().amax(-1, keepdim=True) + _SMALL),
    "norm:std": lambda x: _over_std(x, x),
    "norm:z": lambda x: _over_std(_centred(x), x),
}
LEARNED = ("prelu", "lgrelu", "maxout:5")  # as shown in errors
ALIASES = {"logistic": "sigmoid", "identity": "linear", "swish": "silu", "rect:max": "relu"}
ALIASES["leaky-gain-relu"] = "lgrelu"


class Slopes(nn.Module):
    """max(x, 0) - r max(-x, 0), with an r for each unit; with `gain`, also a factor of max(x, 0).

    Source: He, Zhang, Ren and Sun (2015), "Delving deep into rectifiers", whose first r is 0.25.
    """

    def __init__(self, size: int, *, gain: bool = False) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.full((size,), 0.25, device="cpu"))
        self.gain = nn.Parameter(torch.ones(size, device="cpu")) if gain else None

    def forward(self, x: Tensor) -> Tensor:
        above = torch.relu(x) if self.gain is None else self.gain * torch.relu(x)
        return above - self.slope * torch.relu(-x)


class Maxout(nn.Module):
    """maxₖ mₖ x + bₖ, with k lines for each unit; m begin standard normal, b at zero.

    Source: Goodfellow, Warde-Farley, Mirza, Courville and Bengio (2013), "Maxout networks", with
    lines of one number each, as theanets has them.
    """

    def __init__(self, size: int, pieces: int) -> None:
        super().__init__()
        self.shape = (pieces, size)
        self.slopes = nn.Parameter(torch.randn(pieces * size, device="cpu"))  # on one axis: no weights, to rs.weights
        self.offsets = nn.Parameter(torch.zeros(pieces * size, device="cpu"))

    def forward(self, x: Tensor) -> Tensor:
        return (x.unsqueeze(-2) * self.slopes.view(self.shape) + self.offsets.view(self.shape)).amax(-2)


def is_known(text: str) -> bool:
    """Return True if the text, as `read` gives it, names an activation function."""
    parts = text.split("+")
    return all(part in FUNCTIONS or part in LEARNED[:2] or _pieces(part) for part in parts) and len(parts) <= _MOST


_MOST = 16  # functions joined by "+", and pieces of maxout × 2⁶


def _pieces(part: str) -> int:
    """Return k of "maxout:k", else 0."""
    name, _, count = part.partition(":")
    known = name == "maxout" and count.isascii() and count.isdigit() and len(count) < 5
    return int(count) if known and int(count) <= _MOST * 64 else 0


def read(text: Any, spec: Any, more: tuple[str, ...] = ()) -> str:
    """Return the canonical name of an activation function.

    Args:
        text: a name, or several joined by "+".
        spec: the specification that holds it, for the message.
        more: other words that would have been understood, for the message.

    Raises:
        PlanError: no function has that name; the message lists near names.
    """
    parts = [ALIASES.get(part.strip().lower(), part.strip().lower()) for part in str(text).split("+")]
    name = "+".join(parts)
    if is_known(name):
        return name
    wrong = next((part for part in parts if not is_known(part)), name)
    kind, known = ("form or activation" if more else "activation"), (*FUNCTIONS, *LEARNED, *more)
    if wrong.replace("_", "-") == "leaky-relu":
        raise PlanError(
            f"{text!r}, in {spec!r}: theanets' leaky-relu is 'prelu' here, which learns its slopes; torch's is "
            "'leaky_relu', of slope 0.01"
        )
    if wrong.startswith("maxout"):
        raise PlanError(f"{text!r}, in {spec!r}: maxout is written with its number of lines, as in 'maxout:5'")
    near = get_close_matches(wrong, known)
    hint = f" (near it: {', '.join(near)})" if near else ""
    raise PlanError(f"no {kind} is called {wrong!r}{hint}, in {spec!r}; there are: {', '.join(known)}")


def learned(text: str, size: int) -> nn.ModuleList | None:
    """Return the parts of an activation function that have parameters; None without any."""
    found: list[nn.Module] = [
        Maxout(size, _pieces(part)) if _pieces(part) else Slopes(size, gain=part == "lgrelu")
        for part in text.split("+")
        if part not in FUNCTIONS
    ]
    return nn.ModuleList(found) if found else None


def apply(text: str, x: Tensor, parts: nn.ModuleList | None) -> Tensor:
    """Return the activation function of x; `parts` are those of `learned`."""
    own = iter(() if parts is None else parts)
    for part in text.split("+"):
        x = FUNCTIONS[part](x) if part in FUNCTIONS else next(own)(x)
    return x
