"""YAML as recipes are written in: plain values only, each key once, and no more of them than a recipe could have.

Three things differ from PyYAML's safe loader. A key that stands twice is refused, not overwritten; dates are text; and
aliases that stand for more values than a recipe has are refused before they are put in place, as a few hundred bytes of
them can stand for billions.
"""

from __future__ import annotations

from typing import Any, ClassVar

import yaml

from innerloop.errors import InputError

MOST_VALUES = 100_000
DATE, *OTHERS = (f"tag:yaml.org,2002:{name}" for name in ("timestamp", "binary", "omap", "pairs", "set"))


class Loader(yaml.SafeLoader):
    """PyYAML's, but for dates, which are text, and for kinds of values that no recipe has."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {
        first: [(tag, pattern) for tag, pattern in found if tag != DATE]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    yaml_constructors: ClassVar[dict[Any, Any]] = {
        tag: made for tag, made in yaml.SafeLoader.yaml_constructors.items() if tag not in (DATE, *OTHERS)
    }


def read_yaml(text: str, origin: str) -> Any:
    """Return what YAML text says.

    Args:
        text: the text.
        origin: where it is written, for messages: a file or an option.

    Raises:
        InputError: it is no YAML, names a key twice, or stands for too much.
    """
    try:
        loader = Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _check(node, origin)
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        where = "" if error.problem_mark is None or "\n" not in text else f" in line {error.problem_mark.line + 1}"
        reason = f"{error.problem or error.context}{where}"
        raise InputError(f"{origin} is not valid YAML: {reason}") from None
    except RecursionError:
        raise InputError(f"{origin} holds lists within lists, too deep to read: flatten them") from None
    except InputError:
        raise
    except (yaml.YAMLError, ValueError, KeyError) as error:  # a character that no text has, a number of 5000 digits
        raise InputError(f"{origin} is not valid YAML: {' '.join(str(error).split())[:200]}") from None


def _check(node: yaml.Node, origin: str) -> None:
    """Refuse a key that stands twice, an alias within itself, and more values than a recipe has."""
    sizes: dict[int, int] = {}
    open_: set[int] = set()

    def size(node: yaml.Node) -> int:
        if id(node) in open_:
            raise InputError(f"{origin} has an alias (*NAME) within what it stands for: write its value instead")
        if id(node) not in sizes:
            open_.add(id(node))
            if isinstance(node, yaml.MappingNode):
                _check_keys(node, origin)
                inner = [part for pair in node.value for part in pair]
            else:
                inner = node.value if isinstance(node, yaml.SequenceNode) else []
            sizes[id(node)] = 1 + sum(map(size, inner))
            open_.discard(id(node))
        if sizes[id(node)] > MOST_VALUES:
            raise InputError(f"{origin} stands for more than {MOST_VALUES} values: write fewer aliases (*NAME)")
        return sizes[id(node)]

    size(node)


def _check_keys(node: yaml.MappingNode, origin: str) -> None:
    seen = set()
    for key, _ in node.value:
        name = (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else id(key)
        if name in seen:
            line = key.start_mark.line + 1
            raise InputError(f"{origin} names '{key.value}' twice, again in line {line}: keep one of them")
        seen.add(name)
