"""The command line: one command a verb, one group a noun."""

from loraloop.cli.main import main

__all__ = ["main"]
