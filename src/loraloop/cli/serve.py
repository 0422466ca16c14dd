"""The service: started, and looked at."""

from __future__ import annotations

from typing import Annotated

import typer

from loraloop.cli import apply
from loraloop.cli.screen import DEFAULT_PROJECT, ProjectOption, err, show_next, to_options, write_line
from loraloop.serve.orders import MAX_PORT, ServiceAddress, ServiceSettings

DEFAULTS = ServiceSettings()


def serve(
    context: typer.Context,
    project: ProjectOption = DEFAULT_PROJECT,
    base: Annotated[
        str | None, typer.Option(metavar="GGUF|DIR|URL", help="The base model, or the address of a vLLM server.", show_default=False)
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=MAX_PORT, help="The port on 127.0.0.1; 0 is any that is free.")] = DEFAULTS.port,
    token: Annotated[
        str | None, typer.Option(envvar="LORALOOP_TOKEN", help="What clients must show; a random one without.", show_default=False)
    ] = None,
    applier: Annotated[str, typer.Option(help="What serves: llama.cpp or vllm.")] = DEFAULTS.applier,
    drain: Annotated[
        float, typer.Option(min=0, metavar="SECONDS", help="How long what is under way may go on when something ends.")
    ] = DEFAULTS.drain_seconds,
    option: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="A setting of the applier, such as n_ctx=8192; may be repeated.")
    ] = None,
) -> None:
    """Answer OpenAI clients with the versions that aliases stand for, and record every call.

    One JSON line with url and token is written to standard output when requests are answered. Ctrl-C or SIGTERM ends it in good order.
    """
    if context.invoked_subcommand is not None:
        return
    if not base:
        known = "a GGUF file, a model's folder, or the address of a vLLM server"
        raise typer.BadParameter(f"say what is served: --base with {known}, or base of [serve] in loraloop.toml")
    from loraloop.files import json_line
    from loraloop.project import Project

    def tell_ready(address: ServiceAddress) -> None:
        write_line(json_line({"url": address.url, "token": address.token, "pid": address.pid}))
        typer.get_text_stream("stdout").flush()
        err().print(f"clients call base_url={address.url}/v1 with the token as their API key", markup=False)
        show_next("loraloop serve status", project)

    settings = ServiceSettings(base=base, applier=applier, port=port, token=token, drain_seconds=drain, options=to_options(option or []))
    with Project(project) as opened:
        number = opened.serve(settings, tell_ready)
    raise typer.Exit(128 + number)


def register(app: typer.Typer) -> None:
    """Add `serve` and `serve status`."""
    group = typer.Typer(
        invoke_without_command=True, callback=serve, epilog="Example: loraloop serve --base model.gguf --port 8080 > service.json"
    )
    group.command("status", epilog="Example: loraloop serve status --json")(apply.status)
    app.add_typer(group, name="serve")
