"""A model in this process that probes can ask: greedy answers, and how likely given ones are."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from loraloop.episode import Message
from loraloop.evaluate.rollout import Opening, Player, speak

BATCH = 16
"""Answers that are spoken at a time."""
BATCH_TOKENS = 16_384
"""Tokens of answers, with all before them, that are scored at a time."""


class PlayerSpeaker:
    """Speaks as the agent of a Player: a `Speaker` and a `Scorer`."""

    def __init__(self, player: Player, *, max_tokens: int = 96) -> None:
        """`max_tokens` bound an answer."""
        self.player = player
        self.max_tokens = max_tokens

    def complete(self, prompts: Sequence[Sequence[Message]]) -> list[str]:
        """The greedy answer to each, without the token that ends it."""
        blocks = [prompts[at : at + BATCH] for at in range(0, len(prompts), BATCH)]
        return [
            said
            for block in blocks
            for said in speak(self.player, [Opening(one) for one in block], [self.max_tokens] * len(block), keep_special=False)
        ]

    def log_probs(self, messages: Sequence[Message], answers: Sequence[str]) -> list[float]:
        """The logarithm of the probability that an answer begins with each of `answers`. What they share is computed once."""
        import torch

        turns, _ = self.player.template.prepare(list(messages))
        prompt = self.player.template.encode(self.player.template.text(turns, generation_prompt=True))[0]
        encoded = [self.player.template.encode(answer)[0] for answer in answers]
        n_shared = _count_shared(encoded)
        head, rest = [*prompt, *encoded[0][:n_shared]], [one[n_shared:] for one in encoded]
        branches = _can_branch(self.player.model.config)
        with torch.inference_mode():
            ids = torch.tensor([head], device=self.player.model.device)  # (1, tokens)
            out = self.player.model(input_ids=ids, use_cache=branches, logits_to_keep=n_shared + 1)
            told = out.logits[0].float().log_softmax(-1)  # (shared + 1, vocabulary)
            shared = sum(float(told[place, token]) for place, token in enumerate(head[len(prompt) :]))
            size = max(1, BATCH_TOKENS // (len(head) + max(map(len, rest))))
            parts = [rest[at : at + size] for at in range(0, len(rest), size)]
            if branches:
                found = [value for part in parts for value in self._branch(told[-1], out.past_key_values, part)]
            else:
                found = [value for part in parts for value in self._score(head, part)]
        return [shared + value for value in found]

    def _branch(self, first: Any, cache: Any, answers: Sequence[Sequence[int]]) -> list[float]:
        """The log-probabilities of `answers` behind what is in `cache`; `first` (vocabulary,) are those of their first tokens."""
        import torch

        ids = self._pad(answers)
        chosen = first[ids[:, :1]]  # (answers, 1)
        if ids.shape[1] > 1:
            own = copy.deepcopy(cache)
            own.reorder_cache(torch.zeros(len(answers), dtype=torch.long, device=ids.device))  # one row for each answer
            logits = self.player.model(input_ids=ids[:, :-1], past_key_values=own, use_cache=True).logits.float()
            chosen = torch.cat([chosen, logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]], dim=1)  # (answers, longest)
        return [float(row[: len(answer)].sum()) for row, answer in zip(chosen, answers, strict=True)]

    def _score(self, head: list[int], answers: Sequence[Sequence[int]]) -> list[float]:
        """The same with all that goes before computed for each answer."""
        ids = self._pad([[*head, *answer] for answer in answers])
        keep = ids.shape[1] - len(head) + 1
        logits = self.player.model(input_ids=ids, logits_to_keep=keep).logits[:, :-1].float()  # (answers, longest, vocabulary)
        chosen = logits.log_softmax(-1).gather(-1, ids[:, len(head) :, None])[..., 0]  # (answers, longest)
        return [float(row[: len(answer)].sum()) for row, answer in zip(chosen, answers, strict=True)]

    def _pad(self, rows: Sequence[Sequence[int]]) -> Any:
        """(rows, tokens), padded on the right, where nothing before it sees it."""
        import torch

        longest = max(map(len, rows))
        return torch.tensor([[*row, *([0] * (longest - len(row)))] for row in rows], device=self.player.model.device)


def _count_shared(rows: Sequence[Sequence[int]]) -> int:
    """The tokens that all rows begin with, one less than the shortest at most."""
    most = max(0, min(map(len, rows)) - 1)
    return next((place for place in range(most) if len({row[place] for row in rows}) > 1), most)


def _can_branch(config: Any) -> bool:
    """Whether several tokens can follow what is in a cache: short convolutions go on by one at a time only."""
    return all(kind.endswith("attention") for kind in getattr(config, "layer_types", None) or ())
