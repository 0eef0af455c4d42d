"""All private names of torch that the library uses, each behind a function that works without them.

`TABLE` lists the capabilities: the private names, the public behaviour for which they stand, and
the consequence in a torch without them: slower code or a `VersionError`, never another result. All
names were seen in the versions `SEEN`.

Capabilities are looked up at import: `MISSING` has the ones that this torch lacks. For tests, the
environment variable RESTRAIN_MISSING adds to it: "all", or names separated by commas.

Names in `DE_FACTO` begin with an underscore too, but can't be renamed: they are in files that users
have saved.
"""

from __future__ import annotations

import getpass
import inspect
import operator
import os
import re
import stat
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from types import CodeType
from typing import Any, NamedTuple, NoReturn, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from restrain.errors import FileAccessError, VersionError
from restrain.versions import number

SEEN = ("2.10.0", "2.12.1", "2.13.0", "2.15.0")

DE_FACTO = frozenset(
    {
        # in the pickle of every module, so a renaming would break it
        "_parameters",
        "_buffers",
        "_modules",
        "_forward_hooks",
        "_forward_pre_hooks",
        # in the state_dict keys of every model wrapped by torch.compile, checkpoints or FSDP1
        "_orig_mod",
        "_checkpoint_wrapped_module",
        "_fsdp_wrapped_module",
    }
)


class Private(NamedTuple):
    """A capability of torch without a public name."""

    names: str  # below torch; the part after a colon is looked up on use
    stands_for: str
    without: str
    way_out: str = ""  # advice where it is refused


TABLE = {
    # autograd
    "in_backward": Private(
        "_C._current_graph_task_id", "whether a backward runs in this thread", "the call stack is searched"
    ),
    "will_execute": Private(
        "_C._will_engine_execute_node",
        "which gradients the running backward accumulates",
        "gradients are returned, and added by autograd",
    ),
    "queue_callback": Private(
        "autograd.Variable._execution_engine",
        "a call at the end of the running backward",
        "gradients are returned, and added by autograd; penalties inside torch.compile and reentrant checkpoints are "
        "refused",
        "take use_reentrant=False in checkpoints, and leave layers with penalties on outputs out of torch.compile",
    ),
    "run_last": Private(
        ":Node._set_sequence_nr", "the order of a backward", "the order of the forward: gradients lie in memory longer"
    ),
    "saved": Private(
        ":Node._saved_* :Node._input_metadata",
        "what an operation keeps for its backward, and the shape of its result",
        "derivatives by another forward or backward; batch normalisation counts as in training",
    ),
    "checkpoints": Private(
        "_C._autograd._top_saved_tensors_default_hooks utils.checkpoint._checkpoint_hook "
        "utils.checkpoint._recomputation_hook",
        "which non-reentrant checkpoint runs",
        "the call stack is searched; refused where one checkpoint has to be told from another",
        "leave this layer out of checkpoints",
    ),
    "observed": Private(
        "Tensor._backward_hooks Tensor._post_accumulate_grad_hooks",
        "whether a leaf has hooks on its gradient",
        "it is taken to have some: gradients are returned, and added by autograd",
    ),
    "version": Private(
        "Tensor._version", "whether a tensor was changed in place", "its grad_fn and a copy of its entries are compared"
    ),
    "sequence": Private(
        "_C._autograd._get_sequence_nr",
        "the order in which nodes of the graph were made, by which a forward knows its own",
        "refused: penalties on outputs",
        "put penalties on parameters",
    ),
    "not_alone": Private(
        "_C._dynamo.eval_frame._FrameAction _C._dynamo.eval_frame._FrameExecStrategy "
        "_C._dynamo.eval_frame.set_code_exec_strategy",
        "hooks of a compiled model that run outside of its forward are not compiled by themselves",
        "they are",
    ),
    "is_view": Private("Tensor._is_view", "whether a tensor is a view", "it is taken for one, and copied"),
    # torch.func, modes and tracing
    "wrapped": Private(
        "_C._functorch.is_functorch_wrapped_tensor _C._functorch.get_unwrapped",
        "the tensor behind a wrapper of torch.func",
        "torch.func.debug_unwrap",
    ),
    "transforming": Private(
        "_C._functorch.maybe_current_level",
        "whether a transform of torch.func runs",
        "an autograd function is called that torch.func refuses",
    ),
    "life": Private(
        "_C._functorch.maybe_current_level _C._functorch._wrap_for_grad _C._functorch.is_dead_tensor_wrapper",
        "whether the transform of torch.func is over in which a tensor was seen",
        "penalties inside torch.func that look at tensors of a forward are refused",
        "call the model outside of torch.func",
    ),
    "outside_functorch": Private(
        "_C._DisableFuncTorch",
        "operations past a transform of torch.func",
        "refused inside of one",
        "call the model outside of torch.func",
    ),
    "batched": Private(
        "_C._functorch.is_legacy_batchedtensor",
        "whether a gradient is many, by is_grads_batched=True",
        "every gradient is taken to be: it is computed by the formula",
    ),
    "transformed": Private(
        "_C._functorch.maybe_current_level autograd.forward_ad:_current_level _C._get_tracing_state "
        "_C._len_torch_dispatch_stack",
        "whether plain eager code runs",
        "it is taken not to: values and gradients are computed by the formula",
    ),
    "dispatched": Private(
        "_C._len_torch_dispatch_stack",
        "whether a mode sees the operations",
        "one is taken to: nothing is folded into the optimizer's pass",
    ),
    "symbolic_tracing": Private(
        "fx._symbolic_trace.is_fx_symbolic_tracing _C._len_torch_dispatch_stack",
        "whether torch.fx traces symbolically",
        "any tracing by torch.fx is refused",
        "reg.detach() before the model is traced, and attach reg.plan again",
    ),
    "dispatch_mode": Private(
        "utils._python_dispatch.TorchDispatchMode", "a mode that sees the operations", "no update is recorded"
    ),
    # compilers
    "never_compiled": Private(
        "_disable_dynamo",
        "torch.compiler.disable, without loading the compiler",
        "torch.compiler.disable: import restrain loads the compiler",
    ),
    "compiler_loaded": Private(":_dynamo", "whether the compiler was loaded", "it is taken to be, and loaded"),
    "anything_compiled": Private(
        ":_dynamo.convert_frame.output_codes",
        "whether anything was compiled in this process",
        "compiled code is made anew, without a word, wherever the compiler was loaded",
    ),
    "undone": Private(
        ":_dynamo.utils._disable_side_effect_safety_checks_for_current_subtracer",
        "a side effect that a compiled checkpoint takes back",
        "torch refuses noise on weights in a compiled checkpoint",
    ),
    "encoder_layers": Private(
        ":MultiheadAttention._qkv_same_embed_dim",
        "a TransformerEncoderLayer that calls its attention, not a fused operation in its place",
        "compaction leaves the heads of MultiheadAttention",
    ),
    "exporting": Private(
        "compiler._is_exporting_flag",
        "whether torch.export runs; in compiled code of torch 2.10, torch.compiler.is_exporting() is always True",
        "torch.compiler.is_exporting(), refused in torch 2.10",
        "leave layers with noise out of torch.compile",
    ),
    "module_compiled": Private(
        "nn.Module._compiled_call_impl",
        "whether Module.compile was called",
        "a layer in compiled code is known by its hooks, which are silent",
    ),
    "inductor": Private(
        ":_inductor.standalone_compile :_inductor.compile",
        "compiled code of a graph",
        "the operations one by one",
        "compile=False",
    ),
    # optimizers
    "step_hooks": Private(
        ":Optimizer._optimizer_step_pre_hooks :Optimizer._optimizer_step_post_hooks",
        "who has hooks on a step",
        "somebody else is taken to: nothing is folded into the optimizer's pass, nor recorded of its step",
    ),
    "patch_step": Private(
        "optim.Optimizer._patch_step_function",
        "an optimizer without loading the compiler",
        "the optimizer's own constructor, which loads the compiler",
    ),
    "overlap": Private(
        ":ZeroRedundancyOptimizer._overlap_with_ddp",
        "whether ZeroRedundancyOptimizer updates weights in the backward",
        "it is taken to: it is refused",
        "shard by FSDP2, which has a step",
    ),
    "fused": Private(
        "_fused_sgd_ _fused_adam_ _fused_adamw_", "an optimizer's update in one operation", "the update by its formula"
    ),
    # operations
    "foreach": Private(
        "_foreach_add_ _foreach_copy_ _foreach_mul", "operations on many tensors", "one tensor after the other"
    ),
    "flatten": Private(
        "_utils._flatten_dense_tensors _utils._unflatten_dense_tensors",
        "many tensors in one, and back",
        "cat and split",
    ),
    "linear_pointwise": Private(":ops.mkldnn._linear_pointwise", "oneDNN's product of matrices", "torch's own product"),
    # modules
    "flat_weights": Private(
        ":RNNBase._flat_weights :RNNBase._flat_weights_names :RNNBase._flat_weight_refs",
        "the weights that a recurrent layer uses",
        "those of its last forward are kept until its next one",
    ),
    "norm_base": Private("nn.modules.batchnorm._NormBase", "batch and instance normalisation", "torch's classes of it"),
    "dropout_base": Private("nn.modules.dropout._DropoutNd", "dropout", "torch's classes of it"),
    # processes
    "static_graph": Private(
        ":_DDPSinkBackward.ddp_weakref", "DDP(static_graph=True)", "every graph in a distributed training counts as one"
    ),
    "tensor_parallel": Private(
        ":Module._distribute_module_applied", "modules that tensor parallelism splits", "all that hold DTensors"
    ),
}


# Capabilities of this torch


def _asked_off() -> set[str]:
    names = {name.strip() for name in os.environ.get("RESTRAIN_MISSING", "").split(",")} - {""}
    if unknown := names - {*TABLE, "all"}:
        raise VersionError(f"RESTRAIN_MISSING names {', '.join(sorted(unknown))}; there are: all, {', '.join(TABLE)}")
    return set(TABLE) if "all" in names else names


MISSING = _asked_off()  # capabilities; the ones looked up on use aren't known yet


def _find(name: str) -> Any:
    """Return the object at a dotted path below torch; None for names that are looked up on use."""
    return operator.attrgetter(name.partition(":")[0])(torch) if not name.startswith(":") else None


def _bind(capability: str) -> Any:
    """Return the objects of a capability that are looked up at import; None if one is missing."""
    if capability in MISSING:
        return None
    try:
        found = tuple([_find(name) for name in TABLE[capability].names.split()])
    except AttributeError:
        MISSING.add(capability)
        return None
    return found[0] if len(found) == 1 else found


def refuse(capability: str) -> NoReturn:
    """Raise a `VersionError`: this torch lacks a capability."""
    names, stands_for, _, way_out = TABLE[capability]
    missing = ", ".join("torch." + name.replace(":.", ".").lstrip(":").replace(":", ".") for name in names.split())
    raise VersionError(
        f"this depends on {stands_for}, and torch {torch.__version__} lacks {missing} (seen in torch "
        f"{', '.join(SEEN)}): {way_out}"
    )


def require(capability: str) -> None:
    """Check that this torch has a capability.

    Raises:
        VersionError: it lacks the capability.
    """
    if capability in MISSING:
        refuse(capability)


# Autograd

_graph_task, _will_execute = _bind("in_backward"), _bind("will_execute")
_engine, _checkpoints, _hooks_of_leaves = _bind("queue_callback"), _bind("checkpoints"), _bind("observed")
_view = _bind("is_view")


class MissingError(LookupError):
    """A node of the graph lacks an attribute."""


def in_backward() -> bool:
    """Return True if a backward runs in this thread.

    A layer called then is recomputed by a checkpoint."""
    return _codes_in_backward() is not None if _graph_task is None else _graph_task() >= 0


def _codes_in_backward() -> list[CodeType] | None:
    """Return the code of each frame called by the autograd engine, innermost first; else None.

    The engine's own threads begin with a function of torch that it calls.
    """
    engine = {inspect.unwrap(torch.autograd.backward).__code__, inspect.unwrap(torch.autograd.grad).__code__}
    found, frame = list[CodeType](), sys._getframe(1)
    while frame is not None:
        if frame.f_code in engine:
            return found
        found.append(frame.f_code)
        frame = frame.f_back  # type: ignore[assignment]
    return found if found[-1].co_filename.startswith(os.path.dirname(torch.__file__)) else None


def packs() -> bool:
    """Return True if hooks pack tensors saved for the backward, as in non-reentrant checkpoints."""
    if _checkpoints is not None:
        return _checkpoints[0](False) is not None
    try:
        with torch.autograd.graph.disable_saved_tensors_hooks("there are some"):
            return False
    except RuntimeError:
        return True


def in_checkpoint() -> bool:
    """Return True in the first run of a non-reentrant checkpoint; without the names, `packs()`."""
    return packs() if _checkpoints is None else _packed_by(_checkpoints[1])


def recomputing_saved_tensors() -> bool:
    """Return True if a non-reentrant checkpoint recomputes; its first pass had a graph.

    Gradients are enabled then.
    """
    if _checkpoints is not None:
        return _packed_by(_checkpoints[2])
    from torch.utils import checkpoint

    for code in _codes_in_backward() or ():
        if code.co_filename == checkpoint.__file__ and not code.co_qualname.startswith("checkpoint_sequential"):
            return code.co_qualname not in _FIRST_RUNS
    return False


_FIRST_RUNS = {
    *("checkpoint", "CheckpointFunction.forward", "CheckpointFunction.backward"),
    *("_checkpoint_impl", "_CheckpointedFunction.__call__"),  # of torch 2.15
}


def checkpoint_frame() -> Any:
    """Return torch's frame of the current non-reentrant checkpoint, first run or recomputation.

    None outside of checkpoints.

    Raises:
        VersionError: the names are missing, and there may be a checkpoint.
    """
    if _checkpoints is None:
        return refuse("checkpoints") if packs() else None
    again = recomputing_saved_tensors()
    if not again and not in_checkpoint():
        return None
    pack = inspect.unwrap(_checkpoints[0](False)[0])
    held = dict(zip(pack.__code__.co_freevars, pack.__closure__ or (), strict=True))
    cell = held.get("target_frame_ref" if again else "frame")
    if cell is None:
        refuse("checkpoints")
    return cell.cell_contents() if again else cell.cell_contents


def _packed_by(kind: type) -> bool:
    hooks = _checkpoints[0](False)
    return hooks is not None and kind.__name__ in hooks[0].__qualname__


def will_execute(node: Any) -> bool:
    """Return True if the running backward is known to accumulate the gradient of a leaf.

    Raises:
        RuntimeError: the leaf's gradient is captured, by `autograd.grad`.
    """
    return _will_execute is not None and _engine is not None and _will_execute(node)


def queue_callback(function: Callable[[], None]) -> None:
    """Call a function at the end of the running backward.

    Raises:
        VersionError: this torch lacks the capability.
    """
    if _engine is None:
        refuse("queue_callback")
    _engine.queue_callback(function)


def run_last(node: Any) -> None:
    """Make a node come after all other ready nodes in a backward, if possible."""
    setter = None if "run_last" in MISSING else getattr(node, "_set_sequence_nr", None)
    if setter is not None:
        setter(0)


_ABSENT = object()


def saved(node: Any, name: str, default: Any = _ABSENT) -> Any:
    """Return the attribute `name` that a node saves for its backward.

    Raises:
        MissingError: it isn't known, and there is no default.
    """
    found = _ABSENT if "saved" in MISSING else getattr(node, f"_saved_{name}", default)
    if found is _ABSENT:
        raise MissingError(name)
    return found


def result_shapes(node: Any) -> list[Any]:
    """Return the shapes of the results of a node's operation.

    Raises:
        MissingError: they aren't known.
    """
    metadata = None if "saved" in MISSING else getattr(node, "_input_metadata", None)
    if metadata is None:
        raise MissingError("shape")
    return [one.shape for one in metadata]


def newest_node() -> int:
    """Return the sequence number of the next node that this thread makes.

    Raises:
        VersionError: this torch lacks the capability.
    """
    return refuse("sequence") if _newest is None else int(_newest())


_newest = _bind("sequence")


def made_as(node: Any) -> int:
    """Return a node's sequence number: nodes are numbered in the order in which they are made."""
    return int(node._sequence_nr())


def observed(leaf: Tensor) -> bool:
    """Return True if a leaf may have hooks on its gradient."""
    if _hooks_of_leaves is None:
        return True
    return bool(leaf._backward_hooks or leaf._post_accumulate_grad_hooks)


def is_view(t: Tensor) -> bool:
    """Return True if a tensor may be a view of another."""
    return _view is None or _view(t)


class _Contents:
    """Copy of a tensor's entries, and its grad_fn, which in-place ops in the graph change."""

    def __init__(self, t: Tensor) -> None:
        self.entries, self.node = torch.func.debug_unwrap(t).detach().clone(), t.grad_fn

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Contents) or self.entries.shape != other.entries.shape:
            return False
        a, b = self.entries, other.entries
        return self.node is other.node and bool(((a == b) | ((a != a) & (b != b))).all())

    __hash__ = None  # type: ignore[assignment]


version: Callable[[Tensor], Any] = _Contents if _bind("version") is None else operator.attrgetter("_version")
"""Return a value that differs from earlier ones if a tensor was changed in place since."""


# torch.func, modes and tracing

_wrappers, _level, _lives = _bind("wrapped"), _bind("transforming"), _bind("life")
_past_functorch, _batched, _states = _bind("outside_functorch"), _bind("batched"), _bind("transformed")
_modes, _tracing = _bind("dispatched"), _bind("symbolic_tracing")
_CALL, _NOTHING = nn.Module.__call__, torch.empty(0, device="cpu")


def _unwrap_once(t: Tensor) -> Tensor:
    return torch.func.debug_unwrap(t, recurse=False)


def _is_wrapped(t: Tensor) -> bool:
    return torch.func.debug_unwrap(t, recurse=False) is not t


wrapped: Callable[[Tensor], bool] = _is_wrapped if _wrappers is None else _wrappers[0]
"""Return True if a tensor lives inside a transform of torch.func."""

unwrap: Callable[[Tensor], Tensor] = _unwrap_once if _wrappers is None else _wrappers[1]
"""Return the tensor behind one wrapper of torch.func."""


class _Refused(torch.autograd.Function):
    """Autograd function without `setup_context`, which torch.func refuses."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> None:
        return None


def transforming() -> bool:
    """Return True if a transform of torch.func runs."""
    if _level is not None:
        return _level() is not None
    try:
        _Refused.apply(_NOTHING)  # type: ignore[no-untyped-call]
    except RuntimeError:
        return True
    return False


def life() -> Any:
    """Return a token of the innermost running transform of torch.func, for `over`; None outside.

    Raises:
        VersionError: a transform runs, and this torch lacks the capability.
    """
    if _lives is None:
        return refuse("life") if transforming() else None
    level, wrap, _ = _lives
    return None if (now := level()) is None else wrap(_NOTHING, now)


def over(sign: Any) -> bool:
    """Return True if the transform of a token is over."""
    return sign is not None and bool(_lives[2](sign))


def outside_functorch() -> AbstractContextManager[Any]:
    """Return a context within which operations bypass the transforms of torch.func.

    Raises:
        VersionError: this torch lacks the capability.
    """
    if _past_functorch is None:
        refuse("outside_functorch")
    return _past_functorch()  # type: ignore[no-any-return]


def batched(gradient: Tensor) -> bool:
    """Return True if a gradient may be a batch of them, by autograd.grad(is_grads_batched=True)."""
    return _batched is None or _batched(gradient)


def transformed() -> bool:
    """Return True if code may be transformed, traced or watched.

    By torch.func, forward mode, torch.jit or a dispatch mode."""
    if _states is None:
        return True
    level, forward_mode, tracing, modes = _states
    return level() is not None or forward_mode._current_level >= 0 or tracing() is not None or modes() > 0


def dispatched() -> bool:
    """Return True if a mode may see each operation."""
    return _modes is None or _modes() > 0


def symbolic_tracing() -> bool:
    """Return True if torch.fx traces with proxies.

    make_fx sets the same flag, but traces with tensors in a dispatch mode.

    Raises:
        VersionError: torch.fx traces, and this torch lacks the capability.
    """
    if _tracing is not None:
        is_tracing, modes = _tracing
        return is_tracing() and not modes()
    if nn.Module.__call__ is not _CALL:  # patched by torch.fx while it traces
        refuse("symbolic_tracing")
    return False


DispatchMode: Any = object if (_mode := _bind("dispatch_mode")) is None else _mode
"""TorchDispatchMode, the base of modes that see each operation; else object."""


# Compilers

_F = TypeVar("_F", bound=Callable[..., Any])
_disable = _bind("never_compiled")
_NOISE = number(torch.__version__) < (2, 13)  # see `check_compiled_noise`
_bind("module_compiled")  # only notes in MISSING: the class attribute is None
_bind("exporting")  # the same: it is False
_OLD = number(torch.__version__) < (2, 12)  # see `compiled_for_export`, `put_first`, `dense_gradient`


def never_compiled(function: _F) -> _F:
    """Return the function, excluded from tracing when compiled code calls it."""
    return (torch.compiler.disable if _disable is None else _disable)(function)  # type: ignore[no-any-return]


def compiler_loaded() -> bool:
    """Return True if torch's compiler may have been loaded."""
    return "compiler_loaded" in MISSING or "torch._dynamo" in sys.modules


def anything_compiled() -> bool | None:
    """Return True if anything was compiled in this process; None if not known."""
    if not compiler_loaded():
        return False
    if "anything_compiled" in MISSING:
        return None
    codes = getattr(getattr(sys.modules["torch._dynamo"], "convert_frame", None), "output_codes", None)
    seen = getattr(codes, "seen", None)
    return None if seen is None else len(seen) > 0


def not_alone(function: _F) -> _F:
    """Return the function, traced when compiled code calls it, but never compiled by itself.

    Neither are the functions that it calls. torch.compile calls the hooks of its model outside of
    the compiled forward, and would compile each alone.
    """
    if (found := _bind("not_alone")) is not None:
        action, strategy, put = found
        put(function.__code__, strategy(action.SKIP, action.SKIP))
    return function


def undone(function: Callable[..., None], *args: Any) -> None:
    """Call a function in compiled code, also in a checkpoint, which reverts its side effect."""
    if "undone" not in MISSING:
        from torch._dynamo import utils

        call = getattr(utils, "_disable_side_effect_safety_checks_for_current_subtracer", None)
        if call is not None:
            call(function, *args)
            return
    function(*args)


def _refuse_compiled_noise() -> NoReturn:
    raise VersionError(
        f"noise on weights in compiled code needs torch 2.13 or newer, this is {torch.__version__}, whose compiler "
        "doesn't take the noise away: call such layers outside of torch.compile, or put noise on their inputs"
    )


_refused_when_run = never_compiled(_refuse_compiled_noise)


def check_compiled_noise() -> None:
    """Refuse noise on weights in compiled code, where this torch has it wrong.

    The compiler of torch 2.12 deletes the parameter, that of 2.10 breaks the graph amid the layer's
    call. With `fullgraph=True` torch refuses to compile it; else the error comes when it runs.

    Raises:
        VersionError: torch is older than 2.13.
    """
    if not _NOISE:
        return
    if torch.compiler.is_compiling():
        _refused_when_run()
    frame = sys._getframe(1)
    while frame is not None:  # between two graphs
        if frame.f_code.co_name == "compile_wrapper":
            _refuse_compiled_noise()
        frame = frame.f_back  # type: ignore[assignment]


def module_compiled(module: nn.Module) -> bool:
    """Return True if `module.compile()` was called; False if not known."""
    return "module_compiled" not in MISSING and module._compiled_call_impl is not None


def compiled_for_export() -> bool:
    """Return True if torch.export runs, for compiled code.

    Raises:
        VersionError: this torch lacks the capability, and its public function is wrong.
    """
    if "exporting" not in MISSING:
        return torch.compiler._is_exporting_flag
    if _OLD:  # always True
        refuse("exporting")
    return torch.compiler.is_exporting()


def exporting() -> bool:
    """Return True while a model is exported or traced."""
    if torch.compiler.is_compiling():
        return compiled_for_export()
    tracing: bool = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    return tracing or symbolic_tracing()


def put_first(module: nn.Module, hook: Callable[..., Any], with_kwargs: bool = False) -> RemovableHandle:
    """Register a pre-hook before a module's other pre-hooks; return its handle.

    Dynamo of torch 2.10 and 2.11 numbers hooks in the order in which they were added, so all are
    added anew.
    """
    handle = module.register_forward_pre_hook(hook, prepend=True, with_kwargs=with_kwargs)
    if _OLD:
        hooks = module._forward_pre_hooks
        for key in list(hooks):
            hooks[key] = hooks.pop(key)
    return handle


def _check_inductor() -> None:
    """Check that inductor is there, and that its folders of compiled code are this user's alone.

    Inductor runs what lies in them, of a name that others can guess, and doesn't ask for the
    owner. The headers that it compiles are in the default folder also where another is set.

    Raises:
        VersionError: this torch lacks inductor.
        FileAccessError: a folder belongs to another user, or others may write into it.
    """
    require("inductor")
    if not hasattr(os, "geteuid"):
        return
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # no entry in the system's list of users
        user = f"uid_{os.getuid()}"
    default = os.path.join(tempfile.gettempdir(), "torchinductor_" + re.sub(r'[\\/:*?"<>|]', "_", user))
    own = "TORCHINDUCTOR_CACHE_DIR"
    for folder, variable in ((default, "TMPDIR"), (os.environ.get(own), own)):
        if not folder or not os.path.lexists(folder):
            continue
        found = os.stat(folder)
        if found.st_uid != os.geteuid() or found.st_mode & stat.S_IWOTH:
            raise FileAccessError(
                f"{folder} is where torch keeps compiled code, and others may have put code there: set {variable} to a "
                "folder of your own"
            )


def standalone_compile(graph: Any, examples: Sequence[Any]) -> Callable[..., Any]:
    """Return a graph of symbolic shapes compiled by inductor, without Dynamo.

    Raises:
        VersionError, FileAccessError: see `_check_inductor`.
    """
    _check_inductor()
    from torch._inductor import standalone_compile

    return standalone_compile(graph, examples, dynamic_shapes="from_graph")  # type: ignore[arg-type]


def compile_graph(graph: Any, examples: Sequence[Any], options: dict[str, Any]) -> Callable[..., Any]:
    """Return a graph of fixed shapes compiled by inductor, without Dynamo.

    Raises:
        VersionError, FileAccessError: see `_check_inductor`.
    """
    _check_inductor()
    from torch import _inductor

    return _inductor.compile(graph, examples, options)  # type: ignore[arg-type, no-any-return]


# Optimizers


def step_hooks(optimizer: Optimizer) -> tuple[Mapping[int, Any], Mapping[int, Any]] | None:
    """Return an optimizer's hooks before and after its step, by handle id; None if not known."""
    if "step_hooks" in MISSING:
        return None
    names = "_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"
    before, after = (getattr(optimizer, name, None) for name in names)
    return None if before is None or after is None else (before, after)


def call_attention(module: nn.Module) -> None:
    """Have torch's encoder layers call a module that stands for a MultiheadAttention."""
    module._qkv_same_embed_dim = False  # type: ignore[assignment]


def overlaps_backward(optimizer: Any) -> bool:
    """Return True if a ZeroRedundancyOptimizer updates weights in the backward, without a step."""
    return "overlap" in MISSING or bool(getattr(optimizer, "_overlap_with_ddp", True))


_patch = _bind("patch_step")


def patch_step(optimizer: Optimizer) -> None:
    """Patch the step of an optimizer's class to call hooks, as its constructor does."""
    _patch(optimizer)


_fused = _bind("fused")
fused_sgd_: Any
fused_adam_: Any
fused_adamw_: Any
fused_sgd_, fused_adam_, fused_adamw_ = (None, None, None) if _fused is None else _fused


# Operations on many tensors


def _each_added(tensors: Iterable[Tensor], number: Tensor, alpha: float = 1.0) -> None:
    for t in tensors:
        t.add_(number, alpha=alpha)


def _each_copied(tensors: Iterable[Tensor], others: Iterable[Tensor]) -> None:
    for t, other in zip(tensors, others, strict=True):
        t.copy_(other)


def _each_multiplied(tensors: Iterable[Tensor], numbers: Iterable[float]) -> list[Tensor]:
    return [t * number for t, number in zip(tensors, numbers, strict=True)]


def _joined(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


def _parted(flat: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    parts = flat.split([t.numel() for t in tensors])
    return [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)]


foreach_add_: Callable[..., None]
foreach_copy_: Callable[..., None]
foreach_mul: Callable[..., Sequence[Tensor]]
foreach_add_, foreach_copy_, foreach_mul = _bind("foreach") or (_each_added, _each_copied, _each_multiplied)

flatten: Callable[[Any], Tensor]
unflatten: Callable[[Tensor, Any], Sequence[Tensor]]
flatten, unflatten = _bind("flatten") or (_joined, _parted)


def linear_pointwise() -> Any:
    """Return oneDNN's operation x wᵀ + b, or None."""
    if "linear_pointwise" in MISSING or not torch.backends.mkldnn.is_available():
        return None
    found = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    return None if found is None else found.default


# Modules and processes

_norm, _dropout = _bind("norm_base"), _bind("dropout_base")

_NORMALIZATIONS = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.LazyBatchNorm1d, nn.LazyBatchNorm2d, nn.LazyBatchNorm3d),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, nn.SyncBatchNorm),
    *(nn.LazyInstanceNorm1d, nn.LazyInstanceNorm2d, nn.LazyInstanceNorm3d),
)
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)

NORMALIZATIONS: tuple[type[nn.Module], ...] = _NORMALIZATIONS if _norm is None else (_norm,)
"""Classes of batch and instance normalisation."""

DROPOUTS: Any = _DROPOUTS if _dropout is None else (_dropout,)
"""Classes of dropout of entries and channels; instances have `p`."""


def keep_flat(layer: nn.Module) -> None:
    """Update the list of weights that a recurrent layer passes to its kernel.

    Other layers have no such list."""
    names = None if "flat_weights" in MISSING else getattr(layer, "_flat_weights_names", None)
    if isinstance(layer, nn.RNNBase) and names is not None:
        weights = [getattr(layer, name, None) for name in names]
        refs = [None if w is None else weakref.ref(w) for w in weights]
        if torch.compiler.is_compiling():
            layer._flat_weights, layer._flat_weight_refs = weights, refs
        else:  # in one call: an interrupt must not separate the two
            layer.__dict__.update(_flat_weights=weights, _flat_weight_refs=refs)


def static_graph(node: Any) -> bool:
    """Return True if a node of the graph may belong to DDP(static_graph=True)."""
    if "static_graph" in MISSING:
        return torch.distributed.is_available() and torch.distributed.is_initialized()
    return bool(node.name() == "_DDPSinkBackward" and node.ddp_weakref().static_graph)


def dense_gradient(t: Tensor) -> Tensor:
    """Return a DTensor's part or whole, whose gradient lies in memory as it does.

    torch 2.10 and 2.11 gather a leaf's gradient of other strides, and keep it whole.
    """
    if _OLD and t.requires_grad:
        size, stride = t.size(), t.stride()
        t.register_hook(lambda g: g if g.stride() == stride else g.new_empty_strided(size, stride).copy_(g))
    return t


def tensor_parallel(module: nn.Module) -> bool:
    """Return True if tensor parallelism may have split a module's features."""
    return "tensor_parallel" in MISSING or getattr(module, "_distribute_module_applied", False)
