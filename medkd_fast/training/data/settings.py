"""How volumes are prepared: a part of a run's configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from medkd_fast.training.errors import WrongUse

INTENSITIES = ("window", "percentile", "zscore")


@dataclass(frozen=True)
class Preprocessing:
    """What is done to every volume after it is oriented to LPS. None leaves the choice to `prepare.plan`.

    dims: 2 learns from axial slices, 3 from patches.
    spacing: (z, y, x) of the voxels in mm; a None among them keeps what the volume has.
    size: (rows, columns) that every slice is resampled to over its own extent, in place of the y and x of `spacing`.
    intensity: one word a channel. "window": Hounsfield units clipped to `window`, scaled to [0, 1]. "percentile": clipped
        to `percentiles` of the volume, scaled to [0, 1]. "zscore": clipped to `percentiles`, then mean 0 and standard
        deviation 1 over the voxels that are not 0; where they hold one value, mean 0 alone. "none": as they are.
    """

    dims: int = 2
    spacing: tuple[float | None, float | None, float | None] | None = None
    size: tuple[int, int] | None = None
    intensity: tuple[str, ...] | None = None
    window: tuple[float, float] = (-175.0, 250.0)
    percentiles: tuple[float, float] = (0.5, 99.5)

    def __post_init__(self) -> None:
        # lists come from YAML and JSON
        for name in ("spacing", "size", "intensity", "window", "percentiles"):
            value = getattr(self, name)
            if isinstance(value, str):
                value = (value,)
            object.__setattr__(self, name, None if value is None else tuple(value))
        if self.dims not in (2, 3):
            raise WrongUse(f"dims must be 2 (slices) or 3 (patches), got {self.dims!r}")
        if self.spacing is not None and (len(self.spacing) != 3 or any(s is not None and s <= 0 for s in self.spacing)):
            raise WrongUse(f"spacing must be three positive numbers (z, y, x) in mm, got {self.spacing}")
        if self.size is not None and (len(self.size) != 2 or min(self.size) < 1):
            raise WrongUse(f"size must be two numbers >= 1 (rows, columns), got {self.size}")
        for word in self.intensity or ():
            if word not in (*INTENSITIES, "none"):
                raise WrongUse(f"intensity must be one of {', '.join(INTENSITIES)}, none, got {word!r}")
        if not self.window[0] < self.window[1]:
            raise WrongUse(f"window must be (low, high) in Hounsfield units, got {self.window}")
        if not 0 <= self.percentiles[0] < self.percentiles[1] <= 100:
            raise WrongUse(f"percentiles must be (low, high) between 0 and 100, got {self.percentiles}")

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, for YAML and JSON.

        >>> Preprocessing.from_dict(Preprocessing(dims=3).to_dict()) == Preprocessing(dims=3)
        True
        """
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocessing:
        """Raises WrongUse for a setting that there is not."""
        known = [f.name for f in fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise WrongUse(f"unknown preprocessing setting {unknown[0]!r}: choose from {', '.join(known)}")
        return cls(**values)
