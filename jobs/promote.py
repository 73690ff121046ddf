"""Choose which version of a model is served: `champion` is an alias in the registry.

    python jobs/promote.py smollm2-135m 3        version 3 (or an alias: candidate) is the champion from now on
    python jobs/promote.py smollm2-135m --back   the champion before is it again
    python jobs/promote.py smollm2-135m          who is, who was, and what there is to choose from

A running server goes on with the version it has, until it is told (the last line says how).
"""

import argparse
import json
import shlex
import sys
from typing import Any
from urllib.parse import quote

from acip_platform.reporting.console import console, exit_code, lines
from acip_platform.settings import Settings
from acip_platform.storage.store import Store, StoreError
from acip_platform.tracking.registry import CHAMPION, Registry, reached
from rich.table import Table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="registered model")
    parser.add_argument("version", nargs="?", help="version number or alias that shall be the champion")
    parser.add_argument("--back", action="store_true", help="the champion before is it again")
    args = parser.parse_args()
    if "@" in args.name and not args.version:
        args.name, _, args.version = args.name.partition("@")
    if args.back and args.version:
        parser.error("give a version, or --back, not both.")
    out = console()
    return exit_code(out, lambda: run(args, Settings.from_env(), out))


@reached()
def run(args: argparse.Namespace, settings: Settings, out: Any) -> None:
    registry = Registry(settings)
    if not args.back and not args.version:
        out.print(overview(registry, args.name))
        return
    registry.resolve(args.name, args.version or CHAMPION)
    champion = registry.champion(args.name)
    was = f"version {champion.version}" if champion else "none"
    if args.back:
        now = registry.back(args.name)
    else:
        now = registry.resolve(args.name, args.version)
        if not Store.of(settings).exists(now.uri):
            raise StoreError(f"version {now.version} of {args.name} points at {now.uri}, where there is no artifact. Choose another one.")
        registry.set_champion(now)
    lines(out, {
        "was": was,
        CHAMPION: f"version {now.version} ({now.uri})",
        "a running server": f"curl -X POST http://127.0.0.1:8000/v1/models/{quote(now.name, safe='')}/load "
        f"-H 'Content-Type: application/json' -d {shlex.quote(json.dumps({'version': now.version}))}",
    })  # fmt: skip


def overview(registry: Registry, name: str) -> Table:
    """All versions, the newest first."""
    if name not in registry.models():
        registry.resolve(name)  # says what there is
    table = Table(title=f"{name} (champions so far: {', '.join(registry.champions(name)) or 'none'})", title_justify="left")
    for heading in ("version", "aliases", "area", "recipe", "verdict"):
        table.add_column(heading)
    for version in registry.versions(name, {}):
        table.add_row(version.version, ", ".join(version.aliases), *(version.tags.get(key, "") for key in ("area", "recipe", "verdict")))
    return table


if __name__ == "__main__":
    sys.exit(main())
