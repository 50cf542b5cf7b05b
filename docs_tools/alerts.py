"""The alerts of docker/prometheus/alerts.yml."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from docs_tools.markdown import plain

ALERTS = Path(__file__).resolve().parents[1] / "docker/prometheus/alerts.yml"


def alerts() -> str:
    """A section for each alert: its severity, what is wrong, and what to do."""
    found: dict[str, list[dict[str, Any]]] = {}
    for rule in yaml.safe_load(ALERTS.read_text(encoding="utf-8"))["groups"][0]["rules"]:
        found.setdefault(rule["alert"], []).append(rule)
    return "\n\n".join(part for name, rules in found.items() for part in _section(name, rules))


def _section(name: str, rules: list[dict[str, Any]]) -> Iterator[str]:
    severities = " or ".join(f"`{rule['labels']['severity']}`" for rule in rules)
    delay = f", after {rules[0]['for']}" if "for" in rules[0] else ""
    annotations = rules[0]["annotations"]  # the same for each severity
    summary = re.sub(r"{{ \$(?:labels\.)?(\w+)[^}]*}}", r"`<\1>`", annotations["summary"])
    yield f"## {name}"
    yield f"{severities}{delay}: {plain(summary)}."
    yield f"**First:** {plain(annotations['action'])}"
