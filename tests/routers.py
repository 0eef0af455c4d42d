"""A mixture of experts in short: a body, and a router behind it, in a checkpoint or not."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

EXPERTS = 6


class Moe(nn.Module):
    def __init__(self, reentrant=None):
        super().__init__()
        self.body, self.router, self.reentrant = nn.Linear(4, 5), nn.Linear(5, EXPERTS), reentrant

    def block(self, x):
        return self.router(torch.tanh(self.body(x)))

    def forward(self, x):
        return self.block(x) if self.reentrant is None else checkpoint(self.block, x, use_reentrant=self.reentrant)


def fresh(reentrant=None):
    torch.manual_seed(1)
    return Moe(reentrant).double()
