"""A fleet: who answers when, and that a switch drops, mixes and half-does nothing."""

from __future__ import annotations

import asyncio
import errno
import os
from pathlib import Path

import pytest
from fleets import ask, hold, open_fleet, state_of, wait_until
from http_applier import BASE_SHA256, HttpApplier, make_adapter

from loraloop.errors import NothingServes, ServingError, UnknownModel
from loraloop.serve.aliases import AliasFile, AliasTable, Served
from loraloop.serve.applier import Version


async def test_the_base_model_answers_to_its_own_name_and_never_to_another(tmp_path: Path) -> None:
    async with open_fleet(tmp_path) as (fleet, applier):
        assert await ask(fleet, applier, "base") == applier.base.name == f"base@{BASE_SHA256[:12]}"
        assert fleet.list_names() == {"base": applier.base.name, applier.base.name: applier.base.name}
        with pytest.raises(UnknownModel, match="there is no model 'agent'; known: 'base'"):
            fleet.acquire("agent", "1")


async def test_a_model_is_applied_and_another_takes_over_while_the_first_ends_what_it_began(tmp_path: Path) -> None:
    a, b = make_adapter(tmp_path / "a", 1), make_adapter(tmp_path / "b", 2)
    async with open_fleet(tmp_path / "serving") as (fleet, applier):
        report = await fleet.apply(a, "agent", why="first")
        assert (report.kind, report.before, report.version) == ("apply", None, a.name)
        assert report.proof
        assert report.proof.proven
        long = hold(fleet)
        assert long.endpoint.version == a
        report = await fleet.apply(b, "agent")
        assert (report.before, report.version) == (a.name, b.name)
        assert await ask(fleet, applier) == b.name
        assert state_of(fleet, a.name) == "draining"
        assert (await applier.call(long.endpoint, "/v1/chat/completions", {}))["model"] == a.name, "what it has begun it ends"
        with pytest.raises(NothingServes, match="is draining"):
            fleet.acquire(a.name, "1")
        assert a.name not in [name for name, _ in applier.stopped]
        long.release()
        await fleet.wait_settled()
        assert applier.stopped[-1][0] == a.name
        assert state_of(fleet, a.name) == "stopped"
        assert await ask(fleet, applier, b.name) == b.name
        moves = AliasFile(tmp_path / "serving").read_history()
        assert [(move.kind, move.before, move.after, move.why) for move in moves] == [
            ("apply", None, a.name, "first"),
            ("apply", a.name, b.name, ""),
        ]
        assert moves[0].proof == {"prompts": 2}


async def test_applying_what_answers_already_changes_nothing(tmp_path: Path) -> None:
    a = make_adapter(tmp_path / "a")
    async with open_fleet(tmp_path / "serving") as (fleet, applier):
        await fleet.apply(a, "agent")
        assert (await fleet.apply(a, "agent")).kind == "none"
        assert applier.started.count(a.name) == 1
        assert len(AliasFile(tmp_path / "serving").read_history()) == 1


async def test_a_rollback_goes_back_and_takes_back_what_still_drains(tmp_path: Path) -> None:
    a, b = make_adapter(tmp_path / "a", 1), make_adapter(tmp_path / "b", 2)
    async with open_fleet(tmp_path / "serving") as (fleet, applier):
        await fleet.apply(a, "agent")
        long = hold(fleet)
        await fleet.apply(b, "agent")
        report = await fleet.rollback("agent", why="worse")
        assert (report.kind, report.before, report.version) == ("rollback", b.name, a.name)
        assert applier.started.count(a.name) == 1, "it was still there"
        assert await ask(fleet, applier) == a.name
        long.release()
        await fleet.wait_settled()
        assert state_of(fleet, a.name) == "live"
        assert state_of(fleet, b.name) == "stopped"
        report = await fleet.rollback("agent", b.name)
        assert report.version == b.name
        assert applier.started.count(b.name) == 2
        with pytest.raises(ServingError, match=f"'agent' cannot go back to 'other'; it can to: {a.name}"):
            await fleet.rollback("agent", "other")
        with pytest.raises(UnknownModel, match="there is no alias 'agnet'; known: 'agent'"):
            await fleet.rollback("agnet")


@pytest.mark.parametrize(
    ("kind", "told"),
    [("ignored", "answers as the base model does"), ("dies", "ended with exit code 3"), ("missing", "there is no adapter in")],
)
async def test_what_does_not_come_up_or_is_not_proven_never_answers(tmp_path: Path, kind: str, told: str) -> None:
    a, bad = make_adapter(tmp_path / "a"), make_adapter(tmp_path / "bad", kind=kind)
    if kind == "missing":
        (tmp_path / "bad" / "effect").unlink()
    async with open_fleet(tmp_path / "serving") as (fleet, applier):
        await fleet.apply(a, "agent")
        before = (tmp_path / "serving" / "aliases.json").read_bytes()
        for share in (None, 0.5):
            with pytest.raises(ServingError, match=told):
                await fleet.apply(bad, "agent", canary=share)
            assert state_of(fleet, bad.name) == "failed"
            assert await ask(fleet, applier) == a.name
        assert (tmp_path / "serving" / "aliases.json").read_bytes() == before
        assert len(applier.processes) == 2, "the base model and the old version; nothing of the bad one is left"
        with pytest.raises(NothingServes, match="is failed"):
            fleet.acquire(bad.name, "1")


async def test_green_killed_before_the_alias_moves_leaves_the_old_one(tmp_path: Path) -> None:
    a, b = make_adapter(tmp_path / "a", 1), make_adapter(tmp_path / "b", 2)

    class Killed(HttpApplier):
        async def score(self, endpoint, prompts):  # type: ignore[no-untyped-def]
            scored = await super().score(endpoint, prompts)
            if endpoint.version == b:
                await self.kill(endpoint)
            return scored

    async with open_fleet(tmp_path / "serving", Killed()) as (fleet, applier):
        await fleet.apply(a, "agent")
        with pytest.raises(ServingError, match="died before anybody was sent to it"):
            await fleet.apply(b, "agent")
        assert await ask(fleet, applier) == a.name
        assert (state_of(fleet, a.name), state_of(fleet, b.name)) == ("live", "failed")


async def test_a_full_disk_at_the_move_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = make_adapter(tmp_path / "a", 1), make_adapter(tmp_path / "b", 2)
    async with open_fleet(tmp_path / "serving") as (fleet, applier):
        await fleet.apply(a, "agent")

        def full(handle: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(ServingError, match=f"agent stays with {a.name}: the disk did not take the move: .*No space"):
            await fleet.apply(b, "agent")
        monkeypatch.undo()
        assert await ask(fleet, applier) == a.name
        assert state_of(fleet, b.name) == "failed"
        assert len(applier.processes) == 2, "the base model and the old version"
        assert (await fleet.apply(b, "agent")).version == b.name


async def test_a_version_that_is_stuck_is_stopped_after_the_time_for_draining_and_what_was_cut_is_told(tmp_path: Path) -> None:
    a, b = make_adapter(tmp_path / "a", 1), make_adapter(tmp_path / "b", 2)
    async with open_fleet(tmp_path / "serving", drain_seconds=0.2) as (fleet, applier):
        await fleet.apply(a, "agent")
        stuck = [hold(fleet), hold(fleet)]
        await fleet.apply(b, "agent")
        await fleet.wait_settled()
        [status] = [each for each in fleet.status().versions if each.name == a.name]
        assert (status.state, status.cut, status.in_flight) == ("stopped", 2, 2)
        assert "2 requests were cut" in status.reason
        for ticket in stuck:
            ticket.release(failed=True)
        assert await ask(fleet, applier) == b.name


async def test_a_ticket_that_is_released_twice_counts_once_and_is_told(tmp_path: Path) -> None:
    a, b = make_adapter(tmp_path / "a", 1), make_adapter(tmp_path / "b", 2)
    async with open_fleet(tmp_path / "serving") as (fleet, _):
        await fleet.apply(a, "agent")
        first, second = hold(fleet), hold(fleet)
        first.release()
        first.release(failed=True)
        await fleet.apply(b, "agent")
        await asyncio.sleep(0.1)
        assert state_of(fleet, a.name) == "draining", "the second request is under way"
        second.release()
        await fleet.wait_settled()
        [status] = [each for each in fleet.status().versions if each.name == a.name]
        assert (status.requests, status.failures, status.in_flight, status.released_twice) == (2, 0, 0, 1)


async def test_a_live_version_that_dies_is_started_again_and_nobody_answers_meanwhile(tmp_path: Path) -> None:
    a = make_adapter(tmp_path / "a")
    async with open_fleet(tmp_path / "serving", missed_looks=1, first_wait_seconds=0.3) as (fleet, applier):
        await fleet.apply(a, "agent")
        watch = asyncio.create_task(fleet.watch())
        ticket = hold(fleet)
        await applier.kill(ticket.endpoint)
        ticket.release(failed=True)
        await wait_until(lambda: state_of(fleet, a.name) == "failed")
        with pytest.raises(NothingServes, match=rf"'agent' is {a.name}, which is failed \(it died\)"):
            fleet.acquire("agent", "1")
        assert fleet.status().aliases["agent"].answers is False
        await wait_until(lambda: state_of(fleet, a.name) == "live")
        assert await ask(fleet, applier) == a.name
        assert fleet.status().problems == ()
        watch.cancel()


async def test_blue_killed_while_it_drains_does_not_touch_the_new_one(tmp_path: Path) -> None:
    a, b = make_adapter(tmp_path / "a", 1), make_adapter(tmp_path / "b", 2)
    async with open_fleet(tmp_path / "serving", missed_looks=1) as (fleet, applier):
        await fleet.apply(a, "agent")
        ticket = hold(fleet)
        await fleet.apply(b, "agent")
        await applier.kill(ticket.endpoint)
        await fleet.look()
        assert state_of(fleet, a.name) == "failed"
        ticket.release(failed=True)
        await fleet.wait_settled()
        assert await ask(fleet, applier) == b.name
        assert applier.started.count(a.name) == 1, "nobody wants it any more"
        assert (await fleet.rollback("agent")).version == a.name


async def test_what_the_disk_says_comes_up_after_a_restart_and_what_does_not_is_named(tmp_path: Path) -> None:
    a, b = make_adapter(tmp_path / "a", 1), make_adapter(tmp_path / "b", 2, alias="other")
    async with open_fleet(tmp_path / "serving") as (fleet, applier):
        await fleet.apply(a, "agent")
        await fleet.apply(b, "other")
        ended = applier
    assert not ended.processes
    (tmp_path / "b" / "effect").unlink()
    async with open_fleet(tmp_path / "serving") as (fleet, applier):
        assert await ask(fleet, applier) == a.name
        with pytest.raises(NothingServes, match=rf"'other' is {b.name}, which is failed \(there is no adapter in b\)"):
            fleet.acquire("other", "1")
        assert "other" not in fleet.list_names()
        assert any(b.name in problem for problem in fleet.status().problems)
        assert (tmp_path / "b" / "effect").write_text("good 2")
        watch = asyncio.create_task(fleet.watch())
        await wait_until(lambda: state_of(fleet, b.name) == "live")
        watch.cancel()


async def test_what_was_applied_while_no_service_ran_is_taken_up_at_its_start(tmp_path: Path) -> None:
    a, bad = make_adapter(tmp_path / "a", 1), make_adapter(tmp_path / "bad", kind="ignored")
    file = AliasFile(tmp_path / "serving")
    file.write(AliasTable(aliases={"agent": Served(wanted=a)}))
    async with open_fleet(tmp_path / "serving") as (fleet, applier):
        assert await ask(fleet, applier) == a.name
    assert file.read().aliases["agent"].wanted is None
    file.write(file.read().with_alias("agent", file.read().aliases["agent"].model_copy(update={"wanted": bad})))
    async with open_fleet(tmp_path / "serving") as (fleet, applier):
        assert await ask(fleet, applier) == a.name, "what is not proven does not take the place of what is"
        assert any("answers as the base model does" in problem for problem in fleet.status().problems)
        assert fleet.status().aliases["agent"].wanted == bad.name


async def test_orders_to_one_alias_are_carried_out_one_at_a_time(tmp_path: Path) -> None:
    versions = [make_adapter(tmp_path / str(number), number + 1) for number in range(4)]
    async with open_fleet(tmp_path / "serving") as (fleet, applier):
        await asyncio.gather(*(fleet.apply(version, "agent") for version in versions))
        await fleet.wait_settled()
        moves = AliasFile(tmp_path / "serving").read_history()
        assert [move.before for move in moves[1:]] == [move.after for move in moves[:-1]]
        assert {move.after for move in moves} == {version.name for version in versions}
        assert await ask(fleet, applier) == moves[-1].after
        assert len(applier.processes) == 2


async def test_an_order_is_carried_out_though_whoever_gave_it_is_gone(tmp_path: Path) -> None:
    a = make_adapter(tmp_path / "a")
    async with open_fleet(tmp_path / "serving") as (fleet, applier):
        order = asyncio.create_task(fleet.apply(a, "agent"))
        await asyncio.sleep(0.02)
        order.cancel()
        await fleet.wait_settled()
        assert await ask(fleet, applier) == a.name


@pytest.mark.parametrize("alias", ["base", "", "Agent", "a/b", "..", "-x", "a" * 49])
async def test_what_cannot_be_an_alias_is_refused(tmp_path: Path, alias: str) -> None:
    async with open_fleet(tmp_path / "serving") as (fleet, _):
        with pytest.raises(ServingError, match="cannot be an alias"):
            await fleet.apply(make_adapter(tmp_path / "a"), alias)


async def test_the_base_model_can_answer_to_an_alias_when_it_is_applied(tmp_path: Path) -> None:
    a = make_adapter(tmp_path / "a")
    async with open_fleet(tmp_path / "serving") as (fleet, applier):
        await fleet.apply(applier.base, "agent")
        assert await ask(fleet, applier) == applier.base.name
        await fleet.apply(a, "agent")
        assert await ask(fleet, applier) == a.name
        assert await ask(fleet, applier, "base") == applier.base.name, "it is not drained: it has its own name"
        assert (await fleet.rollback("agent")).version == applier.base.name


async def test_clients_without_pause_see_no_failure_over_many_switches(tmp_path: Path) -> None:
    a, b = make_adapter(tmp_path / "a", 1), make_adapter(tmp_path / "b", 2)
    async with open_fleet(tmp_path / "serving") as (fleet, applier):
        await fleet.apply(a, "agent")
        answers: list[str] = []
        over = False

        async def client(number: int) -> None:
            while not over:
                answers.append(await ask(fleet, applier, conversation=str(number), seconds=0.01))

        clients = [asyncio.create_task(client(number)) for number in range(4)]
        for _ in range(6):
            await fleet.apply(b, "agent")
            await fleet.rollback("agent")
        over = True
        await asyncio.gather(*clients)
        await fleet.wait_settled()
        assert set(answers) == {a.name, b.name}
        assert all(each.cut == each.failures == each.in_flight == 0 for each in fleet.status().versions)


async def test_the_end_of_the_service_waits_for_what_is_under_way(tmp_path: Path) -> None:
    a = make_adapter(tmp_path / "a")
    async with open_fleet(tmp_path / "serving") as (fleet, applier):
        await fleet.apply(a, "agent")
        ticket = hold(fleet)
        end = asyncio.create_task(fleet.close())
        await asyncio.sleep(0.1)
        assert not end.done()
        with pytest.raises(NothingServes, match="the service ends"):
            fleet.acquire("agent", "1")
        assert (await applier.call(ticket.endpoint, "/v1/chat/completions", {}))["model"] == a.name
        ticket.release()
        await end
        with pytest.raises(ServingError, match="the service ends"):
            await fleet.apply(a, "agent")


async def test_a_version_that_cannot_be_stopped_costs_no_other(tmp_path: Path) -> None:
    a, b = make_adapter(tmp_path / "a", 1), make_adapter(tmp_path / "b", 2)
    applier = HttpApplier()
    async with open_fleet(tmp_path / "serving", applier) as (fleet, _):
        await fleet.apply(a, "agent")
        endpoint = hold(fleet)
        endpoint.release()
        process = applier.processes[endpoint.endpoint.url]
        applier.broken.add(a.name)
        await fleet.apply(b, "agent")
        await fleet.wait_settled()
        [status] = [each for each in fleet.status().versions if each.name == a.name]
        assert (status.state, status.reason) == ("stopped", "it cannot be stopped: it cannot be stopped")
        assert await ask(fleet, applier) == b.name
        process.kill()
        await process.wait()


def test_a_version_names_its_bytes() -> None:
    with pytest.raises(ValueError):
        Version(name="agent")
