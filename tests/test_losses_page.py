"""docs/losses.md is what the docstrings say, and it and the README name every loss."""

from __future__ import annotations

import importlib.util
import re
from types import ModuleType

from sources import ROOT

from medkd_fast import losses


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("losses_page", ROOT / "docs" / "losses.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_up_to_date() -> None:
    made = script()
    assert made.DOCUMENT.read_text(encoding="utf-8") == made.page(), (
        "docs/losses.md is not what the docstrings say: run `make losses-page`"
    )


def test_every_loss_is_named() -> None:
    page, readme = script().DOCUMENT.read_text(encoding="utf-8"), (ROOT / "README.md").read_text(encoding="utf-8")
    sections = dict(part.split("\n", 1) for part in page.split("\n## ")[1:])
    names = {name for name in losses.__all__ if name.endswith("Loss")}
    assert set(sections) == names
    for name in names:
        assert f"`{name}`" in readme, f"{name} is not in README.md"
        for label in ("Source", "Other codes", "Weight", "Cost"):
            assert re.search(rf"^\* \*{label}\*: .{{15,}}\.?$", sections[name], re.MULTILINE), f"{name}: no {label}"
    for entry in losses.available():
        assert f"| `{entry.name}` | [`{entry.loss.__name__}`]" in page
