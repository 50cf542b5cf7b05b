"""Markdown tables, and docstrings as Markdown."""

import inspect
import re
from collections.abc import Iterable, Iterator, Sequence

MARKUP = re.compile(r"(`[^`]*`)")
HEADINGS = {"Args": "Arguments", "Attributes": "Attributes", "Returns": "Returns", "Raises": "Raises"}


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table. Columns that are empty in all rows are left out."""
    cells = [[cell.replace("\n", " ").replace("|", "\\|") for cell in row] for row in rows]
    columns = [index for index in range(len(head)) if any(row[index] for row in cells)]
    lines = [[head[index] for index in columns], ["---"] * len(columns), *([row[i] for i in columns] for row in cells)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def sentence(text: str) -> str:
    """A text with a capital letter at its beginning."""
    return text[:1].upper() + text[1:]


def plain(text: str) -> str:
    """A text in which nothing but code counts as markup: `<` and `*` stay what they are."""
    parts = MARKUP.split(" ".join(text.split()))
    return "".join(part if index % 2 else _escaped(part) for index, part in enumerate(parts))


def _escaped(text: str) -> str:
    return re.sub(r"([*_\[])", r"\\\1", text.replace("<", "&lt;"))


def docstring(text: str) -> Iterator[str]:
    """The paragraphs of a docstring, with lists for its sections and code blocks for its examples."""
    paragraph: list[str] = []
    lines = inspect.cleandoc(text).splitlines()
    while lines:
        line = lines.pop(0)
        if line and line.endswith(":") and line[:-1] in {*HEADINGS, "Example", "Examples"}:
            section = []
            while lines and (lines[0].startswith("    ") or not lines[0]):
                section.append(lines.pop(0)[4:])
            yield from [plain(" ".join(paragraph))] if paragraph else []
            paragraph = []
            yield _section(line[:-1], "\n".join(section).strip())
        elif line:
            paragraph.append(line)
        elif paragraph:
            yield plain(" ".join(paragraph))
            paragraph = []
    if paragraph:
        yield plain(" ".join(paragraph))


def _section(name: str, text: str) -> str:
    if name.startswith("Example"):
        return f"```python\n{text}\n```"
    if name == "Returns":
        return f"**Returns:** {plain(text)}"
    items = re.split(r"\n(?! )", text)
    lines = (plain(re.sub(r"^([\w, ]+):", _as_code, item)) for item in items)
    return f"**{HEADINGS[name]}:**\n\n" + "\n".join(f"- {line}" for line in lines)


def _as_code(names: re.Match[str]) -> str:
    return ", ".join(f"`{name}`" for name in names[1].split(", ")) + ":"
