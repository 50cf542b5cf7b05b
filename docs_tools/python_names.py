"""The names that `rednet` exports, with their signatures and docstrings."""

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path

import rednet
from docs_tools.markdown import docstring

DEPRECATED = "Deprecated"


def python_names() -> str:
    """A section for each exported name."""
    names = sorted((name for name in rednet.__all__ if name not in ("model", "service")), key=_functions_first)
    return "\n\n".join(part for name in names for part in _name(name))


def _functions_first(name: str) -> tuple[bool, str]:
    return name[0].isupper(), name


def _name(name: str) -> Iterator[str]:
    node = _definition(getattr(rednet, name))
    yield f"## {name}"
    if isinstance(node, ast.ClassDef):
        yield from _class(node)
    else:
        yield f"```python\n{_signature(node)}\n```"
        yield from docstring(ast.get_docstring(node) or "")


def _class(node: ast.ClassDef) -> Iterator[str]:
    made = next((each for each in node.body if isinstance(each, ast.FunctionDef) and each.name == "__init__"), None)
    if made:
        yield f"```python\n{_signature(made).replace('__init__(self, ', f'{node.name}(').removesuffix(' -> None')}\n```"
    elif fields := [each for each in node.body if isinstance(each, ast.AnnAssign)]:
        keyword_only = any("kw_only=True" in ast.unparse(each) for each in node.decorator_list)
        arguments = [*(["*"] if keyword_only else []), *map(_field, fields)]
        yield f"```python\n{_call(f'class {node.name}', arguments, '')}\n```"
    yield from docstring(ast.get_docstring(node) or "")
    for each in node.body:
        if not isinstance(each, ast.FunctionDef):
            continue
        text = ast.get_docstring(each) or ""
        called = each.name == "__call__"
        if (each.name.startswith("_") and not called) or not text or text.startswith(DEPRECATED):
            continue
        decorators = [ast.unparse(decorator) for decorator in each.decorator_list]
        name = f"{node.name}.{each.name}" if not called else f"Calling {node.name}"
        yield f"### {name}"
        yield f"```python\n{''.join(f'@{one}{chr(10)}' for one in decorators)}{_signature(each)}\n```"
        yield from docstring(text)


def _field(node: ast.AnnAssign) -> str:
    default = ast.unparse(node.value) if node.value else ""
    default = "..." if default.startswith("field(") else default
    return f"{ast.unparse(node.target)}: {ast.unparse(node.annotation)}{f' = {default}' if default else ''}"


def _definition(value: object) -> ast.ClassDef | ast.FunctionDef:
    """The definition in the source: its annotations are those that people wrote."""
    module = inspect.getmodule(value)
    assert module
    assert module.__file__
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    return next(
        node
        for node in tree.body
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == getattr(value, "__name__", "")
    )


def _signature(node: ast.FunctionDef) -> str:
    returned = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    arguments = node.args
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(positional) - len(arguments.defaults)) + list(arguments.defaults)
    shown = [_argument(each, default) for each, default in zip(positional, defaults, strict=True)]
    if arguments.vararg:
        shown.append(f"*{_argument(arguments.vararg, None)}")
    elif arguments.kwonlyargs:
        shown.append("*")
    pairs = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    shown += [_argument(each, default) for each, default in pairs]
    if arguments.kwarg:
        shown.append(f"**{_argument(arguments.kwarg, None)}")
    return _call(node.name, shown, returned)


def _argument(node: ast.arg, default: ast.expr | None) -> str:
    annotation = f": {ast.unparse(node.annotation)}" if node.annotation else ""
    equals = " = " if annotation else "="
    return f"{node.arg}{annotation}{f'{equals}{ast.unparse(default)}' if default else ''}"


def _call(name: str, arguments: list[str], returned: str) -> str:
    line = f"{name}({', '.join(arguments)}){returned}"
    if len(line) <= 100:
        return line
    return f"{name}(\n" + "".join(f"    {each},\n" for each in arguments) + f"){returned}"
