"""The code blocks of README and documentation run, and print what the pages show."""

import pytest

from tests.marked_blocks import blocks, commands, difference, mistakes
from tests.page_reader import ROOT, PageReader

FOLDERS = ("start", "tutorials", "how-to")
PAGES = [
    "README.md",
    *sorted(str(path.relative_to(ROOT)) for name in FOLDERS for path in ROOT.glob(f"docs/{name}/*.md")),
]

PAGE = """
# A page
<!-- setup
touch photo.jpg
-->
- In a list:
  <!-- run -->
  ```bash
  cd service/http/page
  ls ../../../photo.jpg
  export GREETING=hello
  ```
  <!-- output -->
  ```text
  ../../../photo.jpg
  ```

<!-- run -->
```python
import os
print(os.environ["GREETING"], os.getcwd()[-17:], 0.5)
```
<!-- output -->
```text
hello service/http/page 0.49
```
<!-- file: client.py -->
```python
print("port 8000")
```
<!-- run -->
```console
$ python \\
> client.py
port 8000
$ ls client.py
client.py
```
<!-- run: fails -->
```bash
rednet serve --checkpoint nothing
```
<!-- output -->
```text
rednet: ...nothing...
```
<!-- run: needs no-such-command -->
```bash
no-such-command
```
<!-- output -->
```text
never compared
```
<!-- skip: would take long -->
```bash
false
```
"""


@pytest.mark.parametrize("page", PAGES)
def test_blocks_of_page_are_marked(page: str) -> None:
    """No block is forgotten."""
    assert not mistakes((ROOT / page).read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", PAGES)
def test_blocks_of_page_run_and_print_what_it_shows(page: str) -> None:
    """In order, against a real server."""
    with PageReader() as reader:
        reader.read((ROOT / page).read_text(encoding="utf-8"))


def test_every_mark_has_its_effect() -> None:
    """One page with all of them."""
    assert not mistakes(PAGE)
    with PageReader() as reader:
        reader.read(PAGE)


def test_server_is_ready_before_the_next_block_and_is_replaced_by_the_next_server() -> None:
    """On a free port, which blocks and outputs call 8000."""
    first, second = (
        f"<!-- run: server -->\n```bash\nrednet serve --model-name {name}\n```\n"
        "<!-- run -->\n```bash\ncurl http://localhost:8000/v2/models/first\n```\n"
        f"<!-- output -->\n```json\n{output}\n```\n"
        for name, output in (("first", '{\n  "name": "first",\n  ...\n}'), ("second", '{"error": ...}'))
    )
    with PageReader() as reader:
        reader.read(first + second)
        with pytest.raises(AssertionError, match=r"line 2: the server ended\n[^\0]*--devise"):
            reader.read(first.replace("--model-name", "--devise"))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("../../../photo.jpg\n  ```\n\n", "photo.jpg\n  ```\n\n"),
        ("page 0.49", "page 0.4"),
        ("$ ls client.py\nclient.py", "$ ls client.py\nserver.py"),
        ("rednet serve --checkpoint nothing", "rednet --version"),
        ("export GREETING=hello", "export GREETING=hello\n  false"),
        ("import os\n", "import os, nothing\n"),
    ],
)
def test_page_that_shows_something_else_fails(before: str, after: str) -> None:
    """So that a wrong page is noticed."""
    assert before in PAGE
    with PageReader() as reader, pytest.raises(AssertionError, match="line "):
        reader.read(PAGE.replace(before, after))


@pytest.mark.parametrize(
    "text",
    [
        "```bash\nls\n```",
        "text\n\n    ls\n",
        "<!-- skip -->\n```bash\nls\n```",
        "<!-- run: serve -->\n```bash\nls\n```",
        "<!-- run -->\n```yaml\na: 1\n```",
        "<!-- output -->\n```text\na\n```",
        "<!-- rnu -->\n```bash\nls\n```",
        "<!-- run -->\n\n```bash\nls\n```",
    ],
)
def test_mark_that_is_missing_or_wrong_is_a_mistake(text: str) -> None:
    """Each of these has one."""
    assert len(mistakes(text)) == 1


def test_indented_text_in_a_list_is_not_a_block() -> None:
    """It is a paragraph of the list's item."""
    assert not list(blocks("1. one\n\n    more of it\n"))


def test_console_block_is_split_into_commands() -> None:
    """Each with its output."""
    assert list(commands("$ a \\\n> b\n1\n2\n$ c\n")) == [("a \\\nb", "1\n2"), ("c", "")]


@pytest.mark.parametrize(
    ("expected", "printed"),
    [
        ("97.4%  tench", "97.3% tench"),
        ("0.0101", "0.0092"),
        ("a ... z", "a b c z"),
        ("a\n...\nz", "a\nb\nc\nz"),
        ("a\n...\nz", "a\nz"),
        ("id 12", "id 12\n"),
    ],
)
def test_output_that_is_close_enough(expected: str, printed: str) -> None:
    """What varies between machines, or is left out."""
    assert difference(expected, printed) is None


@pytest.mark.parametrize(
    ("expected", "printed"),
    [
        ("97.4%  tench", "94.3% tench"),
        ("0.97", "0.9"),
        ("a ... z", "a\nz"),
        ("id 12", "id 13"),
        ("1", "1.0"),
        ("a", "A"),
    ],
)
def test_output_that_differs(expected: str, printed: str) -> None:
    """What does not vary between machines."""
    assert difference(expected, printed) is not None


def test_output_whose_numbers_vary_must_have_numbers() -> None:
    """Any, in the same places."""
    assert difference("12 ms, 3.5%", "7.25 ms, 99%", numbers_vary=True) is None
    assert difference("12 ms, 3.5%", "some ms, 99%", numbers_vary=True) is not None


def test_json_may_be_laid_out() -> None:
    """White space does not count."""
    assert difference('{\n  "a": [1, 0.5, ...]\n}', '{"a":[1,0.51,3]}', as_json=True) is None
