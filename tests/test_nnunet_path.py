"""`medkd-fast nnunet-path`, which needs no nnU-Net: what it prints, a shell takes."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from medkd_fast import cli
from medkd_fast.integrations import nnunet_path


@pytest.mark.parametrize("missing", [[], ["monai"]])
def test_a_shell_learns_the_folder(missing: list[str], monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(cli, "missing_extra", lambda: missing)
    monkeypatch.setenv("nnUNet_extTrainer", "/their own/trainers")
    assert cli.main(["nnunet-path"]) == 0
    line = capsys.readouterr().out
    told = subprocess.run(
        ["sh", "-c", f"{line}\nprintenv nnUNet_extTrainer"], capture_output=True, text=True, check=True
    )
    others, folder = told.stdout.strip().split(os.pathsep)
    assert others == "/their own/trainers"
    # nnU-Net imports every module in it, and it is first on its path: one more would shadow a package of that name
    assert [path.name for path in Path(folder).glob("*.py") if path.name != "__init__.py"] == ["medkd_fast_trainer.py"]
    assert Path(folder) == Path(nnunet_path.__file__).parent


def test_the_line_does_not_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("nnUNet_extTrainer", str(Path(nnunet_path.__file__).parent))
    assert nnunet_path.export_line().count("nnunet_path") == 1
