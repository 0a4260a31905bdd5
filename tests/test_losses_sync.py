"""Batch statistics over processes: with sync=True the mean of the processes' gradients is that of one with all images."""

from __future__ import annotations

import pytest
import torch
from operators import assert_close, in_new_process, value_and_gradient
from sources import ROOT

from medkd_fast import losses

LOSSES = {
    "dist": lambda **settings: losses.DISTLoss(**settings),
    "pkd": lambda **settings: losses.PKDLoss(**settings),
    "sp": lambda **settings: losses.SPLoss(**settings),
}


def images() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(4, 3, 5, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    target = torch.zeros(4, 5, 6, dtype=torch.long)
    target[0, :3], target[3, 2:4, 1:] = -100, -100  # the processes have different numbers of valid pixels
    return student, teacher, target


def process(rank: int, folder: str) -> None:
    """One of two processes, each with two images."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mine = slice(2 * rank, 2 * rank + 2)
    student, teacher, target = (x[mine] for x in images())
    found = {}
    for name, make in LOSSES.items():
        for sync in (True, False):
            for labels in (None, target):
                loss = make(sync=sync)
                result = value_and_gradient(lambda x, y=labels, loss=loss: loss(x, teacher, y), student)
                found[name, sync, labels is None] = result
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("processes")
    in_new_process(
        f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r})\n"
        "import torch, test_losses_sync\n"
        f"torch.multiprocessing.spawn(test_losses_sync.process, ({str(folder)!r},), nprocs=2)\n"
    )
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("unlabelled", [True, False], ids=["", "masked"])
@pytest.mark.parametrize("name", LOSSES)
def test_statistics_over_processes(found: list[dict], name: str, unlabelled: bool) -> None:
    student, teacher, target = images()
    labels = None if unlabelled else target
    loss = LOSSES[name]()
    want, want_gradient = value_and_gradient(lambda x: loss(x, teacher, labels), student)
    values, gradients = zip(*(one[name, True, unlabelled] for one in found), strict=True)
    assert_close(torch.stack(values).mean(), want, 1e-12)
    assert_close(torch.cat(gradients) / 2, want_gradient, 1e-10)  # as DistributedDataParallel has it, for any parameter

    for rank, one in enumerate(found):
        own = slice(2 * rank, 2 * rank + 2)
        local, local_gradient = value_and_gradient(
            lambda x, own=own: loss(x, teacher[own], None if labels is None else labels[own]), student[own]
        )
        value, gradient = one[name, False, unlabelled]
        assert_close(value, local, 1e-12)
        assert_close(gradient, local_gradient, 1e-12)
    assert abs(torch.stack([one[name, False, unlabelled][0] for one in found]).mean() - want) > 1e-6
