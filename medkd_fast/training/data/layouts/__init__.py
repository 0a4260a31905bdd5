"""How data sets lie on disk, one module a layout; each has `found(root)` and `open(root)`."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

from medkd_fast.training.data.layouts import acdc, builtin, csv_pairs, decathlon, dicom, nnunet, synapse
from medkd_fast.training.errors import WrongUse

# in the order in which they are tried
LAYOUTS: dict[str, ModuleType] = {
    "nnunet": nnunet,
    "decathlon": decathlon,
    "acdc": acdc,
    "synapse": synapse,
    "csv": csv_pairs,
    "dicom": dicom,
}
BUILT_IN = builtin.BUILT_IN


def recognise(root: Path) -> str:
    """Name of the layout that lies at `root`. Raises WrongUse where it is none of them, with what inside it is one."""
    name = _layout_of(root)
    if name:
        return name
    inside = [str(p) for p in sorted(root.iterdir()) if _layout_of(p)] if root.is_dir() else []
    advice = f"try {' or '.join(inside[:3])}" if inside else "name it with --layout"
    raise WrongUse(f"{root} is in no layout that is known ({', '.join(LAYOUTS)}): {advice}")


def _layout_of(root: Path) -> str | None:
    return next((name for name, layout in LAYOUTS.items() if layout.found(root)), None)
