"""Puts the commands together and turns their errors into one line on stderr. Each command lives in its own file."""

import sys
from collections.abc import Sequence

import typer

from . import adapters, chat, data, doctor, jobs, keys, models, pull, serve, train
from .console import CliError, fail


def build_app(*, with_settings: bool = True) -> typer.Typer:
    """The whole command tree. `with_settings` gives `serve` a flag for every setting, and imports them for that."""
    app = typer.Typer(
        name="tuneloop",
        help="Serve open language models and adapters behind OpenAI's own API.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.command("serve", short_help=serve.SUMMARY)(serve.command(with_settings=with_settings))
    app.command("pull")(pull.pull)
    app.command("train")(train.train)
    app.add_typer(jobs.app, name="jobs")
    app.add_typer(data.app, name="data")
    app.add_typer(models.app, name="models")
    app.add_typer(adapters.app, name="adapters")
    app.add_typer(keys.app, name="keys")
    app.command("chat")(chat.chat)
    app.command("doctor")(doctor.doctor)
    app.callback(invoke_without_command=True)(_root)
    return app


def _root(
    version: bool = typer.Option(False, "--version", help="Print the version and exit.", is_eager=True),
) -> None:
    if version:
        from ... import __version__

        typer.echo(f"tuneloop {__version__}")
        raise typer.Exit


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and exit: status 0, 1 after an error that was printed, 2 for a wrong command line."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    app = build_app(with_settings="serve" in words or not words)
    try:
        app(words, prog_name="tuneloop")
    except CliError as error:
        fail(str(error))
    except UnicodeError:  # arguments and stdin alike
        fail("The input holds bytes that are no UTF-8 text.")
    except OSError as error:  # a disk that filled up under the output, for one
        fail(f"The system refuses: {error}.")
    except KeyboardInterrupt:
        sys.exit(130)
