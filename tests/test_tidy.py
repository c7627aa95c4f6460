"""What a program can hold about style, so that people talk about design (docs: design STYLE, requirement R104)."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILE_LINES = 500
FUNCTION_LINES = 70
# Words that say nothing about what a thing is, and synonyms of the glossary's words.
BANNED = {"util", "utils", "helper", "helpers", "common", "misc", "manager", "worker", "master", "swarm", "cluster"}
# Outside terms that contain a banned word and cannot be renamed.
ALLOWED_NAMES = {"worker_serve"}
# Where text on stdout is the purpose.
PRINTS = ("meshnode/app/cli/", "meshnode/app/bench/", "meshnode/app/demo.py", "sim/commands.py", "tools/", "tests/")
# The one place that may catch everything: it runs the effects.
BROAD_EXCEPT = ("meshnode/app/runtime",)
# A path or address that exists on one person's machine only.
MACHINE_PATHS = re.compile(r"(?<![\w.])(/home/\w|/Users/\w|/root/|/work/|/tmp/\w|C:\\\\)")


def tracked(*suffixes: str) -> list[Path]:
    """Files of the checkout as git knows them, new ones included; ignored ones are nobody's style."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    paths = [ROOT / line for line in listed.splitlines() if line.endswith(suffixes)]
    return [path for path in paths if path.is_file()]


def sources(*folders: str) -> list[Path]:
    return [path for path in tracked(".py") if not folders or path.relative_to(ROOT).parts[0] in folders]


def where(path: Path, line: int = 0) -> str:
    return f"{path.relative_to(ROOT).as_posix()}:{line}"


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def words(name: str) -> set[str]:
    return set(re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower().split("_"))


def defined_names(path: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno


def test_there_is_something_to_hold() -> None:
    assert len(sources("meshnode")) > 10
    assert len(sources("tests")) > 3


def test_r104_no_source_file_is_above_its_line_budget() -> None:
    lengths = {where(path): len(path.read_text(encoding="utf-8").splitlines()) for path in sources()}
    assert {name: lines for name, lines in lengths.items() if lines > FILE_LINES} == {}


def test_no_function_is_above_its_line_budget() -> None:
    long = [
        f"{where(path, node.lineno)} {node.name}"
        for path in sources()
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (node.end_lineno or node.lineno) - node.lineno >= FUNCTION_LINES
    ]
    assert long == []


def test_no_name_uses_a_word_that_says_nothing() -> None:
    files = [where(path) for path in sources() if words(path.stem) & BANNED]
    names = [
        f"{where(path, line)} {name}"
        for path in sources("meshnode", "tools")
        for name, line in defined_names(path)
        if words(name) & BANNED and name not in ALLOWED_NAMES
    ]
    assert files + names == []


def swallows_everything(node: ast.AST) -> bool:
    """A broad handler that goes on; one that raises again, or ends the process, hides nothing."""
    if not isinstance(node, ast.ExceptHandler):
        return False
    if node.type is not None and not (
        isinstance(node.type, ast.Name) and node.type.id in {"Exception", "BaseException"}
    ):
        return False
    last = node.body[-1]
    ends = (
        isinstance(last, ast.Expr) and isinstance(last.value, ast.Call) and ast.unparse(last.value.func) == "os._exit"
    )
    return not (ends or (isinstance(last, ast.Raise) and last.exc is None))


def test_everything_is_caught_in_one_place_only() -> None:
    broad = [
        where(path, node.lineno)
        for path in sources("meshnode")
        if not path.relative_to(ROOT).as_posix().startswith(BROAD_EXCEPT)
        for node in ast.walk(parsed(path))
        if swallows_everything(node)
    ]
    assert broad == []


def test_nothing_prints_but_the_command_line() -> None:
    printing = [
        where(path, node.lineno)
        for path in sources("meshnode")
        if not path.relative_to(ROOT).as_posix().startswith(PRINTS)
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert printing == []


def test_an_ignored_type_error_names_its_code() -> None:
    bare = [
        where(path, number)
        for path in sources("meshnode")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if re.search(r"#\s*type:\s*ignore(?!\[)|#\s*noqa(?!:)", line)
    ]
    assert bare == []


def test_no_text_mentions_a_path_of_one_machine() -> None:
    files = [*tracked(".md", ".toml", ".lock", ".txt"), *sources("meshnode", "tools")]
    found = [
        where(path, number)
        for path in files
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if MACHINE_PATHS.search(line)
    ]
    assert found == []


def test_every_test_folder_is_a_package() -> None:
    """Two test files of one name would otherwise shadow each other."""
    folders = {path.parent for path in sources("tests")}
    assert [where(folder) for folder in sorted(folders) if not (folder / "__init__.py").exists()] == []


def test_tests_do_not_sleep() -> None:
    """Waiting for a condition with `sleep(0)` yields and is fine; waiting for time is not."""
    sleeping = [
        where(path, node.lineno)
        for path in sources("tests")
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and (node.func.value.id, node.func.attr) == ("time", "sleep")
    ]
    assert sleeping == []


def test_r101_a_run_that_collects_nothing_fails() -> None:
    command = [sys.executable, "-m", "pytest", "-k", "no_such_test", str(ROOT / "tests" / "app" / "test_config.py")]
    assert (
        subprocess.run(command, cwd=ROOT, check=False, capture_output=True).returncode
        == pytest.ExitCode.NO_TESTS_COLLECTED
    )


def readme_commands() -> list[str]:
    text = (ROOT / "README.md").read_text(encoding="utf-8") if (ROOT / "README.md").exists() else ""
    blocks = re.findall(r"```(?:sh|console|bash)\n(.*?)```", text, re.DOTALL)
    lines = [line.strip().removeprefix("$ ") for block in blocks for line in block.splitlines()]
    found = [re.match(r"(?:\./run|(?:\.venv/bin/)?meshnode) ([a-z]+)", line) for line in lines]
    return sorted({match[1] for match in found if match})


@pytest.mark.parametrize("command", readme_commands())
def test_every_command_of_the_readme_exists(command: str) -> None:
    from meshnode.app.cli.commands import application

    known = {info.name or (info.callback.__name__ if info.callback else "") for info in application.registered_commands}
    groups = {group.name for group in application.registered_groups}
    own = re.findall(r"^  ([a-z]+)\)", (ROOT / "run").read_text(encoding="utf-8"), re.MULTILINE)
    assert command in known | groups | set(own)
