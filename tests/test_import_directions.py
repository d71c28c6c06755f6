"""The rules of the house that a parser can check: layers, budgets, safety, randomness."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

from helpers import ROOT

PACKAGE = ROOT / "s4m_d2"
LITE = ROOT / "detectron2_lite" / "detectron2"

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 50
MAX_LITE_LINES = 4500
MAX_COMMAND_LINES = 100  # train_net.py

BASE = {"errors", "structures", "files", "pretrained", "restricted_pickle", "transfers"}
LEAVES = {"layers", "losses", "sam", "semi"}
SHOWN = {"evaluation", "visualization", "report"}
# What each part of the package may import from the package, beside itself.
MAY_IMPORT = {
    **dict.fromkeys(("errors", "transfers", "config"), set()),
    "files": {"errors"},
    "pretrained": {"errors", "restricted_pickle"},
    "structures": {"errors", "transfers"},
    "restricted_pickle": {"files"},
    "tiling": {"data", "structures"},
    "data": BASE,
    **{leaf: BASE | LEAVES for leaf in LEAVES},
    "modeling": BASE | LEAVES,
    # A system of its own on top: labels of folders, and a refiner of semi's registry.
    "sepl": BASE | LEAVES | {"config", "data", "visualization"},
    **dict.fromkeys(("formats", "evaluation", "visualization", "report"), BASE),
    "engine": BASE | LEAVES | SHOWN | {"config", "data", "modeling", "tiling"},
    "commands": BASE | LEAVES | SHOWN | {*"data engine formats modeling sepl".split()},
}

MAY_UNPICKLE = PACKAGE / "restricted_pickle.py"
# The only uses of generators that nobody passed, by file.
MAY_USE_GLOBAL_RANDOMNESS = {
    # Detectron2's transforms draw from NumPy's generator; it is set for each sample and restored.
    "s4m_d2/data/transforms.py": "np.random.seed np.random.get_state np.random.set_state",
    # Evaluation's tiles have no seeds: clicks on an image depend on its name alone.
    "s4m_d2/commands/label.py": "torch.manual_seed",
    # A mapper in a foreign loader, which attaches no seeds.
    "s4m_d2/data/mappers.py": "np.random.default_rng",
    # Other libraries (dropout) draw from the default ones: they are set in every iteration, and
    # their states are part of a checkpoint.
    "s4m_d2/engine/rng.py": "torch.manual_seed torch.set_rng_state np.random.seed "
    "np.random.get_state np.random.set_state random.seed random.getstate random.setstate",
    # Initial weights.
    "s4m_d2/engine/training/trainer.py": "torch.manual_seed",
    "tools/train_tiny_sam.py": "torch.manual_seed",
}

TORCH_DRAWS = {*"bernoulli multinomial normal poisson rand randint randn randperm".split()}
TORCH_DRAWS |= {"rand_like", "randint_like", "randn_like"}
TENSOR_DRAWS = {*"bernoulli bernoulli_ exponential_ multinomial normal_ random_ uniform_".split()}
NUMPY_OWN_GENERATORS = {"Generator", "SeedSequence", "PCG64", "Philox", "default_rng"}

OURS, LITES = (sorted(folder.rglob("*.py")) for folder in (PACKAGE, LITE))
ALL = [*OURS, *ROOT.glob("tools/**/*.py"), *ROOT.glob("datasets/**/*.py"), ROOT / "train_net.py"]


@cache
def nodes(file: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(file.read_text(), str(file))))


def name(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


@cache
def imported_modules(file: Path) -> list[str]:
    """Names of everything that a file imports, within functions too."""
    found = []
    for node in nodes(file):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 or LITE.parent in file.parents, f"{name(file)}: relative import"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


@cache
def calls(file: Path) -> list[tuple[str, ast.Call]]:
    """(dotted name, node) of every call."""
    return [(ast.unparse(node.func), node) for node in nodes(file) if isinstance(node, ast.Call)]


def keywords(call: ast.Call) -> dict[str, ast.expr]:
    return {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg}


def part(file: Path) -> str:
    """The package's part that a file belongs to: its folder, or its own name."""
    return file.relative_to(PACKAGE).with_suffix("").parts[0]


def test_imports_go_one_way():
    for file in set(OURS) - {PACKAGE / "__init__.py"}:  # which has the public names
        allowed = MAY_IMPORT[part(file)] | {part(file)}
        for module in imported_modules(file):
            package, *parts = module.split(".")
            wrong = package == "s4m_d2" and (not parts or parts[0] not in allowed)
            assert not wrong, f"{name(file)} must not import {module}"


def test_the_engine_does_not_know_the_project():
    for file in LITE.parent.rglob("*.py"):
        assert not [m for m in imported_modules(file) if m.split(".")[0] == "s4m_d2"], name(file)


def test_only_builders_see_a_config():
    """In leaves, data and models, a cfg goes no further than builders and what they call."""
    for file in OURS:
        if part(file) not in LEAVES | {"modeling", "data", "sepl"}:
            continue
        for node in nodes(file):
            if isinstance(node, ast.FunctionDef) and "cfg" in [a.arg for a in node.args.args]:
                registered = any("register" in ast.unparse(d) for d in node.decorator_list)
                helper = node.name.startswith("_") and not node.name.startswith("__")
                builder = node.name == "from_config" or node.name.startswith("build_")
                assert registered or helper or builder, f"{name(file)}: {node.name} takes a cfg"


def test_no_object_keeps_a_config():
    """But the trainer, as Detectron2's does, whose methods read it."""
    for file in set(OURS) - {PACKAGE / "engine" / "training" / "trainer.py"}:
        for node in nodes(file):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                assert node.attr not in ("cfg", "_cfg"), f"{name(file)}:{node.lineno} keeps a cfg"


def test_files_and_functions_stay_short():
    for file in ALL:
        limit = MAX_COMMAND_LINES if file.name == "train_net.py" else MAX_FILE_LINES
        lines = len(file.read_text().splitlines())
        assert lines <= limit, f"{name(file)} has {lines} lines: split it by concept"
        for node in nodes(file):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = node.end_lineno - node.lineno + 1
                assert lines <= MAX_FUNCTION_LINES, f"{name(file)}: {node.name} has {lines} lines"
    assert sum(len(file.read_text().splitlines()) for file in LITES) <= MAX_LITE_LINES


def test_nothing_that_a_user_gives_is_run():
    for file in ALL + LITES:
        for called, call in calls(file):
            where = f"{name(file)}:{call.lineno} calls {called}"
            assert called not in ("eval", "exec", "compile", "os.system", "os.popen"), where
            assert called.split(".")[-1] not in ("unsafe_load", "full_load", "load_all"), where
            assert called != "yaml.load", where
            if called == "torch.load":
                value = keywords(call).get("weights_only")
                assert isinstance(value, ast.Constant) and value.value is True, where
            if called.split(".")[-1] in ("run", "Popen", "call", "check_call", "check_output"):
                assert "shell" not in keywords(call), where


def test_only_the_restricted_reader_unpickles():
    for file in [f for f in ALL if f != MAY_UNPICKLE]:
        for module in imported_modules(file):
            parts = module.split(".")
            assert parts[0] not in ("cPickle", "dill", "joblib", "marshal", "shelve"), name(file)
            assert parts[0] != "pickle" or len(parts) == 1, f"{name(file)} imports {module}"
        for node in nodes(file):
            if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "pickle":
                assert node.attr == "UnpicklingError", f"{name(file)}:{node.lineno}: {node.attr}"
        for called, call in calls(file):
            if called in ("np.load", "numpy.load"):
                assert "allow_pickle" not in keywords(call), f"{name(file)}:{call.lineno}"


def global_draw(called: str, call: ast.Call) -> bool:
    """Whether a call draws from a generator that the caller did not pass, or sets it."""
    owner, _, method = called.rpartition(".")
    given = "generator" in keywords(call)
    if owner in ("torch", "torch.random"):
        sets = method in ("manual_seed", "seed", "set_rng_state")
        return sets or (method in TORCH_DRAWS and not given)
    if owner in ("np.random", "numpy.random"):
        own = method in NUMPY_OWN_GENERATORS and (call.args or call.keywords)
        return not own
    if owner == "random":
        return not (method == "Random" and call.args)
    if owner in ("np.random.default_rng", "rng", "self._rng", "generator") or "init" in owner:
        return False  # NumPy's generators; nn.init, which runs before training
    return bool(owner) and method in TENSOR_DRAWS and not given


def test_no_draw_comes_from_a_global_generator_but_for_the_listed_ones():
    for file in ALL:
        allowed = set(MAY_USE_GLOBAL_RANDOMNESS.get(name(file), "").split())
        assert allowed <= {called for called, _ in calls(file)}, f"{name(file)}: dead exceptions"
        for called, call in calls(file):
            drawn = called not in allowed and global_draw(called, call)
            assert not drawn, f"{name(file)}:{call.lineno} calls {called}"
    assert MAY_USE_GLOBAL_RANDOMNESS.keys() <= set(map(name, ALL))
