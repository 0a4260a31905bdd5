"""Who is trained on, validated on and tested on: by patient, from a seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from medkd_fast.training.errors import WrongUse

if TYPE_CHECKING:
    from medkd_fast.training.data.dataset import Dataset

FRACTIONS = (0.7, 0.1, 0.2)  # train, validation, test


@dataclass(frozen=True)
class Split:
    """Names of cases to learn from, to choose by, and to report on."""

    train: tuple[str, ...]
    validation: tuple[str, ...] = ()
    test: tuple[str, ...] = ()


def split_by_patient(dataset: Dataset, *, seed: int = 0, fractions: Sequence[float] = FRACTIONS) -> Split:
    """Share the labelled cases out, all cases of a patient to one side; the order of files on disk does not matter.

    fractions: of the patients, for train, validation and test. A side that the data set itself gives is kept, and the
    fractions of the others are shared among the rest. Every side with a fraction above 0 gets a patient at least.

    Raises WrongUse where there are too few patients for that.

    >>> from medkd_fast.training.data.dataset import Case, Dataset
    >>> cases = tuple(Case(f"p{i}_{e}", f"p{i}", (), label="x") for i in range(10) for e in ("ed", "es"))
    >>> split = split_by_patient(Dataset("d", "d", "csv", cases, {1: "a"}, ("MR",)), seed=1)
    >>> len(split.train), len(split.validation), len(split.test)
    (14, 2, 4)
    """
    if len(fractions) != 3 or min(fractions) < 0 or fractions[0] <= 0:
        raise WrongUse(f"fractions must be three numbers >= 0 for train (> 0), validation and test, got {fractions}")
    given = dataset.split or Split(())
    if given.train and given.validation and given.test:
        return given
    wanted = [fractions[0], 0 if given.validation else fractions[1], 0 if given.test else fractions[2]]
    patient_of = {c.name: c.patient for c in dataset.cases}
    kept = {patient_of[name] for name in (*given.validation, *given.test)}
    pool = sorted(given.train or [c.name for c in dataset.labelled if c.patient not in kept])
    patients = sorted({patient_of[name] for name in pool})
    sides = sum(f > 0 for f in wanted)
    if not patients:
        raise WrongUse(f"{dataset.name} has 0 labelled patients to train on: look where its labels lie")
    if len(patients) < sides:
        raise WrongUse(
            f"{dataset.name} has {len(patients)} labelled patients to split over {sides} sides: "
            f"at least {sides} are needed, or fewer sides, such as --fractions 1,0,0"
        )
    order = [patients[i] for i in np.random.default_rng(seed).permutation(len(patients))]
    counts = [max(1, round(f / sum(wanted) * len(patients))) if f > 0 else 0 for f in wanted]
    while sum(counts[1:]) >= len(patients):  # few patients: the largest held-out side gives way
        largest = 1 if counts[1] > counts[2] else 2
        counts[largest] -= 1
    validation, test = set(order[: counts[1]]), set(order[counts[1] : counts[1] + counts[2]])

    def names(chosen: set[str]) -> tuple[str, ...]:
        return tuple(name for name in pool if patient_of[name] in chosen)

    return Split(
        train=names(set(patients) - validation - test),
        validation=given.validation or names(validation),
        test=given.test or names(test),
    )
