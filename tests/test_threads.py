"""Every operator called from several Python threads at once gives the bits that it gives alone."""

from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from numerics import SETTINGS, Setting
from operators import value_and_gradient

ROUNDS = 5
THREADS = 4


def call(setting: Setting, images: int) -> tuple[torch.Tensor, torch.Tensor]:
    sample = setting.draw("generic", torch.Generator().manual_seed(images))
    teacher, target = sample.teacher[:images].float(), sample.target[:images]
    return value_and_gradient(lambda x: setting.loss(x, teacher, target), sample.student[:images].float())


def test_called_from_several_threads_at_once(cpp: str) -> None:
    calls: list[Callable[[], tuple[torch.Tensor, torch.Tensor]]] = [
        partial(call, setting, images) for setting in SETTINGS.values() for images in (1, 2)
    ]
    alone = [each() for each in calls]
    order = [index for index in range(len(calls)) for _ in range(ROUNDS)]
    random.Random(0).shuffle(order)
    with ThreadPoolExecutor(THREADS) as pool:
        together = list(pool.map(lambda index: calls[index](), order))
    for index, (value, gradient) in zip(order, together, strict=True):
        assert torch.equal(value, alone[index][0]), calls[index]
        assert torch.equal(gradient, alone[index][1]), calls[index]
