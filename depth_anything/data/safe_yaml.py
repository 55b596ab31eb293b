"""Read untrusted YAML files: PyYAML's safe loader with limits on size, and without aliases."""

from typing import Any

import yaml

_MAX_NODES = 10_000
_MAX_SCALAR = 4096  # characters; YAML parses 1:2:3:… as a base-60 number, which takes hours if it is long


def load_yaml(data: bytes) -> Any:
    """Parse YAML in UTF-8; refuse duplicate keys, aliases and very large files.

    Nested aliases can expand exponentially and exhaust the memory.

    Raises:
        ValueError: With the line and what is wrong.
    """
    try:
        return _BoundedLoader.parse(data.decode("utf-8-sig"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        what = getattr(error, "problem", None) or error
        raise ValueError(f"{where}invalid YAML: {what}") from error


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
        """Refuse aliases and too many or too long values before they are built."""
        event, problem = self.peek_event(), ""
        self.nodes += 1
        if isinstance(event, yaml.AliasEvent):
            problem = f"*{event.anchor} is an alias: write out its value"
        elif self.nodes > _MAX_NODES:
            problem = f"more than {_MAX_NODES} values"
        elif isinstance(event, yaml.ScalarEvent) and len(event.value) > _MAX_SCALAR:
            problem = f"a value has more than {_MAX_SCALAR} characters"
        if problem:
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        """Build a dict; refuse duplicate keys."""
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f'the key "{key.value}" is duplicated', problem_mark=key.start_mark
                )
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else None)
        return super().construct_mapping(node, deep)
