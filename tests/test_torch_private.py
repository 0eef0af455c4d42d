"""Private names of torch stand in one file, and what is done without them gives the same, or is refused."""

import ast
import importlib.util
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import restrain.torch_private as private
from restrain.errors import VersionError

ROOT = Path(__file__).parent.parent

# No other file uses a private name of torch

TORCHS = {
    name
    for thing in (torch, torch.Tensor, nn.Module, torch.optim.Optimizer, torch.autograd.graph.Node, torch.nn.RNNBase)
    for name in dir(thing)
    if name.startswith("_") and not name.startswith("__")
}
OTHERS = {
    *("_replace", "_fields", "_getframe", "_current_frames", "_Float16"),  # of Python and C
    *("_logger_connector", "_should_accumulate"),  # of Lightning
    *("_get_output_dir", "_trial"),  # of Hugging Face's Trainer
    *("_meant", "_classes", "_restrain_layouts"),  # ours, set by name
    *("_g", "_v", "_orig", "_std"),  # ends of names of parameters
    "_base_optimizer",  # of Lookahead
    *("_unsafe_view", "_to_copy", "_softmax", "_log_softmax"),  # operations of ATen
    *("_assert", "_convolution", "_transpose"),  # beginnings and ends of names of such
}
WORD = re.compile(r"_[a-zA-Z]\w*")


def defined(tree):
    """Names with an underscore that a file gives: functions, classes, attributes of objects and fields."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            yield node.attr
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


def used(tree):
    """(line, what stands there) of each name that may be private to torch."""
    docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) not in {"self", "cls", "super()"}:
            yield node.lineno, node.attr
        elif isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                path = f"{getattr(node, 'module', None) or ''}.{alias.name}"
                yield from ((node.lineno, part) for part in path.split(".") if "torch" in path.split("."))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            yield from ((node.lineno, part) for part in node.value.split(".") if WORD.fullmatch(part))


def private_names(sources):
    trees = {path: ast.parse(source) for path, source in sources.items()}
    ours = {name for tree in trees.values() for name in defined(tree)} - TORCHS
    return [
        f"{path}:{line} {name}"
        for path, tree in trees.items()
        for line, name in used(tree)
        if WORD.fullmatch(name) and name not in ours | OTHERS | private.DE_FACTO
    ]


def test_private_names_stand_in_one_file():
    files = {path.relative_to(ROOT).as_posix(): path.read_text("utf-8") for path in (ROOT / "src").rglob("*.py")}
    assert files.pop("src/restrain/torch_private.py")
    assert private_names(files) == []


@pytest.mark.parametrize(
    "line",
    [
        "torch._C.f()",
        "p._version",
        "class A:\n    _version = 1\ndef f(p): return p._version",
        "hooks = optimizer._optimizer_step_pre_hooks",
        "node._saved_self",
        "getattr(node, '_saved_self', None)",
        "sys.modules.get('torch._dynamo')",
        "import torch._utils",
        "import torch._dynamo.utils as utils",
        "from torch._inductor import compile",
        "from torch import _utils",
        "from torch.nn.modules.dropout import _DropoutNd",
        "torch.fx._symbolic_trace.is_fx_symbolic_tracing()",
    ],
)
def test_the_search_finds(line):
    assert private_names({"a.py": line}), line


def test_the_search_lets_pass():
    source = (
        "class A:\n    def f(self, reg, m):\n        self._x = reg._x + self._version\n        return m._parameters"
    )
    assert private_names({"a.py": source, "b.py": '"""See torch._C."""\nfrom a import _x\n_ = f"{x}y"'}) == []


# What is done without them


def loaded(missing):
    """A second `torch_private`, with these capabilities missing."""
    before = os.environ.pop("RESTRAIN_MISSING", None)
    os.environ["RESTRAIN_MISSING"] = missing
    try:
        spec = importlib.util.spec_from_file_location("torch_without", private.__file__)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        os.environ.pop("RESTRAIN_MISSING")
        if before is not None:
            os.environ["RESTRAIN_MISSING"] = before
    return module


public = loaded("all")
BOTH = pytest.mark.parametrize("way", [private, public], ids=["private", "public"])


def test_this_torch_has_all():
    assert torch.__version__.partition("+")[0] in private.SEEN
    assert set() == private.MISSING
    assert set(private.TABLE) == public.MISSING


def test_capabilities_are_taken_away_by_name(monkeypatch):
    some = loaded("version, is_view")
    assert {"version", "is_view"} == some.MISSING
    assert some.in_backward() is False
    with pytest.raises(VersionError, match="RESTRAIN_MISSING names versions; there are: all, in_backward"):
        loaded("version,versions")


def test_a_name_that_torch_has_lost_is_missing(monkeypatch):
    monkeypatch.delattr(torch._C, "_will_engine_execute_node")
    without = loaded("")
    assert {"will_execute"} == without.MISSING
    assert without.will_execute(None) is False


def test_refusals_name_the_version_and_the_way_out():
    for capability in ("queue_callback", "checkpoints", "life", "outside_functorch", "symbolic_tracing", "inductor"):
        with pytest.raises(VersionError) as error:
            public.require(capability)
        said = str(error.value)
        assert f"torch {torch.__version__} lacks torch." in said
        assert f"(seen in torch {', '.join(private.SEEN)})" in said
        assert said.partition("): ")[2] == private.TABLE[capability].way_out != ""
        private.require(capability)


# Where a forward stands

EXACT = ("in_backward", "packs", "recomputing_saved_tensors", "transforming")
CAREFUL = ("in_checkpoint", "transformed", "dispatched")  # without the names, true more often


class Looks:
    """A layer that notes what each way tells where it is called."""

    def __init__(self):
        self.seen = {"private": [], "public": []}

    def __call__(self, x):
        for name, way in (("private", private), ("public", public)):
            told = {key: bool(getattr(way, key)()) for key in EXACT + CAREFUL}
            told["recomputing_saved_tensors"] &= torch.is_grad_enabled()  # it isn't asked elsewhere
            self.seen[name].append(told)
        return torch.tanh(x)

    def agree(self, **expected):
        """Compare the two ways, and each with what is expected of every call."""
        assert self.seen["private"], "never called"
        for one, other in zip(self.seen["private"], self.seen["public"], strict=True):
            assert {key: one[key] for key in EXACT} == {key: other[key] for key in EXACT}
            assert all(other[key] for key in CAREFUL if one[key])
        for key, values in expected.items():
            assert [one[key] for one in self.seen["private"]] == values, key


class Twice(torch.autograd.Function):
    """2 x; the backward calls a function of its own."""

    @staticmethod
    def forward(ctx, x, call):
        ctx.call = call
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        with torch.enable_grad():
            ctx.call(torch.ones(2, requires_grad=True))
        return 2 * gradient, None


X = {"requires_grad": True}


@pytest.mark.parametrize("reentrant", [False, True])
def test_in_checkpoints(reentrant):
    look = Looks()
    checkpoint(look, torch.ones(3, **X), use_reentrant=reentrant).sum().backward()
    look.agree(in_backward=[False, True], recomputing_saved_tensors=[False, not reentrant])
    look = Looks()
    checkpoint_sequential([look, look], 2, torch.ones(3, **X), use_reentrant=reentrant).sum().backward()
    look.agree()


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
@pytest.mark.parametrize("outer", [False, True])
@pytest.mark.parametrize("inner", [False, True])
def test_in_nested_checkpoints(outer, inner):
    look = Looks()

    def layer(x):
        return checkpoint(look, look(x), use_reentrant=inner)

    checkpoint(layer, torch.ones(3, **X), use_reentrant=outer).sum().backward()
    assert len(look.seen["private"]) >= 4
    look.agree()


def test_in_backwards_of_all_kinds():
    look = Looks()
    x = torch.ones(2, **X)
    Twice.apply(x, look).sum().backward()
    torch.autograd.grad(Twice.apply(x, look).sum(), x)
    y = x.exp()
    y.register_hook(lambda gradient: look(gradient) * 0)
    y.sum().backward()
    x.register_post_accumulate_grad_hook(lambda p: [look(p)].clear())
    x.sum().backward()
    look.agree(in_backward=[True] * 4)


def test_a_forward_in_a_backward_is_no_recomputation():
    look = Looks()
    Twice.apply(torch.ones(2, **X), lambda x: checkpoint(look, x, use_reentrant=False)).sum().backward()
    look.agree(in_backward=[True], recomputing_saved_tensors=[False])


def test_twice_differentiated_checkpoints():
    look = Looks()
    x = torch.ones(3, **X)
    (gradient,) = torch.autograd.grad(checkpoint(look, x, use_reentrant=False).sum(), x, create_graph=True)
    gradient.sum().backward()
    look.agree(in_backward=[False, True, True])


def test_in_another_thread():
    look = Looks()
    y = checkpoint(look, torch.ones(3, **X), use_reentrant=False).sum()
    thread = threading.Thread(target=y.backward)
    thread.start()
    thread.join()
    look(torch.ones(2))
    look.agree(in_backward=[False, True, False])


@pytest.mark.parametrize("hooks", [save_on_cpu, lambda: saved_tensors_hooks(torch.Tensor.clone, torch.Tensor.clone)])
def test_hooks_of_saved_tensors(hooks):
    look = Looks()
    x = torch.ones(3, **X)
    with hooks():
        y = look(x)
        z = checkpoint(look, x, use_reentrant=False)
        (y + z).sum().backward()
    look.agree(packs=[True, True, True], in_checkpoint=[False, True, False])
    with torch.autograd.graph.disable_saved_tensors_hooks("none here"):
        assert private.packs() == public.packs() == False  # noqa: E712
        with pytest.raises(RuntimeError, match="none here"), hooks():
            pass


def test_which_checkpoint_runs():
    """Without the names it is refused, except outside of all hooks of saved tensors."""
    frames = []

    def layer(x):
        frames.append(private.checkpoint_frame())
        with pytest.raises(VersionError, match="leave this layer out of checkpoints"):
            public.checkpoint_frame()
        return x.tanh()

    checkpoint(layer, torch.ones(3, **X), use_reentrant=False).sum().backward()
    assert frames[0] is frames[1] is not None
    assert private.checkpoint_frame() is public.checkpoint_frame() is None
    checkpoint(lambda x: frames.append(public.checkpoint_frame()) or x.exp(), torch.ones(1, **X), use_reentrant=True)
    assert frames.pop() is None


def transformed_by(name, function):
    x = torch.ones(2, 3)
    {
        "grad": lambda: torch.func.grad(lambda x: function(x).sum())(x),
        "vmap": lambda: torch.func.vmap(function)(x),
        "jvp": lambda: torch.func.jvp(function, (x,), (x,)),
        "per sample": lambda: torch.func.vmap(torch.func.grad(lambda x: function(x).sum()))(x),
        "jacrev": lambda: torch.func.jacrev(function)(x),
        "hessian": lambda: torch.func.hessian(lambda x: function(x).sum())(x),
    }[name]()


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # of the first jvp
@pytest.mark.parametrize("name", ["grad", "vmap", "jvp", "per sample", "jacrev", "hessian"])
def test_in_transforms(name):
    look, outside = Looks(), torch.ones(3)

    def function(x):
        assert private.wrapped(x)
        assert public.wrapped(x)
        assert not private.wrapped(outside)
        assert not public.wrapped(outside)
        while private.wrapped(x):
            assert public.unwrap(x) is private.unwrap(x)
            x = public.unwrap(x)
        assert not private.over(private.life())
        with pytest.raises(VersionError, match="call the model outside of"):
            public.life()
        with pytest.raises(VersionError, match="call the model outside of"), public.outside_functorch():
            pass
        return look(outside) * 0 if name == "jvp" else torch.ones(3) * look(outside).sum()

    transformed_by(name, lambda x: function(x) * x)
    look.agree(transforming=[True] * len(look.seen["private"]), transformed=[True] * len(look.seen["private"]))
    assert private.life() is public.life() is None
    assert not private.transforming()
    assert not public.transforming()


def test_modes_and_tracing():
    from torch.fx.experimental.proxy_tensor import make_fx

    look = Looks()
    make_fx(look)(torch.ones(2))
    with torch.autograd.forward_ad.dual_level():
        look(torch.ones(2))
    look(torch.ones(2))
    look.agree(dispatched=[True, False, False], transformed=[True, True, False])
    told = []

    class Traced(nn.Module):
        def forward(self, x):
            told.append(private.symbolic_tracing())
            with pytest.raises(VersionError, match=r"reg\.detach\(\) before the model is traced"):
                public.symbolic_tracing()
            return x + 1

    torch.fx.symbolic_trace(Traced())
    make_fx(Traced())(torch.ones(2))
    assert told == [True, False]
    assert private.symbolic_tracing() is public.symbolic_tracing() is False


def test_gradients_that_are_many():
    told = []
    x = torch.ones(3, **X)

    class Noting(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, gradient):
            told.append((private.batched(gradient), public.batched(gradient)))
            return 2 * gradient

    torch.autograd.grad(Noting.apply(x), x, torch.eye(3), is_grads_batched=True)
    Noting.apply(x).sum().backward()
    assert told == [(True, True), (False, True)]


# Tensors and their graphs


def graph_of(t):
    return t * torch.arange(1.0, 4.0).requires_grad_()


@pytest.mark.parametrize("make", [torch.clone, graph_of], ids=["leaf", "graph"])
@pytest.mark.parametrize(
    "act",
    [
        lambda t: t.mul_(2),
        lambda t: t.relu_(),
        lambda t: t[1:].add_(1),
        lambda t: t.data.copy_(torch.zeros(3)),
        lambda t: t.detach().zero_(),
        lambda t: t.fill_(torch.nan),
    ],
)
def test_changes_in_place_are_seen(make, act):
    t = make(torch.tensor([-1.0, 1.0, 2.0]))
    before, other = public.version(t), private.version(t)
    assert before == public.version(t)
    t.exp()
    assert before == public.version(t)
    act(t)
    assert before != public.version(t)
    assert other != private.version(t) or t.grad_fn is None or t.isfinite().all()  # `.data` is hidden from torch


def test_what_equals_itself():
    """NaN, empty tensors, integers; an operation in place that changes no entry, but the graph."""
    for t in (torch.tensor([torch.nan, 1.0]), torch.empty(0), torch.arange(3), torch.tensor(1j)):
        assert public.version(t) == public.version(t)
    t = graph_of(torch.ones(3))
    before = public.version(t)
    t.clamp_(max=10)
    assert before != public.version(t)
    seen = []
    torch.func.vmap(lambda x: seen.append((public.version(x), public.version(x), public.version(x + 1))) or x)(
        torch.ones(2, 3)
    )
    assert seen[0][0] == seen[0][1] != seen[0][2]


def test_nodes():
    x, w = torch.randn(4, 3, **X), torch.randn(5, 3, **X)
    node = (x @ w.T).grad_fn
    assert private.saved(node, "self") is x
    assert private.saved(node, "nothing", 1) == 1
    assert list(map(list, private.result_shapes(node))) == [[4, 5]]
    with pytest.raises(private.MissingError):
        private.saved(node, "nothing")


def test_nodes_tell_nothing_without_the_names():
    node = (torch.ones(2, **X) * 2).grad_fn
    for ask in (lambda: public.saved(node, "other", 1), lambda: public.result_shapes(node)):
        with pytest.raises(public.MissingError):
            ask()


def test_leaves_and_views():
    p, hooked, late = (nn.Parameter(torch.ones(3)) for _ in range(3))
    hooked.register_hook(lambda gradient: gradient)
    late.register_post_accumulate_grad_hook(lambda p: None)
    assert [private.observed(t) for t in (p, hooked, late)] == [False, True, True]
    assert all(public.observed(t) for t in (p, hooked, late))
    assert [private.is_view(t) for t in (p, p[1:])] == [False, True]
    assert public.is_view(p)
    assert public.is_view(p[1:])


def test_the_end_of_a_backward():
    x, told = torch.ones(2, **X), []

    def ask(way):
        told.append(way.will_execute(x_node))
        if way is private:
            way.queue_callback(lambda: told.append("the end"))

    x_node = torch.autograd.graph.get_gradient_edge(x).node
    for way in (private, public):
        Twice.apply(x, lambda _, way=way: ask(way)).sum().backward()
    assert told == [True, "the end", False]
    with pytest.raises(VersionError, match="take use_reentrant=False"):
        public.queue_callback(lambda: None)


@BOTH
def test_the_order_of_a_backward(way):
    order = []
    x = torch.ones(2, **X)
    first, second = Twice.apply(x, lambda _: order.append(1)), Twice.apply(x, lambda _: order.append(2))
    way.run_last(second.grad_fn)
    (first.sum() + second.sum()).backward()
    assert order == ([1, 2] if way is private else [2, 1])


# Operations

TENSORS = [torch.randn(3, 4).T, torch.randn(()), torch.empty(0, 2), torch.randn(2, 3, 1)]


@BOTH
def test_operations_on_many_tensors(way):
    flat = way.flatten(TENSORS)
    torch.testing.assert_close(flat, torch.cat([t.flatten() for t in TENSORS]), rtol=0, atol=0)
    parts = way.unflatten(flat, TENSORS)
    torch.testing.assert_close(list(parts), TENSORS, rtol=0, atol=0)
    parts[0].zero_()
    assert not flat[:12].any()
    copies = [torch.zeros_like(t) for t in TENSORS]
    way.foreach_copy_(copies, TENSORS)
    way.foreach_add_(copies, torch.ones(()), alpha=2.0)
    torch.testing.assert_close(copies, [t + 2 for t in TENSORS], rtol=0, atol=0)
    products = way.foreach_mul(TENSORS, [1.0, 2.0, 3.0, 4.0])
    torch.testing.assert_close(list(products), [t * number for number, t in enumerate(TENSORS, 1)], rtol=0, atol=0)


def test_products_by_onednn():
    assert public.linear_pointwise() is None
    linear = private.linear_pointwise()
    if linear is not None:  # None where torch is built without oneDNN
        x, w, b = torch.randn(5, 4), torch.randn(3, 4), torch.randn(3)
        torch.testing.assert_close(linear(x, w, b, "none", [], ""), x @ w.T + b)


def test_graphs_are_compiled_or_refused():
    graph = torch.fx.symbolic_trace(lambda x: x + 1)
    for compile in (public.standalone_compile, lambda *given: public.compile_graph(*given, {})):
        with pytest.raises(VersionError, match="compile=False"):
            compile(graph, [torch.ones(2)])


class Plain(nn.Module):
    def forward(self, x):
        return x + 1


def test_the_compiler():
    assert public.compiler_loaded()
    assert public.anything_compiled() is None
    assert private.anything_compiled() in (True, False)
    assert not any(way.module_compiled(nn.Linear(2, 2)) for way in (private, public))
    layer = Plain()
    layer.compile(backend="eager")
    assert private.module_compiled(layer)
    assert private.anything_compiled() is False
    layer(torch.ones(1, 2))
    assert private.anything_compiled() is True


@BOTH
def test_what_is_never_compiled(way):
    told = []

    def note():
        told.append(torch.compiler.is_compiling())
        return 1

    note = way.never_compiled(note)
    compiled = torch.compile(lambda x: x + note(), backend="eager")
    assert compiled(torch.ones(1)) == 2
    assert told == [False]


# Optimizers and modules


def test_hooks_of_a_step():
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2))])
    one = optimizer.register_step_pre_hook(lambda *given: None)
    other = optimizer.register_step_post_hook(lambda *given: None)
    assert [list(hooks) for hooks in private.step_hooks(optimizer)] == [[one.id], [other.id]]
    assert public.step_hooks(optimizer) is None


KINDS = sorted(
    {v for v in vars(nn).values() if isinstance(v, type) and issubclass(v, nn.Module)}, key=lambda v: v.__name__
)


@pytest.mark.parametrize("name", ["NORMALIZATIONS", "DROPOUTS"])
def test_classes(name):
    found = [[kind for kind in KINDS if issubclass(kind, getattr(way, name))] for way in (private, public)]
    assert found[0] == found[1]
    assert len(found[0]) > 5


@BOTH
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_weights_of_recurrent_layers(way, kind):
    layer, other = kind(3, 2), kind(3, 2)
    x = torch.randn(4, 1, 3)
    plain, wanted = layer(x)[0], other(x)[0]
    for name, p in other.named_parameters():
        layer.__dict__[name] = p.detach() * 1
    way.keep_flat(layer)
    torch.testing.assert_close(layer(x)[0], wanted, rtol=0, atol=0)
    for name, _ in other.named_parameters():
        del layer.__dict__[name]
    way.keep_flat(layer)
    torch.testing.assert_close(layer(x)[0], plain, rtol=0, atol=0)
    way.keep_flat(nn.Linear(2, 2))


def test_processes():
    node = (torch.ones(2, **X) * 2).grad_fn
    assert not private.static_graph(node)
    assert not public.static_graph(node)  # outside of torch.distributed
    assert not private.tensor_parallel(nn.Linear(2, 2))
    assert public.tensor_parallel(nn.Linear(2, 2))


# Versions before torch 2.12


class Told(nn.Module):
    """Adds 1 if it is exported."""

    def forward(self, x):
        return x + int(private.compiled_for_export())


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_code_knows_whether_it_is_exported(backend):
    torch.compiler.reset()
    x = torch.zeros(2)
    assert torch.equal(torch.compile(Told(), fullgraph=True, backend=backend)(x), x)
    for strict in (False, True):
        assert torch.equal(torch.export.export(Told(), (x,), strict=strict).module()(x), x + 1)
    assert torch.equal(torch.compile(Told(), fullgraph=True, backend=backend)(x), x)


def test_the_public_flag_of_export_is_refused_where_it_is_wrong(monkeypatch):
    monkeypatch.setattr(public, "_OLD", False)
    assert public.compiled_for_export() is False
    monkeypatch.setattr(public, "_OLD", True)
    with pytest.raises(VersionError, match=r"lacks torch.compiler._is_exporting_flag .*: leave layers with noise"):
        public.compiled_for_export()


@pytest.mark.parametrize("old", [False, True])
def test_hooks_put_first(monkeypatch, old):
    monkeypatch.setattr(private, "_OLD", old)
    called, layer = [], nn.Linear(2, 2)
    layer.register_forward_pre_hook(lambda *_: called.append("a"))
    layer.register_forward_pre_hook(lambda *_: called.append("b"))
    private.put_first(layer, lambda *_: called.append("second"))
    handle = private.put_first(layer, lambda module, args, kwargs: called.append("first"), with_kwargs=True)
    layer(torch.ones(2))
    assert called == ["first", "second", "a", "b"]
    numbers = list(layer._forward_pre_hooks)
    assert (list(dict.keys(layer._forward_pre_hooks)) == numbers) is old  # as Dynamo counts
    handle.remove()
    layer(torch.ones(2))
    assert called[4:] == ["second", "a", "b"]


@pytest.mark.parametrize("shape", [(3, 2), (1,), (0, 2), (1, 1)])
def test_gradients_of_parts_of_a_dtensor_lie_as_the_part_does(monkeypatch, shape):
    monkeypatch.setattr(private, "_OLD", True)
    w, seen = torch.ones(shape, **X), []
    w.register_hook(lambda gradient: seen.append(gradient.stride()))
    (3 * private.dense_gradient(w.view_as(w)).sum()).backward()
    assert torch.equal(w.grad, torch.full(shape, 3.0))
    assert seen == [w.stride()]
    (first,) = torch.autograd.grad(private.dense_gradient(w * w).pow(2).sum(), w, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), w)
    torch.testing.assert_close(second, 12 * w.detach() ** 2)
    monkeypatch.setattr(private, "_OLD", False)
    w.grad = None
    (3 * private.dense_gradient(w.view_as(w)).sum()).backward()
    assert seen[-1] != w.stride()  # a torch that takes any strides gets what there is


# The suite without them

REFUSING = {"queue_callback", "life", "outside_functorch", "checkpoints", "sequence"}
COLUMNS = "checkpoint_non_reentrant or checkpoint_reentrant or fx_training or by_grad or inplace"


def suite(*arguments, missing="all"):
    """How many tests passed, failed and were refused in a process of its own; what it printed."""
    command = [sys.executable, "-m", "pytest", "-n", "0", "-p", "refusals", "--tb=short", "-m", "not slow", *arguments]
    paths = os.pathsep.join([str(ROOT / "tests"), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"RESTRAIN_MISSING": missing, "PYTHONPATH": paths}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    counts = [int(n) for n in re.search(r"REFUSALS (\d+) (\d+) (\d+)", run.stdout).groups()]
    return *counts, run.stdout


def test_a_sample_of_the_suite():
    passed, failed, refused, said = suite("tests/test_everywhere.py", "-k", f"equal_or_refused and ({COLUMNS})")
    assert failed == 0, said
    assert passed > 20
    assert 0 < refused < 20  # penalties on outputs are refused without the order of nodes


def test_a_wrong_way_without_them_is_noticed():
    cell = "inplace-Jacobian-penalty or inplace-proximal-penalty"
    *counts, said = suite("tests/test_everywhere.py", "-m", "", "-k", cell, "-p", "wrong_fallback", missing="version")
    assert counts == [1, 1, 0], said


@pytest.mark.slow
@pytest.mark.parametrize("kept", [set(), REFUSING], ids=["all", "all that refuse nothing"])
def test_rules_in_every_way_of_running(kept):
    missing = ",".join(sorted(set(private.TABLE) - kept))
    passed, failed, refused, said = suite("tests/test_everywhere.py", "-k", "equal_or_refused", missing=missing)
    assert failed == 0, said
    assert passed > 300
    assert (refused > 0) is (not kept)
