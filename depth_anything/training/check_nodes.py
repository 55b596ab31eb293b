"""Check the nodes of a config: mappings with a `_target_`, the class that Hydra builds from them."""

import inspect
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from depth_anything.errors import UserError
from depth_anything.training.check_trainer import SET_BY_RUN
from depth_anything.training.value_rules import format_value

#: Arguments that run.py passes to a node itself.
PASSED_BY_RUN = {
    "module": ("model", "frozen", "data", "networks"),
    "data": ("micro_batch", "patch", "teacher"),
}


def parse_nodes(value: Any, path: str) -> dict[str, Any]:
    """Validate the nodes of `callbacks` or `logger`, {NAME: {_target_: CLASS, ARGUMENT: VALUE}}.

    `logger` may also be one node itself, and may hold `project`, which its nodes refer to.
    """
    hint = f"type '+{path}.NAME._target_=package.module.Class'"
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise UserError(f"{path}={format_value(value)} must be {{NAME: node}}", hint)
    if path == "logger" and "_target_" in value:
        _check_node(value, path)
        return dict(value)
    for name, node in value.items():
        if isinstance(node, Mapping):
            _check_node(node, f"{path}.{name}")
        elif not (path == "logger" and name == "project") and node is not None:
            raise UserError(f"{path}.{name}={format_value(node)} is no node with a _target_", hint)
    return {str(name): node for name, node in value.items() if node is not None}


def _check_node(node: Mapping[str, Any], path: str) -> None:
    """Check that the class of a node can be imported and takes the arguments of the node.

    Raises:
        UserError: Naming the node, and the class or argument that is wrong.
    """
    target = node.get("_target_")
    if not isinstance(target, str):
        raise UserError(f"{path} has no _target_", f"type +{path}._target_=package.module.Class")
    parameters = target_parameters(target, path)
    names = ", ".join(parameters)
    for name in node:
        if not str(name).startswith("_") and not takes_argument(target, str(name), path):
            raise UserError(f"{path}.{name}: {target} has no argument {name}; it has {names}")
    if node.get("_partial_") or node.get("_args_"):
        return
    for name, parameter in parameters.items():
        optional = parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        if not optional and parameter.default is parameter.empty and name not in node:
            raise UserError(f"{path}: {target} needs the argument {name}", f"type +{path}.{name}=VALUE")


def takes_argument(target: Any, name: str, where: str) -> bool:
    """Return whether the class that a section names takes an argument of this name from the config."""
    if not isinstance(target, str) or name in PASSED_BY_RUN.get(where, ()):
        return False
    if where == "trainer" and name in SET_BY_RUN:
        return True  # check_trainer names the key to use instead
    parameters = target_parameters(target, where)
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def target_parameters(target: str, where: str) -> Mapping[str, inspect.Parameter]:
    """Import the class that a `_target_` names and return its parameters.

    Raises:
        UserError: If there is no such class.
    """
    module, _, name = target.rpartition(".")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"{where}._target_={target} cannot be imported ({error})",
            f"type {where}._target_=package.module.Class",
        ) from error
    try:
        return inspect.signature(found).parameters
    except (ValueError, TypeError) as error:  # a class of C, or no class
        raise UserError(
            f"{where}._target_={target} is nothing that Hydra can build ({error})",
            f"type {where}._target_=package.module.Class",
        ) from error
