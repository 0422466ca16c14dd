"""Work with an event loop of its own, for callers who may have one running."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


def run_in_plain_thread(work: Callable[[], Result]) -> Result:
    """The result of `work`, which runs its own event loop: here, or in another thread when this one has a loop running."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return work()
    result: list[Result] = []
    failure: list[BaseException] = []

    def target() -> None:
        try:
            result.append(work())
        except BaseException as error:  # noqa: BLE001  handed to the caller below
            failure.append(error)

    thread = threading.Thread(target=target, name="loraloop-train")
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return result[0]
