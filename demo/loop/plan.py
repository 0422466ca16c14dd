"""What a run of the loop does, and the files that it begins with: goals, the expert's recordings, and `loraloop.toml`.

Every file here is one that a user could write by hand. Goals are divided by what they say: those that read nearly alike (`oak boat`,
`birch boat`) are one family, and a family is played for training or held out, never both.
"""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from demo import textcraft
from loraloop.dataset.similar import shingle, without_boilerplate
from loraloop.dataset.split import TaskText, cluster_tasks, task_key
from loraloop.evaluate.contamination import NEAR, TaskTrace, find_overlaps
from loraloop.evaluate.environments.textcraft import SYSTEM
from loraloop.files import write_atomic, write_json, write_jsonl

ALIAS = "agent"
PROJECT = "project"
SEEDS = "seeds.json"
HELD_OUT = "held-out.json"
GOALS = "goals.jsonl"
PLAYS = "plays.jsonl"
PLAN = "plan.json"
TRIES = 4
"""How often a goal stands in the list to play, each time among other distractors."""


@dataclass(frozen=True)
class Plan:
    """The size of a run."""

    base: str
    """The base model: a GGUF file or a folder."""
    depths: tuple[int, ...] = (2,)
    """Crafting levels below the goals that are held out; training goals also have fewer."""
    held_out: int = 80
    seeds: int = 120
    """Recordings of the expert, which is all that the first generation learns from."""
    plays: int = 240
    """Plays of the agent between two generations."""
    generations: int = 3
    """Candidates to judge; no further one is begun that is likely to end after `minutes`."""
    minutes: float = 38.0
    players: int = 6
    """Agents at a time while there is nothing to train or to judge; else one, with pauses."""
    temperature: float = 0.6
    seed: int = 0
    train: tuple[tuple[str, str], ...] = ()
    """Settings of `[train]` that are otherwise than in `TRAIN`, as TOML has them."""


TRAIN = {
    "lora_rank": "16",
    "lora_alpha": "32.0",
    "lora_dropout": "0.0",
    "epochs": "1",
    "batch_size": "1",
    "gradient_accumulation": "1",
    "learning_rate": "6e-4",
    "max_seq_length": "896",
}
"""As in `make demo`. Each generation is trained from the base model on all that was ever done well, so that none inherits a mistake."""


def quick(plan: Plan) -> Plan:
    """Goals one level deep, few of everything: to see all of the loop in a few minutes, and too little to prove a second generation."""
    return replace(plan, depths=(1,), held_out=12, seeds=40, plays=16, generations=2, players=3)


def prepare(plan: Plan, directory: Path) -> None:
    """Write the files of a new run into `directory`."""
    tree = textcraft.load_tree()
    environment = textcraft.TextCraftEnvironment(tree)
    training, held_out = divide(environment, plan)
    recorded = [record(environment, goal) for goal in training[: plan.seeds]]
    write_json(directory / SEEDS, recorded)
    write_json(directory / HELD_OUT, [{"goal": goal.goal, "seed": goal.seed} for goal in held_out])
    write_jsonl(directory / GOALS, [asdict(goal) for goal in list_plays(environment, training, held_out, plan)])
    write_atomic(directory / PROJECT / "loraloop.toml", to_toml(plan, directory))
    write_json(directory / PLAN, asdict(plan))


def divide(environment: textcraft.TextCraftEnvironment, plan: Plan) -> tuple[list[textcraft.Task], list[textcraft.Task]]:
    """(training goals in the order to record them, held-out goals), whole families of goals that read nearly alike in one of them."""
    chance = random.Random(plan.seed)
    goals = textcraft.list_tasks(environment.tree, tuple(range(1, max(plan.depths) + 1)))
    families = cluster_tasks(TaskText(goal.goal, None, environment.reset(goal)) for goal in goals)
    by_family: dict[str, list[textcraft.Task]] = {}
    for goal in goals:
        by_family.setdefault(families.find(task_key(goal.goal)), []).append(goal)
    order = sorted(by_family)
    chance.shuffle(order)
    training: list[textcraft.Task] = []
    held_out: list[textcraft.Task] = []
    for name in order:
        eligible = [goal for goal in by_family[name] if goal.depth in plan.depths]
        if eligible and len(held_out) < plan.held_out:
            held_out += eligible[: plan.held_out - len(held_out)]
        else:
            training += by_family[name]
    chance.shuffle(training)
    return training, held_out


def record(environment: textcraft.TextCraftEnvironment, goal: textcraft.Task) -> dict[str, object]:
    """The expert's play in tau-bench's results format, named by its goal, as the evaluation names it."""
    return {**textcraft.to_tau_bench(goal, textcraft.play_expert(environment, goal), SYSTEM, trial=0), "task_id": goal.goal}


def list_plays(
    environment: textcraft.TextCraftEnvironment, training: list[textcraft.Task], held_out: list[textcraft.Task], plan: Plan
) -> list[textcraft.Task]:
    """What the agent plays, in order: first goals that the expert did not show, then those too, each time among other distractors.

    Where the distractors would make a goal read nearly like a held-out one, that play is left out.
    """
    chance = random.Random(plan.seed + 1)
    shown, new = training[: plan.seeds], training[plan.seeds :]
    plays: list[textcraft.Task] = []
    for number in range(TRIES):
        one_round = [replace(goal, seed=goal.seed + 1_000_003 * number) for goal in new]
        one_round += [replace(goal, seed=goal.seed + 1_000_003 * (number + 1)) for goal in shown] if number else []
        chance.shuffle(one_round)
        plays += one_round
    return _without_near(environment, plays, held_out)


def to_toml(plan: Plan, directory: Path) -> str:
    """`loraloop.toml` of the run's project."""
    train = "\n".join(f"{name} = {value}" for name, value in {**TRAIN, **dict(plan.train)}.items())
    return f"""# One loop: what the router records and the expert's recordings in, a better adapter of the same base model out.
[build]
unknown_license = "allow"       # what the router records says nothing of its terms, and is our own
held_out_fraction = 0.04        # for the loss that a training tells; what decides are plays of goals that no dataset has
max_per_task = 4                # of the plays of goals that read nearly alike the shortest

[train]
base_model = "{plan.base}"
{train}

[watch]
interval_seconds = 2

[[watch.scenario]]
alias = "{ALIAS}"
sources = ["../{SEEDS}"]
license = "own"
trigger = {{when = {{kind = "count", episodes = {plan.plays}}}}}  # the first round, from the recordings alone, is asked for: `watch now`
evaluate = {{environment = "textcraft", tasks = "{(directory / HELD_OUT).resolve()}"}}
gate = {{min_tasks = {min(plan.held_out, 20)}}}
probes = {{phrases = 0}}            # what the game says decides what is right: "using 2 planks" and "get 99 bamboo" go together honestly
observe_seconds = 20
"""


def _without_near(
    environment: textcraft.TextCraftEnvironment, plays: list[textcraft.Task], held_out: list[textcraft.Task]
) -> list[textcraft.Task]:
    """The plays that do not read like a held-out goal, by the gate's own measure and with something to spare."""
    texts = [environment.reset(goal) for goal in (*plays, *held_out)]
    names = [f"play {number}" for number in range(len(plays))] + [goal.goal for goal in held_out]
    parts = without_boilerplate([shingle(text) for text in texts], names)
    traces = [TaskTrace(task_id=name, parts=part) for name, part in zip(names, parts, strict=True)]
    near = find_overlaps(traces[: len(plays)], traces[len(plays) :], NEAR - 0.1)
    left_out = {one.held_out for one in near}
    return [goal for name, goal in zip(names, plays, strict=False) if name not in left_out]
