"""The life of a version: what the table allows."""

from __future__ import annotations

import itertools

import pytest

from loraloop.errors import ServingError
from loraloop.serve.states import MEANINGS, TRANSITIONS, VersionState, check_step

LEGAL = {
    "starting": {"healthy", "failed"},
    "healthy": {"proven", "failed"},
    "proven": {"live", "canary", "stopped", "failed"},
    "canary": {"live", "draining", "failed"},
    "live": {"draining", "failed"},
    "draining": {"stopped", "live", "canary", "failed"},
    "stopped": {"starting"},
    "failed": {"starting"},
}
"""Written out once more, so that a change of the table is a change of this too."""


@pytest.mark.parametrize(("before", "state"), list(itertools.product(LEGAL, LEGAL)))
def test_what_the_table_has_is_done_and_all_else_is_refused(before: str, state: str) -> None:
    if state in LEGAL[before]:
        check_step("agent@1", VersionState(before), VersionState(state))
        return
    with pytest.raises(ServingError, match=f"agent@1 is {before} and cannot become {state}; it may become"):
        check_step("agent@1", VersionState(before), VersionState(state))


def test_each_change_is_once_in_the_table_and_every_state_has_a_meaning() -> None:
    assert len({(step.before, step.state) for step in TRANSITIONS}) == len(TRANSITIONS) == sum(map(len, LEGAL.values()))
    assert list(MEANINGS) == list(VersionState)
