"""Plays that share a cache say what each would say alone, computed without any cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny

from loraloop.base_model import load_tokenizer, resolve_base
from loraloop.chat.rows import build_units
from loraloop.chat.template import ChatTemplate
from loraloop.episode import Message
from loraloop.errors import EvaluationError
from loraloop.evaluate.environment import PlayLimits, last_line
from loraloop.evaluate.rollout import Player, load_player, play, stop_token_ids
from loraloop.train import loop
from loraloop.train.dense import DenseEngine
from loraloop.train.objectives import Likelihood
from loraloop.training_data import TrainingData

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")


class Echo:
    """Answers with the length of what was said; over after as many turns as the task says."""

    def __init__(self) -> None:
        self.left = 0

    def reset(self, task: int) -> str:
        self.left = task
        return f"task {'x' * task} {task}"

    def step(self, action: str) -> tuple[str, float, bool]:
        self.left -= 1
        return f"{len(action)} letters, {'y' * (self.left + 1)}", float(self.left == 0), self.left == 0


def play_alone(player: Player, task: int, limits: PlayLimits, system: str | None) -> list[Message]:
    """The same play with a whole forward pass for every token."""
    import torch

    environment = Echo()
    messages = [Message(role="system", content=system)] if system else []
    messages.append(Message(role="user", content=environment.reset(task)))
    for _ in range(limits.max_turns):
        turns, _ = player.template.prepare(messages)
        ids = player.template.encode(player.template.text(turns, generation_prompt=True))[0]
        said: list[int] = []
        while len(said) < limits.max_turn_tokens:
            with torch.no_grad():
                logits = player.model(input_ids=torch.tensor([ids + said])).logits[0, -1]
            said.append(int(logits.argmax()))
            if said[-1] in stop_token_ids(player):
                break
        words = said[:-1] if said[-1] in stop_token_ids(player) else said
        text = player.template.decode(words)
        observation, _, done = environment.step(last_line(text))
        messages += [Message(role="assistant", content=text), Message(role="user", content=observation)]
        if done:
            break
    return messages


@pytest.fixture(scope="module", params=["llama", "lfm2"])
def player(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Player:
    folder = tiny.make_model(request.param, tmp_path_factory.mktemp(request.param))
    made = load_player(resolve_base(str(folder)), dtype="float32")
    made.model.double()  # so that rounding does not choose between two tokens
    return made


def ascii_only(player: Player) -> None:
    """Bytes that are no text decode to something that encodes otherwise; keep the head to plain letters."""
    head = player.model.get_output_embeddings()
    table = player.template.tokenizer.get_vocab()  # type: ignore[attr-defined]
    letters = {number for token, number in table.items() if len(token) == 1 and token.isascii() and token.isalnum()}

    def mask(_module: Any, _inputs: Any, logits: Any) -> Any:
        for number in range(logits.shape[-1]):
            if number not in letters:
                logits[..., number] = -1e9
        return logits

    head.register_forward_hook(mask)


@pytest.mark.parametrize("system", [None, "play well"])
def test_plays_together_equal_plays_alone(player: Player, system: str | None) -> None:
    ascii_only(player)
    limits = PlayLimits(max_turns=4, max_turn_tokens=7, max_tokens=400)
    tasks = [3, 1, 9, 2, 2, 5]
    together = play(player, [Echo() for _ in tasks], tasks, system=system, limits=limits)
    for task, played in zip(tasks, together, strict=True):
        assert [m.content for m in played.messages] == [m.content for m in play_alone(player, task, limits, system)]
        assert played.n_turns == min(task, 4)
        assert played.finished == (task <= 4)
        assert played.reward == float(task <= 4)


def test_a_model_that_learned_to_stop_stops(tmp_path: Path) -> None:
    import torch

    folder = tiny.make_model("llama", tmp_path / "base")
    base = resolve_base(str(folder))
    player = load_player(base, dtype="float32")
    messages = tuple(
        Message(role=role, content=text)  # type: ignore[arg-type]
        for role, text in (("user", "task x 1"), ("assistant", "ok"), ("user", "2 letters, y"), ("assistant", "ok"))
    )
    units = build_units([TrainingData(messages=messages)], ChatTemplate(load_tokenizer(base)), 512).units
    for parameter in player.model.parameters():
        parameter.requires_grad_(requires_grad=True)
    settings = loop.LoopSettings(
        epochs=60, batch_size=1, gradient_accumulation=1, learning_rate=1e-2, warmup_ratio=0.1, max_grad_norm=1.0, max_steps=None, seed=0
    )
    history = loop.train(loop.Run(player.model, DenseEngine(player.model, batch_size=1), Likelihood()), units, settings, lambda event: None)
    assert history.losses[-1][1] < 0.05
    player.model.eval()
    torch.manual_seed(0)
    limits = PlayLimits(max_turns=2, max_turn_tokens=20, max_tokens=200)
    [played] = play(player, [Echo()], [1], limits=limits)
    assert [m.content for m in played.messages] == ["task x 1", "ok", "2 letters, y"]


def test_too_few_environments_are_an_error(player: Player) -> None:
    with pytest.raises(EvaluationError, match="2 tasks need as many environments, found 1"):
        play(player, [Echo()], [1, 2])


def test_no_tasks_give_no_plays(player: Player) -> None:
    assert play(player, [], []) == []


def test_progress_is_told(player: Player) -> None:
    heard: list[tuple[int, int]] = []
    tell: Callable[[int, int, int], None] = lambda done, total, step: heard.append((done, total))  # noqa: E731
    play(player, [Echo(), Echo()], [1, 2], limits=PlayLimits(max_turns=3, max_turn_tokens=3, max_tokens=300), on_progress=tell)
    assert heard[-1] == (2, 2)


def test_token_limit_ends_a_play(player: Player) -> None:
    [played] = play(player, [Echo()], [9], limits=PlayLimits(max_turns=9, max_turn_tokens=5, max_tokens=12))
    assert not played.finished
    assert played.n_turns >= 1


def test_last_line_is_the_action() -> None:
    assert last_line("think\n\n get 1 log \n\n") == "get 1 log"
    assert last_line("  \n") == ""


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = tiny.make_model("llama", tmp_path / "base")
    with pytest.raises(EvaluationError, match="does not load onto base"):
        load_player(resolve_base(str(folder)), str(tmp_path / "nothing"), dtype="float32")
