"""The command ``normlab``; its subcommands are the classes of `normlab.commands`.

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


_LISTS = ("--normalizers", "--norm-batch", "--composition", "--batch-size", "--condition", "--lrs")


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
        | Annotated[commands.Report, tyro.conf.subcommand("report")]
        | Annotated[commands.Claims, tyro.conf.subcommand("claims")]
        | Annotated[commands.Diagnose, tyro.conf.subcommand("diagnose")]
        | Annotated[commands.Doctor, tyro.conf.subcommand("doctor")],
        tyro.conf.OmitSubcommandPrefixes,
    ]
    words = split_lists(sys.argv[1:] if arguments is None else arguments)
    return _guarded(tyro.cli(choose, prog="normlab", args=words))


def split_lists(words: Sequence[str]) -> list[str]:
    """Let lists be given with commas too: ``--norm-batch 64,8,2`` for ``--norm-batch 64 8 2``.

    Args:
        words: The command line.

    Returns:
        The command line with such lists apart; words with ``=``, as ``group:groups=4,eps=1e-3``,
        stay whole.

    Example:
        >>> split_lists(["compare", "--norm-batch=64,8", "--out", "a,b"])
        ['compare', '--norm-batch', '64', '8', '--out', 'a,b']
    """
    found: list[str] = []
    option = ""
    for word in words:
        if word.startswith("--"):
            option, equals, value = word.partition("=")
            option = option.replace("_", "-")
            if option not in _LISTS or not equals:
                found.append(word)
                continue
            found.append(option)
            word = value
        apart = option in _LISTS and "=" not in word
        found += [part for part in word.split(",") if part] if apart else [word]
    return found


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
