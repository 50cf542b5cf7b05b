"""The code blocks of a page, their marks, and how their output is compared.

A mark is an HTML comment on the line before a block, which readers do not see. CONTRIBUTING.md describes the marks.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

RUNNABLE = ("bash", "sh", "console", "python")
RELATIVE_TOLERANCE, ABSOLUTE_TOLERANCE, PERCENT_TOLERANCE = 0.05, 0.02, 2.0  # the last for numbers before a %

FENCE = re.compile(r"( *)(```+)([\w-]*)")
MARK = re.compile(r" *<!-- *(\w+)(?:: *(.*?))? *-->$")
SETUP = re.compile(r" *<!-- setup$")
OPTION = re.compile(r"server|fails|needs [\w.-]+")
CONTAINER = re.compile(r"[-*+] |\d+\. |!!!|\?\?\?|===")  # an indented line after these is not a code block
NUMBER = r"\d+(?:\.\d+)?(?:e[+-]?\d+)?"
TOKEN = re.compile(rf"({NUMBER}|\.\.\.|\n?\0\n?)")  # \0 stands for any lines


@dataclass(frozen=True)
class Block:
    """A code block.

    Attributes:
        line: of the fence.
        mark: what to do with it; "" if it has none.
        detail: what follows the colon of the mark.
        language: of the fence.
        text: without the indentation of the fence.
    """

    line: int
    mark: str
    detail: str
    language: str
    text: str

    @property
    def options(self) -> list[str]:
        """The options of the mark `run`."""
        return [option.strip() for option in self.detail.split(",")] if self.detail else []

    @property
    def mistake(self) -> str | None:
        """What is wrong with the mark."""
        match self.mark:
            case "skip" | "file":
                return None if self.detail else f"`{self.mark}` without a reason or a name"
            case "run" if self.language not in RUNNABLE:
                return f"a block in the language {self.language!r} cannot be run"
            case "run" if not all(map(OPTION.fullmatch, self.options)):
                return f"unknown option: `run: {self.detail}`"
            case "output" if self.detail not in ("", "numbers vary"):
                return f"unknown option: `output: {self.detail}`"
            case "run" | "output" | "setup":
                return None
        return f"a block with the mark {self.mark!r}" if self.mark else "a block without a mark"


def blocks(markdown: str) -> Iterator[Block]:
    """The code blocks of a page in order, including hidden ones and those without a fence."""
    lines = markdown.splitlines()
    previous, container = "", False
    position = 0
    while position < len(lines):
        start, line = position, lines[position]
        position += 1
        if SETUP.match(line):
            end = lines.index("-->", position)
            yield Block(start + 1, "setup", "", "bash", "\n".join(lines[position:end]))
            position = end + 1
        elif fence := FENCE.match(line):
            indent, ticks, language = fence.groups()
            end = lines.index(indent + ticks, position)
            text = "\n".join(each.removeprefix(indent) for each in lines[position:end])
            found = MARK.match(lines[start - 1]) if start else None
            mark, detail = (found[1], found[2] or "") if found else ("", "")
            yield Block(start + 1, mark, detail, language, text)
            position = end + 1
        elif line.startswith("    ") and not previous.strip() and not container:
            yield Block(start + 1, "", "", "", line)
        elif line and not line.startswith(" "):
            container = CONTAINER.match(line) is not None
        previous = line


def mistakes(markdown: str) -> list[str]:
    """What is wrong with the marks of a page."""
    found = []
    follows_run = False
    for block in blocks(markdown):
        if block.mistake:
            found.append(f"line {block.line}: {block.mistake}")
        elif block.mark == "output" and not follows_run:
            found.append(f"line {block.line}: an output that does not follow a block that is run")
        follows_run = block.mark == "run"
    return found


def commands(console: str) -> Iterator[tuple[str, str]]:
    """The commands of a `console` block, which begin with `$ `, and the output that is shown below each."""
    for part in re.split(r"^\$ ", console, flags=re.MULTILINE)[1:]:
        lines = part.splitlines()
        count = 1 + next(index for index, line in enumerate(lines) if not line.endswith("\\"))
        yield "\n".join(line.removeprefix("> ") for line in lines[:count]), "\n".join(lines[count:])


def difference(expected: str, printed: str, *, numbers_vary: bool = False, as_json: bool = False) -> str | None:
    """How an output differs from what the page shows; None if it does not.

    Args:
        expected: `...` stands for anything within a line, and a line of `...` for any lines.
        printed: the output.
        numbers_vary: every number matches any other. Otherwise integers must be equal, and other numbers close.
        as_json: whether white space is ignored.
    """
    wanted = _compact(re.sub(r"^ *\.\.\. *$", "\0", expected, flags=re.MULTILINE), as_json)
    found = re.fullmatch("".join(map(_pattern, TOKEN.split(wanted))), _compact(printed, as_json))
    shown = f"expected:\n{expected}\nprinted:\n{printed}"
    if found is None:
        return shown
    if not numbers_vary:
        for number, actual in zip(re.finditer(NUMBER, wanted), found.groups(), strict=True):
            if not _close(number[0], actual, percent=wanted.startswith("%", number.end())):
                return f"{actual} is not close to {number[0]}\n{shown}"
    return None


def _compact(text: str, as_json: bool) -> str:
    if as_json:
        return re.sub(r"\s+", "", text)
    return "\n".join(" ".join(line.split()) for line in text.strip().splitlines())


def _pattern(token: str) -> str:
    if "\0" in token:
        return r"(?:.|\n)*?"
    if token == "...":
        return ".*?"
    return f"({NUMBER})" if re.fullmatch(NUMBER, token) else re.escape(token)


def _close(expected: str, actual: str, *, percent: bool) -> bool:
    if expected.isdecimal() or actual.isdecimal():
        return expected == actual
    tolerance = max(ABSOLUTE_TOLERANCE, RELATIVE_TOLERANCE * float(expected))
    return abs(float(expected) - float(actual)) <= (PERCENT_TOLERANCE if percent else tolerance)
