"""Loops over the entries of many tensors in C, compiled by the machine's compiler on first use.

One call processes all tensors, with an equal share of all entries for each thread: no tensors are
copied together, and no tensor is too small. Compiling a loop takes a fraction of a second. Without
a compiler there are no loops.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import shlex
import shutil
import signal
import struct
import subprocess
import tempfile
from array import array
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

Stages: TypeAlias = "tuple[tuple[str, str, str], ...]"

TYPES = {torch.float32: "float", torch.float64: "double", torch.bfloat16: "bfloat", torch.float16: "_Float16"}

# `wide` is the type of computations; load_ and store_ functions convert bfloat16 entries.
PRELUDE = """
#include <math.h>
#include <stdint.h>
#include <string.h>
#include <omp.h>
typedef struct { uint16_t bits; } bfloat;
static inline float load_bfloat(bfloat x) { uint32_t u = (uint32_t)x.bits << 16; float f; memcpy(&f, &u, 4); return f; }
static inline bfloat store_bfloat(float f) {  /* to the nearest, to even where there are two */
  uint32_t u; memcpy(&u, &f, 4);
  bfloat x; x.bits = f != f ? 0x7fc0 : (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16); return x; }
static inline int64_t tensor_of(const int64_t *ends, int64_t count, int64_t number) {  /* the first that ends behind */
  int64_t low = 0;
  for (int64_t high = count; low < high;) {
    int64_t middle = (low + high) / 2;
    if (ends[middle] > number) high = middle; else low = middle + 1;
  }
  return low; }
#define SGN(x) (wide)(((x) > 0) - ((x) < 0))
#define CLAMP(x, low, high) ((x) < (low) ? (low) : (x) > (high) ? (high) : (x))
#define CUT(x, high) ((x) > (high) ? (high) : (x))
#define ABS(x) (sizeof(wide) == 4 ? (wide)fabsf((float)(x)) : (wide)fabs((double)(x)))
#define SQRT(x) (sizeof(wide) == 4 ? (wide)sqrtf((float)(x)) : (wide)sqrt((double)(x)))
"""

# A thread's share of all entries, [from, to), and k, the tensor in which it begins; `ends` are the
# cumulated sizes of the tensors.
_SHARE = """
    int64_t share = ((total + omp_get_num_threads() - 1) / omp_get_num_threads() + 63) & ~(int64_t)63;
    int64_t from = share * omp_get_thread_num(), to = from + share < total ? from + share : total;
    int64_t k = tensor_of(ends, count, from);
"""

_LOOP = """
void loop(void **at, const int64_t *ends, const int64_t *lengths, int64_t count, const double *numbers, int threads) {
  int64_t total = ends[count - 1];
  #pragma omp parallel num_threads(total < 32768 ? 1 : threads)
  {
    %(share)s
    for (; from < to; k++) {
      int64_t start = k ? ends[k - 1] : 0, stop = ends[k] < to ? ends[k] : to;
      %(numbers)s
      %(arrays)s
      for (int64_t i = from - start; i < stop - start; i++) {
        %(body)s
      }
      from = stop;
    }
  }
}
"""

# A row belongs to the thread whose share has its first entry.
_ROWS = """
#include <float.h>
#define ADD_SQUARES(sums, at) for (int j = 0; j < 8; j++) { double x = entry_of(a0, at + j); sums[j] += x * x; }

static inline double entry_of(const %(type)s *a0, int64_t i) { return (double)(%(entry)s); }

static double length_of(const %(type)s *a0, int64_t count) {
  double all = 0, s[8] = {0}, t[8] = {0}, u[8] = {0}, v[8] = {0};
  int64_t i = 0;
  for (; i + 32 <= count; i += 32) {
    ADD_SQUARES(s, i) ADD_SQUARES(t, i + 8) ADD_SQUARES(u, i + 16) ADD_SQUARES(v, i + 24)
  }
  for (; i < count; i++) all += entry_of(a0, i) * entry_of(a0, i);
  for (int j = 0; j < 8; j++) all += (s[j] + t[j]) + (u[j] + v[j]);
  if (sizeof(*a0) < 8 || all != all || (all > 1e-280 && all < 1e300)) return sqrt(all);
  double peak = 0;  /* squares have overflowed or vanished */
  for (i = 0; i < count; i++) { double x = fabs(entry_of(a0, i)); peak = x > peak ? x : peak; }
  if (peak == 0 || peak > DBL_MAX) return peak;
  for (all = 0, i = 0; i < count; i++) { double x = entry_of(a0, i) / peak; all += x * x; }
  return peak * sqrt(all);
}

%(more)s
void loop(void **at, const int64_t *ends, const int64_t *lengths, int64_t count, const double *numbers, int threads) {
  int64_t total = ends[count - 1];
  #pragma omp parallel num_threads(total < 32768 ? 1 : threads)
  {
    %(share)s
    for (; from < to; k++) {
      int64_t start = k ? ends[k - 1] : 0, stop = ends[k] < to ? ends[k] : to, length = lengths[k];
      %(numbers)s
      for (int64_t row = (from - start + length - 1) / length; row * length < stop - start; row++) {
        %(arrays)s
        %(body)s
      }
      from = stop;
    }
  }
}
"""


# The length r of the prox of a row's length, with Σ x² / (r + t)² = 1 and a step for each entry,
# t = cut / (√second · root + eps); 0 if the row becomes zero, NaN if it isn't finite. By Newton's
# iteration from below, as in `shrink_groups`; ‖x‖ - Σ x² t / Σ x² is below the root by Jensen's
# inequality. The iteration doubles the digits, so half of them are enough before the last step.
_SHORTENED = """
#include <stdlib.h>
#define EACH(statements) \\
  for (i = 0; i + 8 <= count; i += 8) for (int j = 0; j < 8; j++) { const int64_t at = i + j; statements } \\
  for (int j = 0; i < count; i++) { const int64_t at = i; statements }

static double root_of(const double *restrict x, const double *restrict t, int64_t count) {
  double s[8] = {0}, u[8] = {0}, b[8] = {0}, total = 0, mean = 0, r = 0;
  int64_t i;
  EACH(
    const double square = x[at] * x[at]; const double d = x[at] - t[at];
    s[j] += square; u[j] += square * t[at]; b[j] = d > b[j] ? d : b[j];
  )
  for (int j = 0; j < 8; j++) { total += s[j]; mean += u[j]; r = b[j] > r ? b[j] : r; }
  if (total != total || r > DBL_MAX) return NAN;
  const double below = total > 1e-280 && total < 1e280 ? sqrt(total) * (1 - 1e-12) - mean / total : 0;
  r = below > r ? below : r;
  for (int step = 0; step < 12; step++) {
    double square = 0, cube = 0;
    for (int j = 0; j < 8; j++) s[j] = u[j] = 0;
    EACH(
      const double part = 1 / (r + t[at] + DBL_MIN); const double y = x[at] * part; const double z = y * y;
      s[j] += z; u[j] += z * part;
    )
    for (int j = 0; j < 8; j++) { square += s[j]; cube += u[j]; }
    if (r == 0 && square <= 1) return 0;
    if (cube > 0) r += (sqrt(square) - 1) * (square / cube);
    if (square <= 1 + (sizeof(wide) == 4 ? 1e-5 : 1e-8)) break;
  }
  return r;
}

static inline double step_of(const %(second_type)s *a1, int64_t i, double root, double eps, double cut) {
  return cut / (eps + root * sqrt((double)(%(second)s)));
}

static void shorten_row(
    %(type)s *restrict a0, const %(second_type)s *restrict a1, int64_t count, double root, double eps, double cut) {
  double *x = malloc(2 * count * sizeof(double)), *t = x + count;
  for (int64_t i = 0; i < count; i++) {
    x[i] = fabs(entry_of(a0, i));
    t[i] = step_of(a1, i, root, eps, cut);
  }
  const double r = root_of(x, t, count);
  if (r == r) for (int64_t i = 0; i < count; i++) {
    wide w = (wide)(r > 0 ? entry_of(a0, i) * (r / (r + t[i])) : 0);
    w = w == 0 ? 0 : w;
    a0[i] = %(store)s;
  }
  free(x);
}
"""


# The same of groups that are the indices of an axis in the middle, (outer, groups, inner): those of
# a tile are neighbours in memory, and gathered together. A tile belongs to one thread.
_MIDDLE = """
#include <float.h>
#define TILE 16
#define EACH_OF(statements) \\
  if (inner == 1) for (int64_t j = 0; j < tile; j++) { const int64_t at = j * length + o; statements } \\
  else for (int64_t c = 0; c < tile; c++) for (int64_t b = 0; b < inner; b++) { \\
    const int64_t j = c * inner + b, at = c * length + o * inner + b; statements }

static inline double entry_of(const %(type)s *a0, int64_t i) { return (double)(%(entry)s); }

%(more)s
void loop(void **at, const int64_t *ends, const int64_t *sizes, int64_t count, const double *numbers, int threads) {
  for (int64_t k = 0; k < count; k++) {
    const int64_t outer = sizes[3 * k], groups = sizes[3 * k + 1], inner = sizes[3 * k + 2], length = outer * inner;
    %(numbers)s
    %(arrays)s
    #pragma omp parallel for num_threads(length * groups < 32768 ? 1 : threads)
    for (int64_t first = 0; first < groups; first += TILE) {
      const int64_t tile = groups - first < TILE ? groups - first : TILE, width = tile * inner;
      double *restrict x = malloc((2 * tile * length + 3 * width) * sizeof(double)), *restrict t = x + tile * length;
      double *restrict u = t + tile * length, *restrict v = u + width, *restrict r = v + width;
      for (int64_t o = 0; o < outer; o++) {
        const int64_t start = (o * groups + first) * inner;
        for (int64_t j = 0; j < width; j++) {
          u[j] = fabs(entry_of(a0, start + j));
          v[j] = step_of(a1, start + j, n0, n1, n2);
        }
        EACH_OF(x[at] = u[j]; t[at] = v[j];)
      }
      for (int64_t c = 0; c < tile; c++) {
        const double root = root_of(x + c * length, t + c * length, length);
        for (int64_t b = 0; b < inner; b++) r[c * inner + b] = root;
      }
      for (int64_t o = 0; o < outer; o++) {
        const int64_t start = (o * groups + first) * inner;
        EACH_OF(v[j] = t[at];)
        for (int64_t j = 0; j < width; j++) {  /* times 1 where the root is NaN */
          const int64_t i = start + j;
          const double kept = r[j] > 0 ? r[j] / (r[j] + v[j]) : r[j] == 0 ? 0 : 1;
          wide w = (wide)(entry_of(a0, i) * kept);
          w = w == 0 ? 0 : w;
          a0[i] = %(store)s;
        }
      }
      free(x);
    }
  }
}
"""


_TIMEOUT = 20  # seconds; compiling a loop takes a tenth of a second
_hangs: list[list[str]] = []  # commands that timed out; not run again


@functools.cache
def compiled(source: str) -> Any:
    """Return the library compiled from C source; None if there is no working compiler."""
    with contextlib.suppress(OSError), tempfile.TemporaryDirectory() as folder:
        file, made = Path(folder, "loop.c"), Path(folder, "loop.so")
        file.write_text(source, "utf-8")
        flags = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC", "-shared", "-x", "c"]
        for native in (["-march=native"], []):
            command = _compiler()  # none any more after it hung
            if command and _runs([*command, *flags, *native, str(file), "-o", str(made), "-lm"]) and _is_whole(made):
                return ctypes.CDLL(str(made))
    return None


def _compiler() -> list[str]:
    """Return the command of $CC, or of a compiler on the path; empty if there is none."""
    try:
        given = shlex.split(os.environ.get("CC", ""))
    except ValueError:  # unbalanced quotes
        return []
    found = given or [path for path in map(shutil.which, ("gcc", "cc", "clang", "g++", "c++")) if path][:1]
    return [] if found in _hangs else found


def _runs(command: list[str]) -> bool:
    """Run a compiler; True if it succeeds. On a timeout it is killed with all its subprocesses."""
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        return process.wait(_TIMEOUT) == 0
    except subprocess.TimeoutExpired:
        _hangs.append(_compiler())
        return False
    finally:  # also after an interrupt
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _is_whole(library: Path) -> bool:
    """Return True if a library file is complete: loading a truncated one would kill the process."""
    head = library.read_bytes()[:64] if library.exists() else b""
    if head[:5] != b"\x7fELF\x02":  # the system checks Mach-O and others
        return bool(head) and head[:4] != b"\x7fELF"
    (start,), (size, count) = struct.unpack_from("<Q", head, 40), struct.unpack_from("<HH", head, 58)
    return len(head) == 64 and library.stat().st_size >= start + size * count > 64


def names(roles: int) -> list[str]:
    """Return the names of entries in a loop's body: w for the weights, then o0, o1, ..."""
    return ["w", *(f"o{number}" for number in range(roles - 1))]


@functools.cache
def loop(kinds: tuple[torch.dtype, ...], body: str, numbers: int, changed: tuple[int, ...]) -> Loop | None:
    """Return a compiled loop that runs `body` for each entry; None if it can't be compiled.

    Args:
        kinds: dtypes of the weights and of the other tensors.
        body: statements on the entries `w`, `o0`, ... and the member's scalars `n0`, `n1`, ...
        numbers: the number of scalars.
        changed: indices of the tensors that the body changes.
    """
    return _made(_LOOP % {**_parts(kinds, numbers), "body": _of_entry(kinds, body, changed)}, kinds, changed)


@functools.cache
def rows(kinds: tuple[torch.dtype, ...], stages: Stages, numbers: int, changed: tuple[int, ...]) -> Loop | None:
    """Return a compiled loop that runs `stages` for each row; None if it can't be compiled.

    Args:
        kinds: dtypes of the weights and of the other tensors, all of them rows in memory.
        stages: triples, run in order: statements on a row of `length` entries that starts at `a0`,
            with Euclidean length `length_of(a0, length)`; a condition, true if its entries change;
            statements on each entry. `shorten_row(a0, a1, length, ...)` is known, too.
        numbers: the number of scalars.
        changed: indices of the tensors that the stages change.
    """
    body = "\n".join(
        f"{row}\nif ({changes}) for (int64_t i = 0; i < length; i++) {{ {_of_entry(kinds, entry, changed)} }}"
        for row, changes, entry in stages
    )
    parts = _parts(kinds, numbers, " + row * length")
    more = _SHORTENED % parts if "shorten_row(" in body else ""
    return _made(_ROWS % {**parts, "body": body, "more": more}, kinds, changed)


@functools.cache
def middle(kinds: tuple[torch.dtype, ...]) -> Loop | None:
    """Return a compiled loop that shortens groups as `shorten_row` does rows; None without it.

    Args:
        kinds: dtypes of the weights and of the second moments, contiguous and alike. Where `rows`
            has the length of a member's rows it takes three numbers: the product of the sizes of
            the axes before that of the groups, its own size, and the product of those after it.
    """
    parts = _parts(kinds, 3)
    return _made(_MIDDLE % {**parts, "more": _SHORTENED % parts}, kinds, (0,))


def _parts(kinds: Sequence[torch.dtype], numbers: int, offset: str = "") -> dict[str, str]:
    """Return the C code for the templates' placeholders: declarations of arrays and scalars."""
    types = [TYPES.get(kind, "") for kind in kinds]
    arrays = [f"{t} *restrict a{r} = ({t} *)at[{r} * count + k]{offset};" for r, t in enumerate(types)]
    given = [f"const wide n{number} = (wide)numbers[k * {numbers} + {number}];" for number in range(numbers)]
    return {
        "share": _SHARE,
        "arrays": " ".join(arrays),
        "numbers": " ".join(given),
        "type": types[0],
        "entry": "load_bfloat(a0[i])" if types[0] == "bfloat" else "a0[i]",
        "store": "store_bfloat(w)" if types[0] == "bfloat" else f"({types[0]})w",
        "second_type": types[-1],
        "second": "load_bfloat(a1[i])" if types[-1] == "bfloat" else "a1[i]",
    }


def _of_entry(kinds: Sequence[torch.dtype], body: str, changed: Sequence[int]) -> str:
    """Return C statements that load entry i of all tensors, run the body, and store changes."""
    types, entries = [TYPES.get(kind, "") for kind in kinds], names(len(kinds))
    load = [f"load_bfloat(a{r}[i])" if t == "bfloat" else f"(wide)a{r}[i]" for r, t in enumerate(types)]
    store = [f"store_bfloat({e})" if t == "bfloat" else f"({t}){e}" for t, e in zip(types, entries, strict=True)]
    return "\n".join(
        [
            " ".join(f"wide {entry} = {read};" for entry, read in zip(entries, load, strict=True)),
            body,
            " ".join(f"a{r}[i] = {store[r]};" for r in changed),
        ]
    )


def _made(source: str, kinds: Sequence[torch.dtype], changed: Sequence[int]) -> Loop | None:
    if not all(kind in TYPES for kind in kinds):
        return None
    wide = "double" if torch.float64 in kinds else "float"
    function = getattr(compiled(f"typedef {wide} wide;\n{PRELUDE}\n{source}"), "loop", None)
    return None if function is None else Loop(function, changed)


class Loop:
    """A compiled loop over tensors with the same dense layout."""

    def __init__(self, function: Any, changed: Sequence[int]) -> None:
        self._function, self._changed = function, changed
        pointer, integer = ctypes.c_void_p, ctypes.c_int64
        function.argtypes, function.restype = (pointer, pointer, pointer, integer, pointer, ctypes.c_int), None

    def __call__(
        self, members: Sequence[Sequence[Tensor]], numbers: Sequence[float], lengths: Sequence[int] = ()
    ) -> None:
        """Run the loop on all members, each with a nonempty tensor for every role.

        Args:
            members: for each member its tensors, in the order of `kinds`.
            numbers: the scalars of the first member, of the second, and so on.
            lengths: the row length of each member, for loops over rows.
        """
        roles, count = list(zip(*members, strict=True)), len(members)
        at = array("q", [address for role in roles for address in map(Tensor.data_ptr, role)])
        if any(len(set(at[role * count : (role + 1) * count])) < count for role in self._changed):
            each, long = len(numbers) // count, len(lengths) // count  # members that share memory run in turn
            for k, member in enumerate(members):
                self([member], numbers[k * each : (k + 1) * each], lengths[k * long : (k + 1) * long])
            return
        ends, given, rows = (
            array("q", accumulate(map(Tensor.numel, roles[0]))),
            array("d", numbers),
            array("q", lengths),
        )
        where = [one.buffer_info()[0] for one in (at, ends, rows)]
        self._function(*where, count, given.buffer_info()[0], torch.get_num_threads())
        torch.autograd.graph.increment_version([t for role in self._changed for t in roles[role]])

    def at(
        self, members: Sequence[Sequence[Tensor]], lengths: Sequence[int] = ()
    ) -> Callable[[array[float]], None] | None:
        """Return the call on these members as a function of the scalars of all of them.

        It holds while the tensors keep their memory. None if members share memory.
        """
        roles, count = list(zip(*members, strict=True)), len(members)
        addresses = [list(map(Tensor.data_ptr, role)) for role in roles]
        if any(len(set(addresses[role])) < count for role in self._changed):
            return None
        tables = [
            array("q", [one for role in addresses for one in role]),
            array("q", accumulate(map(Tensor.numel, roles[0]))),
            array("q", lengths),
        ]
        where = [one.buffer_info()[0] for one in tables]
        changed = [t for role in self._changed for t in roles[role]]

        def call(numbers: array[float], tables: Any = tables) -> None:  # the tables live as long
            self._function(*where, count, numbers.buffer_info()[0], torch.get_num_threads())
            torch.autograd.graph.increment_version(changed)

        return call
