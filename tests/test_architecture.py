"""The rules of CONTRIBUTING.md that a parser can hold. Each check has a test on made-up code that shows it can fail."""

import ast
import copy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "r1jax"

# Imports go to the own part or to a lower layer, never up and never sideways. vllm_plugin runs inside the server: -1.
LAYERS = {
    **dict.fromkeys(("quickstart", "launch"), 6),
    **dict.fromkeys(("train", "generate", "evaluate", "convert", "pipeline", "plan", "doctor"), 5),
    **dict.fromkeys(("sft", "grpo", "commands", "runtime"), 4),
    **dict.fromkeys(("training", "experience"), 3),
    **dict.fromkeys(("data", "objectives", "rewards", "rollout", "checkpoints"), 2),
    **dict.fromkeys(("optimizer", "footprint", "trackers", "deepspeed"), 2),
    **dict.fromkeys(("models", "sharding", "sandbox", "xla_flags"), 1),
    **dict.fromkeys(("config", "batch", "progress"), 0),
    "vllm_plugin": -1,
}
OPTIONAL = {"torch", "vllm", "wandb", "deepspeed", "e2b", "morphcloud", "tokamax", "jieba"}
MAX_MODULE_LINES = 400
MAX_FUNCTION_LINES = 80

Sources = dict[str, str]
"""Text by dotted name; a package's own file is called `r1jax.part.__init__`."""


def read_package(folder: Path) -> Sources:
    """The text of every module under the folder, by dotted name."""
    root = folder.parent
    return {".".join(p.relative_to(root).with_suffix("").parts): p.read_text() for p in sorted(folder.rglob("*.py"))}


def imported_names(module: str, tree: ast.AST) -> Iterator[str]:
    """Absolute dotted names that the code imports, wherever the import stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*package, *([node.module] if node.module else [])])
            # `from r1jax import training` names the module in the alias.
            yield from (f"{base}.{alias.name}" for alias in node.names)


def layer_violations(sources: Sources) -> list[str]:
    """Imports of r1jax that go up or sideways, and parts that the table does not know."""
    found = []
    for module, text in sources.items():
        part = module.split(".")[1]
        if part == "__init__":
            continue
        if part not in LAYERS:
            found.append(f"{module}: give it a layer in LAYERS")
            continue
        for name in imported_names(module, ast.parse(text)):
            top, _, rest = name.partition(".")
            target = rest.split(".")[0]
            if top == "r1jax" and target != part and target in LAYERS and LAYERS[target] >= LAYERS[part]:
                found.append(f"{module} (layer {LAYERS[part]}) imports {name} (layer {LAYERS[target]})")
    return found


def size_violations(sources: Sources) -> list[str]:
    """Modules and functions (their docstring not counted) that are too long."""
    found = []
    for module, text in sources.items():
        num_lines = len(text.splitlines())
        if num_lines > MAX_MODULE_LINES:
            found.append(f"{module}: {num_lines} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and _length(node) > MAX_FUNCTION_LINES:
                found.append(f"{module}.{node.name}: {_length(node)} lines")
    return found


def _length(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    length = (node.end_lineno or node.lineno) - node.lineno + 1
    if ast.get_docstring(node) is not None:
        docstring = node.body[0]
        length -= (docstring.end_lineno or docstring.lineno) - docstring.lineno + 1
    return length


def flax_violations(sources: Sources) -> list[str]:
    """Modules outside models/ that import flax."""
    return [
        f"{module}: imports {name}"
        for module, text in sources.items()
        for name in imported_names(module, ast.parse(text))
        if name.split(".")[0] == "flax" and not module.startswith("r1jax.models.")
    ]


def print_violations(sources: Sources) -> list[str]:
    """Calls of the builtin print."""
    return [
        f"{module}:{node.lineno}: print"
        for module, text in sources.items()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]


def optional_violations(sources: Sources) -> list[str]:
    """Optional dependencies that are imported outside functions (so with their module), or by two files."""
    users: dict[str, set[str]] = {}
    found = []
    for module, text in sources.items():
        tree = ast.parse(text)
        for name in imported_names(module, tree):
            users.setdefault(name.split(".")[0], set()).add(module)
        found += [
            f"{module}: imports {name} at import time"
            for name in imported_names(module, _without_functions(tree))
            if name.split(".")[0] in OPTIONAL and not module.startswith("r1jax.vllm_plugin.")
        ]
    found += [
        f"{name}: imported by {', '.join(sorted(users[name]))}"
        for name in sorted(OPTIONAL & users.keys())
        if len(users[name]) > 1
    ]
    return found


def _without_functions(tree: ast.Module) -> ast.Module:
    class Drop(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
            return None

        visit_AsyncFunctionDef = visit_FunctionDef  # type: ignore[assignment]

        def visit_If(self, node: ast.If) -> ast.AST | None:
            return None if ast.unparse(node.test).endswith("TYPE_CHECKING") else self.generic_visit(node)

    return Drop().visit(copy.deepcopy(tree))


CHECKS: list[Callable[[Sources], list[str]]] = [
    layer_violations,
    size_violations,
    flax_violations,
    print_violations,
    optional_violations,
]


@pytest.mark.parametrize("check", CHECKS)
def test_the_package_keeps_the_rule(check):
    sources = read_package(PACKAGE)
    assert "r1jax.__init__" in sources
    assert check(sources) == []


@pytest.mark.parametrize(
    ("check", "sources"),
    [
        (layer_violations, {"r1jax.config.run": "from r1jax.training.loop import run"}),
        (layer_violations, {"r1jax.config.run": "from r1jax import training"}),
        (layer_violations, {"r1jax.config.run": "from ..models import config"}),
        (layer_violations, {"r1jax.data.packing": "def f():\n    import r1jax.objectives.reductions"}),
        (layer_violations, {"r1jax.models.config": "from r1jax.sharding.mesh import make_mesh"}),
        (layer_violations, {"r1jax.unheard_of": ""}),
        (size_violations, {"r1jax.training.loop": "x = 1\n" * 401}),
        (size_violations, {"r1jax.training.loop": "def f():\n" + "    x = 1\n" * 80}),
        (size_violations, {"r1jax.training.loop": "class A:\n    async def f(self):\n" + "        x = 1\n" * 80}),
        (flax_violations, {"r1jax.training.loop": "def f():\n    from flax import nnx"}),
        (print_violations, {"r1jax.training.loop": "def f():\n    print('x')"}),
        (optional_violations, {"r1jax.training.loop": "import torch.nn"}),
        (optional_violations, {"r1jax.training.loop": "try:\n    import wandb\nexcept ImportError:\n    wandb = None"}),
        (optional_violations, {"r1jax.training.loop": "class A:\n    from deepspeed import x"}),
        (optional_violations, {"r1jax.a": "def f():\n    import torch", "r1jax.b": "def f():\n    import torch"}),
    ],
)
def test_a_breach_is_found(check, sources):
    assert len(check(sources)) == 1


@pytest.mark.parametrize(
    ("check", "sources"),
    [
        (layer_violations, {"r1jax.data.packing": "from . import sources\nfrom r1jax.config import run\nimport numpy"}),
        (layer_violations, {"r1jax.config.__init__": "from .run import RunConfig"}),
        (size_violations, {"r1jax.training.loop": 'def f():\n    """' + "word\n" * 90 + '"""\n' + "    x = 1\n" * 70}),
        (flax_violations, {"r1jax.models.parameters": "from flax import nnx"}),
        (print_violations, {"r1jax.training.loop": "def f(console):\n    console.print('x')"}),
        (
            optional_violations,
            {"r1jax.training.loop": "if TYPE_CHECKING:\n    import torch\nif X:\n    def f():\n        import torch"},
        ),
    ],
)
def test_what_is_allowed_passes(check, sources):
    assert check(sources) == []


def test_importing_the_package_loads_nothing_heavy():
    code = "import r1jax, sys; sys.exit(' '.join({'jax', 'numpy', 'transformers'} & sys.modules.keys()) or 0)"
    result = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
