"""The service: started, and looked at."""

from __future__ import annotations

import typer

from loraloop.cli import apply


def register(app: typer.Typer) -> None:
    """Add `serve` and `serve status`."""
    serve = typer.Typer(no_args_is_help=True, help="Serve the base model and adapters of it.")
    serve.command("status", epilog="Example: loraloop serve status --json")(apply.status)
    app.add_typer(serve, name="serve")
