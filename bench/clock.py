"""How long a step takes on a CPU, on a GPU, and on a GPU's host.

A clock takes the steps of one variant, one for each set of inputs, readies them, and returns a function that runs them all
and gives the seconds of one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from weakref import WeakSet

import torch

Step = Callable[[], None]
Clock = Callable[[Sequence[Step]], Callable[[], float]]


def cpu(steps: Sequence[Step]) -> Callable[[], float]:
    for step in steps:  # compiles, and warms up
        step()
        step()

    def seconds() -> float:
        start = time.perf_counter()
        for step in steps:
            step()
        return (time.perf_counter() - start) / len(steps)

    return seconds


#: Those that are still replayed share their memory: they take turns, and what one leaves no other reads.
_graphs: WeakSet[torch.cuda.CUDAGraph] = WeakSet()


def gpu(steps: Sequence[Step]) -> Callable[[], float]:
    """Replays of one CUDA graph of all the steps: what the GPU does, without the host."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for step in steps:
            step()
            step()
    torch.cuda.current_stream().wait_stream(aside)
    torch.cuda.empty_cache()  # a graph's memory is its own
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=next((other.pool() for other in _graphs), None)):
        for step in steps:
            step()
    _graphs.add(graph)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def seconds() -> float:
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / len(steps)

    seconds()
    return seconds


def host(steps: Sequence[Step]) -> Callable[[], float]:
    """What the host needs to hand a GPU small steps. (Where the GPU needs longer, it is the GPU's time.)"""
    at_once = 50

    def seconds() -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(at_once):
            for step in steps:
                step()
        taken = time.perf_counter() - start
        torch.cuda.synchronize()
        return taken / at_once / len(steps)

    seconds()
    return seconds
