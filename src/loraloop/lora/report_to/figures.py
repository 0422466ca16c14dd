"""What of a training is a figure: `train/loss` and others of each step, `held_out/loss` and others of each measurement."""

from __future__ import annotations

from collections.abc import Mapping

from loraloop.lora.report_to.messages import Figure, Message

NAMES = {
    "train": ("loss", "learning_rate", "tokens_per_s", "memory_mb", "accuracy", "margin"),
    "held_out": ("loss", "accuracy", "margin"),
}
"""Fields of an event, by the group that they stand in."""


class Figures:
    """Makes figures of messages. `logged` are the highest steps that a service has: what a resumed run repeats is left out."""

    def __init__(self, logged: Mapping[str, int]) -> None:
        self._last = dict(logged)
        self._step = max((step for name, step in logged.items() if name.startswith("train/")), default=0)

    def of(self, message: Message) -> list[Figure]:
        """The figures of an event that are new; none of one that has no numbers."""
        event = message.event
        if event is None or event.event not in ("step", "held_out"):
            return []
        if event.event == "step":
            group = "train"
            step = self._step = event.step if event.step is not None else self._step + 1
        else:
            group = "held_out"
            step = event.step if event.step is not None else 0 if event.message == "before" else self._step
        made = []
        for name in NAMES[group]:
            value, full_name = getattr(event, name), f"{group}/{name}"
            if value is not None and step > self._last.get(full_name, -1):
                self._last[full_name] = step
                made.append(Figure(full_name, float(value), step, message.at_ms))
        return made
