"""When to train again: conditions, limits, and a state that a restart neither forgets nor repeats.

`decide` is a function of its arguments alone. The caller stores the state that a firing leads to in the same transaction as the firing
(`TriggerBook` does); until that firing has ended, also over a restart, there is no other. A clock that is set back neither repeats a
slot of a schedule nor gives a new budget, and one that was far ahead and is put right does not silence a trigger until it gets there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import date, datetime, time, timedelta
from typing import Annotated, Literal, Self
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import AfterValidator, Field, field_validator, model_validator

from loraloop.episode import Frozen
from loraloop.evaluate.interval import success_rate
from loraloop.store.ledger import Event, Ledger, Note

DAY_MS = 86_400_000
DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
FIRING, ENDED = "trigger_fired", "trigger_ended"


def _check_clock(text: str) -> str:
    try:
        at = time.fromisoformat(text)
    except ValueError as error:
        raise ValueError(f"{text!r} is no time of day; expected HH:MM, such as 03:30") from error
    return at.strftime("%H:%M")


Clock = Annotated[str, AfterValidator(_check_clock)]
"""A time of day, HH:MM."""


class Count(Frozen):
    """Enough new episodes."""

    kind: Literal["count"] = "count"
    episodes: Annotated[int, Field(ge=1)]


class Age(Frozen):
    """The oldest new episode waits for long enough."""

    kind: Literal["age"] = "age"
    max_seconds: Annotated[float, Field(gt=0)]


class QualityDrop(Frozen):
    """What is live does worse than when it was promoted: the whole 95 % interval of its rate is below that."""

    kind: Literal["quality_drop"] = "quality_drop"
    fall: Annotated[float, Field(ge=0, le=1)] = 0.0
    """How far the rate itself must have fallen besides."""
    min_episodes: Annotated[int, Field(ge=1)] = 20


class Schedule(Frozen):
    """At a time of day, on some days; one that was missed is made up for once."""

    kind: Literal["schedule"] = "schedule"
    at: Clock
    days: tuple[Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"], ...] = DAYS  # type: ignore[assignment]

    @field_validator("days")
    @classmethod
    def _some_day(cls, days: tuple[str, ...]) -> tuple[str, ...]:
        if not days:
            raise ValueError(f"no days; expected some of {', '.join(DAYS)}")
        return days


class Manual(Frozen):
    """Only when asked, which every trigger may be."""

    kind: Literal["manual"] = "manual"


class AllOf(Frozen):
    """Every one of several."""

    kind: Literal["all_of"] = "all_of"
    of: Annotated[tuple[Condition, ...], Field(min_length=1)]


class AnyOf(Frozen):
    """One of several."""

    kind: Literal["any_of"] = "any_of"
    of: Annotated[tuple[Condition, ...], Field(min_length=1)]


class Not(Frozen):
    """The opposite of one."""

    kind: Literal["not"] = "not"
    of: Condition


Condition = Annotated[Count | Age | QualityDrop | Schedule | Manual | AllOf | AnyOf | Not, Field(discriminator="kind")]


class Trigger(Frozen):
    """A condition, and the limits within which it fires. Whoever asks by hand is bound by none of them but a firing that runs."""

    when: Condition
    min_new_episodes: Annotated[int, Field(ge=0)] = 1
    """Without so many new episodes a training would learn what it knows."""
    cool_down_seconds: Annotated[float, Field(ge=0)] = 0.0
    """Least time between two firings."""
    backoff_seconds: Annotated[float, Field(ge=0)] = 60.0
    """Wait after a failure; twice as long after each further one in a row."""
    max_backoff_seconds: Annotated[float, Field(ge=0)] = 86_400.0
    quiet_hours: tuple[Clock, Clock] | None = None
    """From and until when it does not fire, each day, also past midnight."""
    max_per_day: Annotated[int, Field(ge=1)] | None = None
    """Firings on one day of `zone`."""
    zone: str = "UTC"
    """The time zone of times of day, such as Europe/Berlin."""

    @model_validator(mode="after")
    def _sensible(self) -> Self:
        try:
            ZoneInfo(self.zone)
        except (ZoneInfoNotFoundError, ValueError, OSError) as error:
            raise ValueError(f"{self.zone!r} is no time zone that this machine knows; expected one such as Europe/Berlin or UTC") from error
        if self.quiet_hours and self.quiet_hours[0] == self.quiet_hours[1]:
            raise ValueError(f"quiet hours from {self.quiet_hours[0]} until then again leave no time to fire")
        return self


class Facts(Frozen):
    """What is known at a look."""

    new_episodes: int = 0
    """Closed episodes that no training has seen."""
    oldest_new_at: int | None = None
    """When the oldest of them was stored, in Unix milliseconds."""
    live_wins: int = 0
    live_episodes: int = 0
    """Episodes with an outcome that were played with what is live."""
    promoted_rate: float | None = None
    """The success rate for which what is live was promoted."""
    request: str = ""
    """The id of the newest request of a person; one that has fired does not fire again."""


class TriggerState(Frozen):
    """What must outlive the process. Times in Unix milliseconds."""

    since: int
    """When the trigger was first looked at: slots of a schedule before then do not count."""
    last_fired_at: int | None = None
    last_failed_at: int | None = None
    failures: int = 0
    """In a row."""
    day: str = ""
    """The local date that `fired_today` counts for."""
    fired_today: int = 0
    slots_until: int | None = None
    """Slots of a schedule up to then are done with."""
    request: str = ""
    """The request that was fired for last."""
    firing: int = 0
    """Counts the firings."""
    running: bool = False
    """Firing number `firing` has not ended: after a restart, go on with it."""


class Decision(Frozen):
    """Whether to fire now."""

    fire: bool
    reasons: tuple[str, ...]
    """Why, or all that stands in the way."""
    next_look_at: int | None
    """When time alone may change it, in Unix milliseconds; None when only new facts can."""
    state: TriggerState
    """What to store: with a firing the state after it, else the given one put right by the clock."""


def decide(trigger: Trigger, state: TriggerState, facts: Facts, now: int) -> Decision:
    """Whether `trigger` fires at `now`, in Unix milliseconds. The same arguments give the same decision."""
    state = _by_the_clock(trigger, state, now)
    if state.running:
        return Decision(fire=False, reasons=(f"firing {state.firing} has not ended",), next_look_at=None, state=state)
    if facts.request and facts.request != state.request:
        return Decision(fire=True, reasons=("asked for",), next_look_at=None, state=_after(state, facts, now))
    met, why = _is_met(trigger.when, trigger, state, facts, now)
    blocks = list(_blocks(trigger, state, facts, now))
    if met and not blocks:
        return Decision(fire=True, reasons=(why,), next_look_at=None, state=_after(state, facts, now))
    times = [at for _, at in blocks] + list(_turns(trigger.when, trigger, state, facts, now))
    later = [at for at in times if at is not None and at > now]
    reasons = tuple(text for text, _ in blocks) if met else (why, *(text for text, _ in blocks))
    return Decision(fire=False, reasons=reasons, next_look_at=min(later, default=None), state=state)


def end(state: TriggerState, now: int, *, failed: bool) -> TriggerState:
    """The state when the firing that runs has ended."""
    failures = state.failures + 1 if failed else 0
    return state.model_copy(update={"running": False, "failures": failures, "last_failed_at": now if failed else None})


class TriggerBook:
    """The state of one trigger in a store: read, and written with the event of what happened in one transaction."""

    def __init__(self, ledger: Ledger, name: str) -> None:
        self.ledger = ledger
        self.name = f"trigger/{name}"

    def look(self, trigger: Trigger, facts: Facts, now: int) -> Decision:
        """Decide, and when it fires have that on the disk before anyone acts on it.

        Raises NoteChanged when another process has decided meanwhile: then nothing has fired here.
        """
        note = self.ledger.read(self.name)
        state = self._state(note, now)
        decision = decide(trigger, state, facts, now)
        data = {"firing": decision.state.firing, "reasons": list(decision.reasons)}
        happened = [Event(kind=FIRING, subject=self.name, data=data, at=now)] if decision.fire else []
        if decision.state != state or not note.edition:
            self._write(note, decision.state, happened)
        return decision

    def find_running(self) -> int | None:
        """The number of the firing that has not ended, to go on with; None when there is none."""
        note = self.ledger.read(self.name)
        state = self._state(note, 0)
        return state.firing if state.running else None

    def end(self, firing: int, now: int, *, failed: bool, why: str = "") -> None:
        """Note how a firing ended; nothing when that is noted already, or for an older firing."""
        note = self.ledger.read(self.name)
        state = self._state(note, now)
        if state.running and state.firing == firing:
            data = {"firing": firing, "failed": failed, "why": why}
            self._write(note, end(state, now, failed=failed), [Event(kind=ENDED, subject=self.name, data=data, at=now)])

    def _state(self, note: Note, now: int) -> TriggerState:
        return TriggerState.model_validate(note.data) if note.edition else TriggerState(since=now)

    def _write(self, note: Note, state: TriggerState, happened: Sequence[Event]) -> None:
        self.ledger.write(note.model_copy(update={"data": state.model_dump(mode="json")}), *happened)


def _by_the_clock(trigger: Trigger, state: TriggerState, now: int) -> TriggerState:
    """`state` with nothing in the future of a clock that was set back, and today's count."""
    changes: dict[str, object] = {"since": min(state.since, now)}
    for name in ("last_fired_at", "last_failed_at"):
        at = getattr(state, name)
        changes[name] = at if at is None else min(at, now)
    if state.slots_until is not None and state.slots_until > now + DAY_MS:  # it was far ahead; a small step keeps what is done with
        changes["slots_until"] = now
    today, tomorrow = (_local(trigger, now + ahead).date().isoformat() for ahead in (0, DAY_MS))
    if not today <= state.day <= tomorrow:  # tomorrow: the clock was set back over midnight, which gives no new budget
        changes["day"] = today
        changes["fired_today"] = state.fired_today if state.day > today else 0
    return state.model_copy(update=changes)


def _after(state: TriggerState, facts: Facts, now: int) -> TriggerState:
    return state.model_copy(
        update={
            "last_fired_at": now,
            "fired_today": state.fired_today + 1,
            "slots_until": max(now, state.slots_until or 0),
            "request": facts.request or state.request,
            "firing": state.firing + 1,
            "running": True,
        }
    )


def _is_met(condition: Condition, trigger: Trigger, state: TriggerState, facts: Facts, now: int) -> tuple[bool, str]:
    """(whether, why or why not)."""
    match condition:
        case Count(episodes=least):
            return facts.new_episodes >= least, f"{facts.new_episodes} new episodes of {least}"
        case Age(max_seconds=seconds):
            waited = 0.0 if facts.oldest_new_at is None else max(0, now - facts.oldest_new_at) / 1000
            return facts.oldest_new_at is not None and waited >= seconds, f"the oldest new episode waits {waited:.0f} s of {seconds:.0f}"
        case QualityDrop():
            return _has_dropped(condition, facts)
        case Schedule(at=clock):
            slot = _slot(condition, trigger, now, -1)
            done = max(state.since, state.slots_until or 0)
            return slot is not None and slot > done, f"the schedule says {clock} on {', '.join(condition.days)}"
        case Manual():
            return False, "nobody has asked"
    return _is_met_together(condition, trigger, state, facts, now)


def _is_met_together(condition: AllOf | AnyOf | Not, trigger: Trigger, state: TriggerState, facts: Facts, now: int) -> tuple[bool, str]:
    parts = [_is_met(part, trigger, state, facts, now) for part in ((condition.of,) if isinstance(condition, Not) else condition.of)]
    if isinstance(condition, Not):
        return not parts[0][0], f"not: {parts[0][1]}"
    met = all(part for part, _ in parts) if isinstance(condition, AllOf) else any(part for part, _ in parts)
    deciding = [why for part, why in parts if part == met]
    return met, ("; " if isinstance(condition, AllOf) == met else " or ").join(deciding)


def _has_dropped(condition: QualityDrop, facts: Facts) -> tuple[bool, str]:
    if facts.promoted_rate is None or facts.live_episodes < condition.min_episodes:
        return False, f"{facts.live_episodes} live episodes of {condition.min_episodes} to tell a drop"
    wins = [True] * facts.live_wins + [False] * (facts.live_episodes - facts.live_wins)
    rate = success_rate(wins)
    told = f"live {rate.rate:.3f} (at most {rate.high:.3f}) of {rate.n}, promoted at {facts.promoted_rate:.3f}"
    return rate.high < facts.promoted_rate and facts.promoted_rate - rate.rate >= condition.fall, told


def _blocks(trigger: Trigger, state: TriggerState, facts: Facts, now: int) -> Iterator[tuple[str, int | None]]:
    """(what stands in the way, until when) of each limit."""
    if facts.new_episodes < trigger.min_new_episodes:
        yield f"{facts.new_episodes} new episodes, {trigger.min_new_episodes} are the least", None
    if state.last_fired_at is not None:
        until = state.last_fired_at + round(trigger.cool_down_seconds * 1000)
        if now < until:
            yield f"cools down for {(until - now) / 1000:.0f} s more", until
    if state.failures and state.last_failed_at is not None:
        doubled = trigger.backoff_seconds * 2.0 ** min(state.failures - 1, 60)
        until = state.last_failed_at + round(min(doubled, trigger.max_backoff_seconds) * 1000)
        if now < until:
            yield f"waits {(until - now) / 1000:.0f} s more after {state.failures} failures in a row", until
    if trigger.quiet_hours and _is_quiet(trigger.quiet_hours, _local(trigger, now)):
        yield f"quiet hours until {trigger.quiet_hours[1]}", _next_clock(trigger, now, trigger.quiet_hours[1])
    if trigger.max_per_day is not None and state.fired_today >= trigger.max_per_day:
        yield f"{state.fired_today} firings today, {trigger.max_per_day} are the most", _next_clock(trigger, now, "00:00")


def _turns(condition: Condition, trigger: Trigger, state: TriggerState, facts: Facts, now: int) -> Iterator[int | None]:
    """The next times at which parts of the condition change by time alone."""
    match condition:
        case Age(max_seconds=seconds) if facts.oldest_new_at is not None:
            yield facts.oldest_new_at + round(seconds * 1000)
        case Schedule():
            yield _slot(condition, trigger, now, +1)
            if state.slots_until is not None and state.slots_until > now:  # after a clock was set back
                yield _slot(condition, trigger, state.slots_until, +1)
        case Not(of=inner):
            yield from _turns(inner, trigger, state, facts, now)
        case AllOf(of=parts) | AnyOf(of=parts):
            for part in parts:
                yield from _turns(part, trigger, state, facts, now)


def _slot(schedule: Schedule, trigger: Trigger, now: int, way: Literal[-1, 1]) -> int | None:
    """The last slot up to `now`, or the first behind it."""
    today = _local(trigger, now).date()
    for n_days in range(-1, 9):
        day = today + timedelta(days=way * n_days)
        at = _instant(trigger, day, schedule.at)
        if DAYS[day.weekday()] in schedule.days and (at <= now if way < 0 else at > now):
            return at
    return None


def _next_clock(trigger: Trigger, now: int, clock: str) -> int:
    """The first time after `now` at which clocks of the zone show `clock`."""
    today = _local(trigger, now).date()
    return min(at for n in range(-1, 3) for fold in (0, 1) if (at := _instant(trigger, today + timedelta(days=n), clock, fold)) > now)


def _instant(trigger: Trigger, day: date, clock: str, fold: Literal[0, 1] = 0) -> int:
    """When it is `clock` on `day`: of two such times the first, with `fold` the second; of none the one at which clocks leap over it."""
    wanted = datetime.combine(day, time.fromisoformat(clock))
    zone = ZoneInfo(trigger.zone)
    first, second = (round(wanted.replace(tzinfo=zone, fold=side).timestamp()) // 60 for side in (0, 1))  # minutes
    if second >= first:
        return (second if fold else first) * 60_000
    shown, leapt = second, first  # clocks show less than wanted, and no less
    while leapt - shown > 1:
        middle = (shown + leapt) // 2
        if _local(trigger, middle * 60_000).replace(tzinfo=None) >= wanted:
            leapt = middle
        else:
            shown = middle
    return leapt * 60_000


def _local(trigger: Trigger, now: int) -> datetime:
    return datetime.fromtimestamp(now / 1000, ZoneInfo(trigger.zone))


def _is_quiet(hours: tuple[str, str], local: datetime) -> bool:
    start, stop = hours
    clock = local.strftime("%H:%M")
    return start <= clock < stop if start < stop else clock >= start or clock < stop
