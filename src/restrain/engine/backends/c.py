"""Backend of loops of C: instructions, and values and gradients of operations.

A value is summed in blocks of 4,096 entries, or of as many whole rows as fit: within a block in the
precision of the entries (float32 at least), over blocks in float64, always in the same order. So it
is bit-identical for any number of threads.
"""

from __future__ import annotations

import ctypes
import functools
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, count
from string import Template
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from restrain.engine.backends import c_compiler
from restrain.engine.backends.backend import Backend, Decider, Parts, Sums
from restrain.engine.backends.c_compiler import PRELUDE, TYPES, Loop, Stages, compiled
from restrain.engine.core import alike
from restrain.engine.ops import (
    ENDLESS,
    Batch,
    Decay,
    FitRows,
    Gradient,
    Instruction,
    Lengths,
    Lowered,
    Project,
    RootedShrink,
    RootedShrinkRows,
    Shrink,
    ShrinkRows,
    Tensors,
    length_in,
    rows_of,
)
from restrain.operations import Absolute, Huber, Length, Operation, Square

LONG = 1 << 18  # largest row: a row belongs to a single thread
COST = 10**9  # entries × steps that make up for compiling (0.1 s, at 100 ps saved per entry)
TENSOR = 1 << 12  # cost of a tensor without a loop of C, in entries


@dataclass(frozen=True)
class Call:
    """A call of a loop, with its members from several batches."""

    kinds: tuple[torch.dtype, ...]
    text: Any  # C code on entries, or on rows
    changed: tuple[int, ...]
    cost: float  # entries × steps that make up for compiling
    batches: list[Batch] = field(default_factory=list)
    members: list[Tensors] = field(default_factory=list)
    numbers: list[float] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)  # of rows; empty for entries
    turned: list[int] = field(default_factory=list)  # dim that numbers each member's groups; 0: they lie as rows

    def work(self) -> int:
        """Return the number of entries, plus a constant per tensor."""
        return sum(tensors[0].numel() for tensors in self.members) + TENSOR * len(self.members)

    def loop(self) -> Loop | None:
        """Return the compiled loop; None if it can't be compiled."""
        make = c_compiler.loop if isinstance(self.text, str) else c_compiler.rows
        return make(self.kinds, self.text, len(self.numbers) // len(self.members), self.changed)

    def run(self) -> bool:
        """Run the loop; return False if it can't be compiled."""
        loop = self.loop()
        if loop is None:
            return False
        if any(self.turned) and self._run_middle():
            return True
        if any(self.turned):
            rows = [_turned(tensors, dim) for tensors, dim in zip(self.members, self.turned, strict=True)]
            loop(rows, self.numbers, self.lengths)
            for tensors, copies, dim in zip(self.members, rows, self.turned, strict=True):
                if dim:
                    tensors[0].movedim(dim, 0).copy_(copies[0])
        else:
            loop(self.members, self.numbers, self.lengths)
        return True

    def _run_middle(self) -> bool:
        """Shorten groups in Adam's metric where they lie; return False if it can't be done."""
        in_metric = len(self.text) == 1 and self.text[0][0].startswith("shorten_row(")
        if not in_metric or not all(t.is_contiguous() for tensors in self.members for t in tensors):
            return False
        loop = c_compiler.middle(self.kinds)
        if loop is None:
            return False
        sizes = []
        for (w, *_), dim, length in zip(self.members, self.turned, self.lengths, strict=True):
            after = w.shape[dim + 1 :].numel()
            sizes += [w.shape[:dim].numel(), w.shape[dim], after] if dim else [1, w.numel() // length, length]
        loop(self.members, self.numbers, sizes)
        return True


@dataclass
class RepeatedCall:
    """A call of a loop that is repeated with other scalars, for members that keep their memory."""

    call: Call
    parts: list[int] = field(default_factory=list)  # numbers of the batches
    counts: list[int] = field(default_factory=list)  # of their members

    @property
    def cost(self) -> float:
        """Entries × steps that make up for compiling."""
        return self.call.cost

    @cached_property
    def work(self) -> int:
        """The number of entries, plus a constant per tensor."""
        return self.call.work()

    def numbers(self, lowered: Sequence[Lowered | None]) -> array[float]:
        """Return the scalars of all members, for the instructions of each batch."""
        found = array("d")
        for part, members in zip(self.parts, self.counts, strict=True):
            found.extend([number for _, numbers in lowered[part] or () for number in numbers] * members)
        return found

    def loop(self) -> Callable[[array[float]], object] | None:
        """Return the loop as a function of these scalars; None if it can't be compiled."""
        loop = self.call.loop()
        if loop is None:
            return None
        if not any(self.call.turned):
            return loop.at(self.call.members, self.call.lengths)

        def run(numbers: array[float]) -> None:
            self.call.numbers[:] = numbers
            self.call.run()

        return run


def repeated(batches: Sequence[Batch]) -> list[RepeatedCall]:
    """Return the calls for those batches of which C takes all members."""
    found: dict[Any, RepeatedCall] = {}
    for number, batch in enumerate(batches):
        own: dict[Any, Call] = {}
        if _take(own, batch) is not None or len(own) != 1:
            continue
        ((key, call),) = own.items()
        if key in found:
            one = found[key].call
            for mine, its in (
                (one.members, call.members), (one.numbers, call.numbers),
                (one.lengths, call.lengths), (one.turned, call.turned),
            ):  # fmt: skip
                mine.extend(its)  # type: ignore[arg-type]
        else:
            found[key] = RepeatedCall(call)
        found[key].parts.append(number)
        found[key].counts.append(len(call.members))
    return list(found.values())


def _turned(tensors: Tensors, dim: int) -> Tensors:
    """Return copies whose rows are the indices of a dim; for dim 0 the tensors themselves."""
    return tuple([t.movedim(dim, 0).contiguous() for t in tensors]) if dim else tensors


class C(Backend):
    """Loops of C, compiled in about 0.1 s by the machine's compiler; a call runs over many tensors.

    Tensors must be on a CPU, of a dtype in `TYPES`, and lie alike in memory without gaps.
    """

    def sums(self, parts: Parts, like: Tensor) -> Sums | None:
        terms = _sum_of(parts) if like.dtype in TYPES and like.is_cpu else None
        function = None if terms is None else _compiled_sum(tuple([one for _, one in terms]), like.dtype)
        return None if function is None or terms is None else _Sums(function, terms, like.dtype)

    def carry_out(self, batches: Sequence[Batch], decider: Decider) -> list[Batch]:
        if decider.compile is False:
            return list(batches)
        calls: dict[Any, Call] = {}
        left = [rest for batch in batches if (rest := _take(calls, batch)) is not None]
        for call in calls.values():
            if not decider.makes(call.work(), call.cost) or not call.run():
                left += call.batches
        return left


def _take(calls: dict[Any, Call], batch: Batch) -> Batch | None:
    """Add members to their loop's call; return the batch of the remaining, nonempty members."""
    lowered, first = batch.lowered, batch.members[0]
    if lowered is None or not lowered:
        return None if lowered is not None else batch
    kinds = tuple([t.dtype for t in first])
    if not first[0].is_cpu or not all(kind in TYPES for kind in kinds):
        return batch
    text: Any = _text(lowered, batch.by_entry)
    # rounding between stages
    rounds = not batch.by_entry and kinds[0].itemsize < 4 and text is not None and len(text) > 1
    if text is None or rounds:
        return batch
    keep = None if batch.by_entry else rows_of(batch.changes, first[0])
    fit, left, lengths = batch.members, list[Tensors](), _lengths(batch.members, keep)
    if lengths is None:
        found = [(tensors, _length(tensors, keep)) for tensors in batch.members]
        fit = [tensors for tensors, length in found if length is not None]
        left = [tensors for tensors, length in found if length is None and tensors[0].numel()]
        lengths = [length for _, length in found if length is not None]
    turned = [0] * len(fit)
    if left and keep and keep[0] and changed_by(lowered) == (0,):
        columns, left = _columns(left)
        fit, turned = [*fit, *columns], [*turned, *keep * len(columns)]
        lengths = [*lengths, *(tensors[0].numel() // tensors[0].shape[keep[0]] for tensors in columns)]
    if fit:
        key = (kinds, text, changed := changed_by(lowered))
        call = calls.setdefault(key, Call(kinds, text, changed, _cost(lowered)))
        call.batches.append(batch.of(fit))
        call.members.extend(fit)
        call.numbers.extend(numbers_of(lowered) * len(fit))
        call.lengths.extend(lengths)
        call.turned.extend(turned)
    return batch.of(left) if left else None


def _cost(lowered: Lowered) -> float:
    """Return the entries × steps that make up for compiling.

    Of groups in a metric a loop of C saves some 30 ns an entry: it is made at once.
    """
    return 0 if any(isinstance(step, RootedShrinkRows) for step, _ in lowered) else COST


def _columns(members: Sequence[Tensors]) -> tuple[list[Tensors], list[Tensors]]:
    """Return (members whose groups are to be copied as rows, the other members)."""
    apart = len({tensors[0].data_ptr() for tensors in members}) == len(members)
    found = [apart and _plain(one) and len({t.shape for t in one}) == 1 for one in members]
    pairs = list(zip(members, found, strict=True))
    return [one for one, fits in pairs if fits], [one for one, fits in pairs if not fits]


def _text(lowered: Lowered, by_entry: bool) -> Any:
    """Return the C code of instructions, cached for equal instructions; None if not supported."""
    try:
        return _written(tuple([(step, len(own)) for step, own in lowered]), by_entry)
    except TypeError:  # unhashable setting
        return None


@functools.lru_cache(256)
def _written(steps: tuple[tuple[Instruction, int], ...], by_entry: bool) -> Any:
    lowered = [(step, (0.0,) * count) for step, count in steps]
    return statements(lowered) if by_entry else stages(lowered)


def _plain(tensors: Sequence[Tensor]) -> bool:
    """Return True if tensors are ordinary, with their values in memory."""
    return set(map(type, tensors)) <= {Tensor, Parameter} and not any(map(Tensor.is_neg, tensors))


def _lengths(members: Sequence[Tensors], keep: tuple[int, ...] | None) -> list[int] | None:
    """Return `_length` of each member if all are contiguous and nonempty, as usual; else None."""
    every = list(chain.from_iterable(members))
    first, *others = [list(map(Tensor.numel, role)) for role in zip(*members, strict=True)]
    simple = _plain(every) and all(map(Tensor.is_contiguous, every)) and min(first) > 0
    if not simple or keep not in (None, (), (0,)) or any(sizes != first for sizes in others):
        return None
    if keep is None:
        return [0] * len(first)
    found = [size // len(tensors[0]) for size, tensors in zip(first, members, strict=True)] if keep else first
    return found if max(found) <= LONG else None


def _length(tensors: Tensors, keep: tuple[int, ...] | None) -> int | None:
    """Return the length of a member's rows, 0 for entries; None if its memory doesn't allow it."""
    first = tensors[0]
    if not (_plain(tensors) and first.numel() and all(t.numel() == first.numel() for t in tensors)):
        return None
    if keep is not None:
        length = length_in(tensors, keep)
        return None if length is None or length > LONG else length
    return 0 if alike(tensors) else None


# Instructions


class _UnknownError(Exception):
    """Operation or instruction without C code."""


# Value and slope of an entry {x} with |x| = {s}, by the settings of an operation.
_TERMS: dict[type[Operation], tuple[str, str]] = {
    Absolute: ("{s}", "SGN({x})"),
    Square: ("{x} * {x}", "2 * {x}"),
    Huber: (
        "CUT({s}, DELTA) * ({s} - CUT({s}, DELTA) / 2)",
        "({x} < -DELTA ? -DELTA : CUT({x}, DELTA))",
    ),
    Length: ("{x} * {x}", "({x} / size)"),  # of a row of length `size`, the term of its square
}


def _term(one: Any) -> tuple[str, str]:
    """Return C code for an operation's value and slope, with its settings written in.

    Raises:
        _UnknownError: the operation has none.
    """
    if type(one) not in _TERMS:
        raise _UnknownError
    settings = {name.upper(): f"(wide){float(number)!r}" for name, number in vars(one).items() if name != "per"}
    texts = []
    for text in _TERMS[type(one)]:
        for name, number in settings.items():
            text = text.replace(name, number)
        texts.append(text)
    return texts[0], texts[1]


def statements(lowered: Lowered) -> str | None:
    """Return C code on the entries w and o0 for all instructions; None if one has none."""
    try:
        return "\n".join([line for step, names in _named(lowered) for line in _STATEMENTS[type(step)](step, names)])
    except (KeyError, _UnknownError):
        return None


def stages(lowered: Lowered) -> Stages | None:
    """Return C code on rows, for `c_compiler.rows`, for all instructions; None if one has none."""
    found: list[tuple[str, str, str]] = []
    try:
        for step, names in _named(lowered):
            size = f"size{len(found)}"
            if type(step) in _ROWS:
                found.append(_ROWS[type(step)](step, names, size))
            elif _has_lengths(step):
                found.append((_bottom(size), "1", "\n".join(_STATEMENTS[type(step)](step, names, size))))
            else:
                row, changes, entry = found.pop() if found and found[-1][1] == "1" else ("", "1", "")
                found.append((row, changes, "\n".join([entry, *_STATEMENTS[type(step)](step, names)])))
    except (KeyError, _UnknownError):
        return None
    return tuple(found)


def _has_lengths(step: Any) -> bool:
    """Return True if an instruction needs the length of a row."""
    terms = step.sum if isinstance(step, Decay) else step
    return isinstance(terms, Gradient) and any(isinstance(other, Lengths) for other in terms.others)


def numbers_of(lowered: Lowered) -> list[float]:
    """Return the scalars of all instructions."""
    return [float(number) for _, own in lowered for number in own]


def changed_by(lowered: Lowered) -> tuple[int, ...]:
    """Return the indices of changed tensors: 0 for weights, 1 for the gradient."""
    return tuple(sorted({int(isinstance(step, Gradient)) for step, _ in lowered}))


def _named(lowered: Lowered) -> Iterator[tuple[Any, list[str]]]:
    """Yield instructions, each with the names of its scalars."""
    names = (f"n{number}" for number in count())
    return ((step, [next(names) for _ in own]) for step, own in lowered)


# Entries


def _terms(step: Gradient, numbers: Sequence[str], size: str = "") -> Iterator[str]:
    slopes = ["SGN(w)"] * step.l1 + ["w"] * step.l2
    for other in step.others:
        if isinstance(other, Lengths):
            slopes.append(f"(w / bottom_{size})")
        else:
            slopes.append(f"({_term(other)[1].format(x='w', s='ABS(w)')})")
    for number, slope in zip(numbers, slopes, strict=True):
        yield f"{number} * {slope}"


def _gradient(step: Gradient, numbers: Sequence[str], size: str = "") -> Iterator[str]:
    for term in _terms(step, numbers, size):
        yield f"o0 += {term};"


def _decay(step: Decay, numbers: Sequence[str], size: str = "") -> Iterator[str]:
    yield "{ const wide low = w < 0 ? w : 0, high = w > 0 ? w : 0;"
    yield f"wide v = w - ({' + '.join(_terms(step.sum, numbers, size))});"
    yield "w = CLAMP(v, low, high); }" if step.shrinks else "w = v; }"


def _soft(threshold: str) -> str:
    return f"w -= CLAMP(w, -{threshold}, {threshold});"


def _shrink(step: Shrink, numbers: Sequence[str]) -> Iterator[str]:
    if step.scaled:
        yield f"w *= {numbers[0]};"
    if step.soft:
        yield _soft(numbers[-1])
    # -0.0 becomes +0.0; "+ 0" wouldn't do: fused with the product, it gives -0.0 for a zero product
    yield "w = w == 0 ? 0 : w;"


def _rooted(step: RootedShrink, numbers: Sequence[str]) -> Iterator[str]:
    root, eps, *strengths = numbers
    yield f"{{ wide s = {eps} + {root} * SQRT(o0); s = s < (wide){ENDLESS!r} ? s : (wide){ENDLESS!r}; w *= s;"
    if step.soft:
        yield _soft(strengths[0])
    if step.scaled:
        yield f"s += {strengths[-1]};"
    yield "w = w / s + 0; }"


def _project(step: Project, numbers: Sequence[str]) -> Iterator[str]:
    for bound, beyond in ((step.interval.low, "<"), (step.interval.high, ">")):
        if bound is not None:
            yield f"w = w {beyond} (wide){float(bound)!r} ? (wide){float(bound)!r} : w;"
    yield "w += 0;"


_STATEMENTS: dict[type, Any] = {
    Gradient: _gradient,
    Decay: _decay,
    Shrink: _shrink,
    RootedShrink: _rooted,
    Project: _project,
}


# Rows: statements on the row, the condition for changes, statements on entries


def _bottom(size: str) -> str:
    """Return C code of a row's length as a divisor: 1 for zeros, as an inverse could overflow."""
    return f"""const double {size} = length_of(a0, length);
        const wide bottom_{size} = (wide)({size} == 0 ? 1 : {size});"""


def _shrink_row(step: ShrinkRows, numbers: Sequence[str], size: str) -> tuple[str, str, str]:
    row = f"""const double {size} = length_of(a0, length), left_{size} = 1 - {numbers[0]} / {size};
        const wide scale_{size} = (wide)(left_{size} > 0 ? left_{size} : 0);"""
    return row, f"left_{size} == left_{size}", f"w = w * scale_{size} + 0;"  # false for NaN


def _rooted_row(step: RootedShrinkRows, numbers: Sequence[str], size: str) -> tuple[str, str, str]:
    root, eps, cut = numbers
    return f"shorten_row(a0, a1, length, {root}, {eps}, {cut});", "0", ""


def _fit_row(step: FitRows, numbers: Sequence[str], size: str) -> tuple[str, str, str]:
    low, high, some = f"(double){step.low!r}", f"(double){step.high!r}", f"{size} > DBL_MIN"
    row = f"""const double {size} = length_of(a0, length), aim_{size} = {size} < {low} ? {low} : {high};
        const double near_{size} = 8 * (sizeof(*a0) == 4 ? FLT_EPSILON : DBL_EPSILON);
        const int fits_{size} = {size} >= {low} * (1 - near_{size}) && {size} <= {high} * (1 + near_{size});
        const double scale_{size} = {some} ? aim_{size} / {size} : 0;
        const double even_{size} = {some} ? 0 : aim_{size} / sqrt((double)length);"""
    finite = f"(wide)((double)w * scale_{size} + even_{size})"
    return row, f"!fits_{size}", f"w = {size} <= DBL_MAX ? {finite} : w - w == 0 ? w : (wide)NAN;"


_ROWS: dict[type, Any] = {ShrinkRows: _shrink_row, RootedShrinkRows: _rooted_row, FitRows: _fit_row}


# Sums

_HEAD = Template("""
#include <stdlib.h>
typedef $entry entry;
#define LOAD(e) $load
#define STORE(x) $store
#define TERMS $terms
#define LANES 64
#define BLOCK 4096

static inline int64_t rows_of(int64_t width) { return width < BLOCK ? BLOCK / width : 1; }  /* in a block */
static int64_t blocks_of(const int64_t *sizes, const int64_t *widths, int64_t count, int64_t *ends) {
  int64_t blocks = 0;
  for (int64_t k = 0; k < count; k++) {
    int64_t block = rows_of(widths[k]) * widths[k];
    ends[k] = blocks += (sizes[k] + block - 1) / block;
  }
  return blocks;
}
""")

# In lanes: compilers keep the order of a sum, so it is written in the order that SIMD needs.
_ADD = Template("""
static inline void $name(const entry *restrict e, int64_t count, double *sums) {
  for (int64_t part; count > 0; count -= part, e += part) {
    part = count < BLOCK ? count : BLOCK;
    int64_t whole = part & ~(int64_t)(LANES - 1);
    $zero
    if (whole) {
      $lanes
      for (int64_t i = 0; i < whole; i += LANES)
        for (int l = 0; l < LANES; l++) { const wide x = LOAD(e[i + l]), s = ABS(x); $add_lane }
      for (int half = LANES / 2; half; half /= 2)
        for (int l = 0; l < half; l++) { $halve }
      $first
    }
    for (int64_t i = whole; i < part; i++) { const wide x = LOAD(e[i]), s = ABS(x); $add }
    $end
  }
}
""")

# Length of a row: root of its sum of squares; if out of range, again in double, scaled by the
# greatest entry.
_LENGTH = """
static double length_of(const entry *e, int64_t count, double square) {
  double peak = 0;
  if (square != square || (square > 1e-24 && square < 1e30)) return sqrt(square);
  for (int64_t i = 0; i < count; i++) { double x = fabs((double)LOAD(e[i])); peak = x > peak ? x : peak; }
  if (peak == 0 || peak - peak != 0) return peak;
  square = 0;
  for (int64_t i = 0; i < count; i++) { double x = (double)LOAD(e[i]) / peak; square += x * x; }
  return peak * sqrt(square);
}
"""

_RUN = Template("""
static void value(const entry *e, int64_t count, int64_t width, double *sums) {
  $value
}
static void gradient(const entry *restrict e, entry *restrict o, int64_t count, int64_t width,
                     const double *factors, int adds) {
  $factors
  $gradient
}

/* The sum of the values in *out; without out, factor times the gradients, put or added.
   given: strengths, weights. */
void run(const int64_t *table, int64_t count, const double *given, double factor, int adds, wide *out, int threads) {
  const int64_t *sizes = table + count, *widths = sizes + count, *into = widths + count;
  const double *weights = given + TERMS;
  int64_t *ends = malloc(sizeof(int64_t) * count), blocks = blocks_of(sizes, widths, count, ends);
  double *partial = out ? calloc(TERMS * blocks, sizeof(double)) : NULL;
  int64_t chunk = blocks < 128 ? (blocks + 7) / 8 : 16;
  #pragma omp parallel for schedule(dynamic, chunk) num_threads(blocks < 8 ? 1 : threads)
  for (int64_t b = 0; b < blocks; b++) {
    int64_t k = tensor_of(ends, count, b), width = widths[k], step = rows_of(width) * width;
    int64_t start = (b - (k ? ends[k - 1] : 0)) * step, size = sizes[k] - start < step ? sizes[k] - start : step;
    const entry *e = (const entry *)table[k] + start;
    if (out) { value(e, size, width, partial + b * TERMS); continue; }
    double factors[TERMS];
    for (int t = 0; t < TERMS; t++) factors[t] = factor * weights[k] * given[t];
    gradient(e, (entry *)into[k] + start, size, width, factors, adds);
  }
  double total = 0;
  for (int64_t k = 0, b = 0; out && k < count; k++) {
    double sums[TERMS] = {0};
    for (; b < ends[k]; b++) for (int t = 0; t < TERMS; t++) sums[t] += partial[b * TERMS + t];
    for (int t = 0; t < TERMS; t++) total += weights[k] * given[t] * sums[t];
  }
  if (out) *out = (wide)total;
  free(ends);
  free(partial);
}
""")

_PUT = """if (adds)
      for (int64_t i = 0; i < $count; i++) { const wide x = LOAD(e[i]), s = ABS(x); o[i] = STORE(LOAD(o[i]) $slopes); }
    else
      for (int64_t i = 0; i < $count; i++) { const wide x = LOAD(e[i]), s = ABS(x); o[i] = STORE($slopes); }"""
_ENTRIES = (Template("add(e, count, sums);"), Template(_PUT))
_LENGTHS = (
    Template("""for (; count > 0; count -= width, e += width) {
    double own[TERMS] = {0};
    add(e, width, own);
    own[$at] = sqrt((double)width) * length_of(e, width, own[$at]);
    for (int t = 0; t < TERMS; t++) sums[t] += own[t];
  }"""),
    Template(f"""for (; count > 0; count -= width, e += width, o += width) {{
    double square = 0;
    add_squares(e, width, &square);
    const double length = length_of(e, width, square);
    const wide size = (wide)(length == 0 ? 1 : length), f$at = (wide)(factors[$at] * sqrt((double)width));
    {_PUT}
  }}"""),
)


def _each(text: str, formulas: Sequence[str]) -> str:
    """Return the text for each term, with @ replaced by its index and # by its formula."""
    return " ".join([text.replace("@", str(t)).replace("#", formula) for t, formula in enumerate(formulas)])


def _adding(name: str, values: Sequence[str]) -> str:
    texts = {
        "zero": "wide t@ = 0;",
        "lanes": "wide l@[LANES] = {0};",
        "add_lane": "l@[l] += #;",
        "halve": "l@[l] += l@[l + half];",
        "first": "t@ = l@[0];",
        "add": "t@ += #;",
        "end": "sums[@] += t@;",
    }
    return _ADD.substitute({k: _each(text, values) for k, text in texts.items()}, name=name)


def _source(terms: tuple[Operation, ...], dtype: torch.dtype) -> str:
    entry, texts = TYPES[dtype], [[text.format(x="x", s="s") for text in _term(one)] for one in terms]
    values, slopes = [value for value, _ in texts], [slope for _, slope in texts]
    at = next((t for t, one in enumerate(terms) if isinstance(one, Length)), None)
    bfloat = entry == "bfloat"
    head = _HEAD.substitute(
        entry=entry,
        load="load_bfloat(e)" if bfloat else "(wide)(e)",
        store="store_bfloat(x)" if bfloat else "(entry)(x)",
        terms=len(terms),
    )
    inner = {"at": at, "count": "count" if at is None else "width", "slopes": _each("+ f@ * (#)", slopes)}
    value, gradient = [text.substitute(inner) for text in (_ENTRIES if at is None else _LENGTHS)]
    factors = [f"const wide f{t} = (wide)factors[{t}];" for t in range(len(terms)) if t != at]
    run = _RUN.substitute(value=value, gradient=gradient, factors=" ".join(factors))
    squares = "" if at is None else _adding("add_squares", ["x * x"]) + _LENGTH
    wide = "double" if dtype == torch.float64 else "float"
    return f"typedef {wide} wide;\n{PRELUDE}{head}{_adding('add', values)}{squares}{run}"


@functools.cache
def _compiled_sum(terms: tuple[Operation, ...], dtype: torch.dtype) -> Any:
    try:
        function = getattr(compiled(_source(terms, dtype)), "run", None)
    except _UnknownError:
        return None
    if function is not None:
        pointer, whole = ctypes.c_void_p, ctypes.c_int
        function.argtypes = [pointer, ctypes.c_int64, pointer, ctypes.c_double, whole, pointer, whole]
    return function


def _sum_of(parts: Parts) -> list[tuple[float, Operation]] | None:
    """Return (strength, operation) per term of a sum of penalties; None if one isn't supported."""
    found: list[tuple[float, Operation]] = []
    for strength, leaf in parts:
        if leaf.operations is None:
            return None
        for factor, one in leaf.operations:
            length = isinstance(one, Length)
            found += [(float(strength * factor), Length("row") if length else one)] * bool(factor)
    lengths = [one for _, one in found if isinstance(one, Length)]
    return found if found and len(lengths) < 2 and all(type(one) in _TERMS for _, one in found) else None


class _Sums(Sums):
    """A sum of operations on tensors whose entries, or rows, are dense in memory."""

    adds = True

    def __init__(self, function: Any, terms: Sequence[tuple[float, Operation]], dtype: torch.dtype) -> None:
        self._wide = torch.promote_types(dtype, torch.float32)
        self._function, self._rows = function, any(isinstance(one, Length) for _, one in terms)
        self._strengths = [strength for strength, _ in terms]

    def value(self, tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        out = tensors[0].new_empty((), dtype=self._wide)
        self._call(tensors, weights, 0.0, (), out.data_ptr())
        return out

    def gradients(
        self,
        tensors: Sequence[Tensor],
        weights: Sequence[float],
        factor: Tensor,
        into: Sequence[Tensor],
        *,
        add: bool = False,
    ) -> None:
        self._call(tensors, weights, float(factor), into, None, add)
        torch.autograd.graph.increment_version(into)

    def _call(
        self,
        tensors: Sequence[Tensor],
        weights: Sequence[float],
        factor: float,
        into: Sequence[Tensor],
        out: int | None,
        add: bool = False,
    ) -> None:
        sizes = [x.numel() for x in tensors]
        widths = [x.numel() // x.shape[0] for x in tensors] if self._rows else [1] * len(tensors)
        table = array("q", [x.data_ptr() for x in tensors] + sizes + widths + [x.data_ptr() for x in into])
        given = array("d", [*self._strengths, *weights])
        at = table.buffer_info()[0], len(tensors), given.buffer_info()[0]
        self._function(*at, factor, add, out, torch.get_num_threads())
