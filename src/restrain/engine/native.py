"""Loops over the entries of many tensors as C, compiled by this machine's own compiler when they are first needed.

One call goes over all tensors: its threads have equal shares of all entries, so that nothing is copied together and no
tensor is too small. Compiling a loop takes a fraction of a second. Where there is no compiler, there is no loop.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import shlex
import shutil
import subprocess
import tempfile
from array import array
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TYPES = {torch.float32: "float", torch.float64: "double", torch.bfloat16: "bfloat", torch.float16: "_Float16"}

# `wide` is the type in which is computed; LOAD and STORE are between it and a type of entries.
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
#define SGN(x) (wide)(((x) > 0) - ((x) < 0))
#define CLAMP(x, low, high) ((x) < (low) ? (low) : (x) > (high) ? (high) : (x))
#define ABS(x) (sizeof(wide) == 4 ? (wide)fabsf((float)(x)) : (wide)fabs((double)(x)))
#define SQRT(x) (sizeof(wide) == 4 ? (wide)sqrtf((float)(x)) : (wide)sqrt((double)(x)))
"""

# A thread's share of all entries, [from, to), and the tensor in which it begins; ends are where tensors end.
_SHARE = """
    int64_t share = ((total + omp_get_num_threads() - 1) / omp_get_num_threads() + 63) & ~(int64_t)63;
    int64_t from = share * omp_get_thread_num(), to = from + share < total ? from + share : total;
    int64_t k = 0;
    for (int64_t high = count; k < high;) {
      int64_t middle = (k + high) / 2;
      if (ends[middle] > from) high = middle; else k = middle + 1;
    }
"""

_LOOP = """
void loop(void **at, const int64_t *ends, int64_t count, const double *numbers, int threads) {
  int64_t total = ends[count - 1];
  %(numbers)s
  #pragma omp parallel num_threads(total < 32768 ? 1 : threads)
  {
    %(share)s
    for (; from < to; k++) {
      int64_t start = k ? ends[k - 1] : 0, stop = ends[k] < to ? ends[k] : to;
      %(arrays)s
      for (int64_t i = from - start; i < stop - start; i++) {
        %(load)s
        %(body)s
        %(store)s
      }
      from = stop;
    }
  }
}
"""


@functools.cache
def compiled(source: str) -> Any:
    """The library that is compiled of C; None where that can't be done."""
    given = shlex.split(os.environ.get("CC", ""))
    found = [[path] for path in map(shutil.which, ("gcc", "cc", "clang", "g++", "c++")) if path]
    with contextlib.suppress(OSError, subprocess.SubprocessError), tempfile.TemporaryDirectory() as folder:
        file, made = Path(folder, "loop.c"), Path(folder, "loop.so")
        file.write_text(source, "utf-8")
        flags = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC", "-shared", "-x", "c"]
        for native in (["-march=native"], []):
            command = (
                [*(given or found[0]), *flags, *native, str(file), "-o", str(made), "-lm"] if given or found else []
            )
            done = subprocess.run(command, capture_output=True, timeout=60, check=False) if command else None
            if done is not None and done.returncode == 0:
                return ctypes.CDLL(str(made))
    return None


def names(roles: int) -> list[str]:
    """What a body calls the entries: w, of the weights, then o0, o1, ..."""
    return ["w", *(f"o{number}" for number in range(roles - 1))]


@functools.cache
def loop(kinds: tuple[torch.dtype, ...], body: str, numbers: int, changed: tuple[int, ...]) -> Loop | None:
    """What does a body to each entry.

    Args:
        kinds: dtypes of the weights and of what else is read, entry by entry.
        body: statements on `w`, `o0`, ... and on the numbers `n0`, `n1`, ...
        numbers: how many.
        changed: which of the tensors the body changes.
    """
    if not all(kind in TYPES for kind in kinds):
        return None
    wide = "double" if torch.float64 in kinds else "float"
    types, entries = [TYPES[kind] for kind in kinds], names(len(kinds))
    parts = {
        "numbers": " ".join(f"const wide n{number} = (wide)numbers[{number}];" for number in range(numbers)),
        "share": _SHARE,
        "arrays": " ".join(f"{t} *restrict a{r} = at[{r} * count + k];" for r, t in enumerate(types)),
        "load": " ".join(
            f"wide {name} = {f'load_bfloat(a{r}[i])' if types[r] == 'bfloat' else f'(wide)a{r}[i]'};"
            for r, name in enumerate(entries)
        ),
        "body": body,
        "store": " ".join(
            f"a{r}[i] = {f'store_bfloat({entries[r]})' if types[r] == 'bfloat' else f'({types[r]}){entries[r]}'};"
            for r in changed
        ),
    }
    made = compiled(f"typedef {wide} wide;\n{PRELUDE}\n{_LOOP % parts}")
    return None if made is None else Loop(made.loop, changed)


class Loop:
    """A compiled loop, called with tensors whose entries lie alike in memory without gaps."""

    def __init__(self, function: Callable[..., Any], changed: Sequence[int]) -> None:
        self._function, self._changed = function, changed

    def __call__(self, members: Sequence[Sequence[Tensor]], numbers: Sequence[float]) -> None:
        """Do it to all members, each of which has a tensor for every role, none of them empty."""
        roles = list(zip(*members, strict=True))
        at = array("q", [t.data_ptr() for role in roles for t in role])
        ends = array("q", accumulate([t.numel() for t in roles[0]]))
        given = array("d", numbers)
        self._function(
            ctypes.c_void_p(at.buffer_info()[0]),
            ctypes.c_void_p(ends.buffer_info()[0]),
            ctypes.c_int64(len(members)),
            ctypes.c_void_p(given.buffer_info()[0]),
            torch.get_num_threads(),
        )
        torch.autograd.graph.increment_version(self._written(roles))

    def _written(self, roles: Sequence[Sequence[Tensor]]) -> Iterator[Tensor]:
        return (t for role in self._changed for t in roles[role])
