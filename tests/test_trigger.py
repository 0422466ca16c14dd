"""When it fires, when it does not, and that neither a restart nor a clock makes it forget or repeat."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from loraloop.store.ledger import Ledger, NoteChanged
from loraloop.store.sql import SqlEpisodeStore
from loraloop.trigger import (
    ENDED,
    FIRING,
    Age,
    AllOf,
    AnyOf,
    Count,
    Facts,
    Manual,
    Not,
    QualityDrop,
    Schedule,
    Trigger,
    TriggerBook,
    TriggerState,
    decide,
    end,
)

HOUR = 3_600_000
BERLIN = "Europe/Berlin"


def at(text: str, zone: str = "UTC", fold: int = 0) -> int:
    return round(datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(zone), fold=fold).timestamp() * 1000)


NOW = at("2026-11-29T12:00")
MANY = Facts(new_episodes=100, oldest_new_at=NOW - 10 * HOUR)


def fires(when: Any, facts: Facts = MANY, now: int = NOW, state: TriggerState | None = None, **limits: Any) -> bool:
    return decide(Trigger(when=when, **limits), state or TriggerState(since=NOW - 100 * HOUR), facts, now).fire


@pytest.mark.parametrize(
    ("when", "fire"),
    [
        (Count(episodes=100), True),
        (Count(episodes=101), False),
        (Age(max_seconds=36_000), True),
        (Age(max_seconds=36_001), False),
        (Manual(), False),
        (Not(of=Count(episodes=101)), True),
        (AllOf(of=(Count(episodes=100), Age(max_seconds=1))), True),
        (AllOf(of=(Count(episodes=100), Manual())), False),
        (AnyOf(of=(Count(episodes=101), Age(max_seconds=1))), True),
        (AnyOf(of=(Count(episodes=101), Manual())), False),
        (Schedule(at="11:59"), True),
    ],
)
def test_conditions(when: Any, fire: bool) -> None:
    assert fires(when) == fire


def test_a_slot_counts_from_when_the_trigger_was_first_looked_at() -> None:
    sundays = Schedule(at="12:01", days=("sun",))
    assert not fires(sundays), "last Sunday was before"
    assert fires(sundays, now=NOW + 60_000)


def test_a_drop_of_quality_fires_only_when_chance_does_not_explain_it() -> None:
    dropped = Facts(new_episodes=1, live_wins=20, live_episodes=100, promoted_rate=0.5)
    assert fires(QualityDrop(), dropped)
    assert fires(QualityDrop(fall=0.25), dropped)
    assert not fires(QualityDrop(fall=0.35), dropped)
    assert not fires(QualityDrop(), dropped.model_copy(update={"live_wins": 45}))
    assert not fires(QualityDrop(min_episodes=101), dropped)
    assert not fires(QualityDrop(), Facts(new_episodes=1, live_wins=0, live_episodes=100))


def test_a_request_fires_whatever_stands_in_the_way_and_only_once() -> None:
    trigger = Trigger(when=Manual(), min_new_episodes=5, quiet_hours=("11:00", "13:00"), max_per_day=1)
    first = decide(trigger, TriggerState(since=NOW), Facts(request="req-1"), NOW)
    assert first.fire
    assert not decide(trigger, first.state, Facts(request="req-2"), NOW).fire, "while it runs there is no other"
    ended = end(first.state, NOW + 1, failed=False)
    assert not decide(trigger, ended, Facts(request="req-1"), NOW + 2).fire
    assert decide(trigger, ended, Facts(request="req-2"), NOW + 2).fire


def test_each_limit_holds_it_back_and_says_until_when() -> None:
    when = Count(episodes=1)
    assert not fires(when, min_new_episodes=101)
    fired = TriggerState(since=0, last_fired_at=NOW - HOUR, firing=1, day="2026-11-29", fired_today=1)
    cooling = decide(Trigger(when=when, cool_down_seconds=7200), fired, MANY, NOW)
    assert (cooling.fire, cooling.next_look_at) == (False, NOW + HOUR)
    assert fires(when, state=fired, now=NOW + HOUR, cool_down_seconds=7200)
    spent = decide(Trigger(when=when, max_per_day=1), fired, MANY, NOW)
    assert (spent.fire, spent.next_look_at) == (False, at("2026-11-30T00:00"))
    quiet = decide(Trigger(when=when, quiet_hours=("22:00", "13:30")), fired, MANY, NOW)
    assert (quiet.fire, quiet.next_look_at) == (False, at("2026-11-29T13:30"))


def test_failures_wait_twice_as_long_each_and_a_success_forgives_them() -> None:
    trigger = Trigger(when=Count(episodes=1), backoff_seconds=60, max_backoff_seconds=200)
    state, now, waits = TriggerState(since=NOW), NOW, []
    for _ in range(4):
        decision = decide(trigger, state, MANY, now)
        assert decision.fire
        state = end(decision.state, now, failed=True)
        until = decide(trigger, state, MANY, now).next_look_at
        assert until is not None
        waits.append((until - now) / 1000)
        now = until
    assert waits == [60, 120, 200, 200]
    state = end(decide(trigger, state, MANY, now).state, now, failed=False)
    assert decide(trigger, state, MANY, now).fire


def simulate(trigger: Trigger, clock: Iterator[int], start: int) -> list[int]:
    """When it fires on a clock, each firing over at once; each look begins with what a restart would find."""
    state, fired = TriggerState(since=start), []
    for now in clock:
        decision = decide(trigger, TriggerState.model_validate_json(state.model_dump_json()), Facts(new_episodes=9), now)
        state = end(decision.state, now, failed=False) if decision.fire else decision.state
        fired += [now] if decision.fire else []
    return fired


@pytest.mark.parametrize(
    ("day", "expected"),
    [
        ("2026-03-29", [at("2026-03-28T02:30", BERLIN), at("2026-03-29T03:00", BERLIN), at("2026-03-30T02:30", BERLIN)]),
        ("2026-10-25", [at("2026-10-24T02:30", BERLIN), at("2026-10-25T02:30", BERLIN), at("2026-10-26T02:30", BERLIN)]),
    ],
)
def test_a_daily_slot_fires_once_a_day_also_when_clocks_are_changed(day: str, expected: list[int]) -> None:
    start = at(day, BERLIN) - 24 * HOUR
    fired = simulate(Trigger(when=Schedule(at="02:30"), zone=BERLIN), iter(range(start, start + 72 * HOUR, 600_000)), start)
    assert fired == expected


def test_a_slot_that_was_slept_through_is_made_up_for_once() -> None:
    clock = iter([NOW, NOW + 75 * HOUR, NOW + 76 * HOUR])
    assert simulate(Trigger(when=Schedule(at="03:00")), clock, NOW) == [NOW + 75 * HOUR]


def test_a_clock_that_is_set_back_neither_repeats_a_slot_nor_renews_the_budget() -> None:
    slot = at("2026-11-30T00:30")
    clock = iter([NOW, slot, slot - HOUR, slot - HOUR // 2, slot, slot + HOUR, slot + 24 * HOUR])
    assert simulate(Trigger(when=Schedule(at="00:30"), max_per_day=9), clock, NOW) == [slot, slot + 24 * HOUR]
    budget = simulate(Trigger(when=Count(episodes=1), max_per_day=1), iter([slot, slot - HOUR, slot, slot + HOUR]), NOW)
    assert budget == [slot]


def test_a_clock_that_was_a_year_ahead_does_not_silence_it_for_a_year() -> None:
    clock = iter([NOW + 365 * 24 * HOUR, NOW, *range(NOW, NOW + 50 * HOUR, HOUR)])
    fired = simulate(Trigger(when=Schedule(at="03:00"), cool_down_seconds=3600), clock, NOW)
    assert fired == [NOW + 365 * 24 * HOUR, at("2026-11-30T03:00"), at("2026-12-01T03:00")]


conditions = st.recursive(
    st.one_of(
        st.builds(Count, episodes=st.integers(1, 20)),
        st.builds(Age, max_seconds=st.integers(1, 100_000)),
        st.builds(
            Schedule, at=st.times().map(lambda clock: clock.strftime("%H:%M")), days=st.sampled_from([("mon",), ("sat", "sun"), ("wed",)])
        ),
        st.just(Manual()),
    ),
    lambda inner: st.one_of(
        st.builds(AllOf, of=st.tuples(inner, inner)), st.builds(AnyOf, of=st.tuples(inner, inner)), st.builds(Not, of=inner)
    ),
    max_leaves=4,
)
clocks = st.integers(0, 23).map(lambda hour: f"{hour:02d}:30")
triggers = st.builds(
    Trigger,
    when=conditions,
    min_new_episodes=st.integers(0, 5),
    cool_down_seconds=st.integers(0, 50_000),
    backoff_seconds=st.integers(0, 5_000),
    quiet_hours=st.one_of(st.none(), st.tuples(clocks, clocks).filter(lambda pair: pair[0] != pair[1])),
    max_per_day=st.one_of(st.none(), st.integers(1, 3)),
    zone=st.sampled_from(["UTC", BERLIN, "America/New_York", "Asia/Kolkata"]),
)
moments = st.one_of(
    st.integers(at("2026-01-01"), at("2026-12-31")),
    st.integers(at("2026-03-28T20:00"), at("2026-03-29T06:00")),
    st.integers(at("2026-10-24T20:00"), at("2026-10-25T06:00")),
)
states = st.builds(
    TriggerState,
    since=st.just(at("2025-12-01")),
    last_fired_at=st.one_of(st.none(), moments),
    failures=st.integers(0, 4),
    last_failed_at=st.one_of(st.none(), moments),
    slots_until=st.one_of(st.none(), moments),
)


@given(triggers, states, moments, st.integers(0, 30), st.floats(0, 1))
@settings(max_examples=600, deadline=None)
def test_nothing_is_missed_by_sleeping_until_the_next_look(
    trigger: Trigger, state: TriggerState, now: int, episodes: int, share: float
) -> None:
    facts = Facts(new_episodes=episodes, oldest_new_at=now - HOUR if episodes else None)
    decision = decide(trigger, state, facts, now)
    assert decision == decide(trigger, state, facts, now)
    if decision.fire:
        assert decision.state.running
        assert not decide(trigger, decision.state, facts, now + 1).fire
        return
    assert decision.reasons
    until = decision.next_look_at or now + 20 * 24 * HOUR
    assert until > now
    between = now + round(share * (until - 1 - now))
    assert not decide(trigger, decision.state, facts, between).fire, f"next look at {until}, but it fires at {between}"


@given(triggers, st.lists(st.integers(0, 12 * 60), min_size=5, max_size=60))
@settings(max_examples=150, deadline=None)
def test_limits_hold_over_any_run(trigger: Trigger, steps: list[int]) -> None:
    now, clock = at("2026-03-27"), []
    for minutes in steps:
        now += minutes * 60_000
        clock.append(now)
    fired = simulate(trigger, iter(clock), at("2026-03-27"))
    assert all(later - earlier >= trigger.cool_down_seconds * 1000 for earlier, later in pairwise(fired))
    days = [datetime.fromtimestamp(moment / 1000, ZoneInfo(trigger.zone)) for moment in fired]
    if trigger.max_per_day:
        assert all(sum(one.date() == other.date() for other in days) <= trigger.max_per_day for one in days)
    if trigger.quiet_hours:
        start, stop = trigger.quiet_hours
        shown = [day.strftime("%H:%M") for day in days]
        assert not any(start <= clock < stop if start < stop else clock >= start or clock < stop for clock in shown)


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (lambda: Schedule(at="25:00"), "'25:00' is no time of day"),
        (lambda: Schedule(at="12:00", days=()), "no days"),
        (lambda: Trigger(when=Manual(), zone="Mars/Olympus"), "'Mars/Olympus' is no time zone"),
        (lambda: Trigger(when=Manual(), quiet_hours=("08:00", "08:00")), "leave no time"),
        (lambda: AllOf(of=()), "at least 1"),
    ],
)
def test_what_makes_no_sense_is_named(made: Any, says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        made()


def test_a_trigger_survives_json() -> None:
    trigger = Trigger(when=AnyOf(of=(Not(of=Count(episodes=3)), Schedule(at="03:00", days=("mon",)))), quiet_hours=("22:00", "06:00"))
    assert Trigger.model_validate_json(trigger.model_dump_json()) == trigger


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    store = SqlEpisodeStore(tmp_path / "episodes.db")
    yield store.ledger
    store.close()


def test_a_firing_is_kept_with_its_event_and_found_again_after_a_restart(ledger: Ledger) -> None:
    trigger = Trigger(when=Count(episodes=10))
    assert TriggerBook(ledger, "agent").find_running() is None
    assert TriggerBook(ledger, "agent").look(trigger, MANY, NOW).fire
    after_restart = TriggerBook(ledger, "agent")
    assert not after_restart.look(trigger, MANY, NOW + 1).fire
    assert after_restart.find_running() == 1
    after_restart.end(1, NOW + 2, failed=True, why="no memory")
    after_restart.end(1, NOW + 3, failed=True)
    assert after_restart.find_running() is None
    assert after_restart.look(trigger, MANY, NOW + 120_000).state.failures == 1
    after_restart.end(1, NOW + 120_001, failed=True)
    assert after_restart.find_running() == 2, "the end of an older firing ends no newer one"
    kinds = [event.kind for event in ledger.iter_events(subject="trigger/agent")]
    assert kinds == [FIRING, ENDED, FIRING]


def test_of_two_who_decide_at_once_one_fires(ledger: Ledger) -> None:
    class Late(Ledger):
        """Another process decides between this one's reading and writing."""

        def read(self, name: str) -> Any:
            note = ledger.read(name)
            TriggerBook(ledger, "agent").look(trigger, MANY, NOW)
            return note

    trigger = Trigger(when=Count(episodes=10))
    with pytest.raises(NoteChanged):
        TriggerBook(Late(ledger._database), "agent").look(trigger, MANY, NOW)
    assert len(list(ledger.iter_events(kind=FIRING))) == 1
