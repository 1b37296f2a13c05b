"""From a file to a recipe; what is wrong with it is said in one line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from attar.errors import RecipeError
from attar.recipe.agent import AgentRecipe
from attar.recipe.base import Recipe, nearest
from attar.recipe.chat import ChatRecipe
from attar.recipe.classify import ClassifyRecipe

__all__ = ["TASKS", "load_recipe", "parse_recipe"]

TASKS: dict[str, type[Recipe]] = {"classify": ClassifyRecipe, "chat": ChatRecipe, "agent": AgentRecipe}


class _Loader(yaml.SafeLoader):
    """YAML whose keys are text: version 1.1 takes the key `on` for true."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping, as in any YAML but for keys that are spelled as truth values."""
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:bool":
                key.tag = "tag:yaml.org,2002:str"
        return super().construct_mapping(node, deep)


def _model_at(recipe: type[Recipe], location: Sequence[Any]) -> type[BaseModel] | None:
    """The recipe's model that holds the key at a pydantic error location, to find the names that it allows."""
    current: type[BaseModel] | None = recipe
    for part in location:
        if isinstance(part, int) or current is None:
            continue
        field = current.model_fields.get(part)
        if field is None:
            return None
        candidates = [field.annotation]
        current = None
        while candidates:
            candidate = candidates.pop()
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                current = candidate
                break
            candidates.extend(get_args(candidate))
    return current


def _explain(error: ValidationError, recipe: type[Recipe]) -> str:
    lines = []
    for item in error.errors():
        # A union adds the name of the branch that failed to the location; those are no keys of the user's.
        location = [p for p in item["loc"] if isinstance(p, int) or "[" not in str(p)]
        key = ".".join(str(p) for p in location)
        if item["type"] == "extra_forbidden":
            owner = _model_at(recipe, location[:-1])
            allowed = list(owner.model_fields) if owner else []
            lines.append(f"{key}: unknown key{nearest(str(location[-1]), allowed)}; allowed here: {', '.join(allowed)}")
        elif item["type"] == "missing":
            lines.append(f"{key}: required, but not set")
        elif item["type"] == "value_error":
            message = str(item["ctx"]["error"])
            lines.append(message if not key or message.startswith(key.split(".")[0] + ".") else f"{key}: {message}")
        elif item["type"] == "literal_error":
            expected = item["ctx"]["expected"]
            options = [option.strip(" '") for option in expected.replace(" or ", ",").split(",")]
            hint = nearest(str(item["input"]), options)
            lines.append(f"{key}: {item['input']!r} is not allowed{hint}; allowed: {expected}")
        elif item["type"] == "string_type" and isinstance(item["input"], bool | int | float):
            lines.append(f"{key}: YAML reads this as {item['input']!r}; a text is wanted, so put it in quotes")
        else:
            lines.append(f"{key}: {item['input']!r}: {item['msg'][0].lower() + item['msg'][1:]}")
    return "; ".join(dict.fromkeys(lines))


def parse_recipe(content: Any, origin: str, base: Path | None = None) -> Recipe:
    """Make a recipe from plain data; relative paths count from ``base``.

    Raises:
        RecipeError: one line that names the key, the value, what is allowed and the nearest right name.
    """
    if not isinstance(content, dict):
        raise RecipeError(f"{origin}: a recipe is a mapping of keys, this is {type(content).__name__}")
    kind = TASKS.get(str(content.get("task")))
    if kind is None:
        wanted = ", ".join(TASKS)
        raise RecipeError(
            f"{origin}: task: required, but not set; allowed: {wanted}"
            if "task" not in content
            else f"{origin}: task: {content['task']!r} is not allowed{nearest(str(content['task']), list(TASKS))}; "
            f"allowed: {wanted}"
        )
    try:
        recipe = kind.model_validate(content)
    except ValidationError as error:
        raise RecipeError(f"{origin}: {_explain(error, kind)}") from error
    return recipe if base is None else recipe.located(base)


def _override(content: dict[str, Any], assignment: str) -> None:
    key, separator, text = assignment.partition("=")
    if not separator or not key:
        raise RecipeError(f"--set {assignment}: write it as dotted.key=value")
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise RecipeError(f"--set {assignment}: the value is no YAML ({error})") from error
    *parents, last = key.split(".")
    current: Any = content
    for parent in parents:
        current = current.setdefault(parent, {})
        if not isinstance(current, dict):
            raise RecipeError(f"--set {assignment}: {parent} holds a value, not keys")
    current[last] = value


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file.

    Args:
        path: a YAML file.
        overrides: ``dotted.key=value`` strings, applied in order; values are YAML.

    Raises:
        RecipeError: the file is missing, is no YAML, or holds something that a recipe does not allow.
    """
    path = Path(path)
    try:
        content = yaml.load(path.read_text("utf-8"), _Loader)
    except FileNotFoundError as error:
        raise RecipeError(f"{path}: no such recipe; `attar init DIR` writes one") from error
    except IsADirectoryError as error:
        raise RecipeError(f"{path} is a folder; name the recipe file in it, {path / 'attar.yaml'}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: no YAML: {' '.join(str(error).split())}") from error
    content = {} if content is None else content
    if isinstance(content, dict):
        for assignment in overrides:
            _override(content, assignment)
    return parse_recipe(content, str(path), path.parent.resolve())
