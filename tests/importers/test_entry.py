from __future__ import annotations

import pickle

import pytest

from loraloop.chat.refused_entry import EntryRefused, find_finite, shorten, show
from loraloop.episode import Episode, EpisodeMetadata, Failure, FunctionCall, Message, Success, ToolCall, Unknown
from loraloop.importers.entry import require_clean, with_content_id


def make_episode(**fields):
    fields.setdefault("messages", (Message(role="assistant", content="b"),))
    return Episode(**fields)


def test_the_time_of_import_is_not_in_the_id():
    early, late = (make_episode(metadata=EpisodeMetadata(created_at=ms)) for ms in (1, 2))
    assert early.id != late.id
    assert with_content_id(early).id == with_content_id(late).id


def test_outcomes_with_default_values_have_different_ids():
    outcomes = [Success(), Failure(), Unknown(), Success(0.5), Failure("x")]
    assert len({with_content_id(make_episode(outcome=outcome)).id for outcome in outcomes}) == len(outcomes)


def test_the_id_of_a_known_episode_never_changes():
    """A change here makes every store take in everything a second time: the hash must stay what it was."""
    call = ToolCall(id="c", function=FunctionCall(name="f", arguments="{}"))
    episode = make_episode(
        task_id="t",
        messages=(Message(role="user", content="ü"), Message(role="assistant", tool_calls=(call,), weight=0)),
        tools=({"type": "function", "function": {"name": "f"}},),
        outcome=Success(1.0),
        metadata=EpisodeMetadata(scenario="s", tags={"format": "x"}),
    )
    assert with_content_id(episode).id == "ep-0000000000000-f3e7d34f71c63109553556991950dcb1"


def test_refusals_can_be_pickled():
    error = pickle.loads(pickle.dumps(EntryRefused("r", "f", "e", "d")))
    assert (error.reason, str(error)) == ("r", "found f; expected e; do this: d")


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({"a": ["x\0"]}, "bad_encoding"),
        ({"\0": 1}, "bad_encoding"),
        ({"a": {"b": "\udc80"}}, "bad_encoding"),
        ([float("nan")], "bad_shape"),
        ([[[float("-inf")]]], "bad_shape"),
    ],
)
def test_what_no_database_can_hold_is_refused(value, reason):
    with pytest.raises(EntryRefused) as refused:
        require_clean(value)
    assert refused.value.reason == reason
    assert str(refused.value).isprintable()


def test_ordinary_values_are_clean():
    require_clean({"a": ["\\u0000", "🙂", 1, 0.5, None, True, {"\n": "\t"}]})


def test_numbers_are_finite_numbers_only():
    assert [find_finite(value) for value in (1, 0.5, True, "1", None, float("nan"), 10**400)] == [1.0, 0.5, *[None] * 5]


def test_what_is_shown_is_short_and_printable():
    assert show({"b": 1, "a": "\x1b[31m\ud800"}) == r'{"a":"\u001b[31m\ud800","b":1}'
    assert show(float("nan")) == "nan"
    assert shorten("a\nb" * 100) == (r"a\nb" * 40) + "…"
