"""Runs the code blocks of a page in order, as a reader in a fresh clone of the repository would."""

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import httpx

from tests.marked_blocks import Block, blocks, commands, difference
from tests.servers import free_port, is_ready, wait_until

ROOT = Path(__file__).resolve().parents[1]
NOT_COPIED = (".git", ".venv", "build", "*_cache", ".hypothesis", "__pycache__", "*.so", "*.egg-info")
PORTS = re.compile(r"\b800\d\b")  # in blocks and in output; replaced by free ones

# Runs Python blocks in one namespace, in the folder and with the variables of the page's shell.
PYTHON = """
import os, sys, traceback
names = {"__name__": "__main__"}
control = os.fdopen(os.dup(1), "w", buffering=1)
for line in sys.stdin:
    script, output = line.split()
    os.chdir(open(output + ".folder").read().rstrip("\\n"))
    os.environ.update(each.split("=", 1) for each in open(output + ".variables").read().split("\\0") if "=" in each)
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    status = 0
    try:
        exec(compile(open(script).read(), script, "exec"), names)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    control.write(f"{status}\\n")
"""


class PageReader:
    """A shell, a Python process and a server for the blocks of one page."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="rednet-page-"))
        self._ports: dict[str, str] = {}
        clone = self._folder / "clone"
        shutil.copytree(ROOT, clone, symlinks=True, ignore=shutil.ignore_patterns(*NOT_COPIED))
        _link_environment(clone / ".venv")
        (self._folder / ".curlrc").write_text("silent\nshow-error\n")
        variables = os.environ | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "CURL_HOME": str(self._folder),
            "REDNET_PORT": self._port("8000"),
            "REPO": str(ROOT),
        }
        self._processes = [
            subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                cwd=clone,
                env=variables,
                start_new_session=True,
            )
            for command in (["bash"], [sys.executable, "-u", "-c", PYTHON])
        ]
        self._shell, self._python = self._processes
        self._server: int | None = None
        self._count = 0

    def __enter__(self) -> "PageReader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        groups = [process.pid for process in self._processes]  # they have started others
        for group in groups if self._server is None else [self._server, *groups]:
            with suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
        for process in self._processes:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                assert pipe
                pipe.close()
        shutil.rmtree(self._folder)

    def read(self, markdown: str) -> None:
        """Run the blocks of a page. Fails where one fails, or prints something else than the page shows."""
        printed: str | None = None  # None: the block was skipped
        for block in blocks(markdown):
            where = f"line {block.line}"
            match block.mark:
                case "setup":
                    self._run(block, where)
                case "file":
                    path = self._working_folder() / block.detail
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_text(self._with_free_ports(block.text) + "\n")
                case "run":
                    printed = self._run(block, where) if not _missing(block) else None
                case "output" if printed is not None:
                    vary = block.detail == "numbers vary"
                    found = difference(block.text, printed, numbers_vary=vary, as_json=block.language == "json")
                    assert found is None, f"{where}: {found}"

    def _run(self, block: Block, where: str) -> str:
        if "server" in block.options:
            self._serve(block.text, where)
            return ""
        if block.language == "console":
            for command, expected in commands(block.text):
                found = difference(expected, self._run_in_shell(command, where, fails="fails" in block.options))
                assert found is None, f"{where}: {found}"
            return ""
        if block.language == "python":
            return self._run_in_python(block, where)
        return self._run_in_shell(block.text, where, fails="fails" in block.options)

    def _run_in_shell(self, text: str, where: str, *, fails: bool = False) -> str:
        """Run commands in the shell. Unless they are to fail, the first that fails ends the shell."""
        script, output = self._files(text)
        source = f"source {script} </dev/null >{output} 2>&1"
        self._tell(
            self._shell, f"{{ {source}; }} && echo 0 || echo 1" if fails else f"set -e; {source}; set +e; echo 0"
        )
        status = self._hear(self._shell)
        printed = self._with_known_ports(output.read_text(errors="replace"))
        assert status == ("1" if fails else "0"), f"{where}: {'did not fail' if fails else 'failed'}\n{printed}"
        return printed

    def _run_in_python(self, block: Block, where: str) -> str:
        script, output = self._files(block.text)
        self._tell(self._shell, f"pwd >{output}.folder; env -0 >{output}.variables; echo 0")
        self._hear(self._shell)
        self._tell(self._python, f"{script} {output}")
        status = self._hear(self._python)
        printed = self._with_known_ports(output.read_text(errors="replace"))
        failed = "fails" in block.options
        assert status == ("1" if failed else "0"), f"{where}: {printed}"
        return printed

    def _serve(self, text: str, where: str) -> None:
        """Start a server as in a second terminal. The one before has been stopped there."""
        self.stop_server()
        script, output = self._files(text)
        # With job control, so that it is a process group of its own.
        self._tell(self._shell, f"set -m; ( source {script} ) </dev/null >{output} 2>&1 & set +m; echo $!")
        self._server = server = int(self._hear(self._shell))
        with httpx.Client(base_url=f"http://127.0.0.1:{self._port('8000')}") as client:
            wait_until(lambda: is_ready(client) or not _runs(server), f"{where}: the server")
        assert _runs(server), f"{where}: the server ended\n{output.read_text()}"

    def stop_server(self) -> None:
        """Ctrl-C in the server's terminal."""
        if (server := self._server) is not None:
            self._server = None
            os.killpg(server, signal.SIGINT)
            wait_until(lambda: not _runs(server), "the server to stop")

    def _working_folder(self) -> Path:
        self._tell(self._shell, "pwd")
        return Path(self._hear(self._shell))

    def _files(self, text: str) -> tuple[Path, Path]:
        """A new file with the text, and the name of one for its output."""
        self._count += 1
        script = self._folder / f"block{self._count}"
        script.write_text(self._with_free_ports(text) + "\n")
        return script, self._folder / f"output{self._count}"

    def _tell(self, process: subprocess.Popen[str], line: str) -> None:
        assert process.stdin
        process.stdin.write(line + "\n")
        process.stdin.flush()

    def _hear(self, process: subprocess.Popen[str]) -> str:
        assert process.stdout
        return process.stdout.readline().strip()

    def _port(self, shown: str) -> str:
        return self._ports.setdefault(shown, str(free_port()))

    def _with_free_ports(self, text: str) -> str:
        return PORTS.sub(lambda found: self._port(found[0]), text)

    def _with_known_ports(self, text: str) -> str:
        for shown, port in self._ports.items():
            text = re.sub(rf"\b{port}\b", shown, text)
        return text


def _link_environment(folder: Path) -> None:
    """Make a virtual environment of links to this one. `make` takes it for finished."""
    folder.mkdir()
    for each in Path(sys.prefix).iterdir():
        (folder / each.name).symlink_to(each)
    for name in ("serve", "test"):
        (folder / name).unlink(missing_ok=True)
        (folder / name).touch()


def _missing(block: Block) -> list[str]:
    """The commands and Python modules that a block needs and that are not installed."""
    needed = [option.removeprefix("needs ") for option in block.options if option.startswith("needs ")]
    return [name for name in needed if not shutil.which(name) and not importlib.util.find_spec(name)]


def _runs(group: int) -> bool:
    """Whether a process of the group runs."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
