"""The command line: ``pizoo list | train | evaluate | kernel | predict | verify | reproduce | card | overview | publish |
compact | convert | data``."""

from __future__ import annotations

import os
import sys
import warnings
from typing import Annotated, Any, NoReturn

import typer
from rich.markup import escape

from pizoo.cli import console, share, train, use, verify
from pizoo.cli.options import EXIT_MISMATCH, EXIT_USAGE

IN_PROCESSES = ("train", "evaluate")  # what several processes, started by torchrun, do together

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="A model zoo of π-nets that can prove its numbers.",
)
data_app = typer.Typer(no_args_is_help=True, help="Data sets.")


def main() -> None:
    """Run the command line; what a user can mend is one line, not a traceback."""
    warnings.showwarning = _show_warning
    try:
        app()
    except (ValueError, TypeError, OSError) as error:
        _fail(error, EXIT_USAGE)
    except (
        RuntimeError,
        MemoryError,
    ) as error:  # damaged checkpoints, trainings that diverge, failed downloads, no GPU
        _fail(error, EXIT_MISMATCH)


def _show_warning(message: Warning | str, *where: Any) -> None:
    console.err.print(f"[yellow]warning:[/] {escape(str(message))}", highlight=False, soft_wrap=True)


def _fail(error: Exception, code: int) -> NoReturn:
    from pizoo import processes

    # Messages hold shapes and paths in brackets, which rich would take for markup.
    console.err.print(f"[red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
    if processes.started() > 1:  # whatever still waits for the other processes is not waited for
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _leave_processes(*_: Any, **__: Any) -> None:
    from pizoo import processes

    processes.leave()


def _show_version(asked: bool) -> None:
    from pizoo import __version__

    if asked:
        console.say(f"pizoo {__version__}", highlight=False)
        raise typer.Exit


@app.callback(result_callback=_leave_processes)
def _in_processes(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    from pizoo import processes

    if processes.started() > 1 and context.invoked_subcommand not in IN_PROCESSES:
        raise ValueError(
            f"torchrun is for pizoo {' and '.join(IN_PROCESSES)}; run {context.invoked_subcommand} without it"
        )
    console.out.quiet = processes.started() > 1 and os.environ["RANK"] != "0"


# In the order of --help.
app.command("list")(use.list_command)
app.command()(train.train)
app.command()(use.evaluate)
app.command()(use.kernel)
app.command()(use.predict)
app.command()(verify.verify)
app.command()(train.reproduce)
app.command()(share.card)
app.command()(share.overview)
app.command()(share.publish)
app.command()(use.compact)
app.command()(share.convert)
app.add_typer(data_app, name="data")
data_app.command("prepare")(share.data_prepare)
