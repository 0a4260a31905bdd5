"""For mkdocstrings: examples in docstrings, which begin with >>> anywhere, become blocks of code."""

from __future__ import annotations

from typing import Any

from griffe import Extension, Object


def fenced(docstring: str) -> str:
    """The docstring with a fence around every run of lines from a >>> to the next empty line."""
    lines: list[str] = []
    inside = False
    for line in docstring.splitlines():
        if not inside and line.startswith(">>>"):
            lines.append("```pycon")
            inside = True
        elif inside and not line.strip():
            lines.append("```")
            inside = False
        lines.append(line)
    return "\n".join([*lines, "```"] if inside else lines)


class Examples(Extension):
    """Called for every object of the package as its source is read."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = fenced(obj.docstring.value)
