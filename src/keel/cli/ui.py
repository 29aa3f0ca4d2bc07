"""`keel ui`: the pages about runs, tokens and methods."""

from pathlib import Path
from typing import Annotated

import typer

from keel.cli.options import Runs

commands = typer.Typer()


@commands.command()
def ui(
    runs: Runs = Path("runs"),
    host: Annotated[str, typer.Option("--host", help="Where to listen; a loopback address.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 takes a free one.")] = 8765,
    open_: Annotated[bool, typer.Option("--open", help="Open the pages in a browser.")] = False,
) -> None:
    """Show runs, tokens and methods in a browser on this machine, until Ctrl-C."""
    from keel.ui.server import run_ui

    def ready(address: str) -> None:
        print(f"{runs} at {address}; Ctrl-C ends it", flush=True)
        if open_:
            import webbrowser

            webbrowser.open(address)

    run_ui(runs, host, port, ready)
