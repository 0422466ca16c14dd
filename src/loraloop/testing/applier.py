"""The conformance check of appliers."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from pathlib import Path

from loraloop.errors import ServingError
from loraloop.serve.applier import BASE, Applier, Endpoint, Scored, Version
from loraloop.testing.episodes import expect

PROMPTS = (tuple(range(40, 60)), (65, 66, 67), tuple(range(100, 40, -3)))
"""Token ids that every vocabulary has."""
_SAME = 5e-3
"""Log-probabilities of one version that is asked twice differ by less."""
_OTHER = 2e-2
"""The adapters that the check is given change some log-probability by more."""


async def check_applier(applier: Applier, versions: Sequence[Version], prompts: tuple[tuple[int, ...], ...] = PROMPTS) -> None:
    """Check that an applier does all that `serve.applier.Applier` promises; it is closed afterwards.

    `versions` are at least two adapters of its base model with a clear effect, on `prompts` (of token ids) too.
    """
    expect(len({version.name for version in versions}) == len(versions) >= 2, "two adapters at least, each with a name of its own")
    expect(bool(applier.name), "an applier has a name")
    expect(applier.base.name.startswith(f"{BASE}@"), f"the base model's version is called {BASE}@…, not {applier.base.name}")
    _check_checks(applier, versions)
    base = await applier.start(applier.base)
    plain = await _score(applier, base, prompts)
    await _check_refusal(applier, versions[0], base)
    endpoints = {version.name: await applier.start(version) for version in versions}
    scores = {name: await _score(applier, endpoint, prompts) for name, endpoint in endpoints.items()}
    _check_scores(plain, scores)
    again = await _score(applier, base, prompts)
    expect(measure_difference(plain, again) < _SAME, "the base model answers as before while adapters are served beside it")
    await _check_end(applier, endpoints, base)
    first = versions[0]
    second_life = await applier.start(first)
    difference = measure_difference(scores[first.name], await _score(applier, second_life, prompts))
    expect(difference < _SAME, f"{first.name} answers the same after it was stopped and started again, and not {difference:g} apart")
    await applier.close()
    for endpoint in (base, second_life):
        expect(not await applier.is_healthy(endpoint), f"{endpoint.version.name} is not healthy after close()")


def measure_difference(one: Scored, other: Scored) -> float:
    """The largest difference of a log-probability that both tell; infinite where they have no token in common."""
    differences = [
        max((abs(value - right[token]) for token, value in left.items() if token in right), default=math.inf)
        for left, right in zip(one.top, other.top, strict=True)
    ]
    return max(differences, default=math.inf)


def _check_checks(applier: Applier, versions: Sequence[Version]) -> None:
    for version in (applier.base, *versions):
        findings = applier.check(version)
        expect(findings == [], f"check({version.name}) finds nothing in a good version, and not {findings}")
    elsewhere = versions[0].model_copy(update={"base_sha256": "0" * 64})
    expect(bool(applier.check(elsewhere)), "an adapter that was trained on another base model is found")
    expect(bool(applier.check(_without_files(versions[0]))), "an adapter without files is found")


async def _check_refusal(applier: Applier, version: Version, base: Endpoint) -> None:
    """A version that cannot be served raises ServingError, and what runs is not touched."""
    was_started = False
    with contextlib.suppress(ServingError):
        await applier.start(_without_files(version))
        was_started = True
    expect(not was_started, "start() of an adapter without files raises ServingError")
    expect(await applier.is_healthy(base), "what runs is healthy after a start that was refused")


def _without_files(version: Version) -> Version:
    path = version.adapter_path or Path()
    return version.model_copy(update={"adapter_path": path / "nothing-here"})


async def _score(applier: Applier, endpoint: Endpoint, prompts: tuple[tuple[int, ...], ...]) -> Scored:
    name = endpoint.version.name
    expect(await applier.is_healthy(endpoint), f"{name} is healthy once it is started")
    expect(endpoint.url.startswith("http") and not endpoint.url.endswith("/"), f"{name} has a URL without /v1, and not {endpoint.url}")
    scored = await applier.score(endpoint, prompts)
    expect(len(scored.top) == len(prompts), f"{name}: one mapping for each of {len(prompts)} prompts, and not {len(scored.top)}")
    for top in scored.top:
        fine = len(top) >= 2 and all(math.isfinite(value) and value <= 0 for value in top.values())
        expect(fine, f"{name}: the likeliest tokens have log-probabilities, and not {top}")
    return scored


def _check_scores(plain: Scored, scores: dict[str, Scored]) -> None:
    seen = {"the base model": plain}
    for name, scored in scores.items():
        for other, before in seen.items():
            difference = measure_difference(before, scored)
            expect(difference > _OTHER, f"{name} answers otherwise than {other}, and not {difference:g} apart")
        seen[name] = scored


async def _check_end(applier: Applier, endpoints: dict[str, Endpoint], base: Endpoint) -> None:
    for name, endpoint in endpoints.items():
        expect(endpoint.version.name == name, f"the endpoint of {name} says so, and not {endpoint.version.name}")
        await applier.stop(endpoint)
        await applier.stop(endpoint)
        expect(not await applier.is_healthy(endpoint), f"{name} is not healthy once it is stopped")
        refused = True
        with contextlib.suppress(ServingError):
            await applier.score(endpoint, PROMPTS[:1])
            refused = False
        expect(refused, f"{name}: score() raises ServingError once it is stopped")
        expect(await applier.is_healthy(base), f"the base model is healthy when {name} was stopped")
