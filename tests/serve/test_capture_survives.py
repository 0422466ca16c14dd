"""What was acknowledged as recorded is there, whatever the router dies of."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import httpx2
from upstream import Upstream, serving

from loraloop.serve.capture import Recorder
from loraloop.serve.journal import Journal
from loraloop.store.sql import SqlEpisodeStore

ROUNDS = 20


def test_nothing_that_was_acknowledged_is_lost_by_kill_9(tmp_path):
    acknowledged: list[tuple[str, str]] = []
    outcomes: list[str] = []
    draw = random.Random(7)
    with serving(Upstream().app) as upstream:
        command = [sys.executable, str(Path(__file__).with_name("killed_router.py")), str(tmp_path), upstream]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as routers:
            for number in range(ROUNDS):
                print(number, file=routers.stdin, flush=True)
                pid, url = routers.stdout.readline().split()
                killer = Killer(int(pid), draw.randint(1, 12), acknowledged, outcomes)
                clients = [threading.Thread(target=_talk, args=(url, f"{number}-{each}", killer)) for each in range(3)]
                for client in clients:
                    client.start()
                for client in clients:
                    client.join()
                assert killer.n_left <= 0
    with SqlEpisodeStore(tmp_path / "episodes.db") as store:
        last = Recorder(tmp_path / "capture", store)
        last.start()
        last.close()
        episodes = store.query()
        found = {(record.served.id, str(episode.id).partition(".")[0]) for episode in episodes for record in episode.records}
        receipts = [record.served.id for episode in episodes for record in episode.records]
        assert len(acknowledged) > ROUNDS, "the test has seen something"
        assert set(acknowledged) <= found
        assert len(receipts) == len(set(receipts)), "no call is there twice"
        assert len(outcomes) > ROUNDS / 2
        lost = [episode for episode in outcomes if not any(label.source == "router" for label in store.get_labels(episode))]
        assert lost == []
        assert list(Journal(tmp_path / "capture").segments()) == []


@dataclass
class Killer:
    """Notes what a router has acknowledged, and kills it at the very moment of the last that it may."""

    pid: int
    n_left: int
    acknowledged: list[tuple[str, str]]
    outcomes: list[str]

    def note(self, noted: list, acknowledged: object) -> None:
        noted.append(acknowledged)
        self.n_left -= 1
        if self.n_left == 0:
            os.kill(self.pid, signal.SIGKILL)


def _talk(url: str, name: str, killer: Killer) -> None:
    """Call until the router dies; note what it has acknowledged, and nothing else."""
    number = 0
    try:
        with httpx2.Client(base_url=url, timeout=10) as client:
            while True:
                number += 1
                episode = f"ep{name}-{number}"
                body = {"model": "agent", "messages": [{"role": "user", "content": episode}]}
                answer = client.post("/v1/chat/completions", json=body, headers={"x-loraloop-episode": episode})
                record = answer.headers["x-loraloop-record"]
                while client.get(f"/records/{record}").status_code == 202:
                    pass
                killer.note(killer.acknowledged, (record, episode))
                if client.post(f"/episodes/{episode}/outcome", json={"kind": "success"}).status_code == 200:
                    killer.note(killer.outcomes, episode)
    except httpx2.HTTPError:
        return


def test_a_line_that_its_writer_never_finished_is_put_aside(tmp_path):
    journal = Journal(tmp_path)
    journal.open()
    journal.append([{"a": 1}])
    journal.seal()
    (segment,) = journal.segments()
    with segment.open("ab") as file:
        file.write(b'{"b":')
    again = Journal(tmp_path)
    again.open()
    assert segment.read_text() == '{"a":1}\n'
    assert segment.with_suffix(".torn").read_text() == '{"b":'
    again.append([{"c": 3}])
    assert [path.name for path in again.sealed()] == [segment.name]


def test_a_segment_is_removed_only_after_its_content_is_stored(tmp_path):
    with SqlEpisodeStore(tmp_path / "episodes.db") as store:
        journal = Journal(tmp_path / "capture")
        journal.open()
        journal.append([{"kind": "never heard of"}, {"kind": "call", "id": "x"}])
        journal.seal()
        recorder = Recorder(tmp_path / "capture", store)
        recorder.start()
        recorder.close()
        assert recorder.status()["unreadable"] == 2
        assert journal.segments() == []
        assert len((tmp_path / "capture" / "unreadable.jsonl").read_text().splitlines()) == 2
