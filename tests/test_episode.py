import pytest
from pydantic import ValidationError

from loraloop import Episode, EpisodeFilter, EpisodeId, EpisodeMetadata, Failure, Outcome, Success, Timeout, Unknown
from loraloop.episode import Message


def test_outcomes_know_their_kind_and_nothing_else() -> None:
    for outcome, flag in (
        (Success(0.5), "is_success"),
        (Failure("no"), "is_failure"),
        (Timeout(), "is_timeout"),
        (Unknown(), "is_unknown"),
    ):
        assert isinstance(outcome, Outcome)
        flags = {name: getattr(outcome, name) for name in ("is_success", "is_failure", "is_timeout", "is_unknown")}
        assert [name for name, value in flags.items() if value] == [flag]


@pytest.mark.parametrize("outcome", [Success(), Success(0.25), Failure("because"), Timeout(0.5), Timeout(), Unknown()])
def test_an_outcome_survives_json(outcome: Success | Failure | Timeout | Unknown) -> None:
    episode = Episode(outcome=outcome)
    assert Episode.model_validate_json(episode.model_dump_json()).outcome == outcome


@pytest.mark.parametrize("score", [float("nan"), float("inf"), "much"])
def test_a_score_is_a_finite_number(score: object) -> None:
    with pytest.raises(ValidationError):
        Success(score)  # type: ignore[arg-type]


def test_ids_of_other_systems_are_kept_when_they_are_safe() -> None:
    for text in ("e1", "run-7", "trial.3:a@b+c", "ep-1700000000000-0000abcd"):
        assert str(Episode(id=EpisodeId.parse(text)).id) == text
    assert EpisodeId.parse("run-7").timestamp_ms == 0
    assert EpisodeId.parse("ep-1700000000000-0000abcd").timestamp_ms == 1_700_000_000_000


@pytest.mark.parametrize("text", ["", ".", "..", "../x", "a/b", "a b", "-x", "a\0", "é", "x" * 129])
def test_an_id_that_is_no_file_name_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no episode id"):
        EpisodeId.parse(text)


def test_only_the_agents_own_turns_are_its_own() -> None:
    assert Message(role="assistant").is_agent
    assert Message(role="assistant", author="agent").is_agent
    assert not Message(role="assistant", is_demo=True).is_agent
    assert not Message(role="assistant", author="simulated_user").is_agent
    assert not Message(role="user").is_agent


def test_a_filter_takes_an_outcome_by_name_or_type() -> None:
    assert EpisodeFilter(outcome="timeout").matches(Episode(outcome=Timeout()))
    assert EpisodeFilter(outcome=Success).outcome == "success"  # type: ignore[arg-type]
    with pytest.raises(ValidationError):
        EpisodeFilter(outcome="won")  # type: ignore[arg-type]


def test_metadata_measures_durations_and_takes_the_longer_names() -> None:
    metadata = EpisodeMetadata(scenario_name="airline", strategy_name="react", started_at=1_000, ended_at=4_500)  # type: ignore[call-arg]
    assert (metadata.scenario, metadata.strategy, metadata.duration_ms) == ("airline", "react", 3_500)
    assert EpisodeMetadata().duration_ms is None


def test_unknown_keys_are_refused_not_dropped() -> None:
    with pytest.raises(ValidationError):
        Episode(outcom=Success())  # type: ignore[call-arg]
