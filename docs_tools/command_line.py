"""The commands of `rednet` and their options."""

import argparse
import re
from argparse import SUPPRESS
from collections.abc import Iterable, Mapping
from typing import Any

from docs_tools.markdown import plain, sentence, table
from rednet.service.cli.parser import make_parser
from rednet.service.settings import PREFIX, Settings

DEFAULT = re.compile(r"\s*\((?:([^()]*); )?default: (.*)\)$")  # the limits of a number, and the default


def commands() -> str:
    """A section for each command."""
    return "\n\n".join(_command(name, parser) for name, parser in _parsers().items())


def option_names() -> set[str]:
    """The options of `rednet` and of all commands."""
    parsers = (make_parser(), *_parsers().values())
    return {flag for parser in parsers for action in parser._actions for flag in action.option_strings}


def variable_names() -> set[str]:
    """The environment variables of `rednet serve`."""
    return {PREFIX + name.upper() for name in Settings.model_fields}


def _parsers() -> Mapping[str, argparse.ArgumentParser]:
    found = [each for each in make_parser()._actions if isinstance(each, argparse._SubParsersAction)]
    parsers: Mapping[str, argparse.ArgumentParser] = found[0].choices
    return parsers


def _actions(parser: argparse.ArgumentParser) -> Iterable[argparse.Action]:
    return (action for action in parser._actions if not isinstance(action, argparse._HelpAction))


def _command(name: str, parser: argparse.ArgumentParser) -> str:
    actions = list(_actions(parser))
    arguments = [action for action in actions if not action.option_strings]
    usage = " ".join([f"rednet {name}", *map(_shown, arguments), "[OPTIONS]"])
    parts = [f"## rednet {name}", plain(f"{sentence(parser.description or '')}."), f"```text\n{usage}\n```"]
    if arguments:
        rows = ((f"`{_shown(each)}`", plain(each.help or "")) for each in arguments)
        parts.append(table(("argument", "meaning"), rows))
    options = (_option(action, name) for action in actions if action.option_strings)
    parts.append(table(("option", "values", "default", "meaning"), options))
    return "\n\n".join(parts)


def _shown(action: argparse.Action) -> str:
    name = str(action.metavar or action.dest)
    return f"{name}..." if action.nargs == "+" else name


def _option(action: argparse.Action, command: str) -> tuple[str, str, str, str]:
    flag = " ".join([*action.option_strings, *([] if action.nargs == 0 else [str(action.metavar)])])
    help_text = (action.help or "").replace("%%", "%")
    default = DEFAULT.search(help_text)
    shown = "required" if action.required else _as_code(default[2]) if default else ""
    meaning = plain(DEFAULT.sub("", help_text))
    is_setting = command in ("serve", "predict") and action.dest in Settings.model_fields and action.default == SUPPRESS
    variable = f"<br>`{PREFIX}{action.dest.upper()}`" if command == "serve" else ""
    limits = (default and default[1]) or ""
    values = _values(Settings.model_json_schema()["properties"][action.dest]) if is_setting else limits
    return f"`{flag}`{variable}", values, shown, meaning


def _as_code(default: str) -> str:
    return default if " " in default or default in ("any", "none") else f"`{default}`"


def _values(schema: Mapping[str, Any]) -> str:
    """The values that a setting may have."""
    if "anyOf" in schema:
        return " or ".join(filter(None, map(_values, schema["anyOf"])))
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    if "minimum" in schema:
        return f"{_number(schema['minimum'])} to {_number(schema['maximum'])}"
    return ""


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:g}"
