"""Prepares docstrings for the reference pages.

The builder knows `Examples:` only, and would join our closing lines into one paragraph.
"""

from __future__ import annotations

import re
from typing import Any

import griffe


class Sections(griffe.Extension):
    """Renames the section `Example:`, and makes paragraphs of `Numerics:` and `Source:` lines."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Change a docstring before it is parsed."""
        if obj.docstring:
            text = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
            obj.docstring.value = re.sub(
                r"^(Numerics|Source):", r"\n**\1**:", text, flags=re.MULTILINE
            )
