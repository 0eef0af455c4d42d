"""Models of parameters that lie in memory in several ways."""

import torch
from torch import nn

import restrain as rs


def explained(model):
    """Return a module without children whose parameters have the axes (out, in, kernel, ...)."""
    axes = {
        name: " ".join(["out in", *["kernel"] * (p.dim() - 2)]) for name, p in model.named_parameters() if p.dim() > 1
    }
    if axes:
        rs.layout(model, **axes)
    return model


def model_of(shapes, dtypes=(torch.float32,), seed=0):
    draws, model = torch.Generator().manual_seed(seed), nn.Module()
    for number, shape in enumerate(shapes):
        w = torch.randn(shape, generator=draws, dtype=torch.float64).to(dtypes[number % len(dtypes)])
        w = w.to(memory_format=torch.channels_last) if w.dim() == 4 else w.T.contiguous().T if w.dim() == 2 else w
        model.register_parameter(f"p{number}", nn.Parameter(w))
    return explained(model)
