"""Sums and batches over processes: values, gradients and second derivatives against the whole batch's."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from operators import in_new_processes

from medkd_fast.processes import all_gather, all_reduce


def process(folder: str) -> None:
    """One of two processes, each with one of two rows."""
    rank = int(os.environ["RANK"])
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    rows = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    upstream = [torch.arange(12.0).reshape(3, 4).t() + 1, torch.ones(4, 3)]  # differ between processes

    own = rows[rank].t().requires_grad_()  # not contiguous
    total = all_reduce(own)
    torch.testing.assert_close(total, rows.sum(0).t())
    (gradient,) = torch.autograd.grad(total, own, upstream[rank].double())
    torch.testing.assert_close(gradient, (upstream[0] + upstream[1]).double())
    (first,) = torch.autograd.grad(all_reduce(own).square().sum(), own, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), own)
    # each process's loss is the square of the sum: 2 · 2 · x, and that twice over again
    torch.testing.assert_close(first, 4 * rows.sum(0).t())
    torch.testing.assert_close(second, torch.full_like(second, 8))

    whole = all_gather(own, torch.distributed.group.WORLD)
    torch.testing.assert_close(whole, rows.transpose(1, 2).flatten(0, 1))
    weights = [torch.randn(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(r)) for r in (1, 2)]
    (gradient,) = torch.autograd.grad(whole, own, weights[rank])
    torch.testing.assert_close(gradient, (weights[0] + weights[1]).chunk(2)[rank])
    torch.distributed.destroy_process_group()


def test_two_processes(tmp_path: Path) -> None:
    in_new_processes(
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        f"import test_processes; test_processes.process({str(tmp_path)!r})"
    )
