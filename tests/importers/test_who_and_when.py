from __future__ import annotations

import json
from collections import Counter

import pytest

from loraloop.episode import Failure, Success
from loraloop.importers.ingest import HEAD_BYTES, detect, ingest_file, iter_files
from loraloop.importers.who_and_when import WhoAndWhenImporter


def read(path):
    return list(WhoAndWhenImporter().read(path))


def test_a_run_is_told_from_the_side_of_the_agent_that_erred(fixtures):
    (episode,) = read(fixtures / "who_and_when" / "generated.json")
    assert [(message.role, message.author, message.is_agent) for message in episode.messages] == [
        ("system", None, False),
        ("user", "Cook_Expert", False),
        ("assistant", None, True),
        ("user", "Computer_terminal", False),
        ("user", "Cook_Expert", False),
        ("assistant", None, True),
    ]
    assert episode.messages[0].content == "You measure time."
    assert episode.outcome == Failure("It did not look it up.")
    assert (episode.task_id, episode.group_id, episode.metadata.scenario) == ("q-1", "q-1", "who-and-when")
    assert episode.metadata.tags == {"format": "who-and-when", "level": "Easy", "mistake_agent": "Timer_Expert", "mistake_step": "1"}


def test_what_the_harness_prints_at_the_end_is_nobodys_turn(fixtures):
    (episode,) = read(fixtures / "who_and_when" / "hand_crafted.json")
    assert [message.is_agent for message in episode.messages] == [False, True, True, False, False]
    assert [message.name for message in episode.messages] == [
        "human",
        "Orchestrator (thought)",
        "Orchestrator (-> WebSurfer)",
        "WebSurfer",
        "Orchestrator (termination condition)",
    ]


@pytest.mark.parametrize(("verdict", "outcome"), [(True, Success(1.0)), (None, Failure("It asked badly."))])
def test_the_verdict_decides(fixtures, write, verdict, outcome):
    run = json.loads((fixtures / "who_and_when" / "hand_crafted.json").read_text())
    assert read(write(json.dumps({**run, "is_corrected": verdict})))[0].outcome == outcome


def test_the_first_turn_is_the_task_even_when_the_agent_is_said_to_speak_it(fixtures, write):
    run = json.loads((fixtures / "who_and_when" / "generated.json").read_text())
    (episode,) = read(write(json.dumps({**run, "mistake_agent": "Cook_Expert"})))
    assert [message.is_agent for message in episode.messages] == [False, False, False, False, True, False]


def test_a_long_history_does_not_hide_the_format(fixtures, write):
    run = json.loads((fixtures / "who_and_when" / "hand_crafted.json").read_text())
    run["history"][3]["content"] = "x" * HEAD_BYTES
    assert detect(write(json.dumps(run), "a.json")).name == "who-and-when"


def test_real_runs_all_failed_and_each_has_an_agent_to_learn_from(shared_data, store):
    reports = [ingest_file(store, path) for path in iter_files([shared_data / "who_and_when"])]
    assert [(report.format, report.read, report.stored) for report in reports] == [("who-and-when", 1, 1)] * 30
    episodes = store.query()
    assert Counter(episode.outcome.kind for episode in episodes) == {"failure": 30}
    assert len({episode.task_id for episode in episodes}) == 30
    assert all(episode.outcome.reason and any(message.is_agent for message in episode.messages) for episode in episodes)


def test_real_words_are_kept_and_the_answer_is_not(shared_data):
    for path in iter_files([shared_data / "who_and_when"]):
        run = json.loads(path.read_text())
        (episode,) = read(path)
        turns = episode.messages[1:] if episode.messages[0].role == "system" else episode.messages
        assert [message.content for message in turns] == [message["content"] for message in run["history"]]
        assert sum(len(message.model_dump()) > 0 for message in turns if message.is_agent) >= 1
        assert "ground_truth" not in episode.model_dump_json()
