"""`steelyard`: one thin command per verb. Exit codes: 0 done, 1 refused or failed, 2 usage, 130 interrupted."""

from __future__ import annotations

import logging
import signal
import sys
from types import FrameType
from typing import Annotated, NoReturn

import typer

from steelyard.base.errors import SteelyardError
from steelyard.base.threads import choose_waiting
from steelyard.cli import (
    chat,
    countersign,
    doctor,
    grant,
    key,
    ledger,
    measure,
    model,
    notice,
    publish,
    published,
    release,
    run,
    safety,
    scorer,
    trace,
    train,
    uncensored,
    withdraw,
)
from steelyard.cli.output import one_line

app = typer.Typer(
    name="steelyard",
    no_args_is_help=True,
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Build, test and release open-weight language models: no release verifies without its complete, passed test.",
)
app.command("run")(run.run)
app.command("chat")(chat.chat)
app.command("countersign")(countersign.countersign)
app.command("release")(release.release)
app.command("attest")(release.attest)
app.command("approve")(release.approve)
app.command("seal")(release.seal)
app.command("verify")(release.verify)
app.command("publish")(publish.publish)
app.command("withdraw")(withdraw.withdraw)
app.command("releases")(withdraw.releases)
app.command("notice")(notice.notice)
app.command("uncensored")(uncensored.uncensored)
app.command("doctor")(doctor.doctor)
app.add_typer(model.app, name="model")
app.add_typer(safety.app, name="safety")
app.add_typer(scorer.app, name="scorer")
app.add_typer(train.app, name="train")
app.add_typer(measure.app, name="measure")
app.add_typer(published.app, name="probe")
app.add_typer(key.app, name="key")
app.add_typer(grant.app, name="grant")
app.add_typer(ledger.app, name="ledger")
app.add_typer(trace.app, name="trace")


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.", is_eager=True)] = False,
) -> None:
    if version:
        from importlib.metadata import version as installed

        print(f"steelyard {installed('steelyard')}")
        raise typer.Exit


class _Interrupted(BaseException):
    """Ctrl-C. Not an Exception, so that no handler on the way takes it for a failed score or a failed request."""


def _interrupt(_signal: int, _frame: FrameType | None) -> NoReturn:
    # Where it strikes while a connection to the ledger is being closed, the library would print a traceback of it.
    logging.getLogger("sqlalchemy.pool").setLevel(logging.CRITICAL)
    raise _Interrupted


def main() -> None:
    """The console script: errors become one line on standard error and an exit code."""
    choose_waiting()
    signal.signal(signal.SIGINT, _interrupt)
    try:
        app()
    except SteelyardError as error:
        print(f"steelyard: {one_line(str(error))}", file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:  # a file where a folder is expected, a full disk
        where = f"{error.filename}: " if error.filename else ""
        print(f"steelyard: {one_line(where + (error.strerror or str(error)))}", file=sys.stderr)
        sys.exit(1)
    except _Interrupted:
        print("steelyard: interrupted; run the same command again to go on from here", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
