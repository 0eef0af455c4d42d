"""Loop of C for steps that hold norms: w ← R · N(w - lr · R · N(u)), u the optimizer's movement.

Groups of entries with a norm of their own lie one after another in memory. A first pass changes
the moments and sums w², w u and u² of each group, a second one changes the weights: at once for a
group of at most 4,096 entries; else backwards, as the last blocks may still be in the cache. The
u of the last blocks are kept in between, as many as a cache may hold; those of earlier ones are
computed again. Sums are of blocks of 4,096 entries in the precision of the entries, over blocks in
float64, always in the same order.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from array import array
from collections.abc import Sequence
from string import Template
from typing import Any

import torch
from torch import Tensor

from restrain.engine.backends.c_compiler import PRELUDE, TYPES, compiled, names

_BLOCK = 4096
_KEPT = 1024  # blocks whose u are kept by all threads together: 16 MiB in float32

_SOURCE = Template("""
#include <stdlib.h>
#define LANES 64
#define BLOCK $block
#define NUMBERS $numbers
#define LOAD(i) $load

typedef struct { double ww, wu, uu; } sums;
typedef struct { double length, scale, peak; } factors;  /* w = (w - length u / peak) scale; none if scale is 0 */

static sums advance($arrays, int64_t count, const double *numbers, wide *restrict moved) {
  NUMBERS
  wide x[LANES] = {0}, y[LANES] = {0}, z[LANES] = {0};
  int64_t whole = count & ~(int64_t)(LANES - 1);
  for (int64_t at = 0; at < whole; at += LANES)
    for (int l = 0; l < LANES; l++) {
      int64_t i = at + l;
      LOAD(i) $step $store
      const wide u = moved[i] = $movement;
      x[l] += w * w; y[l] += w * u; z[l] += u * u;
    }
  for (int half = LANES / 2; half; half /= 2)
    for (int l = 0; l < half; l++) { x[l] += x[l + half]; y[l] += y[l + half]; z[l] += z[l + half]; }
  for (int64_t i = whole; i < count; i++) {
    LOAD(i) $step $store
    const wide u = moved[i] = $movement;
    x[0] += w * w; y[0] += w * u; z[0] += u * u;
  }
  return (sums){(double)x[0], (double)y[0], (double)z[0]};
}

static factors solved($arrays, int64_t count, const double *numbers, sums s, double radius, double rate) {
  NUMBERS
  double peak = 1;
  if (!(s.uu > 1e-24 && s.uu < 1e30)) {  /* squares vanish or overflow: of u over its greatest entry */
    peak = 0;
    for (int64_t i = 0; i < count; i++) {
      LOAD(i)
      const double u = fabs((double)($movement));
      peak = u > peak || u != u ? u : peak;
    }
    if (peak == 0) return (factors){0, 0, 1};
    s.wu = s.uu = 0;
    for (int64_t i = 0; i < count; i++) {
      LOAD(i)
      const double u = (double)($movement) / peak;
      s.wu += (double)w * u; s.uu += u * u;
    }
  }
  const double length = rate * radius / sqrt(s.uu), square = s.ww - 2 * length * s.wu + length * length * s.uu;
  return (factors){length, square <= 0 ? 0 : radius / sqrt(square), peak};  /* below 0 by rounding */
}

#define TURN(u) \\
  if (f.scale == 0) return; \\
  const wide length = (wide)f.length, scale = (wide)f.scale, peak = (wide)f.peak; \\
  if (f.peak == 1) for (int64_t i = 0; i < count; i++) { LOAD(i) a0[i] = (w - length * (u)) * scale; } \\
  else for (int64_t i = 0; i < count; i++) { LOAD(i) a0[i] = (w - length * ((u) / peak)) * scale; }

static void turn($arrays, int64_t count, const double *numbers, factors f) { NUMBERS TURN($movement) }
static void turn_by($arrays, int64_t count, const wide *restrict moved, factors f) { TURN(moved[i]) }

/* kept: room for the u of so many blocks of each thread */
void hold(void **at, const int64_t *sizes, const int64_t *lengths, int64_t count, const double *numbers, double rate,
          wide *kept, int64_t room, int threads) {
  int64_t total = 0, blocks = 1;
  for (int64_t k = 0; k < count; k++) {
    int64_t own = sizes[k] / lengths[k] * ((lengths[k] + BLOCK - 1) / BLOCK);
    total += sizes[k];
    blocks = own > blocks ? own : blocks;
  }
  sums *partial = malloc(sizeof(sums) * blocks);
  factors *found = malloc(sizeof(factors) * blocks);
  #pragma omp parallel num_threads(total < 32768 ? 1 : threads)
  for (int64_t k = 0; k < count; k++) {
    $pointers
    wide *moved = kept + omp_get_thread_num() * room * BLOCK;
    const wide *radii = at[$roles * count + k];
    int64_t length = lengths[k], groups = sizes[k] / length, each = (length + BLOCK - 1) / BLOCK;
    if (each == 1) {
      #pragma omp for schedule(static) nowait
      for (int64_t g = 0; g < groups; g++) {
        int64_t o = g * length;
        sums s = advance($shifted, length, numbers, moved);
        turn_by($shifted, length, moved, solved($shifted, length, numbers, s, (double)radii[g], rate));
      }
      continue;
    }
    int64_t own = omp_get_thread_num(), all = omp_get_num_threads();
    int64_t from = groups * each * own / all, to = groups * each * (own + 1) / all;
    for (int64_t b = from; b < to; b++) {
      int64_t o = b / each * length + b % each * BLOCK, left = length - b % each * BLOCK;
      partial[b] = advance($shifted, left < BLOCK ? left : BLOCK, numbers, moved + (b - from) % room * BLOCK);
    }
    #pragma omp barrier
    #pragma omp for schedule(static)
    for (int64_t g = 0; g < groups; g++) {
      int64_t o = g * length;
      sums s = {0, 0, 0};
      for (int64_t b = g * each; b < (g + 1) * each; b++) {
        s.ww += partial[b].ww; s.wu += partial[b].wu; s.uu += partial[b].uu;
      }
      found[g] = solved($shifted, length, numbers, s, (double)radii[g], rate);
    }
    for (int64_t b = to - 1; b >= from; b--) {
      int64_t o = b / each * length + b % each * BLOCK, left = length - b % each * BLOCK;
      left = left < BLOCK ? left : BLOCK;
      if (to - b > room) turn($shifted, left, numbers, found[b / each]);
      else turn_by($shifted, left, moved + (b - from) % room * BLOCK, found[b / each]);
    }
    #pragma omp barrier
  }
  free(partial);
  free(found);
}
""")


@functools.cache
def held(dtype: torch.dtype, roles: int, step: str, movement: str, numbers: int) -> Hold | None:
    """Return a compiled step that holds norms; None if it can't be compiled.

    Args:
        dtype: of all tensors.
        roles: the number of tensors: the weights, the gradient, the moments.
        step: statements that change the moments o1, ... by the gradient o0 and the weight w.
        movement: the expression of u in the moments.
        numbers: the number of scalars n0, ... in both.
    """
    if dtype not in (torch.float32, torch.float64):
        return None
    kind, entries, every = TYPES[dtype], names(roles), range(roles)
    source = _SOURCE.substitute(
        block=_BLOCK,
        numbers=" ".join(f"const wide n{n} = (wide)numbers[{n}];" for n in range(numbers)),
        load=" ".join(f"wide {entry} = a{r}[i];" for r, entry in enumerate(entries)),
        store=" ".join(f"a{r}[i] = {entries[r]};" for r in range(2, roles)),
        arrays=", ".join(f"{kind} *restrict a{r}" for r in every),
        pointers=" ".join(f"{kind} *a{r} = at[{r} * count + k];" for r in every),
        shifted=", ".join(f"a{r} + o" for r in every),
        step=step.replace("\n", " "),
        movement=movement,
        roles=roles,
    )
    function = getattr(compiled(f"typedef {kind} wide;\n{PRELUDE}\n{source}"), "hold", None)
    return None if function is None else Hold(function)


class Hold:
    """A compiled step that holds norms."""

    def __init__(self, function: Any) -> None:
        pointer, integer, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
        function.argtypes = (pointer, pointer, pointer, integer, pointer, real, pointer, integer, ctypes.c_int)
        function.restype = None
        self._function = function
        self._kept = threading.local()  # a step of another thread may run at the same time

    def __call__(
        self, members: Sequence[Sequence[Tensor]], radii: Sequence[Tensor], numbers: Sequence[float], rate: float
    ) -> None:
        """Change weights and moments.

        Args:
            members: for each its weights, gradient and moments: nonempty, dense, of one layout, in
                memory of their own.
            radii: for each the norms of its groups, in the order of memory.
            numbers: the scalars, the same for all.
            rate: the learning rate.
        """
        every = [*zip(*members, strict=True), radii]
        at = array("q", [address for role in every for address in map(Tensor.data_ptr, role)])
        sizes = array("q", map(Tensor.numel, every[0]))
        lengths = array("q", [size // len(radius) for size, radius in zip(sizes, radii, strict=True)])
        given = array("d", numbers)
        where = [one.buffer_info()[0] for one in (at, sizes, lengths)]
        threads = torch.get_num_threads()
        room = max(1, min(_KEPT // threads, -(-max(sizes) // _BLOCK)))
        kept = getattr(self._kept, "tensor", None)
        if kept is None or len(kept) < threads * room * _BLOCK:
            kept = self._kept.tensor = torch.empty(threads * room * _BLOCK, dtype=members[0][0].dtype, device="cpu")
        self._function(*where, len(members), given.buffer_info()[0], rate, kept.data_ptr(), room, threads)
        torch.autograd.graph.increment_version([t for role in (every[0], *every[2:-1]) for t in role])
