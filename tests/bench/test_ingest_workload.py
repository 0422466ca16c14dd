"""The benchmark of the store does what it says: the episodes that it asks for, all different, all stored, all stages measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from bench.ingest import to_table
from bench.ingest_workload import N_MESSAGES, N_POLICIES, N_TOOLS, write_episodes
from loraloop.episode import Episode
from loraloop.importers.openai_chat import OpenAIChatImporter

ROOT = Path(__file__).parents[2]


def test_the_workload_is_valid_shares_prompts_and_repeats_no_message(tmp_path: Path) -> None:
    path, nowhere = tmp_path / "episodes.jsonl", tmp_path / "none.json"
    n_bytes = write_episodes(path, 40, data=nowhere)
    assert n_bytes == path.stat().st_size
    episodes = list(OpenAIChatImporter().read(path))
    assert [type(entry) for entry in episodes] == [Episode] * 40
    assert {len(episode.messages) for episode in episodes} == {N_MESSAGES}
    assert all(len(episode.tools) == N_TOOLS for episode in episodes)
    assert len({episode.messages[0].content for episode in episodes}) <= N_POLICIES
    others = [message.model_dump_json() for episode in episodes for message in episode.messages[1:]]
    assert len(set(others)) > 0.95 * len(others)
    again = tmp_path / "again.jsonl"
    write_episodes(again, 40, data=nowhere)
    assert again.read_bytes() == path.read_bytes(), "the same bytes each time"


def test_all_stages_run_and_make_a_table(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "bench.ingest",
        "--episodes",
        "300",
        "--data",
        str(tmp_path / "none.json"),
        "--directory",
        str(tmp_path / "b"),
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    results = json.loads(done.stdout)
    assert results["store"]["stored"] == results["episodes"] == 300
    assert 0 < results["store"]["bytes_on_disk"] < 0.6 * results["raw_bytes"]
    assert results["reads"]["get_ms"][0] > 0
    table = to_table(results)
    assert "| bytes on disk, of raw | 0." in table
    assert "300 episodes" in table
