"""Starts the processes of a test of several ranks."""

import socket

import torch


def spawned(run, count, *arguments):
    """{rank: what it left}: run(rank, port, results, *arguments) in a process for each rank."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with torch.multiprocessing.get_context("spawn").Manager() as manager:
        results = manager.dict()
        torch.multiprocessing.spawn(run, (port, results, *arguments), nprocs=count)
        return dict(results)
