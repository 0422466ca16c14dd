"""The loop beside a real service that clients never stop asking: switched when a candidate is proven, and back when it does worse there."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
from daemon.loops import ANSWERING, add_chats, make_folder, teach_well
from prober import Prober
from services import run, serving

from loraloop.daemon.cycle import CycleReport
from loraloop.lora.states import ModelState
from loraloop.project import Project
from loraloop.serve.orders import ServiceStatus

PROMPTS = [{"messages": [{"role": "user", "content": f"the number {number}"}], "max_tokens": 4} for number in range(50, 54)]
N_EPISODES = 20
"""As many as the first look wants."""


def play(address: dict[str, Any], name: str, outcome: dict[str, Any]) -> set[str]:
    """Episodes of a client that says how each ended; the versions that answered."""
    versions = set()
    with httpx2.Client(base_url=address["url"], headers={"Authorization": f"Bearer {address['token']}"}, timeout=60) as client:
        for number in range(N_EPISODES):
            asked = {**PROMPTS[number % 4], "model": "agent", "messages": [{"role": "user", "content": f"{name} {number}"}]}
            answer = client.post(f"/e/{name}-{number}/v1/chat/completions", json=asked)
            assert answer.status_code == 200, answer.text
            versions.add(answer.headers["X-Loraloop-Version"])
            assert client.post(f"/episodes/{name}-{number}/outcome", json=outcome).status_code == 200
    return versions


def cycle(project: Project, until: str) -> CycleReport:
    """One cycle that must make this move; what the router recorded is in the store a moment after it was said."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        [report] = project.watch(once=True)
        assert report.failure is None
        if until in report.moves:
            return report
        time.sleep(0.25)
    raise AssertionError(f"never {until}; {report}")


def live(project: Project) -> str | None:
    status = project.serving_status()
    assert isinstance(status, ServiceStatus)
    return status.fleet.aliases["agent"].model_id


def test_a_served_alias_is_switched_and_taken_back_without_a_failed_request(tmp_path: Path, tiny_model: Callable[[str], Path]) -> None:
    base = tiny_model("llama")
    folder = make_folder(tmp_path / "project", base, at_least=24)
    teach_well(folder, ANSWERING, observe_seconds=3600, interval_seconds=0.2)
    with serving(folder, base) as (address, _):
        assert run("apply", "base", "--override", "the beginning", project=folder).returncode == 0
        with Prober(f"{address['url']}/v1", address["token"], "agent", PROMPTS, n_clients=1) as prober:
            prober.wait_for(10)
            [before] = play(address, "before", {"kind": "success", "score": 1.0})
            add_chats(folder, 0, 24, answer="ok")
            with Project(folder) as project:
                cycle(project, "apply -> observe")
                [model] = project.list_models()
                assert live(project) == model.id
                [after] = play(address, "after", {"kind": "failure", "reason": "no"})
                assert after == f"agent@{str(model.adapter_sha256)[:12]}" != before
                cycle(project, "roll_back -> collect")
                assert live(project) is None
                assert project.get_model(model.id).state is ModelState.RETIRED
            assert play(address, "again", {"kind": "success"}) == {before}
            prober.wait_for(10)
        assert [answer for answer in prober.answers if not answer.is_good] == []
        assert {answer.version for answer in prober.answers} == {before, after}
