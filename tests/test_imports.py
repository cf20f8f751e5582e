"""The house's rules, held on the source itself: imports run one way, one place for njit, no pickle, no assert
for user errors."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import minilora

ROOT = Path(minilora.__file__).parent
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix("__init__").removesuffix("."): path
    for path in sorted(ROOT.rglob("*.py"))
}

# module (or package) → what of minilora it may import; itself is always allowed
LAYERS = {"config", "functional", "kernels", "threads", "parameters", "layers", "adapter", "quant"}
MODELS = LAYERS | {"composed", "transformer", "building", "lora", "variants", "injection", "merging"}
ALLOWED = {
    "config": set(),
    "composed": {"config"},  # configurations made of others
    "functional": set(),  # knows nobody
    "kernels": {"functional"},  # everything compiled
    "threads": set(),
    "tables": set(),
    "quant.codebooks": {"config"},
    "quant.reference": {"config"},
    "quant": {"config", "kernels"},
    "quant.model": LAYERS,  # a whole model in few bits
    "parameters": {"kernels"},
    "layers": {"config", "kernels", "parameters"},  # the mathematics and its kernels through one switch
    "adapter": {"layers", "parameters"},
    "transformer": {"config", "functional", "layers", "parameters"},  # knows nothing of LoRA
    "building": {"config", "layers", "parameters", "transformer"},
    "lora": {"config", "kernels", "layers", "adapter", "parameters"},  # and LoRA nothing of the transformer
    "variants": LAYERS | {"lora"},
    "injection": LAYERS | {"lora", "variants"},
    "merging": LAYERS,  # any adapter
    "decoding": LAYERS | {"lora", "transformer"},  # what generation needs besides the model
    "generation": {"functional", "kernels", "layers", "threads", "transformer", "decoding"},
    "data": {"config"},
    "formats": MODELS | {"data"},
    "training": MODELS | {"data", "formats"},
    "memory": MODELS | {"data", "formats", "training", "tables"},
    "sweep": MODELS | {"data", "formats", "training", "memory", "generation", "decoding"},
    "report": MODELS | {"data", "formats", "memory", "sweep", "tables"},  # rows in, pictures and pages out
    "claims": MODELS | {"data", "formats", "training", "memory", "generation", "sweep", "report", "tables"},
    "labs": MODELS | {"data", "training"},
}
TOP = {"cli", "__main__", ""}  # know everything below, and nobody below knows them


def runtime_imports(tree: ast.Module, module: str, is_package: bool) -> set[str]:
    """Modules of minilora that are imported when the file runs: not those under ``if TYPE_CHECKING``."""
    found: set[str] = set()
    package = ["minilora", *module.split(".")] if module else ["minilora"]
    if not is_package:
        package = package[:-1]

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            prefix = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*prefix, *([node.module] if node.module else [])])
            found.update(
                {f"{name}.{alias.name}" for alias in node.names}
                if name in ("minilora", "minilora.quant")
                else {name}
            )
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree)
    return {name.removeprefix("minilora.") for name in found if name.startswith("minilora.")}


def rule(module: str) -> str:
    return module if module in ALLOWED else module.split(".")[0]


@pytest.mark.parametrize("module", FILES)
def test_imports_run_one_way(module):
    path = FILES[module]
    imports = runtime_imports(ast.parse(path.read_text(encoding="utf-8")), module, path.name == "__init__.py")
    key = rule(module)
    if key in TOP:
        return
    assert key in ALLOWED, f"{module} has no rule: say in this test what it may know"
    for name in imports:
        inside = rule(name) == key or name.split(".")[0] == key
        assert inside or name.split(".")[0] in ALLOWED[key] or rule(name) in ALLOWED[key], (
            f"{module} must not import {name}"
        )


@pytest.mark.parametrize("module", ["transformer", "lora"])
def test_transformer_and_lora_do_not_know_each_other(module):
    other = {"transformer": "minilora.lora", "lora": "minilora.transformer"}[module]
    code = f"import sys, minilora.{module}; sys.exit({other!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_rule_itself_can_fail():
    tree = ast.parse(
        "from minilora.lora import x\nfrom minilora import lora as y\nfrom . import memory\n"
        "import minilora.cli\n"
    )
    assert runtime_imports(tree, "transformer", False) == {"lora", "memory", "cli"}
    assert (
        runtime_imports(ast.parse("if TYPE_CHECKING:\n    from minilora.lora import x"), "transformer", False)
        == set()
    )
    assert runtime_imports(
        ast.parse("from .results import Row\nfrom ..config import require"), "study.sweep", False
    ) == {"study.results", "config"}


@pytest.mark.parametrize("module", FILES)
def test_no_assert_no_pickle_no_eval(module):
    tree = ast.parse(FILES[module].read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        where = f"{FILES[module].name}:{getattr(node, 'lineno', 0)}"
        assert not isinstance(node, ast.Assert), f"{where}: user errors are ValueErrors, never assert"
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = {getattr(node, "module", None) or ""} | {alias.name for alias in node.names}
            roots = {name.split(".")[0] for name in names}
            assert not roots & {"pickle", "dill", "joblib", "shelve", "marshal", "torch"}, f"{where}: {names}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("eval", "exec"), where
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            assert isinstance(node.value, ast.Constant) and node.value.value is False, where


@pytest.mark.parametrize("module", FILES)
def test_numba_compiles_in_one_place_only(module):
    tree = ast.parse(FILES[module].read_text(encoding="utf-8"))
    used = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)} | {
        n.id for n in ast.walk(tree) if isinstance(n, ast.Name)
    }
    compiles = used & {"njit", "jit", "vectorize", "guvectorize", "prange"}
    if module == "kernels.jit":
        assert compiles == {"njit"}
        calls = [
            n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func).endswith("njit")
        ]
        assert len(calls) == 1, "one policy decorator"
        policy = {k.arg: k.value for k in calls[0].keywords}
        assert policy["nogil"].value is True and policy["cache"].value is True and "parallel" not in policy
        flags = ast.literal_eval(policy["fastmath"])
        assert isinstance(flags, set) and not flags & {"nnan", "ninf", "fast"}, "NaN must stay meaningful"
    else:
        assert not compiles


@pytest.mark.parametrize("module", FILES)
def test_compiled_code_has_one_home(module):
    """numba and llvmlite are imported, and kernels are defined, under kernels/ only."""
    tree = ast.parse(FILES[module].read_text(encoding="utf-8"))
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
        if isinstance(node, ast.FunctionDef):
            found |= {ast.unparse(decorator) for decorator in node.decorator_list}
    if not module.startswith("kernels"):
        assert not found & {"numba", "llvmlite", "kernel", "intrinsic"}


def test_no_two_modules_have_one_name():
    names = [module.rsplit(".", 1)[-1] for module in FILES if FILES[module].name != "__init__.py"]
    assert sorted(names) == sorted(set(names))


DAY = (
    "functional",
    "layers",
    "transformer",
    "lora",
    "merging",
    "generation",
    *(f"quant.{name}" for name in ("codebooks", "reference", "weights", "affine")),
    *(f"training.{name}" for name in ("loss", "optimizers", "trainer", "gradcheck")),
)
"""What everybody reads: the mathematics, the model, the adapters, the formats and the training loop."""


def test_a_days_reading_takes_a_day():
    lines = {module: len(FILES[module].read_text(encoding="utf-8").splitlines()) for module in DAY}
    assert sum(lines.values()) <= 2600, (sum(lines.values()), lines)


def test_from_loras_forward_to_the_gradient_of_a_is_short(monkeypatch):
    """Three files are on the stack when dA is computed, and all that is read on the way is 150 lines."""
    from minilora import functional, kernels, lora
    from minilora.config import LoraConfig
    from minilora.layers import DenseWeight, Gradients, Linear, Parameter

    seen = []
    original = functional.low_rank_backward

    def watched(*args):
        frame = sys._getframe(1)
        while "minilora" in frame.f_code.co_filename:
            seen.append((Path(frame.f_code.co_filename).relative_to(ROOT), frame.f_code.co_name))
            frame = frame.f_back
        return original(*args)

    monkeypatch.setattr(functional, "low_rank_backward", watched)
    base = Linear("q_proj", DenseWeight(Parameter("q_proj.weight", np.ones((3, 4), np.float32))))
    layer = lora.LoraLinear(base, LoraConfig(r=2), np.random.default_rng(0))
    with minilora.plain():
        y, cache = layer.forward(np.ones((20, 4), np.float32))
        layer.backward(y, cache, Gradients(layer.trained()))
    assert seen == [(Path("kernels/__init__.py"), "low_rank_backward"), (Path("lora.py"), "backward")]
    read = [lora.LoraLinear.forward, lora.LoraLinear._adapter_input, lora.LoraLinear.backward]
    read += [kernels.LowRank, kernels.low_rank_forward, kernels.low_rank_backward]
    read += [functional.low_rank_forward, original]
    assert sum(len(inspect.getsource(code).splitlines()) for code in read) <= 150


@pytest.mark.parametrize("module", [m for m in FILES if not m.startswith("kernels.")])
def test_functions_take_at_most_eight_parameters(module):
    for node in ast.walk(ast.parse(FILES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            names = [name for name in names if name not in ("self", "cls")]
            assert len(names) <= 8, f"{FILES[module].name}:{node.lineno} {node.name} takes {len(names)}"


def test_files_stay_short_enough_to_read():
    long = {
        module: n
        for module, path in FILES.items()
        if (n := len(path.read_text(encoding="utf-8").splitlines())) > 500
    }
    assert not long, long


@pytest.mark.parametrize("module", [m for m in FILES if m != "__main__"])
def test_public_names_have_docstrings(module):
    tree = ast.parse(FILES[module].read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), f"{module} has no docstring"
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{module}.{node.name} has no docstring"


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("minilora", "torch transformers matplotlib scipy numba numpy"),
        (
            "minilora.cli",
            "torch transformers matplotlib scipy numba numpy tqdm safetensors",
        ),  # help and refusals come at once
    ],
)
def test_what_is_not_needed_yet_is_not_loaded(module, heavy):
    code = f"import sys, {module}; print(*(name for name in {heavy.split()} if name in sys.modules))"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == ""
    )
