"""A row: one sequence of tokens to train on, and what is known about it.

`check_row` proves a row: no token of another author has weight, every trained turn ends in a trained special token, every recorded
tool call of a trained turn stands in its text, and every tool that the agent could call stands in the prompt.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

ROLES = ("system", "user", "assistant", "tool")
Author = Literal["system", "user", "assistant", "tool", "demonstration", "other", "template"]
"""Who wrote a stretch of a row. `assistant` is the agent itself, `other` another's turn in the agent's place (a simulated user),
`template` what the chat template adds: markers of turns, tool schemas, words of its own."""


class Stretch(NamedTuple):
    """The characters [start, end) of a row's text, and who wrote them."""

    start: int
    end: int
    author: Author


@dataclass(frozen=True)
class Row:
    """One sequence to train on, with what a report needs to know about it."""

    ids: list[int]  # (tokens,)
    weights: list[float]  # (tokens,) loss weight of each token as a target
    text: str
    episode_id: str | None = None
    sample_number: int = 0
    """Of the sample in its training file, from 1; 0 when it is in none."""
    trained_by_role: dict[str, int] = field(default_factory=dict)
    """How many trained tokens lie in the text of a turn of each role; all must be the assistant's."""
    n_turns: int = 0
    """Agent turns trained in this row."""
    n_stops: int = 0
    """How many of them end in a trained special token."""
    n_borders: int = 0
    """Trained stop tokens that end no trained turn: they belong to the border between two turns, which the model never writes."""
    n_calls_recorded: int = 0
    n_calls_rendered: int = 0
    n_tools_recorded: int = 0
    n_tools_rendered: int = 0
    """How many of the tools that the agent could call have their name in the prompt."""
    n_reworded: int = 0
    """Trained turns whose words do not stand in the text as they were recorded."""
    stretches: tuple[Stretch, ...] = ()
    """The whole text in order, by who wrote it."""
    tokens_by_author: dict[str, int] = field(default_factory=dict)
    is_window: bool = False
    """Begins later than its conversation does, behind the head, because that is too long."""
    prefix_broken: bool = False
    """One of several rows of a sample because the template renders earlier turns otherwise once later ones are there."""
    n_elided: int = 0
    """Characters cut out of the sample's tool outputs to make it fit; told by its first row only, so that rows add up."""

    @property
    def n_supervised(self) -> int:
        """Tokens that carry loss."""
        return sum(weight > 0 for weight in self.weights)

    @property
    def origin(self) -> str:
        """Where it came from, for messages: the episode, else the number of the sample."""
        return self.episode_id or f"sample {self.sample_number}"


def check_row(row: Row) -> list[str]:
    """What is wrong with a row; empty when nothing is. Reason codes: see the module's guarantees."""
    findings = []
    if row.n_supervised == 0:
        findings.append("no_agent_tokens")
    findings += [f"trained_{role}_token" for role in ROLES if role != "assistant" and row.trained_by_role.get(role, 0)]
    if row.n_stops < row.n_turns:
        findings.append("stop_token_untrained")
    if row.n_borders:
        findings.append("trained_border_token")
    if row.n_calls_rendered < row.n_calls_recorded:
        findings.append("tool_calls_lost")
    if row.n_tools_rendered < row.n_tools_recorded:
        findings.append("tools_missing")
    return findings
