from __future__ import annotations

import pytest

from loraloop.episode import DependencyGraphRecord, Failure, Success, Unknown
from loraloop.learn.dependency_graph import DependencyGraphLearn
from loraloop.testing import make_episode


def graph(**fields) -> DependencyGraphRecord:
    return DependencyGraphRecord.model_validate(
        {
            "prompt": "Order find, read and fix.",
            "response": "First find, then read; to act: fix.",
            "available_actions": ["find", "fix", "read"],
            "discover_order": ["find", "read"],
            "not_discover_order": ["fix"],
            **fields,
        }
    )


@pytest.mark.parametrize(
    ("fields", "outcome"),
    [
        ({}, Success()),
        ({"available_actions": []}, Success()),
        ({"response": "Of fix, read, find: find comes first, then read, then fix."}, Success()),
        ({"error": "timed out"}, Failure("timed out")),
        ({"discover_order": [], "not_discover_order": []}, Failure("no action was put in order")),
        ({"not_discover_order": []}, Failure("missing: fix")),
        ({"not_discover_order": ["fix", "jump"]}, Failure("unknown: jump")),
        ({"not_discover_order": ["jump"]}, Failure("missing: fix; unknown: jump")),
        ({"not_discover_order": ["fix", "find"]}, Failure("in two places: find")),
        ({"discover_order": ["read", "find"]}, Failure("the answer does not name read, find in this order")),
        ({"response": "finder, read, fix"}, Failure("the answer does not name find, read in this order")),
        ({"response": ""}, Failure("the answer does not name find, read in this order")),
    ],
)
def test_an_answer_is_right_when_it_puts_every_action_in_one_place(fields, outcome):
    assert DependencyGraphLearn().evaluate([graph(**fields)]) == outcome


def test_each_answer_is_an_episode_and_a_right_one_is_learned():
    learn = DependencyGraphLearn()
    right, wrong = learn.build_episodes([graph(task_id="t", timestamp_ms=1), graph(not_discover_order=[], timestamp_ms=2)])
    assert (right.is_open, wrong.is_open) == (False, False)
    sample = learn.convert(right)
    assert [(message.role, message.content) for message in sample.messages] == [
        ("user", right.records[0].prompt),
        ("assistant", right.records[0].response),
    ]
    assert sample.split_key == "/t"
    assert learn.convert(wrong).reason == "outcome_failure"


def test_questions_that_are_the_same_are_on_one_side_of_the_held_out_line():
    learn = DependencyGraphLearn()
    one, other = (learn.convert(episode) for episode in learn.build_episodes([graph(timestamp_ms=1), graph(timestamp_ms=2)]))
    assert one.split_key == other.split_key == graph().prompt


def test_without_an_answer_nothing_is_known():
    assert DependencyGraphLearn().evaluate([]) == Unknown()
    assert DependencyGraphLearn().convert(make_episode()).messages == make_episode().messages
    assert DependencyGraphLearn().convert(make_episode(messages=())).reason == "no_messages"
