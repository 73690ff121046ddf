"""YAML files written by people. Every error names the line and what is allowed there.

The parser keeps YAML nodes, because only nodes have line numbers. Malicious files are errors too: aliases that expand to more than
fits into memory, and values for which YAML's constructors raise other exceptions.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from acip.errors import AcipError, cited
from acip.utils.coerce import did_you_mean

NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"  # of models, fleets, sweeps and arenas; names are parts of paths and queries
MAX_NODES = 100_000  # in a file, with all aliases expanded


class YamlFile:
    """One YAML file at `path`. Errors are raised as `error`, the exception class for this kind of file."""

    def __init__(self, path: str, error: type[AcipError]) -> None:
        self.path, self.error = path, error

    def fail(self, node: yaml.Node, message: str) -> AcipError:
        """Return, but do not raise, an error with the path and the line of `node`."""
        return self.error(f"{self.path}, line {node.start_mark.line + 1}: {message}")

    def root(self, label: str, needs: Iterable[str]) -> yaml.Node:
        """Read the file and return its root node. Errors call the file `label`; an empty file is an error that lists the fields `needs`."""
        try:
            root = yaml.compose(Path(self.path).read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        except (OSError, UnicodeDecodeError) as error:
            raise self.error(f"{label} {self.path!r} can't be read: {error}.") from error
        except (yaml.YAMLError, RecursionError) as error:
            raise self.error(f"{self.path} is not YAML: {error}") from error
        if root is None:
            raise self.error(f"{self.path} is empty; it needs {', '.join(needs)}.")
        if _expanded_count(root, {}) > MAX_NODES:
            raise self.fail(root, f"its aliases expand to more than {MAX_NODES:,} values, or contain themselves. Remove the aliases.")
        return root

    def name(self, node: yaml.Node, value: Any) -> str:
        """Return `value` if it is a valid name for paths and queries."""
        if not isinstance(value, str) or not re.fullmatch(NAME, value):
            allowed = "at most 128 characters, only letters, digits, '.', '_' and '-', and start with a letter or digit"
            raise self.fail(node, f"the name is {cited(value)}; it must have {allowed}.")
        return value

    def items(self, node: yaml.Node, allowed: Any, label: str) -> Iterator[tuple[str, tuple[yaml.Node, yaml.Node]]]:
        """Yield (key, (key node, value node)) of a mapping whose keys are in `allowed`, each at most once."""
        if not isinstance(node, yaml.MappingNode):
            raise self.fail(node, f"{label} must be a mapping of {', '.join(allowed)}.")
        keys: set[str] = set()
        for key_node, value_node in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else ""
            if key not in allowed:
                guess = did_you_mean(key, list(allowed))
                raise self.fail(key_node, f"unknown field {cited(key)} of {label}{guess}. Allowed: {', '.join(allowed)}.")
            if key in keys:
                raise self.fail(key_node, f"field {key!r} is given twice.")
            keys.add(key)
            yield key, (key_node, value_node)

    def value(self, node: yaml.Node) -> Any:
        """Return the Python value of `node`."""
        try:
            return yaml.SafeLoader("").construct_object(node, deep=True)
        except (yaml.YAMLError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
            # for example from int("x"), from a date in month 13, or from a tag on a node of another kind
            raise self.fail(node, f"this value can't be read: {error}") from error

    def checked(self, node: yaml.Node, make: Callable[..., Any], *args: Any) -> Any:
        """Return `make(*args)`. Its AcipError becomes an error at the line of `node`."""
        try:
            return make(*args)
        except AcipError as error:
            raise self.fail(node, str(error)) from error


def _expanded_count(node: yaml.Node, counts: dict[int, float]) -> float:
    """Return the number of nodes in `node` with all aliases expanded, or infinity if an alias contains itself."""
    if id(node) not in counts:
        counts[id(node)] = math.inf
        inner = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        counts[id(node)] = 1 + (0 if isinstance(node, yaml.ScalarNode) else sum(_expanded_count(part, counts) for part in inner))
    return counts[id(node)]
