"""Compiles an operator's Triton kernels for a GPU that need not be there, where its capability is 90 and features have 16 channels
unless that is said: `python tests/compile_triton.py OPERATOR [capability [channels]]`.

Every launch becomes a compilation, by Triton and by the ptxas that comes with it, so results are whatever memory held. Prints, as
JSON, the kernels and the most shared memory that each takes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

import medkd_fast
from medkd_fast import backend

CLASSES = 5
#: Triton's intermediate code of every launch, with the kernel's name.
CODE: list[tuple[str, str]] = []
#: Of a program, by compute capability.
SHARED_BYTES = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448}


class NoGPU:
    """A driver that only says what the target is, and how much shared memory a program has there."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)
        self.utils = self

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED_BYTES[self.target.arch]}

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def compile_only(capability: int) -> dict[str, int]:
    """From now on operators run their Triton launchers, on tensors of the CPU. Returns where the kernels are noted."""
    shared: dict[str, int] = {}

    def launcher(kernel: JITFunction, grid: Any) -> Any:
        def launch(*args: Any, **settings: Any) -> None:
            compiled = kernel.warmup(*args, grid=grid, **settings)
            name = f"{kernel.fn.__module__.rpartition('.')[2]}.{kernel.fn.__name__}"
            shared[name] = max(shared.get(name, 0), compiled.metadata.shared)
            CODE.append((name, compiled.asm["ttgir"]))

        return launch

    driver.set_active(NoGPU(capability))
    JITFunction.__getitem__ = launcher
    import medkd_fast.kernels  # noqa: F401

    backend.UNAVAILABLE["triton"] = ""
    backend.ON_REQUEST["cpu"] = ["triton"]
    backend.set_backend("triton")
    return shared


def calls(operator: str, x: torch.Tensor, y: torch.Tensor, mask: torch.Tensor | None) -> Iterator[torch.Tensor]:
    """Results of the operator in all that it knows, with or without a mask."""
    function = getattr(medkd_fast, operator)
    target = torch.arange(x[:, 0].numel()).view(x[:, 0].shape) % CLASSES
    if operator in ("decoupled_kl", "class_kl"):
        settings = {} if mask is None else {"weight": mask.float()}
        low = x[..., ::2, ::2].detach().requires_grad_()  # upsampled
        for student, reduction in ((x, "mean"), (x, "none"), (low, "mean")):
            labels = (target,) if operator == "decoupled_kl" else ()
            result = function(student, y, *labels, temperature=2.0, reduction=reduction, **settings)
            yield result.loss if operator == "decoupled_kl" else result
    elif operator in ("channel_relation", "pixel_relation"):
        relations = ("cosine", "pearson", "gram") + (("row", "softmax") if operator == "channel_relation" else ())
        for relation in relations:
            for divergence in ("mse",) if relation == "softmax" else ("mse", "kl"):
                yield function(x, y, relation=relation, divergence=divergence, mask=mask)
                if operator == "pixel_relation" and relation == "cosine":
                    yield function(x, y, relation=relation, divergence=divergence, mask=mask, across_images=True)
    elif operator in ("channel_gram", "pixel_affinity"):
        for relation in ("cosine", "pearson", "gram") + (("row", "softmax") if operator == "channel_gram" else ()):
            yield function(x, relation=relation, **({} if operator == "pixel_affinity" else {"mask": mask}))
    elif operator in ("spatial_kl", "standardised_mse"):
        yield function(x, y, mask=mask)
    elif operator == "class_pearson":
        yield function(x, y, target=None if mask is None else target).loss
    elif operator == "attention_map":
        for power in (1.0, 2.0, 2.5, 4.0):
            yield function(x, power=power, mask=mask)
    elif operator == "importance_and_affinity":
        for power in (2.0, 2.5):
            result = function(x, y, target, num_classes=CLASSES, power=power)
            yield result.importance + result.affinity
    elif operator == "class_means":
        yield function(x, target, num_classes=CLASSES).means
    elif operator == "class_similarity":
        yield function(x, target, num_classes=CLASSES)
    else:  # a window that a program goes over, and one of many pixels
        for window in (2, 9):
            yield function(x, window, mask=mask).pooled


def main(operator: str, capability: int = 90, channels: int = 16) -> None:
    shared = compile_only(capability)
    for dtype, layout, masked in (
        (torch.float32, torch.contiguous_format, True),
        (torch.bfloat16, torch.channels_last, False),
        (torch.float64, torch.contiguous_format, False),
    ):
        x, y = (torch.randn(2, channels, 18, 20).to(dtype, memory_format=layout) for _ in range(2))
        mask = torch.rand(2, 18, 20) < 0.7 if masked else None
        for result in calls(operator, x.requires_grad_(), y, mask):
            result.sum().backward()
    print(json.dumps(shared))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
