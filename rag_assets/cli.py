"""The `ragline` command. Each command reads the settings, calls one function, and prints a report or, with --json, facts."""

import errno
import sys

import typer

from rag_assets.commands import corpus, errors, evalset, evidence, keys, line, models, release
from rag_serving.errors import RaglineError

_UNWRITABLE = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENOSPC, errno.EDQUOT})

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None, help=__doc__)
for theme in (line, corpus, release, evidence, evalset):
    app.add_typer(theme.commands)
app.add_typer(models.commands, name="models")
app.add_typer(keys.commands, name="keys")


def main() -> None:
    """Entry point: an error of ours, and a place that cannot be written, is one line on stderr and an exit code."""
    try:
        app()
    except (RaglineError, ValueError) as error:
        if not hasattr(error, "exit_code"):
            raise
        errors.print(f"ragline: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(error.exit_code)
    except ModuleNotFoundError as error:
        errors.print(
            f"ragline: {error.name} is not installed here. Install the pipeline: pip install 'ragline[pipeline]'.",
            style="red",
            markup=False,
        )
        sys.exit(1)
    except OSError as error:
        if error.filename is None or error.errno not in _UNWRITABLE:
            raise
        fix = "Correct its permissions, make room, or set RAGLINE_HOME to another folder."
        errors.print(f"ragline: {error.filename}: {error.strerror}. {fix}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
