"""Values and gradients of penalties over the entries, or the rows, of many tensors: one call of C each.

A value is summed in blocks of 4,096 entries, or of as many whole rows as fit in: up to that number in the precision of
the entries (float32 at least), from there on in float64, and always in the same order. So it is the same to the bit
whatever the number of threads.
"""

from __future__ import annotations

import ctypes
import functools
from array import array
from collections.abc import Sequence
from string import Template
from typing import Any

import torch
from torch import Tensor

from restrain.engine.backends import compiler
from restrain.penalties import GroupLasso, Huber, Penalty

# Value and slope of an entry x with |x| = s, by a number {a}; of lengths, what their squares are sums of.
_TERMS = {
    "absolute": ("s", "SGN(x)"),
    "squares": ("x * x", "2 * x"),
    "huber": ("CUT(s, {a}) * (s - CUT(s, {a}) / 2)", "(x < -{a} ? -{a} : CUT(x, {a}))"),
    "lengths": ("x * x", "x"),
}

_HEAD = Template("""
#include <stdlib.h>
typedef $entry entry;
#define LOAD(e) $load
#define STORE(x) $store
#define TERMS $terms
#define LANES 64
#define BLOCK 4096
#define CUT(x, high) ((x) > (high) ? (high) : (x))

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

# In lanes: a compiler keeps the order of a sum as it is written, so it is written as a processor can do it at once.
_ADD = Template("""
static inline void $name(const entry *restrict e, int64_t count, const wide *numbers, double *sums) {
  $numbers
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

_RUN = Template("""
static void value(const entry *e, int64_t count, int64_t width, const wide *numbers, double *sums) {
  $value
}
static void gradient(const entry *restrict e, entry *restrict o, int64_t count, int64_t width,
                     const wide *numbers, const double *factors, int adds) {
  $numbers
  $factors
  $gradient
}

/* The sum of the values in *out; without out, factor times the gradients, put or added.
   given: strengths, numbers, weights. */
void run(const int64_t *table, int64_t count, const double *given, double factor, int adds, wide *out, int threads) {
  const int64_t *sizes = table + count, *widths = sizes + count, *into = widths + count;
  const double *weights = given + 2 * TERMS;
  wide numbers[TERMS];
  for (int t = 0; t < TERMS; t++) numbers[t] = (wide)given[TERMS + t];
  int64_t *ends = malloc(sizeof(int64_t) * count), blocks = blocks_of(sizes, widths, count, ends);
  double *partial = out ? calloc(TERMS * blocks, sizeof(double)) : NULL;
  int64_t chunk = blocks < 128 ? (blocks + 7) / 8 : 16;
  #pragma omp parallel for schedule(dynamic, chunk) num_threads(blocks < 8 ? 1 : threads)
  for (int64_t b = 0; b < blocks; b++) {
    int64_t k = tensor_of(ends, count, b), width = widths[k], step = rows_of(width) * width;
    int64_t start = (b - (k ? ends[k - 1] : 0)) * step, size = sizes[k] - start < step ? sizes[k] - start : step;
    const entry *e = (const entry *)table[k] + start;
    if (out) { value(e, size, width, numbers, partial + b * TERMS); continue; }
    double factors[TERMS];
    for (int t = 0; t < TERMS; t++) factors[t] = factor * weights[k] * given[t];
    gradient(e, (entry *)into[k] + start, size, width, numbers, factors, adds);
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
_ENTRIES = (Template("add(e, count, numbers, sums);"), Template(_PUT))
_ROWS = (
    Template("""for (; count > 0; count -= width, e += width) {
    double own[TERMS] = {0};
    add(e, width, numbers, own);
    own[$at] = sqrt((double)width) * sqrt(own[$at]);
    for (int t = 0; t < TERMS; t++) sums[t] += own[t];
  }"""),
    Template(f"""for (; count > 0; count -= width, e += width, o += width) {{
    double square = 0;
    add_squares(e, width, NULL, &square);
    const wide f$at = square == 0 ? 0 : (wide)(factors[$at] * sqrt((double)width) / sqrt(square));
    {_PUT}
  }}"""),
)


def _each(text: str, formulas: Sequence[str]) -> str:
    """The text for each term: @ is its place, # its formula."""
    return " ".join([text.replace("@", str(t)).replace("#", formula) for t, formula in enumerate(formulas)])


def _adding(name: str, values: Sequence[str], numbers: str) -> str:
    texts = {
        "zero": "wide t@ = 0;",
        "lanes": "wide l@[LANES] = {0};",
        "add_lane": "l@[l] += #;",
        "halve": "l@[l] += l@[l + half];",
        "first": "t@ = l@[0];",
        "add": "t@ += #;",
        "end": "sums[@] += t@;",
    }
    return _ADD.substitute({k: _each(text, values) for k, text in texts.items()}, name=name, numbers=numbers)


def _source(terms: tuple[str, ...], dtype: torch.dtype) -> str:
    entry = compiler.TYPES[dtype]
    values, slopes = [[_TERMS[term][which].replace("{a}", f"a{t}") for t, term in enumerate(terms)] for which in (0, 1)]
    at = terms.index("lengths") if "lengths" in terms else None
    numbers = _each("const wide a@ = numbers[@];", terms)
    bfloat = entry == "bfloat"
    head = _HEAD.substitute(
        entry=entry,
        load="load_bfloat(e)" if bfloat else "(wide)(e)",
        store="store_bfloat(x)" if bfloat else "(entry)(x)",
        terms=len(terms),
    )
    inner = {"at": at, "count": "count" if at is None else "width", "slopes": _each("+ f@ * (#)", slopes)}
    value, gradient = [text.substitute(inner) for text in (_ENTRIES if at is None else _ROWS)]
    factors = [f"const wide f{t} = (wide)factors[{t}];" for t in range(len(terms)) if t != at]
    run = _RUN.substitute(value=value, gradient=gradient, numbers=numbers, factors=" ".join(factors))
    squares = "" if at is None else _adding("add_squares", ["x * x"], "")
    wide = "double" if dtype == torch.float64 else "float"
    return f"typedef {wide} wide;\n{compiler.PRELUDE}{head}{_adding('add', values, numbers)}{squares}{run}"


@functools.cache
def _compiled(terms: tuple[str, ...], dtype: torch.dtype) -> Any:
    made = compiler.compiled(_source(terms, dtype))
    if made is None:
        return None
    pointer, whole = ctypes.c_void_p, ctypes.c_int
    made.run.argtypes = [pointer, ctypes.c_int64, pointer, ctypes.c_double, whole, pointer, whole]
    return made.run


def _terms(parts: Sequence[tuple[Any, Penalty]]) -> list[tuple[str, float, float]] | None:
    """Name, strength and number of each term of a sum of penalties; None if there is another."""
    found: list[tuple[str, float, float]] = []
    for strength, leaf in parts:
        if isinstance(leaf, GroupLasso):
            found.append(("lengths", float(strength), 0.0))
        elif isinstance(leaf, Huber):
            found.append(("huber", float(strength), leaf.delta))
        elif leaf.elastic is None:
            return None
        else:
            for name, factor in zip(("absolute", "squares"), leaf.elastic, strict=True):
                found += [(name, float(strength * factor), 0.0)] * bool(factor)
    names = [name for name, _, _ in found]
    return found if found and names.count("lengths") < 2 else None


class Sums:
    """A sum of penalties on tensors whose entries fill stretches of memory."""

    def __init__(self, function: Any, terms: Sequence[tuple[str, float, float]], dtype: torch.dtype) -> None:
        self._wide = torch.promote_types(dtype, torch.float32)
        self._function, self._rows = function, any(name == "lengths" for name, _, _ in terms)
        self._given = [*[strength for _, strength, _ in terms], *[number for _, _, number in terms]]

    def value(self, tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        """The sum of the values, each multiplied by its weight; in float32 at least."""
        out = tensors[0].new_empty((), dtype=self._wide)
        self._call(tensors, weights, 0.0, (), out.data_ptr())
        return out

    def gradients(
        self,
        tensors: Sequence[Tensor],
        weights: Sequence[float],
        factor: float,
        into: Sequence[Any],
        adds: bool = False,
    ) -> None:
        """Write factor · weight · gradient of each into tensors with the same strides, or add it to them."""
        self._call(tensors, weights, factor, into, None, adds)
        torch.autograd.graph.increment_version(into)

    def _call(
        self,
        tensors: Sequence[Tensor],
        weights: Sequence[float],
        factor: float,
        into: Sequence[Tensor],
        out: int | None,
        adds: bool = False,
    ) -> None:
        sizes = [x.numel() for x in tensors]
        widths = [x.numel() // x.shape[0] for x in tensors] if self._rows else [1] * len(tensors)
        table = array("q", [x.data_ptr() for x in tensors] + sizes + widths + [x.data_ptr() for x in into])
        given = array("d", [*self._given, *weights])
        at = table.buffer_info()[0], len(tensors), given.buffer_info()[0]
        self._function(*at, factor, adds, out, torch.get_num_threads())


def known(parts: Sequence[tuple[Any, Penalty]], dtype: torch.dtype) -> Sums | None:
    """What computes the sum of these penalties; None where that isn't written in C, or can't be compiled."""
    terms = _terms(parts) if dtype in compiler.TYPES else None
    function = None if terms is None else _compiled(tuple([name for name, _, _ in terms]), dtype)
    return None if function is None or terms is None else Sums(function, terms, dtype)
