"""One cycle of the loop: over a real project, and where its stages fail, end early or have been done before."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from daemon.loops import Ledgered, add_chats, make_folder, stages_of
from models_made import make_model, save_model

from loraloop.daemon.cycle import CycleReport, cycle_once
from loraloop.daemon.project_stages import ProjectStages
from loraloop.daemon.state import FAILED, TRANSITIONS, LoopNote, LoopState, Stage, iter_moves, pause, read_state, request, resume
from loraloop.errors import LoraTrainerError
from loraloop.lora.model import LoraModelId
from loraloop.project import Project
from loraloop.settings import ScenarioSettings
from loraloop.store.ledger import Event, NoteChanged
from loraloop.trigger import Count, Schedule, Trigger

ROUND = ("collect -> build", "build -> train", "train -> evaluate", "evaluate -> apply", "apply -> observe", "observe -> collect")


class Rehearsed(ProjectStages):
    """The project's own stages, but for a training that gives its model at once."""

    trained: list[str]
    fail_training: int = 0

    def train(self, scenario: ScenarioSettings, dataset: str, run: str) -> str:
        if self.fail_training:
            self.fail_training -= 1
            raise LoraTrainerError(f"no room for a training of {scenario.alias} just now")
        self.trained.append(dataset)
        registry = self._project.registry
        if not any(model.id == run for model in registry.list_models()):
            save_model(registry.directory, id=LoraModelId(run), dataset=dataset)
        return run


@dataclass
class Loop:
    """One loop with a clock that the test moves."""

    project: Project
    scenario: ScenarioSettings
    stages: Rehearsed
    end: Ledgered
    now_ms: int = 1_000_000

    def cycle(self, after_seconds: float = 0.0) -> CycleReport:
        self.now_ms += round(after_seconds * 1000)
        return cycle_once(self.project.store.ledger, self.scenario, self.stages, now=lambda: self.now_ms)

    @property
    def state(self) -> LoopState:
        return read_state(self.project.store.ledger, self.scenario.alias)

    def events(self, kind: str) -> list[Event]:
        return list(self.project.store.ledger.iter_events(kind=kind, subject=self.scenario.alias))


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[Loop]:
    """A loop with four new chats, whose training is rehearsed."""
    folder = make_folder(tmp_path / "project", tmp_path / "model")
    add_chats(folder, 0, 4)
    end = Ledgered(tmp_path / "effects.jsonl")
    with Project(folder) as project:
        scenario, real = stages_of(project, end)
        stages = Rehearsed(project, real._settings, proof=end, serving=end)
        stages.trained = []
        yield Loop(project, scenario, stages, end)


def test_a_whole_round_over_a_real_project_with_a_real_training(tmp_path: Path, tiny_model: Callable[[str], Path]) -> None:
    folder = make_folder(tmp_path / "project", tiny_model("llama"))
    end = Ledgered(tmp_path / "effects.jsonl")
    with Project(folder) as project:
        scenario, stages = stages_of(project, end)
        assert cycle_once(project.store.ledger, scenario, stages).waits_for.startswith("0 new episodes of 4")
        add_chats(folder, 0, 4)
        report = cycle_once(project.store.ledger, scenario, stages)
        assert report.failure is None
        assert report.moves == ROUND
        assert report.collected.stored == 4
        [model] = project.list_models()
        [run] = project.runs.list_runs()
        state = read_state(project.store.ledger, "agent")
        assert (state.run, state.model, state.live) == (run.id, model.id, model.id)
        assert model.dataset == state.dataset == project.get_dataset().id
        assert model.sample_count == 4
        assert end.lines("apply") == [model.id]
        assert cycle_once(project.store.ledger, scenario, stages).moves == ()


def test_nothing_follows_before_enough_is_new(loop: Loop) -> None:
    assert loop.cycle().moves == ROUND
    add_chats(loop.project.directory, 4, 7)
    assert loop.cycle().waits_for == "3 new episodes of 4"
    add_chats(loop.project.directory, 7, 8)
    assert loop.cycle().moves == ROUND
    assert len(set(loop.stages.trained)) == 2
    assert loop.state.round == 2


def test_what_is_written_as_a_whole_is_taken_in_when_it_has_changed(loop: Loop) -> None:
    (loop.project.directory / "chats" / "whole.json").write_text('{"messages": [')
    first = loop.cycle()
    assert first.collected.refused == {"bad_json": 1}
    assert "whole.json" in first.collected.details[0]
    assert loop.cycle().collected.refused == {}, "it is told once"
    chat = '[{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]'
    (loop.project.directory / "chats" / "whole.json").write_text(chat)
    assert loop.cycle().collected.stored == 1
    assert loop.cycle().collected.stored == 0


def test_a_dataset_is_never_trained_twice(loop: Loop) -> None:
    loop.cycle()
    note = LoopNote(loop.project.store.ledger, "agent")
    note.move(note.state.model_copy(update={"n_episodes": 0}))  # so that the trigger fires for the same episodes
    report = loop.cycle()
    assert report.moves == ("collect -> build", "build -> collect")
    assert len(loop.stages.trained) == 1
    [*_, last] = iter_moves(loop.project.store.ledger, "agent")
    assert last.data["why"] == f"{loop.state.live} was trained on this very dataset"


@pytest.mark.parametrize("decision", ["hold", "reject"])
def test_only_what_is_promoted_is_applied(loop: Loop, decision: str) -> None:
    loop.end.decisions = [decision]
    assert loop.cycle().moves == (*ROUND[:3], "evaluate -> collect")
    assert loop.end.lines("apply") == []
    assert loop.state.live is None
    assert loop.state.verdict is not None
    assert (loop.state.verdict.decision, loop.state.verdict.reason) == (decision, f"{decision} against base")


def test_without_a_proof_every_candidate_is_held(loop: Loop) -> None:
    loop.stages = Rehearsed(loop.project, loop.stages._settings)
    loop.stages.trained = []
    assert loop.cycle().moves[-1] == "evaluate -> collect"
    assert loop.state.verdict is not None
    assert "nothing set by which" in loop.state.verdict.reason


def test_a_model_that_does_worse_where_it_is_used_is_rolled_back(loop: Loop) -> None:
    loop.cycle()
    first = loop.state.live
    add_chats(loop.project.directory, 4, 8)
    loop.end.is_worse = True
    assert loop.cycle().moves == (*ROUND[:5], "observe -> roll_back", "roll_back -> collect")
    assert loop.end.lines("roll_back") == [first]
    assert loop.state.live == first


def test_a_model_is_observed_for_so_long_while_new_episodes_come_in(loop: Loop) -> None:
    loop.scenario = loop.scenario.model_copy(update={"observe_seconds": 60.0})
    assert loop.cycle().stage is Stage.OBSERVE
    add_chats(loop.project.directory, 4, 8)
    observed = loop.cycle(after_seconds=59)
    assert (observed.stage, observed.collected.stored) == (Stage.OBSERVE, 4)
    assert observed.next_look_at == loop.now_ms + 1000
    assert loop.cycle(after_seconds=1).moves == ("observe -> collect",)


@pytest.mark.parametrize("stage", ["evaluate", "apply", "observe"])
def test_a_stage_that_fails_is_counted_and_tried_again_later(loop: Loop, stage: str) -> None:
    loop.end.fail = [stage, stage]
    failed = loop.cycle()
    assert failed.failure == f"{stage} cannot be done just now"
    assert loop.state.attempts == 1
    assert loop.cycle().waits_for == f"{stage} failed 1 times and is tried again later"
    assert loop.cycle(after_seconds=0.05).failure
    assert loop.cycle(after_seconds=0.05).failure is None, "not yet: the pause has doubled"
    assert loop.state.attempts == 2
    assert loop.cycle(after_seconds=0.05).moves[-1] == ROUND[-1]
    assert (loop.state.attempts, loop.state.failure) == (0, None)
    assert "OSError" in str(loop.events(FAILED)[0].data["traceback"])
    assert len(loop.stages.trained) == 1


def test_a_round_that_fails_too_often_is_given_up_and_its_dataset_gone_on_with(loop: Loop) -> None:
    loop.stages.fail_training = 5
    for _ in range(5):
        loop.cycle(after_seconds=10)
    assert loop.state.stage is Stage.COLLECT
    assert loop.events(FAILED)[-1].data["given_up"]
    assert loop.state.failure is not None, "status tells it until the next round"
    run = loop.state.run
    assert loop.cycle(after_seconds=60).moves == ROUND, "its episodes are new still"
    assert loop.state.live == run, "the same run of the same dataset"


def test_a_rollback_is_never_given_up(loop: Loop) -> None:
    loop.end.is_worse = True
    loop.end.fail = ["roll_back"] * 8
    for _ in range(9):
        loop.cycle(after_seconds=10)
    assert loop.end.lines("roll_back") == ["None"]
    assert loop.state.live is None


def test_a_clock_that_was_set_back_does_not_stop_a_loop(loop: Loop) -> None:
    loop.end.fail = ["apply"]
    assert loop.cycle().failure
    assert loop.cycle(after_seconds=-100_000).moves[-1] == ROUND[-1]


def test_a_training_that_ended_before_its_first_step_is_begun_under_another_id(loop: Loop) -> None:
    loop.stages.fail_training = 1
    loop.cycle()
    run = loop.state.run
    assert run is not None
    (loop.project.runs.directory / run).mkdir(parents=True)  # its data alone was written when it was killed
    assert loop.cycle(after_seconds=10).moves == ("train -> train", *ROUND[2:])
    assert loop.state.live != run


def test_a_paused_loop_does_nothing_until_it_is_resumed(loop: Loop) -> None:
    ledger = loop.project.store.ledger
    pause(ledger, "agent")
    pause(ledger)
    assert loop.cycle().waits_for == "it is paused"
    assert loop.project.store.count() == 0
    resume(ledger, "agent")
    assert loop.cycle().waits_for == "it is paused", "as every loop is"
    pause(ledger, "agent")
    resume(ledger)
    assert loop.cycle().moves == ROUND


def test_of_two_that_move_one_loop_the_second_is_told(loop: Loop) -> None:
    ledger = loop.project.store.ledger
    one, other = LoopNote(ledger, "agent"), LoopNote(ledger, "agent")
    one.move(one.state.to(Stage.BUILD))
    with pytest.raises(NoteChanged):
        other.move(other.state.to(Stage.BUILD))
    assert len(list(iter_moves(ledger, "agent"))) == 1


class Killed(BaseException):
    """Stands for kill -9: nothing of the loop may catch it."""


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("stage", ["collect", "look", "build", "is_spent", "train", "evaluate", "apply", "observe", "roll_back"])
def test_a_loop_that_is_killed_round_a_stage_comes_to_the_same_end(
    loop: Loop, monkeypatch: pytest.MonkeyPatch, stage: str, when: str
) -> None:
    """The one instant that random kills seldom hit: what a stage does is done, and the move is not written down."""
    loop.end.is_worse = stage == "roll_back"
    whole = getattr(loop.stages, stage)

    def die(*arguments: Any) -> None:
        if when == "after":
            whole(*arguments)
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(loop.stages, stage, die)
        with pytest.raises(Killed):
            loop.cycle()
    assert loop.events(FAILED) == []
    report = loop.cycle()
    assert report.stage is Stage.COLLECT
    assert loop.state.round == 1
    assert len(set(loop.stages.trained)) == len(loop.project.list_models()) == 1
    assert loop.project.store.count() == 4
    assert set(loop.end.lines("apply")) == {loop.state.model}
    assert loop.state.live == (None if stage == "roll_back" else loop.state.model)
    assert loop.cycle().moves == ()


def test_a_move_that_the_table_lacks_is_refused() -> None:
    for stage in Stage:
        for following in Stage:
            if following not in TRANSITIONS[stage]:
                with pytest.raises(ValueError, match=f"{stage} is not followed by {following}"):
                    LoopState(stage=stage).to(following)


def test_what_has_no_verdict_is_never_applied(loop: Loop) -> None:
    model = make_model(loop.project.directory / "models")
    note = LoopNote(loop.project.store.ledger, "agent")
    note.move(note.state.model_copy(update={"stage": Stage.APPLY, "model": str(model.id)}))
    assert "has no verdict that promotes it" in str(loop.cycle().failure)
    assert loop.end.lines("apply") == []


# --- triggers ---------------------------------------------------------------------------------------------------------------


def test_a_quiet_hour_is_kept_and_the_round_begins_behind_it(loop: Loop) -> None:
    quiet = Trigger(when=Count(episodes=4), quiet_hours=("00:00", "06:00"))
    loop.scenario = loop.scenario.model_copy(update={"trigger": quiet})
    loop.now_ms = 3 * 3_600_000  # 03:00 UTC
    waiting = loop.cycle()
    assert waiting.waits_for == "quiet hours until 06:00"
    assert waiting.next_look_at == 6 * 3_600_000
    assert loop.cycle(after_seconds=3 * 3600).moves == ROUND


def test_a_schedule_counts_from_the_first_look_and_fires_once(loop: Loop) -> None:
    loop.scenario = loop.scenario.model_copy(update={"trigger": Trigger(when=Schedule(at="12:00"))})
    loop.now_ms = 11 * 3_600_000
    assert loop.cycle().moves == ()
    assert loop.cycle(after_seconds=3600).moves == ROUND
    add_chats(loop.project.directory, 4, 8)
    assert loop.cycle(after_seconds=3600).moves == ()
    assert loop.cycle(after_seconds=24 * 3600).moves == ROUND


def test_a_round_that_was_given_up_holds_the_trigger_back(loop: Loop) -> None:
    loop.scenario = loop.scenario.model_copy(update={"max_attempts": 1})
    loop.stages.fail_training = 1
    assert loop.cycle().failure
    assert "after 1 failures in a row" in loop.cycle(after_seconds=30).waits_for
    assert loop.cycle(after_seconds=30).moves == ROUND


def test_who_asks_by_hand_gets_one_round_whatever_the_trigger_waits_for(loop: Loop) -> None:
    loop.scenario = loop.scenario.model_copy(update={"trigger": Trigger(when=Count(episodes=1000))})
    assert loop.cycle().moves == ()
    request(loop.project.store.ledger, "agent")
    assert loop.cycle().moves == ROUND
    assert loop.cycle().moves == (), "it was one request"
    request(loop.project.store.ledger)
    assert loop.cycle().moves == ("collect -> build", "build -> collect"), "there is nothing new to train on"
