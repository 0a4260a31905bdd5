"""What the cases of a data set hold, whatever it is called and wherever it lies: a digest a case."""

from __future__ import annotations

import json
from collections.abc import Iterable

from medkd_fast.training.data.cache import default_cache, digest, digest_of_content
from medkd_fast.training.data.dataset import Dataset
from medkd_fast.training.errors import WrongUse


def content_of(dataset: Dataset, names: Iterable[str]) -> dict[str, str]:
    """{case: digest of its images, its label and its slices}. A file is read once, then its digest is remembered.

    Raises WrongUse, naming the case, for a file that cannot be read.
    """
    found = {}
    for name in names:
        case = dataset.case(name)
        try:
            files = [
                digest_of_content(f, default_cache()) for f in (*case.images, *([case.label] if case.label else []))
            ]
        except OSError as error:
            raise WrongUse(f"case {name}: {error.filename} cannot be read ({error.strerror})") from error
        found[name] = digest(json.dumps([files, case.slices]))
    return found
