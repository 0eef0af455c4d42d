"""Rules on activations under tensor parallelism: on whole tensors as in one process, on one process's part refused."""

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import restrain as rs
from everywhere.kinds import Kind, rules
from everywhere.training import attached, fresh
from everywhere.workers import together
from restrain.engine.distributed.shards import whole
from restrain.engine.forward.tensor_parallel import groups

OF_BATCH = 0.1 * rs.KLSparsity(0.2).on(rs.outputs("head", via=torch.sigmoid))
WHOLE = Kind("whole outputs", rules(0.3 * rs.L1().on(rs.outputs("head")), OF_BATCH))


def parallel(ranks):
    model, mesh = fresh(), init_device_mesh("cpu", (ranks,))
    return parallelize_module(model, mesh, {"first": ColwiseParallel(), "head": RowwiseParallel()})


def train(rank, ranks):
    model = parallel(ranks)
    assert len(list(groups(model))) == 1
    run = attached(WHOLE, model)
    hooks = len(model.head._forward_hooks)
    run.steps(1)
    assert len(model.head._forward_hooks) < hooks, "the comparison is for one forward"
    found = run.steps(1, 1).result()
    return found | {"weights": [whole(w).clone() for w in found["weights"]]}


def refusals(rank, ranks):
    """What is said of one process's part, and in compiled code; and whether the next step without the rule is right."""
    said = []
    for compiled in (False, True):
        model = parallel(ranks)
        reg = rs.attach(model, 0.1 * rs.L1().on(rs.outputs("act")))
        run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        with pytest.raises(Exception, match="one process's part") as error:  # dynamo's own kind in compiled code
            run(torch.ones(2, 4, dtype=torch.float64))
        said.append(str(error.value))
        reg.detach()
        assert not model.act._forward_hooks
        model(torch.ones(2, 4, dtype=torch.float64)).sum().backward()
    return said


def test_whole_outputs():
    expected = attached(WHOLE, fresh()).steps(2).result()
    torch.testing.assert_close(together(2, train), [expected] * 2)


def test_parts_are_refused():
    for eager, compiled in together(2, refusals):
        assert "one process's part" in eager
        assert "RowwiseParallel" in eager
        assert "call the model once before torch.compile" in compiled
