"""Writes the generated sections of the reference: python -m docs_tools"""

from docs_tools.pages import REFERENCE, updated

for path in sorted(REFERENCE.glob("*.md")):
    before = path.read_text(encoding="utf-8")
    after = updated(before)
    if after != before:
        path.write_text(after, encoding="utf-8")
        print(f"{path.relative_to(REFERENCE.parents[1])}: updated")
