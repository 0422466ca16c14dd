"""Which version answers to which alias, and how that changes: the next one is up and proven before the alias moves, the last one drains.

An alias moves in one step: the file is on the disk, then the table in memory is another, with nothing in between that waits. A move that
fails on the way leaves everything as it was. Orders to one alias are carried out one at a time. Used by one event loop.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections import defaultdict
from collections.abc import Coroutine
from typing import Any, Self

from loraloop.episode import Outcome
from loraloop.errors import NothingServes, ServingError, UnknownModel
from loraloop.serve.aliases import AliasFile, AliasTable, CanaryShare, Served, make_move
from loraloop.serve.applier import ALIAS_FORM, BASE, Applier, Version
from loraloop.serve.bring_up import Loader, Retry
from loraloop.serve.canary import Trial, is_in_canary, score_of
from loraloop.serve.fleet_status import AliasStatus, ApplyReport, FleetSettings, FleetStatus, describe, describe_alias, name_both, name_of
from loraloop.serve.loaded import Loaded, OpenTicket
from loraloop.serve.proof import Prove
from loraloop.serve.states import ANSWERING, VersionState

logger = logging.getLogger(__name__)


class Fleet:
    """The versions that answer; implements `routing.Routes`. `await recover()` before anything else, `await close()` at the end."""

    def __init__(self, applier: Applier, file: AliasFile, prove: Prove, settings: FleetSettings | None = None) -> None:
        self.settings = settings or FleetSettings()
        self._applier = applier
        self._file = file
        self._loader = Loader(applier, prove, self.settings.drain_seconds)
        self._table = AliasTable()
        self._turns: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._trials: dict[str, Trial] = {}
        self._retries: dict[str, Retry] = {}
        self._problems: dict[str, str] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._wake = asyncio.Event()
        self._closing = False

    @property
    def base(self) -> Version:
        """The base model alone."""
        return self._applier.base

    # --- Routes ---------------------------------------------------------------------------------------------------------------

    def acquire(self, model: str, conversation: str) -> OpenTicket:
        """See `routing.Routes`."""
        if self._closing:
            raise NothingServes("the service ends; try again when it is there again")
        served = self._table.aliases.get(model)
        if served is None:
            return self._acquire_by_name(model)
        if served.canary is not None and is_in_canary(model, conversation, served.canary.share):
            canary = self._loader.find(served.canary.version.name)
            if canary is not None and canary.state in ANSWERING:
                return canary.open_ticket(model, is_canary=True, on_end=self._end)
        if served.version is None:
            raise NothingServes(f"nothing answers to {model!r} yet: what was applied to it did not come up; see `loraloop serve status`")
        live = self._loader.find(served.version.name)
        if live is None or live.state not in ANSWERING:
            raise NothingServes(f"{model!r} is {served.version.name}, which {describe(live)}; it is tried again")
        return live.open_ticket(model, on_end=self._end)

    def list_names(self) -> dict[str, str]:
        """See `routing.Routes`; only names that somebody answers to."""
        answering = {each.version.name: each.version.name for each in self._loader if each.state in ANSWERING}
        names = {BASE: self.base.name, **{alias: served.version.name for alias, served in self._aliases() if served.version}}
        return {**{alias: name for alias, name in sorted(names.items()) if name in answering}, **answering}

    def _acquire_by_name(self, model: str) -> OpenTicket:
        loaded = self._loader.find(self.base.name if model == BASE else model)
        if loaded is not None and loaded.state in ANSWERING:
            return loaded.open_ticket(model, on_end=self._end)
        if loaded is not None:
            raise NothingServes(f"{loaded.version.name} {describe(loaded)}; ask for an alias")
        known = ", ".join(repr(name) for name in self.list_names()) or "none"
        raise UnknownModel(f"there is no model {model[:100]!r}; known: {known}; another is served after `loraloop apply MODEL`")

    def _end(self, ticket: OpenTicket, failed: bool) -> None:
        trial = self._trials.get(ticket.alias)
        if trial is not None:
            trial.end_request(is_canary=ticket.is_canary, failed=failed)
        if failed:
            self._wake.set()

    def add_outcome(self, versions: frozenset[str], outcome: Outcome) -> None:
        """How an episode ended that these versions have answered in; it counts in a trial when only one side of it has."""
        score = score_of(outcome)
        for alias, trial in self._trials.items():
            served = self._table.aliases[alias]
            champion, canary = served.version, served.canary
            sides = {canary.version.name: True, champion.name: False} if champion and canary else {}
            if score is not None and len(versions) == 1 and (side := sides.get(next(iter(versions)))) is not None:
                trial.arm(is_canary=side).add_score(score)
                self._wake.set()

    # --- orders ---------------------------------------------------------------------------------------------------------------

    async def apply(self, version: Version, alias: str, *, canary: float | None = None, why: str = "") -> ApplyReport:
        """Let `version` answer to `alias`, or to a share of its conversations; the last one goes on until then, and then drains.

        Raises ServingError saying why not; then nothing has changed for any request.
        """
        if canary is not None and not 0 < canary < 1:
            raise ServingError(f"a canary's share is above 0 % and below 100 %, not {canary:.0%}; without one all conversations move")
        if alias == BASE or not re.fullmatch(ALIAS_FORM, alias):
            raise ServingError(f"{alias!r} cannot be an alias; expected 1 to 48 of a-z, 0-9 and ._-, not {BASE!r}")
        return await self._order(alias, self._apply(version, alias, canary, why))

    async def promote(self, alias: str, *, why: str = "") -> ApplyReport:
        """Let the canary of `alias` answer to all of its conversations. Raises ServingError when there is none."""
        return await self._order(alias, self._promote(alias, why))

    async def rollback(self, alias: str, to: str | None = None, *, why: str = "") -> ApplyReport:
        """End the trial of a canary; without one, or when `to` names a version or model, go back to what answered before.

        Raises ServingError when there is nothing to go back to, or it does not come up; then nothing has changed.
        """
        return await self._order(alias, self._rollback(alias, to, why))

    async def _order(self, alias: str, order: Coroutine[Any, Any, ApplyReport]) -> ApplyReport:
        """Carry out an order in its turn, and to its end also when whoever gave it is gone meanwhile."""

        async def in_turn() -> ApplyReport:
            started = time.monotonic()
            async with self._turns[alias]:
                if self._closing:
                    order.close()
                    raise ServingError("the service ends; give the order again when it is there again")
                report = await order
            return report.model_copy(update={"seconds": round(time.monotonic() - started, 3)})

        return await asyncio.shield(self._spawn(in_turn()))

    async def _apply(self, version: Version, alias: str, share: float | None, why: str, kind: str = "apply") -> ApplyReport:
        before = self._table.aliases.get(alias, Served())
        if share is not None and before.version is None:
            raise ServingError(f"nothing answers to {alias!r} that a canary could be compared with; apply it without a share")
        if share is not None and before.version == version:
            raise ServingError(f"{version.name} answers to {alias!r} already; it cannot be its own canary")
        loaded = await self._loader.bring_up(version)
        if share is not None:
            kind, after = "canary", before.model_copy(update={"canary": CanaryShare(version=version, share=share)})
        elif before.version == version and before.canary is None and before.wanted is None:
            return ApplyReport(alias=alias, kind="none", version=version.name, model_id=version.model_id, before=version.name)
        else:
            after = before.moved_to(version)
        return await self._move(alias, kind, after, loaded, why)

    async def _promote(self, alias: str, why: str) -> ApplyReport:
        served = self._get_served(alias)
        if served.canary is None:
            raise ServingError(f"{alias!r} has no canary; begin one with `loraloop apply MODEL --canary 10%`")
        return await self._apply(served.canary.version, alias, None, why, "promote")

    async def _rollback(self, alias: str, to: str | None, why: str) -> ApplyReport:
        served = self._get_served(alias)
        if served.canary is not None and to is None:
            return await self._end_trial(alias, why)
        wanted = served.find_previous(to)
        if wanted is None:
            known = ", ".join(name_both(each) for each in served.previous) or "nothing"
            what = "what answered before" if to is None else repr(to)
            raise ServingError(f"{alias!r} cannot go back to {what}; it can to: {known}")
        return await self._apply(wanted, alias, None, why, "rollback")

    async def _end_trial(self, alias: str, why: str) -> ApplyReport:
        served = self._get_served(alias)
        live = self._loader.find(served.version.name) if served.version else None
        return await self._move(alias, "canary_rolled_back", served.model_copy(update={"canary": None}), live, why)

    async def _move(self, alias: str, kind: str, after: Served, loaded: Loaded | None, why: str) -> ApplyReport:
        """Move the alias: on the disk, then here, without a wait between. On a full disk, everything is as it was."""
        before = self._table.aliases.get(alias, Served())
        table = self._table.with_alias(alias, after).model_copy(update={"problem": None})
        try:
            self._file.write(table)
        except OSError as error:
            reason = f"{alias} stays with {name_of(before)}: the disk did not take the move: {error}"
            if loaded is not None and loaded.state is VersionState.PROVEN:
                await self._loader.fail(loaded, reason)
            raise ServingError(reason) from error
        self._table = table
        self._settle()
        proof = loaded.proof if loaded is not None and loaded.version in (after.version, after.canary and after.canary.version) else None
        move = make_move(alias, kind, before, after, why, proof=dict(proof.figures) if proof else None)
        self._note("history", self._file.tell(move))
        self._note("aliases", None)
        shown = after.canary.version if kind == "canary" and after.canary else after.version
        assert shown is not None  # noqa: S101  an order moves to a version
        return ApplyReport(
            alias=alias,
            kind=kind,
            version=shown.name,
            model_id=shown.model_id,
            before=before.version.name if before.version else None,
            share=after.canary.share if kind == "canary" and after.canary else None,
            proof=proof,
        )

    def _settle(self) -> None:
        """Give every version the state that the table wants for it; nothing here waits."""
        roles = {self.base.name: VersionState.LIVE}
        for alias, served in self._aliases():
            if served.canary:
                roles[served.canary.version.name] = VersionState.CANARY
                if alias not in self._trials or self._trials[alias].of != served.canary.version.name:
                    self._trials[alias] = Trial(served.canary.version.name, self.settings.canary)
            else:
                self._trials.pop(alias, None)
            if served.version:
                roles[served.version.name] = VersionState.LIVE
        for loaded in self._loader:
            role, state = roles.get(loaded.version.name), loaded.state
            if role is None:
                self._retries.pop(loaded.version.name, None)
                if state in ANSWERING:
                    self._loader.drain(loaded)
            elif state is VersionState.DRAINING:
                self._loader.take_back(loaded, role)
            elif state is VersionState.PROVEN or (state in ANSWERING and state is not role):
                loaded.become(role)

    # --- start, watch, end ----------------------------------------------------------------------------------------------------

    async def recover(self) -> Self:
        """Bring up what the disk says, the base model first; an alias whose version does not come up answers to nobody, and is told.

        Raises ServingError when the base model does not come up, or neither file can be read.
        """
        self._table = self._file.read()
        self._note("aliases", self._table.problem)
        await self._loader.bring_up(self.base)
        self._settle()
        for alias, served in self._aliases():
            for version in served.versions:
                await self._try_again(version.name, version)
            if served.wanted is not None:
                await self._take_up(alias, served.wanted)
        return self

    async def _take_up(self, alias: str, wanted: Version) -> None:
        """Apply what was applied while no service ran; what answered before goes on when it cannot be."""
        try:
            await self._order(alias, self._apply(wanted, alias, None, "applied while no service ran"))
        except ServingError as error:
            self._note(f"wanted {alias}", f"{alias} stays with {name_of(self._table.aliases[alias])}: {error}")

    async def look(self) -> None:
        """Look at every version once: the dead are marked and started again when it is time, canaries that fail are taken back."""
        for loaded in self._loader:
            if loaded.state in ANSWERING | {VersionState.DRAINING} and loaded.endpoint is not None:
                await self._look_at(loaded)
        for alias, trial in tuple(self._trials.items()):
            reason = trial.judge()
            if reason is not None:
                self._spawn(self._take_canary_back(alias, trial.of, reason))
        for name, retry in tuple(self._retries.items()):
            version = self._find_version(name)
            if not retry.running and time.monotonic() >= retry.at and version is not None:
                retry.running = True
                self._spawn(self._try_again(name, version))

    async def watch(self) -> None:
        """`look` for ever, at once when a request failed."""
        while True:
            try:
                async with asyncio.timeout(self.settings.look_seconds):
                    await self._wake.wait()
            except TimeoutError:
                pass
            self._wake.clear()
            try:
                await self.look()
            except Exception as error:  # the watch must outlive whatever an applier raises
                logger.exception("the fleet could not be looked at")
                self._note("watch", f"{type(error).__name__}: {error}")

    async def _look_at(self, loaded: Loaded) -> None:
        assert loaded.endpoint is not None  # noqa: S101  asked before
        healthy = await self._applier.is_healthy(loaded.endpoint)
        loaded.missed_looks = 0 if healthy else loaded.missed_looks + 1
        if loaded.missed_looks < self.settings.missed_looks or loaded.state not in ANSWERING | {VersionState.DRAINING}:
            return
        state = loaded.state
        await self._loader.fail(loaded, "it died" if state is not VersionState.DRAINING else "it died while it drained")
        name = loaded.version.name
        for alias, served in self._aliases():
            if served.canary and served.canary.version.name == name:
                self._spawn(self._take_canary_back(alias, name, "it died"))
        if self._find_version(name) is not None:
            self._retries[name] = Retry(time.monotonic() + self.settings.first_wait_seconds, self.settings.first_wait_seconds)

    async def _take_canary_back(self, alias: str, name: str, reason: str) -> None:
        """End the trial of the canary of that name, if it goes on still."""
        async with self._turns[alias]:
            served = self._table.aliases[alias]
            if self._closing or served.canary is None or served.canary.version.name != name:
                return
            try:
                await self._end_trial(alias, f"taken back by itself: {reason}")
            except ServingError as error:
                self._note(f"canary {alias}", str(error))
            else:
                self._note(f"canary {alias}", f"the canary {name} of {alias} was taken back: {reason}")

    async def _try_again(self, name: str, version: Version) -> None:
        """Bring up what should answer, in the turn of its alias; when it does not come up, later again."""
        async with self._turns[name.partition("@")[0]]:
            if self._closing or self._find_version(name) is None:
                self._retries.pop(name, None)
                return
            try:
                await self._loader.bring_up(version)
            except ServingError as error:
                for alias, served in self._aliases():
                    if served.canary and served.canary.version.name == name:
                        self._spawn(self._take_canary_back(alias, name, str(error)))
                last = self._retries.get(name)
                wait = min(last.wait * 2, self.settings.last_wait_seconds) if last else self.settings.first_wait_seconds
                self._retries[name] = Retry(time.monotonic() + wait, wait)
                self._note(name, f"{error}; tried again in {wait:g} s")
            else:
                self._retries.pop(name, None)
                self._note(name, None)
                self._settle()

    async def wait_settled(self) -> None:
        """Wait until every order is carried out and nothing drains."""
        while others := self._tasks - {asyncio.current_task()}:
            await asyncio.wait(others)
        await self._loader.wait_settled()

    async def close(self) -> None:
        """Take no more requests, let those under way end within the time for draining, stop everything."""
        self._closing = True
        for task in tuple(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        await self._loader.close()

    # --- told -----------------------------------------------------------------------------------------------------------------

    def status(self) -> FleetStatus:
        """How everything stands."""
        return FleetStatus(
            applier=self._applier.name,
            base=self.base.name,
            aliases={alias: self._alias_status(alias, served) for alias, served in self._aliases()},
            versions=tuple(sorted((each.status() for each in self._loader), key=lambda each: each.since)),
            problems=tuple(self._problems.values()),
        )

    def _alias_status(self, alias: str, served: Served) -> AliasStatus:
        live = self._loader.find(served.version.name) if served.version else None
        return describe_alias(served, live, self._trials.get(alias))

    def _aliases(self) -> list[tuple[str, Served]]:
        return sorted(self._table.aliases.items())

    def _get_served(self, alias: str) -> Served:
        served = self._table.aliases.get(alias)
        if served is None:
            known = ", ".join(map(repr, sorted(self._table.aliases))) or "none; make one with `loraloop apply MODEL`"
            raise UnknownModel(f"there is no alias {alias!r}; known: {known}")
        return served

    def _find_version(self, name: str) -> Version | None:
        """The version of that name, when something should answer with it."""
        if name == self.base.name:
            return self.base
        return next((each for _, served in self._aliases() for each in served.versions if each.name == name), None)

    def _note(self, subject: str, problem: str | None) -> None:
        if problem is None:
            self._problems.pop(subject, None)
        else:
            logger.warning("%s", problem)
            self._problems[subject] = problem

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
