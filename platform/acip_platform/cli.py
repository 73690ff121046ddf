"""Command-line conventions that all jobs share: argument types, `--pool`, exit codes, and old option names.

    def main(argv: Sequence[str] | None = None) -> int:
        args = cli.parse(cli.parser(__doc__), argv)
        return cli.exit_code(lambda: run(args))

Exit codes of every job:

    0      all work succeeded
    1      some of the work failed
    2      wrong arguments, a wrong file or setting, or a service that cannot be reached (AcipError, OSError)
    130    interrupted by Ctrl-C, SIGTERM or `ray job stop`
"""

import argparse
import math
import sys
from collections.abc import Callable, Sequence

from acip.errors import AcipError, BudgetError, cited
from acip.renamed import OPTIONS, warn
from acip.utils.coerce import did_you_mean

FAILED = 1
REFUSED = 2
INTERRUPTED = 130


def exit_code(work: Callable[[], int | None]) -> int:
    """Run `work` and return the exit code of the job; the error of a user becomes one line on stderr.

    A Ray that was started for this process ends here, too. Other exceptions are bugs: they keep their traceback, and Python exits with 1.
    """
    try:
        return work() or 0
    except (AcipError, OSError) as error:  # OSError: a file that cannot be read or written
        print(f"error: {error}", file=sys.stderr, flush=True)
        return REFUSED
    except KeyboardInterrupt:
        print("interrupted. Finished work is kept; run the same command to resume.", file=sys.stderr, flush=True)
        return INTERRUPTED
    finally:
        if (ray := sys.modules.get("ray")) is not None:  # some jobs need no Ray, and importing it takes seconds
            ray.shutdown()


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser that prints `description`, the docstring of a job, as it is written."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse `argv` (None = the arguments of this process); old option names are accepted with a FutureWarning.

    An empty argument is an error: it comes from a variable that is not set, and would be read as the current folder or as no choice.
    """
    words = current_options(parser, sys.argv[1:] if argv is None else argv)
    for i, word in enumerate(words):
        if not word or (word.startswith("--") and word.endswith("=")):
            place = word or f"after {words[i - 1]}" if i else "at the beginning"
            parser.error(f"an argument is empty ({place}). Set the variable that it comes from, or leave the option out.")
    return parser.parse_args(words)


def current_options(parser: argparse.ArgumentParser, argv: Sequence[str]) -> list[str]:
    """Return `argv` with the old names of the parser's options replaced by the present ones (acip.renamed.OPTIONS)."""
    known = parser._option_string_actions  # argparse has no public list of a parser's options
    renamed = {old: new for old, new in OPTIONS.items() if new in known}
    words, result = list(argv), list[str]()
    while words and words[0] != "--":
        word = words.pop(0)
        option, equals, value = word.partition("=")
        pair = f"{option} {value if equals else next(iter(words), '')}"
        if pair in renamed:  # a value that became an option of its own
            if not equals:
                words.pop(0)
            old, new = pair, renamed[pair]
        elif option in renamed:
            old, new = option, renamed[option] + equals + value
        else:
            result.append(word)
            continue
        result.append(new)
        warn("option", old, new.partition("=")[0], stacklevel=4)
    return result + words


# ---- argument types


def whole_number(least: int, most: int | None = None) -> Callable[[str], int]:
    """Return an argument type: a whole number from `least` to `most` (None = no limit)."""
    allowed = f"a whole number of at least {least}" if most is None else f"a whole number from {least} to {most}"

    def whole_number(text: str) -> int:
        try:
            value: int | None = int(text)
        except ValueError:
            value = None
        if value is None or value < least or (most is not None and value > most):
            raise argparse.ArgumentTypeError(f"{cited(text)} is not allowed; give {allowed}.")
        return value

    return whole_number


def positive_number(text: str) -> float:
    """Parse a finite number above 0."""
    value = _number(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{cited(text)} is not allowed; give a number above 0.")
    return value


def number_from_zero(text: str) -> float:
    """Parse a finite number of at least 0."""
    value = _number(text)
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"{cited(text)} is not allowed; give a number of at least 0.")
    return value


def _number(text: str) -> float:
    """Parse a number; NaN for anything else, and for infinity."""
    try:
        value = float(text)
    except ValueError:
        return math.nan
    return value if math.isfinite(value) else math.nan


def ratio(text: str) -> float:
    """Parse a size ratio, "0.6" or "60%"."""
    from acip.sizing.budget import Budget

    try:
        value = Budget.parse(text).ratio
    except BudgetError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if value is None:
        raise argparse.ArgumentTypeError(
            f'{cited(text)} is not a size ratio; give one like "0.6" or "60%". jobs/materialize.py prints the ratio that fits a budget.'
        )
    return value


def node_pool(text: str) -> list[dict[str, float]]:
    """Parse the nodes that an autoscaler may start, "8xGPU:1,CPU:14"."""
    from acip_platform.scheduling.job_queue import pool

    try:
        return pool(text)
    except AcipError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


# ---- arguments that several jobs have


def add_pool(parser: argparse._ActionsContainer) -> None:
    """Add `--pool`: a list of nodes, or None for the nodes of the cluster."""
    parser.add_argument(
        "--pool", type=node_pool, metavar="8xGPU:1,CPU:14", help="nodes that an autoscaler may start (default: the nodes of the cluster)"
    )


def add_dry_run(parser: argparse._ActionsContainer) -> None:
    """Add `--dry-run`."""
    parser.add_argument("--dry-run", action="store_true", help="print what would be done, and stop")


def check_only(names: Sequence[str] | None, known: Sequence[str], owner: str) -> None:
    """Raise AcipError for a name of `--only` that `owner`, a fleet or an arena, does not have."""
    for name in names or ():
        if name not in known:
            raise AcipError(f"--only names {name!r}{did_you_mean(name, tuple(known))}; the {owner} has {', '.join(known)}.")
