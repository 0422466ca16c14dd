"""The conformance check of suites and their environments."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from loraloop.evaluate.environment import Environment, Task, TaskSuite, hash_tasks
from loraloop.testing.episodes import expect

Told = list[tuple[str, float, bool]]


def check_environment(make: Callable[[], TaskSuite], actions: Sequence[str], n_tasks: int = 3) -> None:
    """Check that a suite does all that `evaluate.environment.TaskSuite` promises.

    `make` gives a new suite each time; `actions` are some that its environments understand and some that they do not.
    """
    suite = make()
    expect(bool(suite.name) and "\n" not in suite.description, "a suite has a name and a description of one line")
    tasks = list(suite.list_tasks())
    expect(bool(tasks), "a suite has tasks")
    expect(len({task.id for task in tasks}) == len(tasks), "the ids of the tasks are unique")
    expect(hash_tasks(tasks) == hash_tasks(list(suite.list_tasks())), "list_tasks() gives the same tasks in the same order")
    expect(hash_tasks(tasks) == hash_tasks(list(make().list_tasks())), "another suite of the kind has the same tasks in the same order")
    expect(isinstance(suite.to_action("a thought\nact"), str), "to_action() gives text")
    expect(isinstance(suite.to_action(""), str), "to_action() of an empty turn gives text")
    limits = suite.limits
    expect(min(limits.max_turns, limits.max_turn_tokens, limits.max_tokens) > 0, "the limits let a play begin")
    for task in tasks[:n_tasks]:
        first = _play(suite.open(), task, actions)
        expect(first == _play(make().open(), task, actions), f"task {task.id}: the same actions get the same answers")
        used = suite.open()
        _play(used, tasks[-1], actions)
        expect(first == _play(used, task, actions), f"task {task.id}: a play leaves nothing behind for the next in the same environment")
        one, other = suite.open(), suite.open()
        one.reset(task)
        _play(other, tasks[-1], actions)
        expect(first[1:] == _act(one, actions), f"task {task.id}: a play in one environment changes nothing in another")


def _play(environment: Environment[Task], task: Task, actions: Sequence[str]) -> Told:
    observation = environment.reset(task)
    expect(isinstance(observation, str) and bool(observation), f"task {task.id}: reset() gives text, found {observation!r}")
    return [(observation, 0.0, False), *_act(environment, actions)]


def _act(environment: Environment[Task], actions: Sequence[str]) -> Told:
    """What comes of the actions, up to the end of the play."""
    told: Told = []
    for action in actions:
        observation, reward, done = environment.step(action)
        expect(isinstance(observation, str), f"step({action!r}) gives text, found {observation!r}")
        expect(isinstance(reward, float) and isinstance(done, bool), f"step({action!r}) gives a float and a bool: {reward!r}, {done!r}")
        told.append((observation, reward, done))
        if done:
            break
    return told
