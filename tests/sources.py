"""Where the sources lie and how setup.py compiles them, for tests that compile them in other ways."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parent.parent


@cache
def setup_script() -> ModuleType:
    """setup.py, for its list of sources and flags."""
    spec = importlib.util.spec_from_file_location("medkd_fast_setup", ROOT / "setup.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
