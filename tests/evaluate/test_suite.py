"""Both sides on the same tasks: paired, the same whenever it is measured, and gone on with after a death at any instant."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from counting import CountingSuite
from sides import make_project

from loraloop.errors import EvaluationError, LoraTrainerError, SettingsError
from loraloop.evaluate.environment import Task
from loraloop.evaluate.rollout import Played, Sampling
from loraloop.evaluate.speaker import InProcessSpeaker, OnEnded
from loraloop.evaluate.suite import Plays, Progress, Schedule, play_both
from loraloop.evaluation import EvaluationOptions
from loraloop.project import Project

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
SUITE = "counting:CountingSuite"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory):
    project, base, models = make_project(tmp_path_factory.mktemp("evaluated"), 2)
    yield project, base, models
    project.store.close()


def copy_of(made, directory: Path) -> Project:
    """The same models in a project of their own, so that what one test measured is not read by another."""
    project = Project(directory / "project")
    (directory / "project" / "models").rmdir() if (directory / "project" / "models").exists() else None
    (directory / "project" / "models").symlink_to(made[0].directory.resolve() / "models")
    return project


def test_an_evaluation_is_paired_and_kept(made, tmp_path: Path) -> None:
    with copy_of(made, tmp_path) as project:
        heard: list[Progress] = []
        options = EvaluationOptions(environment=SUITE, options={"n": "20"}, temperature=1.0, on_progress=heard.append)
        found = project.evaluate(made[2][0].id, "base", options)
        primary = found.primary
        assert primary.n == 20
        assert (found.plan.candidate.name, found.plan.opponent.name) == (made[2][0].id, "base")
        assert found.plan.candidate.adapter_sha256 == made[2][0].adapter_sha256
        assert found.plan.opponent.base_sha256 == found.plan.candidate.base_sha256
        assert primary.wins + primary.losses + primary.ties == 20
        assert primary.wins or primary.losses, "two models that say other things"
        assert primary.difference == pytest.approx(primary.candidate - primary.opponent)
        assert primary.lower is not None
        assert primary.upper is not None
        assert primary.lower <= primary.difference <= primary.upper
        assert {one.task for one in primary.regressions} == {one.task for one in primary.scores if one.candidate < one.opponent}
        assert found.notes == ("nothing left out",)
        assert (heard[-1].done, heard[-1].total, len(heard[-1].partial)) == (40, 40, 20)
        assert (heard[0].done, heard[0].what) == (0, "plays (16 under way, at token 0)"), "a sign of life before the first play is over"
        assert next(one for one in heard if one.done).eta_s is not None

        plays = list(Plays(tmp_path / "project" / "evaluations" / found.id))
        assert len(plays) == 40
        by_hand = CountingSuite().open()
        for play in plays:
            by_hand.reset(Task(id=play.task, data={"by": 2 + int(play.task.removeprefix("task-")) % 3}))
            said = [message["content"] for message in play.messages if message["role"] == "assistant"]
            told = [by_hand.step(text) for text in said]
            assert (told[-1][1], sum(int(answer.split()[1]) % 2 == 0 for answer, _, _ in told)) == (play.reward, play.n_executed)
        assert [one.name for one in found.comparisons] == ["counting: success", "counting: actions executed"]

        again = project.evaluate(made[2][0].id, "base", EvaluationOptions(environment=SUITE, options={"n": "20"}, temperature=1.0))
        assert again == found
        assert project.list_evaluations() == [found]


def test_measured_afresh_it_is_the_same_under_another_id(made, tmp_path: Path) -> None:
    with copy_of(made, tmp_path) as project:
        options = {"environment": SUITE, "seeds": 3, "options": {"n": "6"}}
        first = project.evaluate(made[2][0].id, "base", EvaluationOptions(**options))
        second = project.evaluate(made[2][0].id, "base", EvaluationOptions(**options, again=True))
        assert first.id != second.id
        assert first.comparisons == second.comparisons
        assert first.plan.temperature == 0.7
        folder = tmp_path / "project" / "evaluations" / first.id
        said = {(play.task, play.seed): str(play.messages) for play in Plays(folder) if play.side == "opponent"}
        assert len({said["task-0", seed] for seed in range(3)}) > 1, "seeds draw something else"


def test_a_side_is_not_played_again_in_another_evaluation_unless_something_is_different(made, tmp_path: Path) -> None:
    """Counted by the plays that progress tells as made: what is reused is there before the first sign of life."""

    def n_there(model: str, **options: object) -> int:
        heard: list[Progress] = []
        asked = EvaluationOptions(**{"environment": SUITE, "options": {"n": "6"}, "on_progress": heard.append, **options})  # type: ignore[arg-type]
        found = project.evaluate(model, "base", asked)
        ids.append(found.id)
        return heard[0].done

    first, second = (model.id for model in made[2])
    ids: list[str] = []
    with copy_of(made, tmp_path) as project:
        folder = project.directory / "evaluations"
        assert n_there(first) == 0
        assert n_there(second) == 6, "the base model's plays"
        kept = [{(play.task, play.side): play for play in Plays(folder / one)} for one in ids]
        for task in (f"task-{number}" for number in range(6)):
            assert kept[0][task, "opponent"] == kept[1][task, "opponent"]
            assert kept[0][task, "candidate"].key != kept[1][task, "candidate"].key
        assert n_there(second, again=True) == 0
        assert n_there(second, dtype="float32", limit=5) == 0, "weights of another type may say something else"
        assert n_there(second, limit=3) == 6, "all that is wanted is there"
        assert n_there(second, temperature=1.0) == 0
        assert n_there(second, options={"n": "7"}) == 0
        changed = tmp_path / "tasks.json"
        changed.write_text(json.dumps([{"id": "task-0", "by": 5}]))
        assert n_there(second, tasks=changed) == 0, "another task of the same name"


def test_live_is_the_promoted_model_or_the_base(made, tmp_path: Path) -> None:
    project, _, models = made
    candidate, other = models
    options = EvaluationOptions(environment=SUITE, options={"n": "3"})
    found = project.evaluate(candidate.id, "live", options)
    assert found.plan.opponent.name == "base"
    assert "no model is promoted" in found.notes[0]
    project.move_model(other.id, "promoted", "for this test")
    assert project.evaluate(candidate.id, "live", options).plan.opponent.name == other.id


def test_what_cannot_be_measured_is_refused_before_anything_is_loaded(made, tmp_path: Path) -> None:
    with copy_of(made, tmp_path) as project:
        name = made[2][0].id
        with pytest.raises(SettingsError, match="both sides are"):
            project.evaluate(name, name, EvaluationOptions(environment=SUITE))
        with pytest.raises(SettingsError, match="would all play the same"):
            project.evaluate(name, "base", EvaluationOptions(environment=SUITE, seeds=2, temperature=0))
        with pytest.raises(SettingsError, match=r"no environment named 'textcarft'.*Did you mean textcraft"):
            project.evaluate(name, "base", EvaluationOptions(environment="textcarft"))
        with pytest.raises(SettingsError, match="no option 'm'"):
            project.evaluate(name, "base", EvaluationOptions(environment=SUITE, options={"m": "1"}))
        with pytest.raises(LoraTrainerError, match="no model 'lora-x'"):
            project.evaluate("lora-x", "base", EvaluationOptions(environment=SUITE))
        tasks = tmp_path / "tasks.json"
        tasks.write_text('[{"id": "a", "by": 2}, {"id": "a", "by": 3}]')
        with pytest.raises(EvaluationError, match="task 2: the id 'a' is there twice"):
            project.evaluate(name, "base", EvaluationOptions(environment=SUITE, tasks=tasks))
        assert not (tmp_path / "project" / "evaluations").exists()


def test_a_limit_takes_some_of_what_a_greater_one_takes(made, tmp_path: Path) -> None:
    with copy_of(made, tmp_path) as project:
        few, more = (
            {one.task for one in project.evaluate(made[2][0].id, "base", EvaluationOptions(environment=SUITE, limit=n)).primary.scores}
            for n in (3, 6)
        )
        assert len(few) == 3
        assert few < more


def test_plays_end_early_when_the_sequential_test_decides(made, tmp_path: Path) -> None:
    """One side wins always where the other cannot: a task that only the candidate's words fulfil, in a suite made for it."""
    with copy_of(made, tmp_path) as project:
        said = {side: words_of(made, side) for side in ("candidate", "opponent")}
        assert said["candidate"] != said["opponent"], "greedy, the two models answer the same question differently"
        tasks = tmp_path / "tasks.json"
        tasks.write_text(json.dumps([{"id": f"task-{number}", "by": 1} for number in range(200)]))
        options = EvaluationOptions(environment="counting:OnlyCandidate", tasks=tasks, options={"n": said["candidate"]}, early=True)
        found = project.evaluate(made[2][0].id, "base", options)
        assert found.stopped_early
        assert found.verdict is not None
        assert found.verdict.decision == "promote"
        assert found.verdict.n == found.primary.n < 200
        assert found.primary.n % 16 == 0
        all_of_them = project.evaluate(made[2][0].id, "base", EvaluationOptions(environment=SUITE, options={"n": "20"}, early=True))
        assert (all_of_them.stopped_early, all_of_them.verdict.decision, all_of_them.primary.n) == (False, "hold", 20)


def words_of(made, side: str) -> str:
    """What a side says first, greedily, of any task of the suite."""
    from loraloop.base_model import resolve_base
    from loraloop.episode import Message
    from loraloop.evaluate.rollout import Opening, load_player, speak

    player = load_player(resolve_base(str(made[1])), str(made[2][0].adapter_path) if side == "candidate" else None)
    messages = [Message(role="system", content="count"), Message(role="user", content="say")]
    return speak(player, [Opening(messages)], [6], keep_special=False)[0].encode().hex() or "-"


class Died(Exception):
    pass


class Dies:
    """Plays as another does, and breaks off behind a number of plays."""

    def __init__(self, inner: InProcessSpeaker, left: int) -> None:
        self.inner, self.left = inner, left

    def play(self, suite, tasks: Sequence[Task], sampling: Sampling, on_ended: OnEnded) -> None:
        def told(place: int, played: Played[Task]) -> None:
            if self.left == 0:
                raise Died
            self.left -= 1
            on_ended(place, played)

        self.inner.play(suite, tasks, sampling, told)


@pytest.mark.parametrize("left", [0, 1, 7, 17])
def test_broken_off_anywhere_it_goes_on_to_the_same_plays(made, tmp_path: Path, left: int) -> None:
    from loraloop.base_model import resolve_base
    from loraloop.evaluate.rollout import load_player

    base, model = resolve_base(str(made[1])), made[2][0]
    speakers = {"candidate": InProcessSpeaker(load_player(base, str(model.adapter_path))), "opponent": InProcessSpeaker(load_player(base))}
    schedule = Schedule(CountingSuite(options={"n": "9"}), CountingSuite(options={"n": "9"}).list_tasks(), temperature=1.0, block=4)

    def run(folder: Path, dying: int | None) -> list[str]:
        folder.mkdir(exist_ok=True)
        made_of = {name: (lambda one=one: one if dying is None else Dies(one, dying)) for name, one in speakers.items()}
        play_both(schedule, made_of, Plays(folder))
        return sorted(play.model_dump_json() for play in Plays(folder))

    whole = run(tmp_path / "whole", None)
    with pytest.raises(Died):
        run(tmp_path / "cut", left % 9)
    assert run(tmp_path / "cut", None) == whole


def test_killed_at_random_instants_it_ends_with_the_same_evaluation(made, tmp_path: Path) -> None:
    options = {"n": "40"}
    with copy_of(made, tmp_path) as project:
        evaluated = project.evaluate(made[2][0].id, "base", EvaluationOptions(environment=SUITE, options=options, temperature=1.0))
    (tmp_path / "killed").mkdir()
    with copy_of(made, tmp_path / "killed"):
        pass
    argv = [sys.executable, "-m", "loraloop", "evaluate", made[2][0].id, "--against", "base", "--environment", SUITE, "--option", "n=40"]
    argv += ["--temperature", "1.0"]
    argv += ["--project", str(tmp_path / "killed" / "project"), "--json"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "")}
    environment = {name: value for name, value in environment.items() if value}
    plays = tmp_path / "killed" / "project" / "evaluations" / evaluated.id / "plays.jsonl"
    chance, kept = random.Random(5), []
    for _ in range(2):
        before = plays.stat().st_size if plays.exists() else 0
        with subprocess.Popen(argv, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            while process.poll() is None and not (plays.exists() and plays.stat().st_size > before):
                time.sleep(0.005)
            time.sleep(chance.random() * 0.05)
            process.send_signal(signal.SIGKILL)
        kept.append(len(Plays(plays.parent)))
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert 0 < kept[0] < 80, kept
    assert json.loads(done.stdout) == json.loads(evaluated.model_dump_json())
    assert sorted(kept) == kept
