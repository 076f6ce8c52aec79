"""What all commands share: where output goes, how errors look, how progress is shown.

Results go to stdout; progress, warnings and errors go to stderr.
"""

from __future__ import annotations

import functools
import inspect
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Annotated, Any, NoReturn, get_type_hints

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..engines.errors import KandrtError

FAILED, INTERRUPTED = 1, 130  # exit codes; typer gives 2 for wrong usage

log = logging.getLogger("kandrt")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, and nothing else, on stdout.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Show debug messages, and tracebacks of unexpected errors.")]


@functools.cache
def stdout() -> Console:
    """Where results go."""
    return Console(highlight=False)


@functools.cache
def stderr() -> Console:
    """Where progress, warnings and errors go; one object, so that messages do not tear a live display."""
    return Console(stderr=True, highlight=False)


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """The command with an option more, `verbose`, whose every failure is one line on stderr and an exit code."""

    @functools.wraps(command)
    def run(*args: Any, verbose: bool = False, **kwargs: Any) -> None:
        try:
            with debug_messages(verbose):
                command(*args, **kwargs)
        except KandrtError as error:
            fail("error", str(error))
        except KeyboardInterrupt:
            stderr().print("interrupted")
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            discard_stdout()
            raise typer.Exit(FAILED) from None
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except Exception as error:
            unexpected(error, verbose)

    signature = inspect.signature(command, eval_str=True)
    option = inspect.Parameter("verbose", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Verbose)
    run.__annotations__ = get_type_hints(command, include_extras=True) | {"verbose": Verbose}
    run.__signature__ = signature.replace(parameters=[*signature.parameters.values(), option])  # type: ignore[attr-defined]
    return run


def fail(kind: str, message: str) -> NoReturn:
    """Print `kind: message`, unwrapped so that paths and commands can be copied, and leave with exit code 1."""
    stderr().print(Text.assemble((f"{kind}:", "bold red"), f" {message}"), soft_wrap=True)
    raise typer.Exit(FAILED)


def unexpected(error: Exception, verbose: bool) -> NoReturn:
    """Fail with an error that nothing foresaw: one line, after the traceback with `verbose`."""
    what = " ".join(f"{type(error).__name__}: {error}".split())
    if verbose:
        stderr().print_exception(width=None, show_locals=False)
        fail("unexpected error", what)
    fail("unexpected error", f"{what}, run with --verbose for the traceback")


def warn(message: str) -> None:
    """Print a warning on one line."""
    stderr().print(Text.assemble(("warning:", "bold yellow"), f" {' '.join(message.split())}"), soft_wrap=True)


def discard_stdout() -> None:
    """Let go of a stdout that nobody reads, so that the interpreter does not complain of it when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def debug_messages(verbose: bool) -> Iterator[None]:
    """With `verbose`, show what kandrt logs."""
    if not verbose:
        yield
        return
    from rich.logging import RichHandler

    handler, level = RichHandler(console=stderr(), show_path=False), log.level
    log.addHandler(handler)
    log.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


@contextmanager
def warnings_in_line() -> Iterator[None]:
    """Show kandrt's own warnings as lines on stderr, and no library's."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        warn(str(message))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", category=UserWarning, module=r"kandrt\.")
        warnings.showwarning = show
        yield


@contextmanager
def pieces() -> Iterator[Callable[[str], None]]:
    """A function that is told each piece of work as it starts: one live line on a terminal, else a line each.

    What libraries print meanwhile goes to stderr as well, so that stdout holds the result alone.
    """
    console, started = stderr(), time.monotonic()

    def print_line(text: str) -> None:
        console.print(Text(f"{time.monotonic() - started:7.1f} s  {text}"), soft_wrap=True)

    with redirect_stdout(sys.stderr):
        if not console.is_terminal:
            yield print_line
            return
        from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        columns = SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn()
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task("starting", total=None)

            def show(text: str) -> None:
                log.debug(text)
                progress.update(task, description=text)

            yield show


@contextmanager
def byte_progress(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """A function that is told how many bytes were read since its last call; a bar on a terminal, else nothing."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=stderr(), transient=True, disable=not stderr().is_terminal) as progress:
        task = progress.add_task(description, total=total)
        yield lambda length: progress.advance(task, length)


def table(*columns: str) -> Table:
    """An empty table in the one style; a column whose name starts with ">" is aligned right.

    Where the terminal is narrow, texts take more lines and nothing of them is left out.
    """
    from rich import box

    made = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False, header_style="dim")
    for column in columns:
        name = column.removeprefix(">")
        made.add_column(name, justify="left" if name == column else "right", overflow="fold")
    return made


def print_json(value: Any) -> None:
    """Print dataclasses, mappings, sequences and plain values as one JSON object."""
    import msgspec

    typer.echo(json.dumps(msgspec.to_builtins(value), indent=2))


def size_text(size: int) -> str:
    """Bytes as people read them, in powers of 1000: "1.25 GB"."""
    return scaled(size, "GB", "MB", "kB") or f"{size} B"


def count_text(count: int) -> str:
    """A number of parameters as people read it: "1.25 B"."""
    return scaled(count, "B", "M", "k") or str(count)


def scaled(value: int, *units: str) -> str:
    """Three digits and the unit, of those for 10⁹, 10⁶ and 10³, that suits a value; "" for one below 1000."""
    for unit, factor in zip(units, (10**9, 10**6, 10**3), strict=True):
        if value >= 0.9995 * factor:
            number = value / factor
            return f"{f'{number:#.3g}'.rstrip('.') if number < 999.5 else f'{number:,.0f}'} {unit}"
    return ""
