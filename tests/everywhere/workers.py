"""Processes that train together, started once for a number of ranks; each cell has a process group of its own."""

import atexit
import os
import pickle
import tempfile
import time
import traceback
import warnings
from datetime import timedelta

import torch
import torch._inductor.config
import torch.distributed as dist

from everywhere.column import at_attach
from everywhere.training import PROGRESS
from restrain.errors import RestrainError, RestrainWarning, VersionError

PATIENCE = 300  # seconds for one cell, with the start of the processes
POOLS = {}


class RankError(Exception):
    """What went wrong on a rank, with the traceback there."""


def serve(rank, ranks, connection):
    """Runs what comes through the connection until the other end is closed."""
    torch.set_num_threads(1)
    torch._inductor.config.fallback_random = True  # the draws of eager code
    warnings.simplefilter("ignore", RestrainWarning)
    while True:
        try:
            function, file, options = connection.recv()
        except EOFError:
            os._exit(0)  # gloo's threads sometimes abort the process while the interpreter shuts down
        connection.send(answer(rank, ranks, function, file, options))
        torch.compiler.reset()


def answer(rank, ranks, function, file, options):
    """How a function ended on a rank.

    ("done", result), ("refused", error, its VersionError or None, whether at attach, whether too late) or
    ("failed", traceback).
    """
    PROGRESS.clear()
    dist.init_process_group("gloo", f"file://{file}", timedelta(seconds=PATIENCE), rank=rank, world_size=ranks)
    try:
        found = ("done", function(rank=rank, ranks=ranks, **options))
    except RestrainError as error:
        version = str(error) if isinstance(error, VersionError) else None
        found = ("refused", str(error), version, at_attach(error), bool(PROGRESS))
    except Exception:
        found = ("failed", traceback.format_exc())
    if found[0] == "done":
        dist.barrier()
    dist.destroy_process_group()
    try:
        pickle.dumps(found)
    except Exception:
        return "failed", traceback.format_exc()
    return found


class RefusalError(RestrainError):
    """A refusal that came on all ranks."""

    def __init__(self, said, attaching, late):
        super().__init__(said)
        self.attaching = attaching
        if late:
            PROGRESS.append(0)


class Pool:
    """So many processes, each at the end of a pipe."""

    def __init__(self, ranks):
        context = torch.multiprocessing.get_context("spawn")
        self.connections, self.processes = [], []
        for rank in range(ranks):
            here, there = context.Pipe()
            process = context.Process(target=serve, args=(rank, ranks, there), daemon=True)
            process.start()
            there.close()
            self.connections.append(here)
            self.processes.append(process)

    def run(self, function, options):
        """What function(rank=, ranks=, **options) gives on each rank."""
        with tempfile.TemporaryDirectory() as folder:
            for connection in self.connections:
                connection.send((function, os.path.join(folder, "meeting"), options))
            end, answers = time.monotonic() + PATIENCE, []
            for connection in self.connections:
                answers.append(connection.recv() if connection.poll(max(end - time.monotonic(), 1)) else ("hangs",))
                if answers[-1][0] != "done":
                    end = min(end, time.monotonic() + 15)  # the others may wait for this one for ever
        return answers


def close(ranks):
    """End the processes of a pool, if there is one."""
    pool = POOLS.pop(ranks, None)
    for process in pool.processes if pool else ():
        process.kill()


def together(ranks, function, **options):
    """What function(rank=, ranks=, **options) gives on each rank; refused where all ranks refuse."""
    if ranks not in POOLS:
        POOLS[ranks] = Pool(ranks)
        atexit.register(close, ranks)
    answers = POOLS[ranks].run(function, options)
    kinds = {found[0] for found in answers}
    if kinds == {"done"}:
        return [found[1] for found in answers]
    if kinds == {"refused"}:
        _, said, version, *when = answers[0]
        raise RefusalError(said, *when) from (None if version is None else VersionError(version))
    close(ranks)
    raise RankError("\n".join(f"rank {rank}: {' '.join(map(str, found))}" for rank, found in enumerate(answers)))
