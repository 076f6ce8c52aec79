"""The command line: `kandrt COMMAND`. What a command needs is imported when it runs, so that help appears at once."""

from __future__ import annotations

import contextlib
import io
import signal
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from . import build, doctor, engines, export, generate, inspect, quantize, verify
from .bench import command as bench
from .console import FAILED, INTERRUPTED, discard_stdout, guarded


class Command(TyperCommand):
    """A command whose `options_metavar` is its whole usage line: typer cannot say that the first of two is optional."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:  # noqa: ARG002  # a method of typer's
        """What follows the command's name in the usage line."""
        return [self.options_metavar or ""]


def paragraphs(text: str | None) -> str:
    """Text as typer shows it right: a paragraph a line, and no markup."""
    return "\n\n".join(" ".join(part.split()) for part in (text or "").split("\n\n")).replace("[", r"\[")


app = typer.Typer(
    help="Kandinsky run time: checkpoints in, pictures out, without PyTorch where the pictures are made.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Example:\n\nkandrt export kandinsky-2-2-prior kandinsky-2-2-decoder -o my-bundle\n\n"
    'kandrt generate my-bundle "a robot, 4k photo" -o robot.png\n\n'
    "Likewise Kandinsky 2.1 (kandinsky-2-1-prior, kandinsky-2-1) and Kandinsky 3 (kandinsky-3).",
)


def add(to: typer.Typer, name: str, command: Callable[..., None], usage: str, example: str) -> None:
    """Add a command, described by its docstring."""
    to.command(
        name,
        cls=Command,
        options_metavar=f"{usage} [OPTIONS]".lstrip(),
        help=paragraphs(command.__doc__),
        epilog=paragraphs(f"Example:\n\n{example}"),
    )(guarded(command))


for module in (export, quantize, build, generate, inspect, verify, doctor):
    add(app, module.__name__.rpartition(".")[2], module.command, module.USAGE, module.EXAMPLE)
add(app, "bench", bench.command, bench.USAGE, bench.EXAMPLE)
engines_app = typer.Typer(
    help="List the engines of a bundle, and remove those of no use.", no_args_is_help=True, rich_markup_mode="rich"
)
for name, (function, usage, example) in engines.COMMANDS.items():
    add(engines_app, name, function, usage, example)
app.add_typer(engines_app, name="engines")


def show_version(wanted: bool) -> None:
    """Print the version and leave, where `--version` was given."""
    if wanted:
        from importlib.metadata import version

        typer.echo(f"kandrt {version('kandrt')}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Kandinsky run time: checkpoints in, pictures out, without PyTorch where the pictures are made."""


def main() -> None:
    """Run the command line as a program: SIGTERM and a closed terminal end it as Ctrl-C does."""
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names of files may hold bytes that are no text
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
        sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        sys.exit(FAILED)
    except Exception as error:  # outside of a command: help, say, on a disk that is full
        sys.exit(f"unexpected error: {error}")
    finally:
        close_stdout()


def close_stdout() -> None:
    """Write out what is buffered; where that fails, let go of it, so that the interpreter does not complain as well."""
    try:
        sys.stdout.flush()
    except OSError:
        with contextlib.suppress(OSError, ValueError):
            discard_stdout()


if __name__ == "__main__":
    main()
