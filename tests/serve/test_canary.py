"""Canaries: who gets one, and when it is taken back."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest
from fleets import ask, open_fleet, state_of, wait_until
from http_applier import make_adapter

from loraloop.episode import Failure, Success, Timeout, Unknown
from loraloop.errors import ServingError
from loraloop.serve.aliases import AliasFile
from loraloop.serve.canary import CanaryBounds, Trial, is_in_canary, score_of


def test_a_share_of_the_conversations_is_chosen_for_good_and_kept_when_it_grows() -> None:
    names = [f"conversation {number}" for number in range(4000)]
    chosen = {share: {name for name in names if is_in_canary("agent", name, share)} for share in (0.1, 0.5)}
    assert 300 < len(chosen[0.1]) < 500
    assert 1850 < len(chosen[0.5]) < 2150
    assert chosen[0.1] < chosen[0.5]
    assert chosen[0.1] == {name for name in names if is_in_canary("agent", name, 0.1)}
    assert chosen[0.1] != {name for name in names if is_in_canary("other", name, 0.1)}


def run_trial(champion_errors: float, canary_errors: float, n: int, seed: int) -> str | None:
    draw, trial = random.Random(seed), Trial("agent@1", CanaryBounds())
    for _ in range(n):
        trial.end_request(is_canary=False, failed=draw.random() < champion_errors)
        trial.end_request(is_canary=True, failed=draw.random() < canary_errors)
        if reason := trial.judge():
            return reason
    return None


def test_a_canary_that_fails_more_is_taken_back_and_a_sound_one_is_not() -> None:
    assert sum(run_trial(0.01, 0.5, 100, seed) is not None for seed in range(50)) == 50
    false_alarms = sum(run_trial(0.05, 0.05, 640, seed) is not None for seed in range(200))
    assert false_alarms <= 8, "p <= 0.01 at each of six looks"
    assert "requests failed, of the champion's 0 of 20" in (run_trial(0, 1, 20, 0) or "")
    assert run_trial(0, 1, 19, 0) is None, "not before the first look"


def test_a_canary_with_lower_scores_is_taken_back_and_one_with_equal_or_better_is_not() -> None:
    for champion, canary, bad in [(0.8, 0.2, True), (0.5, 0.5, False), (0.2, 0.8, False), (1.0, 0.0, True), (1.0, 1.0, False)]:
        draw, trial = random.Random(1), Trial("agent@1", CanaryBounds())
        for _ in range(40):
            trial.champion.add_score(float(draw.random() < champion))
            trial.canary.add_score(float(draw.random() < canary))
        assert (trial.judge() is not None) == bad, (champion, canary)


def test_what_an_outcome_counts() -> None:
    outcomes = [Success(0.7), Failure("no"), Timeout(0.4), Timeout(), Unknown()]
    assert [score_of(outcome) for outcome in outcomes] == [0.7, 0.0, 0.4, None, None]


async def test_a_canary_answers_to_its_share_and_is_promoted_or_rolled_back(tmp_path: Path) -> None:
    a, b = make_adapter(tmp_path / "a", 1), make_adapter(tmp_path / "b", 2)
    async with open_fleet(tmp_path / "serving") as (fleet, applier):
        with pytest.raises(ServingError, match="nothing answers to 'agent' that a canary could be compared with"):
            await fleet.apply(b, "agent", canary=0.3)
        await fleet.apply(a, "agent")
        for share in (0.0, 1.0, -0.1):
            with pytest.raises(ServingError, match="a canary's share"):
                await fleet.apply(b, "agent", canary=share)
        with pytest.raises(ServingError, match="its own canary"):
            await fleet.apply(a, "agent", canary=0.3)
        with pytest.raises(ServingError, match="has no canary"):
            await fleet.promote("agent")
        report = await fleet.apply(b, "agent", canary=0.3)
        assert (report.kind, report.version, report.before, report.share) == ("canary", b.name, a.name, 0.3)
        expected = {str(number): b.name if is_in_canary("agent", str(number), 0.3) else a.name for number in range(30)}
        for _ in range(2):
            assert {name: await ask(fleet, applier, conversation=name) for name in expected} == expected
        status = fleet.status().aliases["agent"]
        assert status.canary_arm
        assert status.champion_arm
        assert status.canary_arm.requests == 2 * list(expected.values()).count(b.name) > 0
        assert status.champion_arm.requests + status.canary_arm.requests == 60
        assert (await fleet.rollback("agent")).kind == "canary_rolled_back"
        assert {await ask(fleet, applier, conversation=name) for name in expected} == {a.name}
        await fleet.wait_settled()
        await fleet.apply(b, "agent", canary=0.3)
        assert (await fleet.promote("agent")).version == b.name
        assert {await ask(fleet, applier, conversation=name) for name in expected} == {b.name}
        assert applier.started.count(b.name) == 2
        kinds = [move.kind for move in AliasFile(tmp_path / "serving").read_history()]
        assert kinds == ["apply", "canary", "canary_rolled_back", "canary", "promote"]


async def test_a_canary_that_dies_or_scores_less_is_taken_back_by_itself(tmp_path: Path) -> None:
    a, b = make_adapter(tmp_path / "a", 1), make_adapter(tmp_path / "b", 2)
    mine = next(str(number) for number in range(100) if is_in_canary("agent", str(number), 0.5))
    async with open_fleet(tmp_path / "serving", missed_looks=1) as (fleet, applier):
        watch = asyncio.create_task(fleet.watch())
        await fleet.apply(a, "agent")
        await fleet.apply(b, "agent", canary=0.5)
        ticket = fleet.acquire("agent", mine)
        assert ticket.is_canary
        await applier.kill(ticket.endpoint)
        ticket.release(failed=True)
        await wait_until(lambda: fleet.status().aliases["agent"].canary is None)
        assert await ask(fleet, applier, conversation=mine) == a.name
        assert any("was taken back: it died" in problem for problem in fleet.status().problems)
        await fleet.apply(b, "agent", canary=0.5)
        for _ in range(30):
            fleet.add_outcome(frozenset({a.name}), Success(1.0))
            fleet.add_outcome(frozenset({a.name, b.name}), Failure("of both: counts for neither"))
            fleet.add_outcome(frozenset({b.name}), Failure("worse"))
        await wait_until(lambda: fleet.status().aliases["agent"].canary is None)
        await fleet.wait_settled()
        assert state_of(fleet, b.name) == "stopped"
        last = AliasFile(tmp_path / "serving").read_history()[-1]
        assert last.kind == "canary_rolled_back"
        assert "its mean score is 0.000 over 30 episodes, the champion's 1.000 over 30" in last.why
        watch.cancel()


async def test_a_canary_is_still_one_after_a_restart(tmp_path: Path) -> None:
    a, b = make_adapter(tmp_path / "a", 1), make_adapter(tmp_path / "b", 2)
    mine = next(str(number) for number in range(100) if is_in_canary("agent", str(number), 0.5))
    async with open_fleet(tmp_path / "serving") as (fleet, applier):
        await fleet.apply(a, "agent")
        await fleet.apply(b, "agent", canary=0.5)
    async with open_fleet(tmp_path / "serving") as (fleet, applier):
        assert await ask(fleet, applier, conversation=mine) == b.name
    (tmp_path / "b" / "effect").unlink()
    async with open_fleet(tmp_path / "serving") as (fleet, applier):
        await fleet.wait_settled()
        assert await ask(fleet, applier, conversation=mine) == a.name
        assert fleet.status().aliases["agent"].canary is None
