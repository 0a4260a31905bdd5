"""The console script `medkd-fast`: hands over to `medkd_fast.training.commands`, or says which extra is missing."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from medkd_fast.integrations.nnunet_path import export_line
from medkd_fast.training.doctor import INSTALL_EXTRA, doctor_lines, missing_extra


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command (of `sys.argv` where none is given) and return its exit code: 0, 2 for wrong use, 130 for Ctrl-C.

    >>> main(["--help"])  # doctest: +ELLIPSIS
    Usage: medkd-fast ...
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    missing = missing_extra()
    if missing and arguments == ["doctor"]:  # it must answer above all where something is missing
        print("\n".join(doctor_lines()))
        return 0
    if missing and arguments == ["nnunet-path"]:  # nnU-Net needs nothing of the extra
        print(export_line())
        return 0
    if missing:
        print(f"medkd-fast: {', '.join(missing)} not installed: run `{INSTALL_EXTRA}`", file=sys.stderr)
        return 2
    try:
        from medkd_fast.training.commands import run
    except KeyboardInterrupt:  # nothing has begun yet
        return 130
    return run(arguments)


if __name__ == "__main__":
    sys.exit(main())
