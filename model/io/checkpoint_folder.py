"""Finds a checkpoint by its path, which may be that of a folder, such as a volume that holds a model. PyTorch is not
imported here, so that the server can report a wrong path at once."""

from pathlib import Path

from rednet.model.io.output_files import TRAINING_SUFFIX

SUFFIXES = (".safetensors", ".pth", ".pdparams")
MAX_LISTED = 20


def find_checkpoint(path: Path) -> Path:
    """The file itself, which need not exist, or the one checkpoint directly in a folder. Hidden files do not count.

    Raises:
        ValueError: the folder holds none or several, and the message lists what was found; or the file does not exist
            because its training has not finished.
        OSError: the folder cannot be read.
    """
    if path.is_dir():
        return _checkpoint_in(path)
    state = path.with_name(path.name + TRAINING_SUFFIX)
    if not path.exists() and state.is_file():
        raise ValueError(
            f"{path} does not exist yet, because its training has not finished; repeat the rednet train command to "
            f"finish it. {state.name} has weights, but no class names, input size or calibration"
        )
    return path


def _checkpoint_in(folder: Path) -> Path:
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
