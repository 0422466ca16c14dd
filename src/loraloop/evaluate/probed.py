"""A model in this process that probes can ask: greedy answers, and how likely given ones are."""

from __future__ import annotations

from collections.abc import Sequence

from loraloop.episode import Message
from loraloop.evaluate.rollout import Player, stop_token_ids

BATCH = 64


class PlayerSpeaker:
    """Speaks as the agent of a Player: a `Speaker` and a `Scorer`."""

    def __init__(self, player: Player, *, max_tokens: int = 96) -> None:
        """`max_tokens` bound an answer."""
        self.player = player
        self.max_tokens = max_tokens

    def complete(self, messages: Sequence[Message]) -> str:
        """The greedy answer, without the token that ends it."""
        import torch

        ids = torch.tensor([self._prompt_ids(messages)], device=self.player.model.device)  # (1, tokens)
        stop = sorted(stop_token_ids(self.player))
        with torch.inference_mode():
            out = self.player.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=self.max_tokens,
                do_sample=False,
                eos_token_id=stop,
                pad_token_id=stop[0],
            )
        said = [int(token) for token in out[0, ids.shape[1] :] if int(token) not in stop]
        return self.player.template.decode(said)

    def log_probs(self, messages: Sequence[Message], answers: Sequence[str]) -> list[float]:
        """The logarithm of the probability that an answer begins with each of `answers`."""
        prompt = self._prompt_ids(messages)
        encoded = [self.player.template.encode(answer)[0] for answer in answers]
        return [value for at in range(0, len(encoded), BATCH) for value in self._score(prompt, encoded[at : at + BATCH])]

    def _score(self, prompt: list[int], answers: list[list[int]]) -> list[float]:
        import torch

        longest = max(map(len, answers))
        rows = [[*prompt, *answer, *([0] * (longest - len(answer)))] for answer in answers]
        ids = torch.tensor(rows, device=self.player.model.device)  # (answers, tokens); padding on the right is seen by nothing before it
        with torch.inference_mode():
            logits = self.player.model(input_ids=ids, logits_to_keep=longest + 1).logits[:, :-1].float()  # (answers, longest, vocabulary)
            chosen = logits.log_softmax(-1).gather(-1, ids[:, len(prompt) :, None])[..., 0]  # (answers, longest)
        return [float(row[: len(answer)].sum()) for row, answer in zip(chosen, answers, strict=True)]

    def _prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        template = self.player.template
        turns, _ = template.prepare(list(messages))
        return template.encode(template.text(turns, generation_prompt=True))[0]
