"""Exported, traced and scripted models: what is made of a model with rules is what is made of one without."""

import os
import tempfile
import warnings

import torch
from torch import nn

from everywhere.column import column
from everywhere.kinds import KINDS
from everywhere.training import DEVICE, STEPS, Net, attached, batch, fresh, plain, seed

GROUP = "Exported models"
SOME = ("output-penalty", "dropout", "parametrisation")


def without_rules(model):
    """A model without rules, and this one's effective weights."""
    clean = fresh(type(model)).to(next(model.parameters()).dtype)
    with torch.no_grad():
        for mine, theirs in ((clean.first, model.first), (clean.head, model.head)):
            mine.weight.copy_(theirs.weight)
            mine.bias.copy_(theirs.bias)
    return clean


def graph(made):
    """What a graph module computes, without the names of tensors; torch's softplus of a parametrisation may stand."""
    return [str(node.target) for node in made.graph.nodes if node.op == "call_function"]


def exported(kind, export, make=Net, training=False, dtype=torch.float64, same_graph=graph):
    """What is exported in mid-training, and what comes of a clean model; then training goes on as if nothing was."""
    run = attached(kind, fresh(make, dtype)).steps(2)
    run.model.train(training)
    clean = without_rules(run.model).train(training)
    found, expected = export(run.model), export(clean)
    if kind.name != "parametrisation":
        assert same_graph(found) == same_graph(expected)
    x = batch(9, dtype)[0]
    outputs = []
    for made in (found, expected, clean):
        seed(9)
        with torch.no_grad():
            outputs.append(torch.as_tensor(made(x)))
    torch.testing.assert_close(outputs[1].to(dtype), outputs[2], rtol=1e-5, atol=1e-5)
    run.model.train()
    return [outputs[0], run.steps(STEPS - 2, 2).result()], [outputs[1], in_dtype(kind, make, dtype)]


def in_dtype(kind, make, dtype):
    return attached(kind, fresh(make, dtype)).steps().result()


def by_export(model, strict=False):
    x = batch(9, next(model.parameters()).dtype)[0]
    return torch.export.export(model, (x,), strict=strict).module()


@column("`torch.export.export`", GROUP, fast=SOME)
def export(kind):
    return exported(kind, by_export)


@column("`torch.export.export(strict=True)`", GROUP, fast=("input-penalty",))
def export_strict(kind):
    return exported(kind, lambda model: by_export(model, strict=True))


@column("`torch.export.export` in train mode: the model without noise of ours", GROUP, fast=SOME)
def export_training(kind):
    return exported(kind, by_export, training=True)


@column("`torch.export.export(strict=True)` in train mode", GROUP, fast=("noise",))
def export_training_strict(kind):
    return exported(kind, lambda model: by_export(model, strict=True), training=True)


class Session:
    """An ONNX file, run by onnxruntime."""

    def __init__(self, model, **options):
        import onnxruntime

        x = batch(9, torch.float32)[0]
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's and onnxscript's own deprecations
            file = os.path.join(folder, "model.onnx")
            torch.onnx.export(model, (x,), file, verbose=False, **options)
            quiet = onnxruntime.SessionOptions()
            quiet.log_severity_level = 3
            self.session = onnxruntime.InferenceSession(file, quiet, providers=["CPUExecutionProvider"])
            import onnx

            self.operators = [node.op_type for node in onnx.load(file).graph.node]

    def __call__(self, x):
        (given,) = self.session.get_inputs()
        return torch.as_tensor(self.session.run(None, {given.name: x.cpu().numpy()})[0]).to(DEVICE)


@column(
    "ONNX (`torch.onnx.export(dynamo=True)`), run by onnxruntime",
    GROUP,
    fast=("statistic-of-the-batch",),
    rounding=1e-6,
)
def onnx(kind):
    """The file is of a float32 model in evaluation; training goes on in float32."""
    return exported(
        kind, lambda model: Session(model, dynamo=True), dtype=torch.float32, same_graph=lambda made: made.operators
    )


def by_trace(model, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch.jit
        return torch.jit.trace(model, (batch(9)[0],), **options)


def traced_graph(made):
    return [node.kind() for node in made.inlined_graph.nodes()]


@column("`torch.jit.trace`", GROUP, fast=SOME)
def jit_trace(kind):
    return exported(kind, by_trace, same_graph=traced_graph)


@column("`torch.jit.trace` in train mode", GROUP, fast=("statistic-of-the-batch", "weight-noise"))
def jit_trace_training(kind):
    """Without torch's own check, which compares with the model as it runs, with its noise, and says that it differs."""
    return exported(kind, lambda model: by_trace(model, check_trace=False), training=True, same_graph=traced_graph)


def by_script(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(model)


AT_STEPS = [kind.name for kind in KINDS.values() if kind.at_steps and not kind.on_outputs]
SCRIPT = {name: r"torch.jit.script compiles .*reg.detach\(\) before it" for name in KINDS if name not in AT_STEPS}


@column("`torch.jit.script`", GROUP, fast=True, refuses=SCRIPT)
def jit_script(kind):
    if kind.name in SCRIPT:
        by_script(attached(kind, fresh()).model)
    return exported(kind, by_script, same_graph=traced_graph)


@column("`torch.jit.script` of a detached model, attached again", GROUP, fast=SOME)
def jit_script_detached(kind):
    run = attached(kind, fresh()).steps(2)
    counted = run.reg.state_dict()
    run.reg.detach()
    clean, x = without_rules(run.model), batch(9)[0]
    scripted = by_script(run.model)
    outputs = scripted(x).detach(), clean(x).detach()
    again = attached(kind, run.model, lambda parameters: run.optimizer, losses=run.losses, values=run.values)
    again.reg.load_state_dict(counted)
    return [outputs[0], again.steps(STEPS - 2, 2).result()], [outputs[1], plain(kind)]


class Block(nn.Module):
    """A layer that symbolic tracing enters, with hooks on it."""

    def __init__(self):
        super().__init__()
        self.tanh = nn.Tanh()

    def forward(self, x):
        return self.tanh(x) * 1.0


class Nested(Net):
    def __init__(self):
        super().__init__()
        self.act = Block()


@column("`torch.fx.symbolic_trace`, also through layers with hooks", GROUP, fast=True)
def fx(kind):
    return exported(kind, torch.fx.symbolic_trace, make=Nested)


PAST = {"Jacobian-penalty": "a training forward ran, but these places were never reached: ''"}


@column("attached to a model, trained by its fx graph, which shares the layers", GROUP, fast=True, refuses=PAST)
def fx_training(kind):
    run = attached(kind, fresh())
    run.call = torch.fx.symbolic_trace(run.model)
    assert run.call.head is run.model.head
    return run.steps().result(), plain(kind)


@column("attached to a graph of `torch.fx.symbolic_trace`", GROUP, fast=True)
def fx_attached(kind):
    return attached(kind, torch.fx.symbolic_trace(fresh())).steps().result(), plain(kind)
