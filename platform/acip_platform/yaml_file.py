"""A YAML file that a person wrote: what is wrong in it is named with its line and what is allowed.

YAML nodes keep their lines; plain values don't. So the nodes are walked, and each complaint has a line.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from acip.errors import AcipError, EvaluationError, RecipeError
from acip.recipe import did_you_mean


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
        except yaml.YAMLError as error:
            raise self.error(f"{self.path} is not YAML: {error}") from error
        if root is None:
            raise self.error(f"{self.path} is empty; it needs {', '.join(needs)}.")
        return root

    def items(self, node: yaml.Node, allowed: Any, what: str) -> Iterator[tuple[str, tuple[yaml.Node, yaml.Node]]]:
        if not isinstance(node, yaml.MappingNode):
            raise self.fail(node, f"{what} must be a mapping of {', '.join(allowed)}.")
        seen: set[str] = set()
        for key_node, value_node in node.value:
            key = str(key_node.value)
            if key not in allowed:
                raise self.fail(
                    key_node, f"unknown field {key!r} of {what}{did_you_mean(key, list(allowed))}. Allowed: {', '.join(allowed)}."
                )
            if key in seen:
                raise self.fail(key_node, f"field {key!r} stands here twice.")
            seen.add(key)
            yield key, (key_node, value_node)

    def value(self, node: yaml.Node) -> Any:
        try:
            return yaml.SafeLoader("").construct_object(node, deep=True)
        except yaml.YAMLError as error:
            raise self.fail(node, str(error)) from error

    def checked(self, node: yaml.Node, make: Callable[..., Any], *args: Any) -> Any:
        try:
            return make(*args)
        except (RecipeError, EvaluationError) as error:
            raise self.fail(node, str(error)) from error
