"""Limits of the package's code: parameters of a function, private names of torch."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import grimp
import pytest

PACKAGE = Path(__file__).parents[2] / "lora_kernels"
# Files whose functions mirror schemas, or kernels with flat arguments.
MIRRORS = (
    *(f"ops/{name}.py" for name in ("linear", "direct", "multi", "experts", "head")),
    *("oracle/reference.py", "backends/triton/linear.py"),
)
MANY, ALLOWED = 10, 5
SKIPS = 20  # calls and tables that the formatter would spread over a line for each value, besides
# signatures of Triton kernels, whose arguments belong together in groups
PRIVATE_OF_TORCH = {
    "torch._C._dispatch_tls_local_include_set",  # no public way to see modes and transforms
    "torch._C._is_any_autocast_enabled",  # no public way to ask for all devices at once
    "torch._C._autograd._get_current_graph_task_keep_graph",  # no public way to see retain_graph
    "torch._C._storage_Use_Count",  # no public way to see who else holds a tensor's memory
    "torch._C._functorch.is_legacy_batchedtensor",  # no public way to see is_grads_batched
    "torch._C._functorch.peek_interpreter_stack",  # no public way to see a transform alone
    # No public way to hand an object on to autograd's threads.
    "torch._C._get_obj_in_tls",
    "torch._C._is_key_in_tls",
    "torch._C._stash_obj_in_tls",
    "torch.autograd.forward_ad._current_level",  # no public way to see forward-mode AD
    "torch.cuda._sleep",  # no public kernel that waits
    "torch.nn.modules.module._has_any_global_hook",  # no public way to see hooks of all modules
    "torch.utils._python_dispatch._get_current_dispatch_mode",  # no public way to see tracing
    "torch.utils._python_dispatch.TorchDispatchMode",  # named in PyTorch's tutorials
    # No public way to tell whether a layer is checkpointed by itself.
    "torch._C._autograd._pop_saved_tensors_default_hooks",
    "torch._C._autograd._push_saved_tensors_default_hooks",
    "torch._C._autograd._saved_tensors_hooks_is_enabled",
    "torch._C._autograd._top_saved_tensors_default_hooks",
    # No public way to find the FLOP counters that are active.
    "torch.utils._python_dispatch._get_current_dispatch_mode_stack",
}


def parsed(exclude: tuple[str, ...] = ()) -> Iterator[tuple[str, ast.Module]]:
    for file in sorted(PACKAGE.rglob("*.py")):
        path = file.relative_to(PACKAGE).as_posix()
        if path not in exclude:
            yield path, ast.parse(file.read_text(encoding="utf-8"))


def functions_with_many_parameters(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            a = node.args
            is_kernel = any(".jit" in ast.unparse(d) for d in node.decorator_list)
            if not is_kernel and len(a.posonlyargs + a.args + a.kwonlyargs) >= MANY:
                yield node.name


def private_names_of_torch(tree: ast.Module) -> Iterator[str]:
    """Yield imports and attributes of torch with a component that starts with an underscore."""
    modules, names = {"torch": "torch"}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            modules |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
            names |= {f"{node.module}.{a.name}" for a in node.names}
        elif isinstance(node, ast.Import):
            names |= {a.name for a in node.names if a.name.split(".")[0] == "torch"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            first, _, rest = ast.unparse(node).partition(".")
            if first in modules and rest.replace(".", "").isidentifier():
                names.add(f"{modules[first]}.{rest}")
    private = {n for n in names if any(p.startswith("_") for p in n.split("."))}
    yield from (n for n in private if not n.rpartition(".")[2].startswith("__"))


def test_functions_with_many_parameters_are_few() -> None:
    found = [
        f"{path}: {name}"
        for path, tree in parsed(exclude=MIRRORS)
        for name in functions_with_many_parameters(tree)
    ]
    assert len(found) <= ALLOWED, found


def test_places_left_by_the_formatter_are_few() -> None:
    root, mark = PACKAGE.parent, "# fmt: " + "skip"
    files = [*PACKAGE.rglob("*.py"), *(root / "tests").rglob("*.py")]
    counts = {str(f.relative_to(root)): f.read_text() for f in files}
    found = [
        f for f, text in counts.items() for _ in range(text.count(mark) - text.count(f"):  {mark}"))
    ]
    assert len(found) <= SKIPS, found


def test_private_names_of_torch_are_these() -> None:
    assert {n for _, tree in parsed() for n in private_names_of_torch(tree)} == PRIVATE_OF_TORCH


@pytest.mark.parametrize(
    ("code", "names"),
    [
        ("import torch\ntorch.ops.aten._unsafe_view.default(y)", {"torch.ops.aten._unsafe_view"}),
        ("from torch._compile import disable", {"torch._compile.disable"}),
        (
            "from torch.autograd import forward_ad as f\nf._level",
            {"torch.autograd.forward_ad._level"},
        ),
        ("import torch\nself._torch = torch.mm\ntorch.__version__", set()),
    ],
)
def test_private_names_of_torch_in_code_are_found(code: str, names: set[str]) -> None:
    found = set(private_names_of_torch(ast.parse(code)))
    assert {n.removesuffix(".default") for n in found} == names


def test_imports_have_no_circle() -> None:
    """Those inside of functions too; those for type checkers not."""
    graph = grimp.build_graph("lora_kernels", exclude_type_checking_imports=True)
    found = [
        (module, imported)
        for module in sorted(graph.modules)
        for imported in graph.find_modules_directly_imported_by(module)
        if graph.find_shortest_chain(imported, module)
    ]
    assert len(graph.modules) > 100 and not found
