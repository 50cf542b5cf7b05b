"""Finds the one checkpoint in a folder, such as a volume that holds a model. PyTorch is not imported here, so that the
server can report a wrong folder at once."""

from pathlib import Path

SUFFIXES = (".safetensors", ".pth", ".pdparams")
MAX_LISTED = 20


def checkpoint_in(folder: Path) -> Path:
    """The one checkpoint directly in a folder. Hidden files do not count.

    Raises:
        ValueError: there is none, or there are several. The message lists what was found.
        OSError: the folder cannot be read.
    """
    files = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    found = [path for path in files if path.name.lower().endswith(SUFFIXES) and path.is_file()]
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"{folder} holds {len(found)} checkpoints, not one: {_listed(found)}")
    holds = f"it holds {_listed(files)}" if files else "it is empty"
    raise ValueError(f"{folder} holds no checkpoint ({', '.join(SUFFIXES)}); {holds}")


def _listed(paths: list[Path]) -> str:
    rest = f" and {len(paths) - MAX_LISTED} more" if len(paths) > MAX_LISTED else ""
    return ", ".join(path.name + "/" * path.is_dir() for path in paths[:MAX_LISTED]) + rest
