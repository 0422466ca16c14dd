"""The settings of a dataset, each declared once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from loraloop.errors import SettingsError

OnSecret = Literal["quarantine", "allow"]
OnPersonalData = Literal["quarantine", "report", "off"]
OnUnknownLicense = Literal["refuse", "allow"]


@dataclass(frozen=True, kw_only=True)
class DatasetSettings:
    """What of the episodes gets into a dataset, and what of that is held out. Raises SettingsError naming value and range."""

    held_out_fraction: float = 0.2
    """Share of the tasks kept from training, 0 <= share < 1. A task that was held out once stays held out."""
    held_out_min_tasks: int = 5
    """With fewer distinct tasks than this no further one is held out, at least 1."""
    near_duplicate: float = 0.9
    """Conversations of one outcome are duplicates, and tasks one task, from this similarity on: 0.5 <= similarity <= 1, where 1 is
    equal words. It is the share of three-word sequences that both have, of those that either has."""
    max_per_task: int | None = None
    """Samples of one task to train on, at most, the best first; at least 1."""
    max_per_source: int | None = None
    """Samples of one source to train on, at most, the best first; at least 1."""
    secrets: OnSecret = "quarantine"
    """An episode with a key, token or password: refused as `secret_found`, or counted and kept."""
    personal_data: OnPersonalData = "report"
    """An episode with an e-mail address, telephone, account or card number: refused as `personal_data_found`, counted and kept, or
    not looked for."""
    unknown_license: OnUnknownLicense = "refuse"
    """An episode without the tag `license`: refused as `license_unknown`, or kept."""

    def __post_init__(self) -> None:
        _check_share("held_out_fraction", self.held_out_fraction, "0 <= share < 1", is_inside=0 <= self.held_out_fraction < 1)
        _check_share("near_duplicate", self.near_duplicate, "0.5 <= similarity <= 1", is_inside=0.5 <= self.near_duplicate <= 1)
        for name in ("held_out_min_tasks", "max_per_task", "max_per_source"):
            value = getattr(self, name)
            if (value is not None or name == "held_out_min_tasks") and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise SettingsError(f"{name}={value!r}: expected a whole number >= 1")
        for name, choices in (("secrets", OnSecret), ("personal_data", OnPersonalData), ("unknown_license", OnUnknownLicense)):
            if getattr(self, name) not in get_args(choices):
                raise SettingsError(f"{name}={getattr(self, name)!r}: expected {' or '.join(get_args(choices))}")


def _check_share(name: str, value: object, expected: str, *, is_inside: bool) -> None:
    """NaN is never inside."""
    if isinstance(value, bool) or not is_inside:
        raise SettingsError(f"{name}={value!r}: expected {expected}")
