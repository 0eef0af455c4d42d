"""Several gloo processes: DDP, FSDP2, tensor parallelism, alone and with compilation, checkpoints, mixed precision."""

import warnings

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from everywhere.column import column
from everywhere.kinds import APART as OF_EACH
from everywhere.kinds import CODES, KINDS, PROJECTED
from everywhere.running import checkpointed
from everywhere.training import Net, Run, adam, attached, fresh, plain, sgd
from everywhere.workers import together
from restrain import attach
from restrain.engine.distributed.shards import whole

GROUP = "Several processes"
SEVERAL = "Attach to the bare model first, then wrap it"
SAMPLE = (
    "parameter-penalty-in-the-loss",
    "proximal-group-penalty",
    "output-penalty",
    "statistic-of-the-batch",
    "noise",
)

OTHERS = CODES | OF_EACH | {PROJECTED.name: PROJECTED}


def result_of(run):
    """As `Run.result`, with whole weights."""
    found = run.result()
    attributes = [getattr(owner, key, None) for owner in run.model.modules() for key in ("weight", "bias")]
    weights = [w.detach() for w in attributes if isinstance(w, torch.Tensor)]  # parametrised ones too
    return found | {"weights": [whole(w).clone() for w in weights]}


def compared(found, expected):
    """All ranks' weights with the reference's; losses and values are means over the ranks' batches."""
    ranks = len(found)
    for key in ("losses", "values"):
        mean = torch.tensor([result[key] for result in found], dtype=torch.float64).mean(0).tolist()
        found = [result | {key: mean} for result in found]
    return found, ranks * [expected]


def reference(kind, parts, **options):
    """Micro-batches count one by one only for what is drawn for each."""
    return plain(kind, parts=parts if kind.random else 1, **options)


# DDP


def zero(parameters):
    """Adam whose state is divided among the processes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch.jit.script, as torch imports it
        from torch.distributed.optim import ZeroRedundancyOptimizer

    return ZeroRedundancyOptimizer(parameters, torch.optim.Adam, lr=0.05)


def train_ddp(name, wrapping=None, backend=None, order=None, first=False, divided=False, **ours):
    """By DDP; compiled in either order; rules attached before or after the wrapping; ZeRO."""
    kind, model = (KINDS | OTHERS)[name], fresh()
    ours |= {"optimizer": zero} if divided else {}
    run = attached(kind, model, **ours) if first else None
    if order == "inside":
        model = torch.compile(model, backend=backend, fullgraph=True)
    wrapped = DistributedDataParallel(model, **(wrapping or {}))
    run = run or attached(kind, wrapped, **ours)
    run.call = torch.compile(wrapped, backend=backend) if order == "outside" else wrapped
    return result_of(run.steps())


def ddp(title, ranks, name, fast=(), refuses=None, **how):
    """A column."""
    refuses = ({} if how.get("first") else {"parametrisation": SEVERAL}) | (refuses or {})

    @column(title, GROUP, name, refuses=refuses, fast=fast)
    def run(kind):
        return compared(together(ranks, train_ddp, name=kind.name, **how), reference(kind, ranks))


for number in (2, 4):
    ddp(f"DDP, {number} processes", number, f"ddp_{number}", SAMPLE if number == 2 else ())
    unused = {"find_unused_parameters": True}
    ddp(f"DDP with find_unused_parameters, {number} processes", number, f"ddp_unused_{number}", wrapping=unused)
    ddp(f"DDP with static_graph, {number} processes", number, f"ddp_static_{number}", wrapping={"static_graph": True})
APART = dict.fromkeys(
    ("units-across-tensors", "sharpness"),
    r"the optimizer steps .* in another process \(ZeroRedundancyOptimizer\): train by FSDP2",
)
ddp("DDP with `ZeroRedundancyOptimizer`, 2 processes", 2, "ddp_zero", divided=True, refuses=APART)
ddp("rules attached before DDP", 2, "ddp_after", first=True)
ddp("torch.compile(DDP(model)), aot_eager", 2, "ddp_compiled", backend="aot_eager", order="outside")
ddp("DDP(torch.compile(model)), aot_eager", 2, "ddp_of_compiled", backend="aot_eager", order="inside")
ddp("DDP(torch.compile(model)), inductor", 2, "ddp_of_inductor", backend="inductor", order="inside")


# FSDP1


def train_fsdp1(name, **ours):
    """By FSDP1, with the parameters' own shapes only in name: each process has flat parts."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it will go
        model = fresh()
        options = {"use_orig_params": True, "device_id": torch.device("cpu")}
        for name_of_layer in ("first", "head"):
            setattr(model, name_of_layer, FullyShardedDataParallel(getattr(model, name_of_layer), **options))
        wrapped = FullyShardedDataParallel(model, **options)
        run = attached(KINDS[name], wrapped, **ours).steps()
        found = run.result()
        with FullyShardedDataParallel.summon_full_params(wrapped):
            return found | {"weights": [p.detach().clone() for p in wrapped.parameters()]}


FLAT = "FullyShardedDataParallel gives each process a flat part.*fully_shard"
BY_ENTRY = ("parameter-penalty-as-gradient", "decoupled-decay", "cautious-decay", "proximal-penalty", "target")
IN_PARTS = {kind: FLAT for kind, made in KINDS.items() if not made.on_outputs and kind not in BY_ENTRY}
IN_PARTS["parametrisation"] = SEVERAL


@column("FSDP1 (`use_orig_params=True`), 2 processes", GROUP, refuses=IN_PARTS)
def fsdp1(kind):
    return compared(together(2, train_fsdp1, name=kind.name), reference(kind, 2))


# FSDP2 and tensor parallelism


def train_fsdp(name, first=False, reentrant=None, mesh=None, backend=None, dtype=torch.float64, mixed=False, **ours):
    """By FSDP2; on a mesh of replicas, with checkpoints, compiled, in mixed precision."""
    kind, model = (KINDS | OTHERS)[name], fresh(Net if reentrant is None else checkpointed(reentrant), dtype)
    reg = attach(model, kind.make()) if first else None  # fully_shard makes other parameters than it had
    names = ("copies", "shards")
    options = {"mesh": init_device_mesh("cpu", mesh, mesh_dim_names=names)} if mesh else {}
    if mixed:
        options["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, torch.float32, torch.float32)
    for layer in (model.first, model.head, model):
        fully_shard(layer, **options)
    opt = sgd if mixed else adam
    run = Run(model, opt(model.parameters()), reg, **ours) if first else attached(kind, model, opt, **ours)
    run.call = torch.compile(model, backend=backend) if backend else None
    return result_of(run.steps())


class Wide(Net):
    """Whose hidden units four processes can share."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(4, 8), nn.Linear(8, 3)


def train_tensor_parallel(name, rank, ranks, replicas=1):
    """Columns of the first layer and rows of the second, alone and with FSDP2 around them."""
    model, mesh = fresh(Wide), init_device_mesh("cpu", (replicas, ranks // replicas), mesh_dim_names=("data", "tensor"))
    parallelize_module(model, mesh["tensor"], {"first": ColwiseParallel(), "head": RowwiseParallel()})
    if replicas > 1:
        fully_shard(model, mesh=mesh["data"])
    run = attached((KINDS | OTHERS)[name], model, rank=mesh.get_local_rank(0), ranks=replicas)
    return result_of(run.steps())


def shards(
    title, ranks, name, train=train_fsdp, fast=(), parts=None, rounding=1e-12, optimizer=adam, refuses=None, **how
):
    """A column; `parts` of the reference's batch, where those aren't the ranks."""
    drawn = [kind for kind, made in KINDS.items() if made.random and rounding > 1e-6 and kind not in (refuses or ())]
    senseless = dict.fromkeys(drawn, "other draws in bfloat16; their distribution is tested in test_noise.py")

    @column(
        title,
        GROUP,
        name,
        refuses=REFUSED if refuses is None else refuses,
        fast=fast,
        rounding=rounding,
        senseless=senseless,
    )
    def run(kind):
        found = together(ranks, train, name=kind.name, **how)
        make = Wide if train is train_tensor_parallel else Net
        return compared(found, reference(kind, parts or ranks, make=make, optimizer=optimizer))


JACOBIAN = {"Jacobian-penalty": "can't be differentiated twice: use estimator='jvp', or estimator='difference'"}
SHARDED = {"sharpness": "'first.weight' is sharded, and forwards use it whole"}
REFUSED = JACOBIAN | SHARDED | {"parametrisation": SEVERAL}
AT_STEPS = {kind: "no given optimizer holds" for kind, made in KINDS.items() if made.at_steps or kind == "sharpness"}
PARTS = {kind: "one process's part of a tensor" for kind, made in KINDS.items() if made.on_outputs}
PARTS |= {"weight-noise": "by tensor parallelism", "parametrisation": "use how='project'"}
PARTS |= {"sharpness": "by tensor parallelism|is sharded, and forwards use it whole"}
MIXED = {"dtype": torch.float32, "mixed": True, "optimizer": sgd, "rounding": 2e-2}

for number in (2, 4):
    shards(f"FSDP2, {number} processes", number, f"fsdp_{number}", fast=SAMPLE if number == 2 else ())
    title = f"FSDP2 and non-reentrant checkpoints, {number} processes"
    shards(title, number, f"fsdp_checkpoint_{number}", reentrant=False)
    title = f"tensor parallelism, {number} processes"
    shards(title, number, f"tensor_{number}", train_tensor_parallel, parts=1, refuses=PARTS)
shards("FSDP2 on a mesh of 2 × 2", 4, "fsdp_mesh", mesh=(2, 2))
title = "FSDP2 around tensor parallelism, 2 × 2"
shards(
    title,
    4,
    "fsdp_tensor",
    train_tensor_parallel,
    parts=2,
    refuses=REFUSED | PARTS | {"parametrisation": SEVERAL},
    replicas=2,
)
shards("rules attached before FSDP2", 2, "fsdp_after", refuses=JACOBIAN | AT_STEPS, first=True)
shards("FSDP2 and torch.compile, aot_eager", 2, "fsdp_compiled", backend="aot_eager")
title = "FSDP2, non-reentrant checkpoints, bfloat16, to 2 %"
shards(title, 2, "fsdp_mixed", reentrant=False, **MIXED)
title = "FSDP2, non-reentrant checkpoints, bfloat16 and torch.compile, to 2 %"
shards(title, 2, "fsdp_mixed_compiled", refuses=REFUSED, reentrant=False, backend="aot_eager", **MIXED)
