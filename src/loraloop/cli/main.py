"""`loraloop`: recorded agent runs in, a better adapter out.

Data goes to standard output, everything else to standard error. `--json` gives JSON and nothing else on standard output. Every
command ends with the next one to type. Exit codes: 0 done, 1 it could not be done (the message says why), 2 wrong usage,
128 + n ended by signal n.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from loraloop.cli import (
    apply,
    browse,
    build,
    doctor,
    evaluate,
    evaluations,
    export,
    ingest,
    label,
    promote,
    retention,
    runs,
    serve,
    settings,
    status,
    train,
    watch,
)
from loraloop.errors import LoraLoopError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Turn the recorded episodes of LLM agents into LoRA adapters.\n\n"
    "\b\nloraloop ingest runs/           read recorded runs into a project\n"
    "loraloop build                  freeze a dataset from the episodes that ended well\n"
    "loraloop train --base MODEL     train an adapter on it\n"
    "loraloop evaluate latest        whether it is better than what is live\n"
    "loraloop runs watch latest      how a training goes, from any terminal\n"
    "loraloop models list            what has been trained\n"
    "loraloop apply MODEL            let it answer to the alias that the agent calls\n"
    "loraloop watch                  do all of it again whenever there is reason to",
)
commands = (
    *(ingest, label, build, train, evaluate, promote, runs, browse, evaluations, export),
    *(apply, serve, watch, status, retention, settings, doctor),
)
for command in commands:
    command.register(app)


@app.callback(invoke_without_command=True)
def _options(
    show_version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what every stage does to standard error.")] = False,
) -> None:
    if show_version:
        typer.echo(f"loraloop {version('loraloop')}")
        raise typer.Exit
    if verbose:
        logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(name)s %(message)s")


def main() -> None:
    """Run the command line; an error of ours becomes one message and exit code 1."""
    for number in (signal.SIGTERM, signal.SIGHUP):  # so that what a command has begun, a training, ends with it
        if signal.getsignal(number) is signal.SIG_DFL:  # nohup has SIGHUP ignored, and means it
            signal.signal(number, _stop)
    for name in ("stdout", "stderr"):  # closed by whoever started this
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115  until this process ends
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # names of files need not be Unicode
    try:
        app()
    except LoraLoopError as error:
        sys.stderr.write(f"Error: {error}\n")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.stderr.write("stopped\n")
        sys.exit(130)
    except BrokenPipeError:  # the reader of a pipe, such as head, has seen enough
        sys.stderr.close()
        sys.exit(141)
    except OSError as error:  # such as a full disk, or a folder of another user
        sys.stderr.write(f"Error: {error}\n")
        sys.exit(1)


def _stop(number: int, _frame: object) -> NoReturn:
    """Unwind as Ctrl-C does, and end with the exit code that a shell gives for the signal."""
    sys.exit(128 + number)


if __name__ == "__main__":
    main()
