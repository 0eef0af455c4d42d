"""A report with every section, and a reader of its HTML."""

from html.parser import HTMLParser

import numpy as np
import torch
from torch import nn

import restrain as rs

NAME = "<script>alert(1)</script>"
VOID = {"meta", "link", "input", "br", "img", "hr"}


class Net(nn.Module):
    """Filters, a layer whose name is markup, and an output."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(1, 4, 3)
        self.add_module("<script>", nn.Linear(4 * 16, 12))
        self.out = nn.Linear(12, 3)

    def forward(self, x):
        h = self.conv(x.reshape(-1, 1, 6, 6)).relu().flatten(1)
        return self.out(self.get_submodule("<script>")(h).relu())


def trained(steps=30, shares=True):
    """(The model, its attachment) after some steps; half of the hidden units are dead."""
    model = Net()
    plan = [
        0.05 * rs.GroupLasso(per="out").on("<script>.weight", how="proximal", name=NAME),
        1e-3 * rs.L1().on("conv.weight", name="l1 in the loss"),
        1e-3 * rs.L2().on("out.weight", name="$decay_"),
    ]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    reg = rs.attach(model, plan, optimizer, track=1)
    reg.track(1, shares=shares)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, 36, generator=generator)
    y = (x[:, :3].sum(1) > 0).long()
    for _ in range(steps):
        optimizer.zero_grad()
        reg.loss(nn.functional.cross_entropy(model(x), y)).backward()
        optimizer.step()
    with torch.no_grad():
        model.get_parameter("<script>.weight")[:6] = 0
    return model, reg


def lasso():
    """A fitted path of 9 inputs, of which two matter."""
    draw = np.random.default_rng(0)
    x = draw.standard_normal((60, 9))
    y = 2 * x[:, 4] - x[:, 7] + 0.3 * draw.standard_normal(60)
    return rs.RegressorCV(points=12, cv=3).fit(x, y)


def names():
    return [NAME, *[f"input {number}" for number in range(1, 9)]]


def contrast(one, other):
    """The contrast of two colors by WCAG 2.2."""

    def luminance(color):
        parts = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        r, g, b = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    high, low = sorted([luminance(one), luminance(other)], reverse=True)
    return (high + 0.05) / (low + 0.05)


class Reader(HTMLParser):
    """Tags, ids, links and texts of a page; elements that aren't closed are faults."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.ids, self.links, self.faults, self.open = [], [], [], [], []
        self.texts = {}  # tag -> texts directly in it
        self.feed(text)
        self.close()
        self.faults += [f"<{tag}> isn't closed" for tag in self.open]

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name in ("href", "src", "xlink:href", "action", "data"):
                self.links.append(value)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if not self.open or self.open[-1] != tag:
            self.faults.append(f"</{tag}> closes {self.open[-1:]}")
        if tag in self.open:
            while self.open.pop() != tag:
                pass

    def handle_data(self, data):
        if self.open and data.strip():
            self.texts.setdefault(self.open[-1], []).append(data)
