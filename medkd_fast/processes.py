"""Sums and batches over the processes of a group, with gradients.

Those of `torch.distributed.nn` are deprecated, and as default arguments they hold the group that was there when they were
imported: after `destroy_process_group` its threads live on, and a process that ends under one of them dies of it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _Sum.apply(upstream, ctx.group), None


class _Batch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        whole = x.new_empty(dist.get_world_size(group) * x.shape[0], *x.shape[1:])
        dist.all_gather_into_tensor(whole, x.contiguous(), group=group)
        return whole

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        own = upstream.new_empty(upstream.shape[0] // dist.get_world_size(ctx.group), *upstream.shape[1:])
        dist.reduce_scatter_tensor(own, upstream.contiguous(), group=ctx.group)
        return own, None


def all_reduce(x: torch.Tensor, group: Any = None) -> torch.Tensor:
    """The sum of every process's `x`, of equal shapes; None is the group of all. The gradient is the sum of theirs."""
    total: torch.Tensor = _Sum.apply(x, group)
    return total


def all_gather(x: torch.Tensor, group: Any = None) -> torch.Tensor:
    """Every process's `x` [B, ...], of equal shapes, side by side in dimension 0. The gradient is the sum of theirs."""
    whole: torch.Tensor = _Batch.apply(x, group)
    return whole
