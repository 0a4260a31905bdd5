"""The emulation of a CUDA launch itself: right kernels are right in it, and what CUDA forbids is found."""

from __future__ import annotations

import pytest
import torch
from cuda_host import HERE, build


@pytest.fixture(scope="module", autouse=True)
def library() -> None:
    torch.ops.load_library(str(build([HERE / "kernels.cu"], "kernels")))


def run(name: str, size: int = 64, blocks: int = 1, threads: int = 64, shared_bytes: int = 256) -> torch.Tensor:
    out = torch.full((size,), torch.nan)
    torch.ops.medkd_fast_cuda_host.run(name, out, blocks, threads, shared_bytes)
    return out


def test_sums_and_shuffles() -> None:
    blocks, threads = 5, 96
    lane, thread = torch.arange(threads) % 32, torch.arange(threads).float()
    warps = thread.reshape(3, 32)
    want = [
        thread.sum().expand(threads),
        warps.sum(1, keepdim=True).expand(3, 32).reshape(-1),
        warps.amax(1, keepdim=True).expand(3, 32).reshape(-1),
        torch.where(lane == 0, thread, thread - 1),
        torch.where(lane % 16 == 15, thread, thread + 1),
        torch.where(lane % 2 == 1, thread - lane + (lane ^ 2), thread - lane + 4),
    ]
    out = run("right", 6 * blocks * threads, blocks, threads, 16).reshape(6, blocks, threads)
    for got, row in zip(out, want, strict=True):
        assert torch.equal(got, row.expand(blocks, threads))


def test_a_barrier_orders_what_is_in_shared_memory() -> None:
    want = torch.arange(64).flip(0).float()
    assert torch.equal(run("reverse<true>", 192, blocks=3), want.repeat(3))
    out = run("reverse<false>", 192, blocks=3)
    # shared memory is NaN before a block: also the block that follows another cannot see that one's values
    assert not torch.equal(out.nan_to_num(), want.repeat(3)) and out.reshape(3, 64).isnan().any(1).all()


def test_blocks_have_no_order() -> None:
    assert not torch.equal(run("blocks_in_order", blocks=64), torch.arange(1.0, 65.0))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("behind_shared_memory", r"block \(0, 0, 0\) wrote 0 bytes behind its 256 bytes of shared memory"),
        (
            "divergent_barrier",
            r"40 of 64 threads of block \(0, 0, 0\) wait in __syncthreads, and 24 have ended without",
        ),
        ("lane_that_ended", r"waits in a shuffle or __syncwarp for lane 1, which has ended"),
        ("lane_at_another_barrier", r"waits in a shuffle or __syncwarp for lane 1, which waits in __syncthreads"),
        ("lane_not_in_the_mask", r"shuffles with lane 0 under a mask that lacks one of the two"),
    ],
)
def test_mistakes_are_found(name: str, message: str) -> None:
    with pytest.raises(RuntimeError, match=f"emulated CUDA: .*{message}"):
        run(name)
    # and the next launch is a new one
    assert torch.equal(run("reverse<true>"), torch.arange(64).flip(0).float())


def test_a_warp_that_the_block_does_not_fill() -> None:
    with pytest.raises(RuntimeError, match="for lane 8, which the block does not have"):
        run("right", 6 * 40, threads=40)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"blocks": 2**32}, r"reverse<true>.*: invalid configuration argument \(4294967296 x 1 blocks of 64 threads"),
        ({"threads": 1025}, r"reverse<true>.*: invalid configuration argument \(1 x 1 blocks of 1025 threads"),
        ({"shared_bytes": 300_000}, r"reverse<true>.*: invalid argument .*with 300000 bytes of shared memory"),
    ],
)
def test_a_launch_that_cannot_be_names_the_kernel(settings: dict[str, int], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        run("reverse<true>", **settings)


def test_more_than_48_kib_of_shared_memory() -> None:
    assert torch.equal(run("reverse<true>", shared_bytes=99 * 1024), torch.arange(64).flip(0).float())
