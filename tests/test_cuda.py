"""What shows on a GPU only: waiting for it, its memory, its graphs. `make test-cuda` runs this file.

It has not been run yet: no GPU was at hand where it was written.
"""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import restrain as rs

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

LOSS = [
    0.1 * rs.L1().on("*.weight"),
    0.1 * rs.GroupLasso(per="out").on("0.weight"),
    0.3 * rs.L1().on(rs.outputs("1")),
    0.1 * rs.KLSparsity(0.2).on(rs.outputs("0", via=torch.sigmoid)),
]
STEP = [
    0.1 * rs.L2().on("0.weight", how="gradient"),
    0.1 * rs.L1().on("0.weight", how="decoupled"),
    1e-3 * rs.L1().on("2.weight", how="proximal"),
    1e-3 * rs.GroupLasso(per="out").on("0.weight", how="proximal"),
]
SETS = [rs.NonNegative().on("2.bias"), rs.Box(-1, 1).on("0.bias"), rs.MaxNorm(0.5, per="out").on("2.weight")]
FORWARD = [
    rs.GaussianNoise(0.1).on(rs.inputs()),
    rs.Dropout(0.3).on(rs.outputs("1")),
    rs.DropConnect(0.1).on("0.weight"),
]
MOVING = [0.1 * rs.schedules.WarmUp(10) * rs.L1().on("*.weight"), 0.1 * rs.L2().on("2.weight", every=2)]
PLANS = {"loss": LOSS, "step": STEP, "sets": SETS, "forward": FORWARD, "moving": MOVING}
OPTIMIZERS = {
    "SGD": lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9),
    "Adam": lambda ps: torch.optim.Adam(ps, lr=0.01, foreach=False),
    "AdamW, fused": lambda ps: torch.optim.AdamW(ps, lr=0.01, fused=True),
    "Adam, capturable": lambda ps: torch.optim.Adam(ps, lr=0.01, capturable=True, foreach=False),
}


def network(device):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8, device=device), nn.ReLU(), nn.Linear(8, 3, device=device))


def batch(device, samples=16):
    return torch.randn(samples, 6, device=device), torch.randint(3, (samples,), device=device)


def step(model, optimizer, reg, x, y):
    optimizer.zero_grad()
    loss = reg.loss(F.cross_entropy(model(x), y))
    loss.backward()
    optimizer.step()
    return loss.detach()


@GPU
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("plan", PLANS)
def test_a_step_does_not_wait_for_the_gpu(plan, optimizer):
    model = network("cuda")
    opt = OPTIMIZERS[optimizer](model.parameters())
    x, y = batch("cuda")
    with rs.attach(model, PLANS[plan], opt) as reg:
        for _ in range(4):
            step(model, opt, reg, x, y)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(4):
                step(model, opt, reg, x, y)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@GPU
def test_waiting_for_the_gpu_is_noticed():
    x = torch.ones(3, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchronizing"):
            x.sum().item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@GPU
@pytest.mark.parametrize("plan", ["loss", "step", "sets", "moving"])
def test_graphs_of_kernels_give_the_same(plan):
    found = []
    for compiled in (False, True):
        torch.compiler.reset()
        model = network("cuda")
        opt = torch.optim.Adam(model.parameters(), lr=0.01, capturable=True)
        with rs.attach(model, PLANS[plan], opt) as reg:
            call = torch.compile(model, mode="reduce-overhead") if compiled else model
            torch.manual_seed(1)
            losses = []
            for _ in range(6):
                x, y = batch("cuda")
                torch.compiler.cudagraph_mark_step_begin()
                opt.zero_grad()
                loss = reg.loss(F.cross_entropy(call(x), y))
                loss.backward()
                opt.step()
                losses.append(loss.item())
        found.append((losses, [p.detach().clone() for p in model.parameters()]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


@GPU
def test_a_graph_captured_by_hand_is_refused():
    model = network("cuda")
    x, _ = batch("cuda")
    with rs.attach(model, LOSS):
        model(x)
        with pytest.raises(rs.errors.CaptureError, match="reduce-overhead"), torch.cuda.graph(torch.cuda.CUDAGraph()):
            model(x)


@GPU
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_values_under_autocast_are_float32s(dtype):
    model = network("cuda")
    reference = copy.deepcopy(model).double()
    x, _ = batch("cuda", 512)
    values = []
    for net, given, cast in ((model, x, True), (reference, x.double(), False)):
        with rs.attach(net, LOSS) as reg:
            with torch.autocast("cuda", dtype, enabled=cast):
                out = net(given).square().mean()
            reg.loss(out).backward()
            values.append(reg.values())
    for name, value in values[0].items():
        assert value == pytest.approx(values[1][name], rel=2e-2)


@GPU
@pytest.mark.parametrize("how", ["loss", "gradient", "decoupled", "proximal"])
def test_peak_memory(how):
    """Beyond weights, gradients and the optimizer's state: a few times the largest weight, whatever the number."""
    model = nn.Sequential(*[nn.Linear(1024, 1024, bias=False) for _ in range(16)]).cuda()
    opt = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    x = torch.randn(8, 1024, device="cuda")
    peaks = []
    for rules in ([], 1e-3 * rs.L1().on("*.weight", how=how)):
        with rs.attach(model, rules, opt) as reg:
            for counted in (False, True):
                if counted:
                    torch.cuda.reset_peak_memory_stats()
                opt.zero_grad(set_to_none=False)
                reg.loss(model(x).square().mean()).backward()
                opt.step()
        peaks.append(torch.cuda.max_memory_allocated())
    largest = 1024 * 1024 * 4
    assert peaks[1] - peaks[0] <= 4 * largest
