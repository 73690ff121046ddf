"""A YAML file that a person wrote: what is wrong in it is named with its line and what is allowed.

YAML nodes keep their lines; plain values don't. So the nodes are walked, and each complaint has a line. A file may also be
meant badly: aliases that unfold to more than any machine holds, values that make YAML's constructors fail in ways of their own.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from acip.errors import AcipError, cited
from acip.utils.coerce import did_you_mean

NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"  # of a registered model, a fleet, a sweep, an arena: part of paths and queries
NODES = 100_000  # of a file, aliases written out


class YamlFile:
    """`error` is what is raised about this kind of file."""

    def __init__(self, path: str, error: type[AcipError]) -> None:
        self.path, self.error = path, error

    def fail(self, node: yaml.Node, message: str) -> AcipError:
        return self.error(f"{self.path}, line {node.start_mark.line + 1}: {message}")

    def root(self, what: str, needs: Iterable[str]) -> yaml.Node:
        try:
            root = yaml.compose(Path(self.path).read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        except (OSError, UnicodeDecodeError) as error:
            raise self.error(f"{what} {self.path!r} can't be read: {error}.") from error
        except (yaml.YAMLError, RecursionError) as error:
            raise self.error(f"{self.path} is not YAML: {error}") from error
        if root is None:
            raise self.error(f"{self.path} is empty; it needs {', '.join(needs)}.")
        if _unfolded(root, {}) > NODES:
            raise self.fail(root, f"its aliases make more than {NODES:,} values of it, or hold themselves; write out what is meant.")
        return root

    def name(self, node: yaml.Node, value: Any) -> str:
        """A name that may stand in paths and queries."""
        if not isinstance(value, str) or not re.fullmatch(NAME, value):
            allowed = "only letters, digits, '.', '_' and '-', 128 at most, a letter or digit first"
            raise self.fail(node, f"the name {cited(value)} may hold {allowed}.")
        return value

    def items(self, node: yaml.Node, allowed: Any, what: str) -> Iterator[tuple[str, tuple[yaml.Node, yaml.Node]]]:
        if not isinstance(node, yaml.MappingNode):
            raise self.fail(node, f"{what} must be a mapping of {', '.join(allowed)}.")
        seen: set[str] = set()
        for key_node, value_node in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else ""
            if key not in allowed:
                guess = did_you_mean(key, list(allowed))
                raise self.fail(key_node, f"unknown field {cited(key)} of {what}{guess}. Allowed: {', '.join(allowed)}.")
            if key in seen:
                raise self.fail(key_node, f"field {key!r} stands here twice.")
            seen.add(key)
            yield key, (key_node, value_node)

    def value(self, node: yaml.Node) -> Any:
        try:
            return yaml.SafeLoader("").construct_object(node, deep=True)
        except (yaml.YAMLError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
            # of int("x"), of dates in month 13, of tags on what they don't fit
            raise self.fail(node, f"this can't be read: {error}") from error

    def checked(self, node: yaml.Node, make: Callable[..., Any], *args: Any) -> Any:
        try:
            return make(*args)
        except AcipError as error:
            raise self.fail(node, str(error)) from error


def _unfolded(node: yaml.Node, known: dict[int, float]) -> float:
    """How many nodes there are under `node`, aliases written out; infinitely many where one holds itself."""
    if id(node) not in known:
        known[id(node)] = math.inf
        inner = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        known[id(node)] = 1 + (0 if isinstance(node, yaml.ScalarNode) else sum(_unfolded(part, known) for part in inner))
    return known[id(node)]
