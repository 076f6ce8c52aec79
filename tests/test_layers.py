"""The architecture: which layer imports what, what runs without PyTorch, how long files get, what is never called."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "kandrt"
LAYERS: dict[str, set[str]] = {
    "engines": set(),
    "export": {"engines"},
    "runtime": {"engines"},
    "scripts": {"engines", "export", "runtime"},
}
FILES = sorted(path.relative_to(ROOT) for layer in LAYERS for path in (ROOT / layer).rglob("*.py"))

# Library -> the files that may import it, lazily or not; `if TYPE_CHECKING` may anywhere.
EXPORT_ONLY = r"export/.*"
MAY_IMPORT: dict[str, str] = {
    "torch": r"export/.*|scripts/train_miniature/.*|scripts/bench.*",  # as what trains, and as a contender's tensors
    "transformers": EXPORT_ONLY,
    "onnx": EXPORT_ONLY,
    "onnxscript": EXPORT_ONLY,
    "onnx_ir": EXPORT_ONLY,
    "huggingface_hub": EXPORT_ONLY,
    "diffusers": r"scripts/bench.*",  # as the contender of a benchmark
    "onnxruntime": r"engines/providers\.py",
    "onnxruntime_ep_openvino": r"engines/providers\.py",
    "onnxruntime_ep_nv_tensorrt_rtx": r"engines/providers\.py",
    "onnxruntime_ep_webgpu": r"engines/providers\.py",
    "openvino": r"engines/openvino\.py",
    "cupy": r"engines/.*",
    "tensorrt": r"engines/trt\.py",
    "tensorrt_rtx": r"engines/trt\.py",
}

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60


# What a file imports


class Imports(ast.NodeVisitor):
    """Dotted names that a file imports at any depth, as absolute names, with their lines."""

    def __init__(self, path: Path) -> None:
        self.folder = (PACKAGE, *path.parent.parts)
        self.found: list[tuple[str, int]] = []

    def visit_If(self, node: ast.If) -> None:
        if ast.unparse(node.test) not in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            self.generic_visit(node)
            return
        for other in node.orelse:
            self.visit(other)

    def visit_Import(self, node: ast.Import) -> None:
        self.found += [(alias.name, node.lineno) for alias in node.names]

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        base = ".".join([*self._above(node.level), *([node.module] if node.module else [])])
        self.found += [(f"{base}.{alias.name}", node.lineno) for alias in node.names]

    def visit_Call(self, node: ast.Call) -> None:
        if called(node) in ("importlib.import_module", "import_module", "__import__", "pytest.importorskip"):
            name = node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else None
            if isinstance(name, str):
                dots = len(name) - len(name.lstrip("."))
                self.found.append((".".join([*self._above(dots), name.lstrip(".")]), node.lineno))
        self.generic_visit(node)

    def _above(self, level: int) -> tuple[str, ...]:
        return self.folder[: len(self.folder) - level + 1] if level else ()


def called(node: ast.Call) -> str:
    return ast.unparse(node.func)


def imports(path: Path, source: str) -> list[tuple[str, int]]:
    visitor = Imports(path)
    visitor.visit(ast.parse(source))
    return visitor.found


def wrong_layers(path: Path, source: str) -> list[str]:
    own = path.parts[0]
    problems = []
    for name, line in imports(path, source):
        package, _, rest = name.partition(".")
        layer = rest.partition(".")[0]
        if package == PACKAGE and layer != own and layer not in LAYERS[own]:
            allowed = ", ".join(sorted(LAYERS[own])) or "no other layer"
            problems.append(f"{path}:{line}: imports {name}; {own} may import {allowed}")
    return problems


def wrong_libraries(path: Path, source: str) -> list[str]:
    return [
        f"{path}:{line}: imports {name}, which only {MAY_IMPORT[library]} may"
        for name, line in imports(path, source)
        for library in [name.partition(".")[0]]
        if library in MAY_IMPORT and not re.fullmatch(MAY_IMPORT[library], path.as_posix())
    ]


# What a file does


RUNS_ITS_INPUT = re.compile(
    r"(builtins\.)?(eval|exec|compile)"
    r"|os\.(system|popen)"
    r"|(c?[pP]ickle|dill|marshal|joblib)\.(loads?|Unpickler)"
)


def dangerous_calls(path: Path, source: str) -> list[str]:
    """Calls that may run what a file or a string says, and imports that would give them another name."""
    problems = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            wrong = [name for name in names if RUNS_ITS_INPUT.fullmatch(name) or name == "torch.load"]
            problems += [f"{path}:{node.lineno}: imports {name}" for name in wrong]
        elif isinstance(node, ast.Call):
            problems += [f"{path}:{node.lineno}: {problem}" for problem in call_problems(node)]
    return problems


def call_problems(node: ast.Call) -> Iterator[str]:
    name = called(node)
    settings = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords if keyword.arg}
    if RUNS_ITS_INPUT.fullmatch(name):
        yield f"calls {name}"
    if settings.get("shell", "False") != "False":
        yield f"{name} with shell={settings['shell']}"
    if settings.get("allow_pickle", "False") != "False":
        yield f"{name} with allow_pickle={settings['allow_pickle']}"
    if name == "torch.load" and settings.get("weights_only") != "True":
        yield "torch.load without weights_only=True"


def too_long(path: Path, source: str) -> list[str]:
    lines = len(source.splitlines())
    problems = [f"{path}: {lines} lines, at most {MAX_FILE_LINES}: split it by subject"] * (lines > MAX_FILE_LINES)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            # a command's signature is its list of options: the body counts
            length = (node.end_lineno or node.lineno) - node.body[0].lineno + 1
            if length > MAX_FUNCTION_LINES:
                problems.append(f"{path}:{node.lineno}: {node.name} has {length} lines, at most {MAX_FUNCTION_LINES}")
    return problems


RULES = [wrong_layers, wrong_libraries, dangerous_calls, too_long]


@pytest.mark.parametrize("rule", RULES)
def test_every_file_keeps_the_rules(rule: object) -> None:
    assert callable(rule)
    problems = [problem for path in FILES for problem in rule(path, (ROOT / path).read_text(encoding="utf-8"))]
    assert not problems, "\n" + "\n".join(problems)


@pytest.mark.parametrize(
    ("rule", "path", "source"),
    [
        (wrong_layers, "engines/a.py", "from ..runtime.images import open_image"),
        (wrong_layers, "engines/a.py", "from .. import runtime"),
        (wrong_layers, "runtime/a.py", "def f():\n    from ..export import weights"),
        (wrong_layers, "runtime/a.py", "import kandrt.export.weights"),
        (wrong_layers, "runtime/a.py", "from kandrt import export"),
        (wrong_layers, "runtime/a.py", "import importlib\nimportlib.import_module('kandrt.export')"),
        (
            wrong_layers,
            "runtime/a.py",
            "import_module('..export.weights', __package__)",
        ),
        (wrong_layers, "export/modules/a.py", "from ...runtime.images import open_image"),
        (wrong_layers, "export/a.py", "from ..scripts import cli"),
        (wrong_libraries, "runtime/a.py", "import torch.nn.functional as F"),
        (wrong_libraries, "runtime/a.py", "try:\n    from torch import Tensor\nexcept ImportError:\n    pass"),
        (wrong_libraries, "engines/a.py", "__import__('transformers')"),
        (wrong_libraries, "scripts/a.py", "def f():\n    import huggingface_hub.utils"),
        (wrong_libraries, "export/a.py", "import diffusers"),
        (wrong_libraries, "engines/a.py", "import onnxruntime as ort"),
        (wrong_libraries, "engines/a.py", "from openvino import Core"),
        (wrong_libraries, "runtime/a.py", "import cupy"),
        (wrong_libraries, "engines/trt_session.py", "import tensorrt_rtx as trt"),
        (wrong_libraries, "runtime/a.py", "if TYPE_CHECKING:\n    pass\nelse:\n    import torch"),
        (dangerous_calls, "export/a.py", "pickle.load(file)"),
        (dangerous_calls, "export/a.py", "pickle.Unpickler(file).load()"),
        (dangerous_calls, "export/a.py", "from pickle import loads as read"),
        (dangerous_calls, "export/a.py", "def f():\n    return eval('1')"),
        (dangerous_calls, "export/a.py", "exec('pass')"),
        (dangerous_calls, "export/a.py", "subprocess.run('ls', shell=True)"),
        (dangerous_calls, "export/a.py", "subprocess.run('ls', shell=quick)"),
        (dangerous_calls, "export/a.py", "os.system('ls')"),
        (dangerous_calls, "export/a.py", "numpy.load(file, allow_pickle=True)"),
        (dangerous_calls, "export/a.py", "torch.load(file)"),
        (dangerous_calls, "export/a.py", "torch.load(file, weights_only=False)"),
        (dangerous_calls, "export/a.py", "from torch import load"),
        (too_long, "export/a.py", "x = 1\n" * (MAX_FILE_LINES + 1)),
        (too_long, "export/a.py", "class A:\n  def f(self):\n" + "    x = 1\n" * (MAX_FUNCTION_LINES + 1)),
    ],
)
def test_the_rules_see(rule: object, path: str, source: str) -> None:
    assert callable(rule)
    assert len(rule(Path(path), source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        (
            "scripts/a.py",
            "from ..export.weights import Weights\nfrom ..runtime import images\nimport kandrt.engines",
        ),
        (
            "export/modules/a.py",
            "from ...engines.errors import A\nfrom ..weights import Weights\nfrom . import unet",
        ),
        ("export/a.py", "import torch\nnetwork.eval()\ntorch.load(file, weights_only=True)\nre.compile('a')"),
        ("runtime/a.py", "from .images import open_image\nfrom . import masks\nimport onnxruntime_tools"),
        ("runtime/a.py", "if TYPE_CHECKING:\n    import torch"),
        ("engines/providers.py", "import onnxruntime\nimport cupy"),
        ("engines/backends.py", "from .openvino import OpenVinoSession"),
        ("scripts/bench_contenders.py", "import diffusers"),
        ("export/a.py", "subprocess.run(['ls'], shell=False)\nexcept_this = pickle.UnpicklingError"),
        ("export/a.py", "def f():\n" + "    x = 1\n" * MAX_FUNCTION_LINES),
    ],
)
def test_the_rules_let_pass(path: str, source: str) -> None:
    assert not [problem for rule in RULES for problem in rule(Path(path), source)]


# Packaging


def test_packages_are_the_folders() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")  # by hand: Python 3.10 has no tomllib
    packages = re.search(r"^packages = \[(.*?)\]", text, re.DOTALL | re.MULTILINE)
    assert packages, "pyproject.toml: no line `packages = [...]`"
    folders = sorted({path.parent for path in FILES})
    wanted = [".".join((PACKAGE, *folder.parts)) for folder in folders]
    assert sorted(re.findall(r'"([^"]+)"', packages[1])) == sorted(wanted), "pyproject.toml: packages"
    for folder in folders:
        for name in ("__init__.py", "py.typed"):
            assert (ROOT / folder / name).is_file(), f"{folder}: {name} is missing"
    top = {path.parent.name for path in ROOT.glob("[!.]*/__init__.py")}
    assert top == set(LAYERS), "the repository's top level holds one folder a layer"


def test_no_file_without_a_subject() -> None:
    vague = [str(path) for path in FILES if path.stem in ("utils", "util", "helpers", "misc", "common")]
    assert not vague, f"name the file for its subject: {', '.join(vague)}"


# Running without PyTorch

ABSENT = ("torch", "transformers", "diffusers", "onnx", "onnxscript", "onnx_ir", "huggingface_hub")
LAZY = ("onnxruntime", "openvino", "cupy")
IMPORT_ALL = """
import importlib, sys
absent, lazy, modules = (names.split() for names in sys.argv[1:])
sys.modules.update(dict.fromkeys(absent))
for module in modules:
    importlib.import_module(module)
    early = [name for name in lazy if name in sys.modules]
    assert not early, f"importing {module} imports {', '.join(early)}"
"""


@pytest.mark.parametrize("layers", [("engines",), ("engines", "runtime"), ("engines", "runtime", "scripts/cli")])
def test_making_pictures_needs_no_torch(layers: tuple[str, ...]) -> None:
    """Every module can be imported where PyTorch and its kin are not to be had, and engine libraries wait for use."""
    chosen = [path for path in FILES if path.as_posix().startswith(layers)]
    modules = [".".join((PACKAGE, *path.with_suffix("").parts)).removesuffix(".__init__") for path in chosen]
    command = [sys.executable, "-c", IMPORT_ALL, *map(" ".join, (ABSENT, LAZY, modules))]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
