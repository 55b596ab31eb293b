"""Yaml that comes from a disk: read as safe_load does, with limits on what it may expand to."""

from typing import Any

import yaml

_MAX_NODES = 10_000
_MAX_SCALAR = 4096  # characters; 1:2:3:… is a number to base 60 in yaml, which takes hours if it is long


def load_yaml(data: bytes) -> Any:
    """Read yaml in UTF-8. A key that comes twice, an alias, and more than anyone would write are refused.

    An alias stands for all of what it means, and ten of them of ten aliases each fill any memory.

    Raises:
        ValueError: Naming the line, and what is wrong with it.
    """
    try:
        return _BoundedLoader.parse(data.decode("utf-8-sig"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        what = getattr(error, "problem", None) or error
        raise ValueError(f"{where}this is no yaml: {what}") from error


class _BoundedLoader(yaml.SafeLoader):
    nodes = 0

    @classmethod
    def parse(cls, text: str) -> Any:
        loader = cls(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Refuse aliases, and more than anyone would write, before they are made."""
        event, problem = self.peek_event(), ""
        self.nodes += 1
        if isinstance(event, yaml.AliasEvent):
            problem = f"*{event.anchor} is an alias: write out what it stands for"
        elif self.nodes > _MAX_NODES:
            problem = f"it has more than {_MAX_NODES} values"
        elif isinstance(event, yaml.ScalarEvent) and len(event.value) > _MAX_SCALAR:
            problem = f"a value has more than {_MAX_SCALAR} characters"
        if problem:
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        """Make a dict of a mapping."""
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.MarkedYAMLError(problem=f'"{key.value}" comes twice', problem_mark=key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else None)
        return super().construct_mapping(node, deep)
