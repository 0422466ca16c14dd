"""Play tasks with a model: many at a time, greedily or by seed, each token fed once.

All plays share one key-value cache and move forward a token at a time: where a play waits for the model, its token is the model's
choice; where the environment has answered, its tokens are the answer's. So no play waits for another's turn to end, and nothing is
computed twice. The conversation that the model sees is the chat template's own rendering, as in training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from loraloop.base_model import BaseModel, Dtype, choose_device, choose_dtype, load_model, load_tokenizer
from loraloop.chat.template import ChatTemplate
from loraloop.episode import Message
from loraloop.errors import EvaluationError
from loraloop.evaluate.environment import Environment, PlayLimits, last_line

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


@dataclass
class Played(Generic[T]):
    """One play: its task, what was said, and how it ended."""

    task: T
    messages: list[Message]
    reward: float = 0.0
    n_turns: int = 0
    finished: bool = False
    """The environment ended it; otherwise a limit did."""


@dataclass(frozen=True)
class Sampling:
    """How the model's tokens are chosen."""

    temperature: float = 0.0
    """0 takes the likeliest token; above, tokens are drawn, the same ones for the same seed."""
    seeds: Sequence[int] = ()
    """One for each play; needed above temperature 0."""


@dataclass
class Player:
    """A model that can play: weights with the adapter merged in, and the template that renders for it."""

    model: Any
    template: ChatTemplate


def load_player(base: BaseModel, adapter: str | None = None, dtype: Dtype = "auto") -> Player:
    """The base model, with the adapter from the folder `adapter` merged in. Raises BaseModelError or EvaluationError."""
    device = choose_device()
    model = load_model(base, choose_dtype(dtype, device))
    if adapter is not None:
        import peft

        try:
            model = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()
        except (OSError, ValueError, RuntimeError) as error:
            raise EvaluationError(f"the adapter in {adapter} does not load onto {base.name}: {error}") from error
    return Player(model.to(device).eval(), ChatTemplate(load_tokenizer(base)))


def play(
    player: Player,
    environments: Sequence[Environment[T]],
    tasks: Sequence[T],
    *,
    system: str | None = None,
    limits: PlayLimits | None = None,
    to_action: Callable[[str], str] = last_line,
    sampling: Sampling | None = None,
    on_progress: Callable[[int, int, int], None] = lambda done, total, step: None,
    on_ended: Callable[[int, Played[T]], None] = lambda index, played: None,
) -> list[Played[T]]:
    """Play each task in an environment of its own; gives the plays in the order of `tasks`.

    The same weights, tasks and sampling give the same plays on the same machine; without sampling it is greedy. `on_progress` hears
    (plays ended, plays, step), `on_ended` each play as it ends, with its place among `tasks`. Raises EvaluationError when there are
    fewer environments than tasks, or fewer seeds where tokens are drawn.
    """
    sampling = sampling or Sampling()
    if len(environments) < len(tasks):
        raise EvaluationError(f"{len(tasks)} tasks need as many environments, found {len(environments)}")
    if sampling.temperature > 0 and len(sampling.seeds) != len(tasks):
        raise EvaluationError(f"{len(tasks)} plays at temperature {sampling.temperature:g} need as many seeds, found {len(sampling.seeds)}")
    if not tasks:
        return []
    limits = limits or PlayLimits()
    seats = [
        _Seat(player, environment, Played(task, _opening(environment.reset(task), system)), limits, to_action)
        for environment, task in zip(environments, tasks, strict=False)
    ]
    _run(player, seats, limits, _Choice(sampling, len(seats)), _Told(on_progress, on_ended))
    return [seat.played for seat in seats]


@dataclass(frozen=True)
class Opening:
    """A conversation that waits for the agent's next turn."""

    messages: Sequence[Message]
    tools: Sequence[dict[str, Any]] = ()


def speak(
    player: Player, openings: Sequence[Opening], max_tokens: Sequence[int], sampling: Sampling | None = None, *, keep_special: bool = True
) -> list[str]:
    """The agent's next turn behind each opening, at most so many tokens of each; special tokens stand in it unless told otherwise."""
    if not openings:
        return []
    seats = [
        _Seat(
            player,
            _OneTurn(),
            Played(None, list(opening.messages)),
            PlayLimits(1, n_tokens, n_tokens),
            lambda text: text,
            tools=opening.tools,
            keep_special=keep_special,
        )
        for opening, n_tokens in zip(openings, max_tokens, strict=True)
    ]
    choose, told = _Choice(sampling or Sampling(), len(seats)), _Told(lambda done, total, step: None, lambda place, played: None)
    _run(player, seats, PlayLimits(1, max(max_tokens), max(max_tokens)), choose, told)
    return [seat.played.messages[-2].content or "" for seat in seats]


class _OneTurn:
    """What is played where only the next turn is wanted."""

    def reset(self, task: None) -> str:  # noqa: ARG002  an environment's
        return ""

    def step(self, action: str) -> tuple[str, float, bool]:  # noqa: ARG002
        return "", 0.0, True


def _opening(observation: str, system: str | None) -> list[Message]:
    head = [Message(role="system", content=system)] if system is not None else []
    return [*head, Message(role="user", content=observation)]


@dataclass
class _Seat(Generic[T]):
    """One play at the table: what is still to be fed, and what the model has said in this turn."""

    player: Player
    environment: Environment[T]
    played: Played[T]
    limits: PlayLimits
    to_action: Callable[[str], str]
    tools: Sequence[dict[str, Any]] = ()
    keep_special: bool = False
    feed: list[int] = field(default_factory=list)
    said: list[int] = field(default_factory=list)
    n_fed: int = 0
    over: bool = False

    def prompt_ids(self) -> list[int]:
        return self.player.template.encode(self._text(generation_prompt=True))[0]

    def next_token(self, choice: int, stop_ids: frozenset[int]) -> int:
        """The token to feed next, given what the model would say; ends the turn or the play where that is due."""
        if self.over:  # still at the table until it is cleared; what it is fed no longer matters
            return choice
        self.n_fed += 1
        if self.feed:
            return self.feed.pop(0)
        self.said.append(choice)
        if choice in stop_ids or len(self.said) == self.limits.max_turn_tokens:
            self._end_turn(stopped=choice in stop_ids)
        self.over = self.over or self.n_fed >= self.limits.max_tokens
        return choice

    def _end_turn(self, *, stopped: bool) -> None:
        """Act, and queue what the template puts between the agent's last token and its next turn."""
        words = self.said[:-1] if stopped else self.said
        text = self.player.template.decode(words, keep_special=self.keep_special)
        self.said = []
        observation, reward, done = self.environment.step(self.to_action(text))
        before = self._text(generation_prompt=True)
        self.played.messages += [Message(role="assistant", content=text), Message(role="user", content=observation)]
        self.played.reward, self.played.n_turns, self.played.finished = reward, self.played.n_turns + 1, done
        if done or self.played.n_turns == self.limits.max_turns:
            self.over = True
            return
        after = self._text(generation_prompt=True)
        if not after.startswith(before):
            raise EvaluationError("the chat template changes earlier turns when later ones follow; such templates cannot be played yet")
        self.feed = self.player.template.encode(self._behind_turn(after[len(before) :], stopped=stopped))[0]

    def _behind_turn(self, rest: str, *, stopped: bool) -> str:
        """What follows the agent's words in `rest`; without the stop token when the model has said that itself."""
        stops = [(rest.find(stop), len(stop)) for stop in self.player.template.stop_texts if stop in rest]
        if not stops:
            raise EvaluationError("the chat template ends no turn with a special token; its models cannot be played")
        start, length = min(stops)
        return rest[start + length :] if stopped else rest[start:]

    def _text(self, *, generation_prompt: bool) -> str:
        turns, tools = self.player.template.prepare(self.played.messages, self.tools)
        return self.player.template.text(turns, tools, generation_prompt=generation_prompt)


def stop_token_ids(player: Player) -> frozenset[int]:
    """The tokens that end a turn: the tokenizer's end token and those of the generation configuration."""
    tokenizer: Any = player.template.tokenizer
    configured = getattr(player.model.generation_config, "eos_token_id", None)
    listed = configured if isinstance(configured, list) else [configured]
    return frozenset(token for token in [tokenizer.eos_token_id, *listed] if token is not None)


class _Choice:
    """Chooses each seat's next token; what one seat draws does not depend on who else is at the table."""

    def __init__(self, sampling: Sampling, n_seats: int) -> None:
        import torch

        self.temperature = sampling.temperature
        drawn = sampling.seeds if sampling.temperature > 0 else ()
        self.generators = [torch.Generator().manual_seed(seed) for seed in drawn]
        self.seat_numbers = list(range(n_seats))

    def keep(self, rows: Sequence[int]) -> None:
        """The others have left the table."""
        self.seat_numbers = [self.seat_numbers[row] for row in rows]

    def __call__(self, logits: torch.Tensor) -> list[int]:
        """`logits` (rows, vocabulary) of the seats at the table; drawn by adding Gumbel noise, which the seat's own generator makes."""
        import torch

        if self.temperature <= 0:
            return [int(token) for token in logits.argmax(-1)]
        scaled = logits.float().cpu() / self.temperature
        noise = [torch.rand(scaled.shape[-1], generator=self.generators[number]) for number in self.seat_numbers]
        return [int(token) for token in (scaled - torch.log(-torch.log(torch.stack(noise).clamp(1e-20, 1 - 1e-7)))).argmax(-1)]


@dataclass(frozen=True)
class _Told:
    """Who hears how the plays go on."""

    on_progress: Callable[[int, int, int], None]
    on_ended: Callable[[int, Any], None]


def _run(player: Player, seats: list[_Seat[T]], limits: PlayLimits, choose: _Choice, told: _Told) -> None:
    """Feed all seats token by token until every play is over."""
    import torch

    device = next(player.model.parameters()).device
    stop_ids = stop_token_ids(player)
    cache = roomy_cache(player.model.config, limits.max_tokens)
    with torch.inference_mode():
        ids, mask = _pad_left([seat.prompt_ids() for seat in seats], device)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        choices = choose(_forward(player.model, ids, mask, positions, cache))
        position = positions[:, -1:] + 1  # (seats, 1)
        active = list(seats)
        for step in range(limits.max_tokens):
            playing = [number for number in choose.seat_numbers if not seats[number].over]
            fed = [seat.next_token(choice, stop_ids) for seat, choice in zip(active, choices, strict=True)]
            for number in playing:
                if seats[number].over:
                    told.on_ended(number, seats[number].played)
            told.on_progress(len(seats) - sum(not seat.over for seat in seats), len(seats), step)
            kept = [index for index, seat in enumerate(active) if not seat.over]
            if not kept:
                return
            tokens = torch.tensor(fed, device=device)[:, None]  # (seats, 1)
            if len(kept) <= 0.75 * len(active):  # leave the table to those who still play
                rows = torch.tensor(kept, device=device)
                cache.reorder_cache(rows)  # works for every kind of layer, with fewer rows too
                mask, position, tokens = mask[rows], position[rows], tokens[rows]
                active = [active[index] for index in kept]
                choose.keep(kept)
            mask = torch.cat([mask, mask.new_ones(len(active), 1)], dim=1)
            choices = choose(_forward(player.model, tokens, mask, position, cache))
            position = position + 1
        for number in choose.seat_numbers:
            if not seats[number].over:
                seats[number].over = True
                told.on_ended(number, seats[number].played)


def _forward(model: Any, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: Any) -> torch.Tensor:
    """(rows, vocabulary) what each row says of its next token; the head sees the last position only."""
    out = model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1)
    logits: torch.Tensor = out.logits[:, -1]
    return logits


def _pad_left(prompts: Sequence[list[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, mask), both (rows, tokens), prompts ending at the right edge."""
    import torch

    length = max(map(len, prompts))
    ids = torch.zeros(len(prompts), length, dtype=torch.long)
    mask = torch.zeros(len(prompts), length, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :] = torch.tensor(prompt)
        mask[row, length - len(prompt) :] = 1
    return ids.to(device), mask.to(device)


def roomy_cache(config: Any, room: int) -> Any:
    """A transformers cache whose attention layers leave room to grow, so that a new token is not a copy of all before it."""
    import torch
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    class RoomyLayer(DynamicLayer):  # type: ignore[misc]
        """Keys and values are views of larger buffers, filled in place."""

        keys: torch.Tensor
        values: torch.Tensor
        buffers: tuple[torch.Tensor, torch.Tensor] | None = None

        def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            old = self.get_seq_length()
            new = old + key_states.shape[-2]
            buffers = self.buffers
            if buffers is None or self.keys.data_ptr() != buffers[0].data_ptr() or new > buffers[0].shape[-2]:
                buffers = (_grown(self.keys, key_states, old, room), _grown(self.values, value_states, old, room))
            self.buffers = keys, values = buffers
            keys[..., old:new, :], values[..., old:new, :] = key_states, value_states
            self.keys, self.values = keys[..., :new, :], values[..., :new, :]
            return self.keys, self.values

    def _grown(have: torch.Tensor, add: torch.Tensor, old: int, room: int) -> torch.Tensor:
        shape = (*add.shape[:-2], old + add.shape[-2] + room, add.shape[-1])  # (rows, heads, tokens, head dimension)
        buffer = torch.empty(shape, dtype=add.dtype, device=add.device)
        if old:
            buffer[..., :old, :] = have
        return buffer

    cache = DynamicCache(config=config)
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
