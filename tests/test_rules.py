"""Rules of the house that a machine can check: what never appears in the tree, and what works without torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PYTHON_FILES = sorted((ROOT / "diptych").rglob("*.py"))
BANNED_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
BANNED_CALLS = {"eval", "exec", "torch.load", "yaml.load", "yaml.unsafe_load", "os.system", "os.popen"}
BANNED_KEYWORDS = {("shell", True), ("trust_remote_code", True), ("allow_pickle", True), ("weights_only", False)}
WITHOUT_TORCH = ("kv", "sched", "transfer", "text", "obs", "api", "router", "group", "bench", "cli", "server")


def violations(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] in BANNED_MODULES)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in BANNED_MODULES:
            yield str(node.module)
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in BANNED_CALLS:
                yield name
            for keyword in node.keywords:
                if isinstance(keyword.value, ast.Constant) and (keyword.arg, keyword.value.value) in BANNED_KEYWORDS:
                    yield f"{keyword.arg}={keyword.value.value}"
        elif isinstance(node, ast.ExceptHandler) and node.type is None:
            yield "bare except"


def test_nothing_banned_is_in_the_package() -> None:
    found = {
        str(path.relative_to(ROOT)): names
        for path in PYTHON_FILES
        if (names := list(violations(ast.parse(path.read_text()))))
    }
    assert not found


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from dill import loads",
        "torch.load('x')",
        "eval('1')",
        "run(x, shell=True)",
        "try: f()\nexcept: g()",
    ],
)
def test_the_walker_sees_what_is_banned(code: str) -> None:
    assert list(violations(ast.parse(code)))


def test_only_small_rooms_know_torch() -> None:
    """Every room that must work without torch imports in a process where torch cannot be imported."""
    modules = [f"diptych.{name}" for name in WITHOUT_TORCH]
    for room in WITHOUT_TORCH:
        modules += [
            ".".join(path.relative_to(ROOT).with_suffix("").parts)
            for path in sorted((ROOT / "diptych" / room).rglob("*.py"))
            if path.name != "__init__.py" and "shims" not in path.parts
        ]
    code = f"import sys, importlib\nsys.modules['torch'] = None\nfor m in {modules!r}: importlib.import_module(m)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]


def test_a_module_is_short_enough_to_read() -> None:
    long = {str(path.relative_to(ROOT)): n for path in PYTHON_FILES if (n := len(path.read_text().splitlines())) > 500}
    assert not long


def test_seed_fixtures_are_whole() -> None:
    for name in ("sglang_pd.yaml", "llm-model.yaml", "request.sh", "reply.json"):
        assert (ROOT / "examples" / "seed" / name).stat().st_size > 100
