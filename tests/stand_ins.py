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


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimisation as it is commonly written (davda54/sam); with rho = 0 the base optimizer itself."""

    def __init__(self, params, base, rho=0.0, **options):
        super().__init__(params, {"rho": rho, **options})
        self.base_optimizer = base(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def step(self, closure):
        before = [[p.clone() for p in group["params"]] for group in self.param_groups]
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(p.grad, alpha=group["rho"])
        torch.enable_grad()(closure)()
        for group, old in zip(self.param_groups, before, strict=True):
            for p, was in zip(group["params"], old, strict=True):
                p.copy_(was)
        self.base_optimizer.step()


class SGDScheduleFree(torch.optim.Optimizer):
    """Parameters are y in training and the average x in evaluation, z is in the state (Defazio and others, 2024)."""

    def __init__(self, params, lr=0.1, beta=0.9):
        super().__init__(params, {"lr": lr, "beta": beta, "k": 0, "train_mode": True})

    def _towards(self, weight, mode):
        for group in self.param_groups:
            if group["train_mode"] != mode:
                for p in group["params"]:
                    p.data.lerp_(self.state[p]["z"], weight(group["beta"]))
                group["train_mode"] = mode

    def eval(self):
        self._towards(lambda beta: 1 - 1 / beta, False)

    def train(self):
        self._towards(lambda beta: 1 - beta, True)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            assert group["train_mode"], "call optimizer.train() first"
            share, lr, beta = 1 / (group["k"] + 1), group["lr"], group["beta"]
            for p in group["params"]:
                z = self.state[p].setdefault("z", p.clone())
                p.lerp_(z, share).add_(p.grad, alpha=lr * (beta * (1 - share) - 1))
                z.sub_(p.grad, alpha=lr)
            group["k"] += 1
