"""Every key of `--set`, `--config` and `config=`, from the docstrings of `xmc_midx.config`.

python scripts/document_config.py > docs/configuration.md
"""

from __future__ import annotations

import ast
import inspect
import itertools
import json
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from xmc_midx.config import Config

HEAD = """# Configuration

What `--set section.key=value` sets, a YAML file for `--config` holds and `config=` in Python takes: sections and their
keys. `auto` is derived from the data, and the run's `config.yaml` says what came out.
(`python scripts/document_config.py` writes this page.)

```yaml
training: {epochs: 20, seed: 7}
model:
  dim: 256
```
"""
TABLE = "| key | default | may be | |\n| --- | --- | --- | --- |\n"
NAMES = {bool: "true or false", int: "whole number", float: "number", str: "text"}
SIGNS = ((Gt, "gt", ">"), (Ge, "ge", ">="), (Lt, "lt", "<"), (Le, "le", "<="))
BAR = "\\|"
BEYOND = 2**62
"""A bound that nobody meets."""


def descriptions(section: type[BaseModel]) -> dict[str, str]:
    """The string behind each key in the source."""
    (tree,) = ast.parse(inspect.getsource(section)).body
    assert isinstance(tree, ast.ClassDef)
    found, key = {}, None
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            key = node.target.id
        elif key is not None and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            found[key] = " ".join(str(node.value.value).split())
    return found


def values(kind: Any, bounds: tuple[Any, ...] = ()) -> Iterator[str]:
    """What a key may be, in words."""
    if hasattr(kind, "__metadata__"):
        inner = [data.metadata if isinstance(data, FieldInfo) else [data] for data in kind.__metadata__]
        yield from values(get_args(kind)[0], (*bounds, *itertools.chain(*inner)))
    elif get_origin(kind) is Literal:
        yield from (f"`{value}`" for value in get_args(kind))
    elif kind is type(None):
        yield "`null`"
    elif get_args(kind):
        for one in get_args(kind):
            yield from values(one, bounds)
    else:
        limits = [(sign, getattr(b, name)) for b in bounds for one, name, sign in SIGNS if isinstance(b, one)]
        said = " and ".join(f"{sign} {limit:g}" for sign, limit in limits if abs(limit) < BEYOND)
        yield f"{NAMES[kind]} {said}".strip()


def page() -> str:
    parts = [HEAD]
    for section, info in Config.model_fields.items():
        kind = info.annotation
        assert isinstance(kind, type) and issubclass(kind, BaseModel)
        said = descriptions(kind)
        parts.append(f"\n## {section}\n\n{inspect.getdoc(kind)}\n\n{TABLE}")
        for key, field in kind.model_fields.items():
            default = json.dumps(field.default).strip('"')
            may_be = ", ".join(dict.fromkeys(values(field.annotation, tuple(field.metadata))))
            parts.append(f"| `{key}` | `{default}` | {may_be} | {said[key].replace('|', BAR)} |\n")
    return "".join(parts)


if __name__ == "__main__":
    print(page(), end="")
