"""Every `medkd-fast` line in the README and in docs/ names a command and options that there are."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from medkd_fast.training.commands import app

ROOT = Path(__file__).parents[2]
FENCED = re.compile(r"^```\w*.*?\n(.*?)^```", re.MULTILINE | re.DOTALL)


def lines() -> list[str]:
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    blocks = [block for page in pages for block in FENCED.findall(page.read_text(encoding="utf-8"))]
    joined = "\n".join(blocks).replace("\\\n", " ")
    return sorted(
        {line.removeprefix("$ ") for line in joined.splitlines() if line.startswith(("medkd-fast ", "$ medkd-fast "))}
    )


@pytest.mark.parametrize("line", lines())
def test_command_and_options_exist(line: str) -> None:
    name, *arguments = shlex.split(line, comments=True)[1:]
    command = get_command(app).commands[name]
    command.make_context(name, arguments)  # raises for an option that there is not, or an argument too few


def test_there_are_such_lines() -> None:
    assert len(lines()) >= 5
