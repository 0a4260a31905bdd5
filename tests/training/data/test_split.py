"""Splits: by patient, from the seed, never leaking; the sides that a data set gives stay."""

from __future__ import annotations

import pytest

from medkd_fast.training.data.dataset import Case, Dataset
from medkd_fast.training.data.split import Split, split_by_patient
from medkd_fast.training.errors import WrongUse


def dataset(patients: int, split: Split | None = None, *, unlabelled: int = 0) -> Dataset:
    """Two cases a patient, and some patients without labels."""
    cases = [Case(f"p{i}_{e}", f"p{i}", (), "label") for i in range(patients) for e in ("ed", "es")]
    cases += [Case(f"u{i}", f"u{i}", ()) for i in range(unlabelled)]
    return Dataset("set", "set", "csv", tuple(cases), {1: "a"}, ("MR",), split=split)


def sides(split: Split) -> list[set[str]]:
    return [{n.split("_")[0] for n in names} for names in (split.train, split.validation, split.test)]


@pytest.mark.parametrize(
    ("patients", "fractions", "counts"),
    [
        (10, (0.7, 0.1, 0.2), [7, 1, 2]),
        (100, (0.7, 0.1, 0.2), [70, 10, 20]),
        (3, (0.7, 0.1, 0.2), [1, 1, 1]),
        (4, (0.5, 0.5, 0.0), [2, 2, 0]),
        (5, (1.0, 0.0, 0.0), [5, 0, 0]),
        (3, (0.01, 0.5, 0.5), [1, 1, 1]),
        (4, (0.1, 0.6, 0.3), [1, 2, 1]),
    ],
)
def test_patients_are_shared_out_whole(patients, fractions, counts):
    data = dataset(patients, unlabelled=4)
    split = split_by_patient(data, seed=0, fractions=fractions)
    found = sides(split)
    assert [len(s) for s in found] == counts and len(set.union(*found)) == patients
    names = [*split.train, *split.validation, *split.test]
    assert sorted(names) == sorted(
        c.name for c in data.labelled
    )  # both cases of a patient, none twice, no unlabelled one


def test_the_seed_decides_and_the_order_of_files_does_not():
    data = dataset(20)
    first = split_by_patient(data, seed=4)
    backwards = Dataset("set", "set", "csv", data.cases[::-1], {1: "a"}, ("MR",))
    assert split_by_patient(backwards, seed=4) == first
    assert split_by_patient(data, seed=5) != first


def test_given_sides_stay():
    given = Split(("p0_ed", "p0_es", "p1_ed", "p1_es", "p2_ed"), test=("p4_ed", "p4_es"))
    split = split_by_patient(dataset(6, given))
    assert split.test == given.test and len(sides(split)[1]) == 1
    assert set(split.train + split.validation) == set(given.train)  # what is given as training, no more

    whole = Split(("p0_ed",), ("p1_ed",), ("p2_ed",))
    assert split_by_patient(dataset(6, whole)) is whole

    no_train = split_by_patient(dataset(6, Split((), ("p1_ed",), ("p2_ed",))))
    assert sides(no_train)[0] == {"p0", "p3", "p4", "p5"} and (no_train.validation, no_train.test) == (
        ("p1_ed",),
        ("p2_ed",),
    )

    test_alone = split_by_patient(dataset(6, Split((), test=("p4_ed",))))
    # the test's patient is nowhere else, with none of its cases
    assert "p4" not in sides(test_alone)[0] | sides(test_alone)[1] and test_alone.test == ("p4_ed",)


@pytest.mark.parametrize(
    ("patients", "fractions", "message"),
    [
        (
            2,
            (0.7, 0.1, 0.2),
            "set has 2 labelled patients to split over 3 sides: at least 3 are needed, or fewer .*--fractions 1,0,0",
        ),
        (0, (0.7, 0.1, 0.2), "set has 0 labelled patients to train on: look where its labels lie"),
        (9, (0.7, 0.3), "fractions must be three numbers"),
        (9, (0.0, 0.5, 0.5), "fractions must be three numbers"),
        (9, (0.9, -0.1, 0.2), "fractions must be three numbers"),
    ],
)
def test_splits_that_cannot_be_made(patients, fractions, message):
    with pytest.raises(WrongUse, match=message):
        split_by_patient(dataset(patients), fractions=fractions)
