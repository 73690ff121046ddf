"""Choose which version of a model is served. The served version has the alias `champion` in the registry.

    python jobs/promote.py smollm2-135m                 list the versions, the champion and its predecessors
    python jobs/promote.py smollm2-135m 3               make version 3 the champion; an alias (candidate) works, too
    python jobs/promote.py smollm2-135m --rollback      make the previous champion the champion again

A running server loads the new champion within a minute, and serves the old one until then. Moving the alias in MLflow's UI does the same.

Exit codes: 0 done, 2 wrong arguments or no such version, 130 interrupted.
"""

import argparse
import sys
from collections.abc import Sequence

from acip_platform import cli
from acip_platform.reporting.console import console, lines
from acip_platform.settings import Settings
from acip_platform.storage.store import Store, StoreError
from acip_platform.tracking.registry import CHAMPION, Registry, reached
from acip_platform.tracking.run_descriptions import CLOSE_KL
from rich.table import Table


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.parser(__doc__)
    parser.add_argument("name", metavar="NAME[@VERSION]", help="name in the registry")
    parser.add_argument("version", nargs="?", help="version number or alias of the new champion")
    parser.add_argument("--rollback", action="store_true", help="make the previous champion the champion again")
    args = cli.parse(parser, argv)
    if "@" in args.name and not args.version:
        args.name, _, args.version = args.name.partition("@")
    if args.rollback and args.version:
        parser.error("give a version or --rollback, not both.")
    return cli.exit_code(lambda: run(args, Settings.from_env()))


@reached()
def run(args: argparse.Namespace, settings: Settings) -> None:
    out, registry = console(), Registry(settings)
    if not args.rollback and not args.version:
        out.print(overview(registry, args.name))
        return
    registry.resolve(args.name, args.version or CHAMPION)
    champion = registry.champion(args.name)
    previous = f"version {champion.version}" if champion else "none"
    version = registry.previous_champion(args.name) if args.rollback else registry.resolve(args.name, args.version)
    if not Store.of(settings).exists(version.uri):
        raise StoreError(
            f"version {version.version} of {args.name} points at {version.uri}, where there is no artifact. Choose another version."
        )
    if args.rollback:
        registry.roll_back(args.name)
    else:
        registry.set_champion(version)
    lines(out, {
        "was": previous,
        CHAMPION: f"version {version.version} ({version.uri})",
        "a running server": "loads it within a minute",
    })  # fmt: skip


def overview(registry: Registry, name: str) -> Table:
    """Return a table of all versions, newest first."""
    if name not in registry.models():
        registry.resolve(name)  # raises an error that lists the models
    table = Table(title=f"{name} (champions so far: {', '.join(registry.champions(name)) or 'none'})", title_justify="left")
    tags = {"area": "area", f"KL of {CLOSE_KL} at": "close_to_base", "recipe": "recipe", "verdict": "verdict"}
    for heading in ("version", "aliases", *tags):
        table.add_column(heading)
    for version in registry.versions(name, {}):
        table.add_row(version.version, ", ".join(version.aliases), *(version.tags.get(tag, "") for tag in tags.values()))
    return table


if __name__ == "__main__":
    sys.exit(main())
