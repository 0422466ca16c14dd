"""A program that is killed in the midst of moving an alias: `switch_and_die.py FOLDER BEFORE AFTER before|after`."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

from fleets import open_fleet
from http_applier import make_adapter


async def main(folder: Path, when: str) -> None:
    async with open_fleet(folder / "serving") as (fleet, _):
        await fleet.apply(make_adapter(folder / "a", 1), "agent")
        rename = os.replace

        def die(source: str, target: str) -> None:
            if when == "after":
                rename(source, target)
            os.kill(os.getpid(), signal.SIGKILL)

        os.replace = die  # type: ignore[assignment]  # the one step in which the alias moves
        await fleet.apply(make_adapter(folder / "b", 2), "agent")


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), sys.argv[2]))
