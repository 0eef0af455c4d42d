"""Optimizers of other packages in short, where the package itself isn't needed."""

import torch


class DPOptimizer(torch.optim.Optimizer):
    """Opacus' wrapper in short: .grad is written from gradients of samples, and the base class isn't initialised."""

    def __init__(self, optimizer):
        self.original_optimizer = optimizer

    param_groups = property(lambda self: self.original_optimizer.param_groups)
    state = property(lambda self: self.original_optimizer.state)
    defaults = property(lambda self: self.original_optimizer.defaults)

    def zero_grad(self, set_to_none=True):
        self.original_optimizer.zero_grad(set_to_none)

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = p.grad_sample.mean(0)
        return self.original_optimizer.step()
