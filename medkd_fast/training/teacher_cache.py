"""A teacher's logits on disk, once for every volume: it need not run while the student trains.

What they stand for: the teacher saw the volume as it is. The augmentation's turn, zoom, shift and the crop are replayed on
the logits (linear interpolation); its gain, offset and noise are the student's alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from medkd_fast.training.bars import track
from medkd_fast.training.data import cache as store_of
from medkd_fast.training.data.prepare import Volume
from medkd_fast.training.inference import predict_logits

if TYPE_CHECKING:
    from medkd_fast.training.runs import Trained

VERSION = 2  # of what this file computes: another number, another cache
OVERLAP = 0.5


def record_teacher(
    teacher: Trained,
    volumes: Mapping[str, Volume],
    *,
    patch: Sequence[int],
    device: torch.device | str = "cpu",
    cache: Path | None = None,
) -> dict[str, Tensor]:
    """{name: logits [K + 1, D, H, W] bfloat16, mapped from disk} of the volumes, computed where they are not there yet.

    They are keyed by the teacher's weights and the volumes' voxels. Raises WrongUse where the cache cannot be written.
    """
    folder = (cache or store_of.default_cache()) / "teachers"
    weights = hashlib.sha256()
    for name, value in teacher.network.state_dict().items():
        weights.update(name.encode() + value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    network = teacher.network.to(device)
    found = {}
    for name, volume in track(list(volumes.items()), "the teacher's logits"):
        voxels = hashlib.sha256(volume.image.contiguous().numpy()).hexdigest()
        key = store_of.digest(json.dumps([VERSION, weights.hexdigest(), voxels, list(patch), OVERLAP]))
        if store_of.load(folder / key) is None:
            logits = predict_logits(
                network, volume.image, dims=teacher.dims, patch=patch, overlap=OVERLAP, device=device
            )
            # numpy has no bfloat16
            store_of.store(folder / key, {"logits": logits.bfloat16().view(torch.int16).numpy()}, {"volume": name})
        arrays = store_of.load(folder / key)
        assert arrays is not None, key
        found[name] = torch.from_numpy(arrays[0]["logits"]).view(torch.bfloat16)
    network.cpu()
    return found
