"""Options of a suite: names and texts, as `--option NAME=VALUE` gives them."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from loraloop.errors import SettingsError


def take_options(suite: str, given: Mapping[str, str] | None, defaults: Mapping[str, str]) -> dict[str, str]:
    """`defaults` with what is given in their place. Raises SettingsError for a name that is not among them."""
    for name in given or {}:
        if name not in defaults:
            near = difflib.get_close_matches(name, defaults, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise SettingsError(f"{suite} has no option {name!r}; known: {', '.join(sorted(defaults)) or 'none'}.{hint}")
    return {**defaults, **(given or {})}
