"""`python -I -S guard.py PROGRAM ARGUMENT…`: become that program, and leave a watch that ends it when whoever started it is gone.

Standard input is a pipe that the starter holds open and never writes to; when the starter dies, however it dies, the watch reads its
end, asks the process group to stop, and ends it for good a while later. The program keeps this process's id, so exit code, signals and
limits are its own; its standard input is empty. Imports nothing of ours, so that it starts in milliseconds.
"""

import os
import signal
import sys
import time

PATIENCE_SECONDS = 60.0
"""A training that is asked to stop saves a checkpoint first."""


def main(argv: list[str]) -> None:
    """Never returns: this process becomes the program, or ends with 127 when that cannot be started."""
    if os.fork() == 0:
        if os.fork() == 0:
            watch(os.getpgrp())
        os._exit(0)  # so that the watch is nobody's child: the program may wait for all of its own
    os.wait()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    try:
        os.execvp(argv[0], argv)  # noqa: S606  what it runs is what it is for
    except OSError as error:
        sys.stderr.write(f"{argv[0]} cannot be started: {error.strerror}; see python_path\n")
        sys.stderr.flush()
    os._exit(127)


def watch(group: int) -> None:
    """Wait for the end of standard input, then end `group`, this process among it."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 1)
    os.dup2(null, 2)
    while os.read(0, 4096):
        pass
    os.killpg(group, signal.SIGTERM)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while _is_there(group) and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(group, signal.SIGKILL)


def _is_there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True


if __name__ == "__main__":
    main(sys.argv[1:])
