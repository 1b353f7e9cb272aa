"""The command ``normlab``: ``compare``, ``list``, ``show``, ``report``.

Importing this costs nothing but the standard library; each command imports what it needs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Annotated, Any

_EXTRA = (
    "the command line needs the lab extra; install it with: pip install 'normlab[lab]' "
    "(missing: {name})"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Words after the program's name; None for those of the process.

    Returns:
        The exit status: 0; 1 for an error, said in one line; 130 after Ctrl-C.
    """
    try:
        import tyro
    except ImportError as error:
        print(f"normlab: {_EXTRA.format(name=error.name)}", file=sys.stderr)
        return 1
    from normlab import commands

    choose = Annotated[
        Annotated[commands.Compare, tyro.conf.subcommand("compare")]
        | Annotated[commands.List, tyro.conf.subcommand("list")]
        | Annotated[commands.Show, tyro.conf.subcommand("show")]
        | Annotated[commands.Report, tyro.conf.subcommand("report")],
        tyro.conf.OmitSubcommandPrefixes,
    ]
    return _guarded(tyro.cli(choose, prog="normlab", args=arguments))


def _guarded(command: Any) -> int:
    """Run a command; errors that a user can mend are said in a line, not as a traceback."""
    try:
        return int(command.run())
    except KeyboardInterrupt:
        print("\nnormlab: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe has gone, as `| head` does
        sys.stderr.close()
        return 0
    except (ValueError, LookupError, OSError, ImportError) as error:
        print(f"normlab: {error}", file=sys.stderr)
        return 1


def print_json(value: Any) -> None:
    """Print a value as JSON."""
    print(json.dumps(value, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    sys.exit(main())
