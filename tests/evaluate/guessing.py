"""An environment of Gymnasium: guess the number that the seed has drawn."""

from __future__ import annotations

from typing import Any

import gymnasium
from gymnasium.spaces import Text


class Guessing(gymnasium.Env):
    observation_space = Text(60)
    action_space = Text(20)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        self.wanted = int(self.np_random.integers((options or {}).get("below", 10)))
        self.left = 3
        return "Guess a number.", {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        guess = int(action)
        self.left -= 1
        right = guess == self.wanted
        said = "right" if right else "more" if guess < self.wanted else "less"
        return said, 0.75 if right else 0.125, right, self.left == 0, {}


class Numbers(Guessing):
    def reset(self, **told: Any) -> tuple[Any, dict[str, Any]]:
        super().reset(**told)
        return 3, {}


gymnasium.register("Guessing-v0", "guessing:Guessing")
gymnasium.register("Numbers-v0", "guessing:Numbers")
