"""What a data set is before anything is read: cases with their files, classes, channels, and the split that it brings."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from medkd_fast.training.data.settings import Preprocessing
from medkd_fast.training.data.split import Split
from medkd_fast.training.errors import WrongUse
from medkd_fast.training.files import quoted

IGNORE = 255  # what an ignored voxel is called in prepared labels, whatever the files call it


@dataclass(frozen=True)
class Case:
    """One thing to segment. name: unique in its data set. patient: cases of one patient never lie on both sides of a split.

    images: one file a channel, or one file with several channels (4-D or RGB), or one DICOM folder.
    label: None where there is nothing to learn from. reader: the function of `data.read.READERS` that understands the files.
    slices: (first, last) axial slice in LPS order, both counted; None takes the whole volume.
    """

    name: str
    patient: str
    images: tuple[Path, ...]
    label: Path | None = None
    reader: str = "image"
    slices: tuple[int, int] | None = None


@dataclass(frozen=True)
class Dataset:
    """Cases and how to understand them.

    classes: {1..K: name}; 0 is the background and not listed. label_values: {value in the files: class, 0 or `IGNORE`},
    None where the files hold the classes themselves; a value that it lacks is wrong, or background where `other_values`
    is true. ignore_label: `IGNORE` where the data set has voxels to leave out of losses and scores, else None.
    split: the one that comes with the data. defaults: preprocessing where the user asks for none.
    """

    name: str
    root: Path
    layout: str
    cases: tuple[Case, ...]
    classes: dict[int, str]
    channels: tuple[str, ...]
    ignore_label: int | None = None
    split: Split | None = None
    label_values: dict[int, int] | None = None
    other_values: bool = False
    defaults: Preprocessing = field(default_factory=Preprocessing)
    notes: tuple[str, ...] = ()

    def case(self, name: str) -> Case:
        """Raises WrongUse for a name that is not there."""
        for case in self.cases:
            if case.name == name:
                return case
        raise WrongUse(f"{self.name} has no case {name!r}: `medkd-fast data {quoted(self.root)}` lists them")

    @property
    def repeated(self) -> dict[str, int]:
        """The names that several cases have, and how many."""
        return {name: count for name, count in Counter(c.name for c in self.cases).items() if count > 1}

    @property
    def labelled(self) -> tuple[Case, ...]:
        return tuple(c for c in self.cases if c.label is not None)


def open_dataset(data: str | Path, layout: str | None = None) -> Dataset:
    """The data set at a path, or one of the built-in ones by its name. Its images are not read yet.

    data: "demo" (a CT), "mni152" (an MRI), a folder or a CSV file; "./demo" is a folder.
    layout: its format; None finds out by what is there.

    Raises WrongUse where nothing is there, or nothing that is understood.
    """
    from medkd_fast.training.data.layouts import BUILT_IN, LAYOUTS, recognise

    if str(data) in BUILT_IN and layout is None:
        return BUILT_IN[str(data)]()
    root = Path(data)
    if not root.exists():
        raise WrongUse(f"no data at {root}: give a folder, a CSV file or a built-in data set ({', '.join(BUILT_IN)})")
    if layout is not None and layout not in LAYOUTS:
        raise WrongUse(f"unknown layout {layout!r}: choose from {', '.join(LAYOUTS)}")
    return LAYOUTS[layout or recognise(root)].open(root)
