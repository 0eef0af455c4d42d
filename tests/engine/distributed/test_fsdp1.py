"""FSDP1 with use_orig_params=True: parameters are flat parts. Rules by entry are right, others are refused."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

import restrain as rs
from restrain.errors import DetachedError, HowError
from spawning import spawned

BY_ENTRY = {
    "gradient": lambda: 0.1 * rs.L2().on("*.weight", how="gradient"),
    "decoupled": lambda: 0.1 * rs.L2().on("*.weight", how="decoupled"),
    "proximal": lambda: 0.5 * rs.L1().on("*.weight", how="proximal"),
    "box": lambda: rs.Box(-0.2, 0.2).on("*.weight"),
}
WHOLE = {
    "loss": lambda: 0.1 * rs.L2().on("*.weight"),
    "constraint": lambda: rs.L1Ball(1.0).on("0.weight"),
    "rows": lambda: rs.MaxNorm(1.0, per=0).on("0.weight"),
    "groups": lambda: rs.GroupLasso(0).on("0.weight", how="proximal"),
    "norm": lambda: rs.Norm(2).on("2.weight", how="gradient"),
    "spectrum": lambda: rs.NuclearNorm(rows=(0,)).on("0.weight", how="gradient"),
    "weights": lambda: rs.Weighted(rs.L1(), lambda w: w.abs()).on("0.weight", how="gradient"),
    "mean": lambda: rs.L2().on("0.weight", how="gradient", reduce="mean"),
    "biases": lambda: rs.Norm(2).on("0.bias", how="gradient"),
}


def built():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()


def trained(model, wrapped, plan):
    x = torch.randn(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    with rs.attach(wrapped, plan, optimizer) as reg:
        for _ in range(3):
            optimizer.zero_grad()
            reg.loss(wrapped(x).square().mean()).backward()
            optimizer.step()


def run(rank, port, results):
    from torch.distributed.fsdp import FullyShardedDataParallel

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    found = {}

    def wrap():
        model, options = built(), {"use_orig_params": True, "device_id": torch.device("cpu")}
        model[0] = FullyShardedDataParallel(model[0], **options)
        return model, FullyShardedDataParallel(model, **options)

    for name, plan in BY_ENTRY.items():
        model, wrapped = wrap()
        try:
            trained(model, wrapped, [plan()])
            with FullyShardedDataParallel.summon_full_params(wrapped):
                found[name] = [p.detach().clone() for p in model.parameters()]
        except HowError as error:
            found[name] = str(error)
    for name, plan in WHOLE.items():
        _, wrapped = wrap()
        try:
            rs.attach(wrapped, plan(), torch.optim.SGD(wrapped.parameters(), lr=0.1))
            found[name] = "attached"
        except HowError as error:
            found[name] = str(error)
    model = built()
    before = rs.attach(model, 0.1 * rs.GroupLasso(0).on("2.weight"))
    FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    try:
        found["wrapped later"] = before.penalty().item()
    except DetachedError as error:
        found["wrapped later"] = str(error)
    results[rank] = found
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found():
    return spawned(run, 2)


@pytest.mark.parametrize("name", BY_ENTRY)
def test_by_entry_it_trains_as_one_process(found, name):
    model = built()
    trained(model, model, [BY_ENTRY[name]()])
    for of_rank in found.values():
        assert not isinstance(of_rank[name], str), of_rank[name]
        for mine, other in zip(of_rank[name], model.parameters(), strict=True):
            torch.testing.assert_close(mine, other.detach())


@pytest.mark.parametrize("name", WHOLE)
def test_of_whole_tensors_it_is_refused_with_the_way_out(found, name):
    for of_rank in found.values():
        assert "FullyShardedDataParallel" in of_rank[name]
        assert "fully_shard" in of_rank[name]


def test_a_model_that_is_flattened_after_attach_is_refused(found):
    for of_rank in found.values():
        assert "'2.weight' had the shape (2, 5)" in of_rank["wrapped later"]
        assert "FullyShardedDataParallel, which is to wrap the model first" in of_rank["wrapped later"]
