"""The library's layers: who may import whom, read from the source of every module."""

import ast
import pathlib

import pytest

import instanas_jax

PACKAGE = "instanas_jax"
ROOT = pathlib.Path(instanas_jax.__file__).parent
LAYERS = {
    1: {
        "errors",
        "files",
        "search_space",
        "cost",
        "policy",
        "diversity",
        "rewards",
        "policy_gradient",
        "latency",
        "latency_file",
        "budget",
        "metrics",
        "data",
        "data_sources",
        "decoding",
        "image_sets",
        "prepared",
        "streaming",
        "augment",
        "convolution",
        "fusion",
        "packing",
        "batch_norm",
        "environment",
    },
    2: {"layers", "channels", "ops", "controller", "supernet"},
    3: {
        "train_state",
        "optimizers",
        "stage",
        "stages",
        "search",
        "profiling",
        "whole_networks",
        "inference",
        "skipping",
        "batching",
        "static_nas",
        "plain_layers",
        "onnx_graph",
        "onnx_model",
    },
    4: {"parallel", "feeding", "train_loop", "checkpoint"},
}
LAYER_OF = {module: layer for layer, modules in LAYERS.items() for module in modules}
NEVER = {"absl", "experiments", "benchmarks", "tensorflow"}
DEVICE_WORDS = {"pmap", "local_devices", "local_device_count"}
MAX_LINES = 300

FILES = sorted(ROOT.rglob("*.py"))
each_file = pytest.mark.parametrize(
    "path", FILES, ids=[path.relative_to(ROOT).as_posix() for path in FILES]
)


def module_of(path: pathlib.Path) -> str:
    """Name of the module or subpackage right under the package; '' for the package itself."""
    part = path.relative_to(ROOT).parts[0].removesuffix(".py")
    return "" if part == "__init__" else part


def imported_names(tree: ast.AST) -> set[str]:
    """Dotted names of everything that is imported, at the top or inside a function."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def imported_siblings(tree: ast.AST) -> set[str]:
    dotted = [name.split(".") for name in imported_names(tree)]
    return {parts[1] for parts in dotted if parts[0] == PACKAGE and len(parts) > 1}


def imported_roots(tree: ast.AST) -> set[str]:
    return {name.split(".")[0] for name in imported_names(tree)}


def dotted_name(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted_name(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def device_words(tree: ast.AST) -> set[str]:
    """The words of device management that the code, not its prose, uses."""
    used = {dotted_name(node) for node in ast.walk(tree)} | imported_names(tree)
    return {
        name
        for name in used
        if name.split(".")[-1] in DEVICE_WORDS or name.startswith("jax.distributed")
    }


def prints(tree: ast.AST) -> list[int]:
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and dotted_name(node.func) == "print"
    ]


def misplaced_imports(module: str, tree: ast.AST) -> set[str]:
    """Siblings in a higher layer than the module's own; an unknown one is misplaced too."""
    own = LAYER_OF.get(module, 0)
    return {sibling for sibling in imported_siblings(tree) if LAYER_OF.get(sibling, own + 1) > own}


@each_file
def test_module_is_in_a_layer(path):
    module = module_of(path)
    assert module == "" or module in LAYER_OF, (
        f"'{module}' stands in no layer: add it to LAYERS here and to the design's section 3"
    )


@each_file
def test_imports_go_down_or_stay_in_the_layer(path):
    assert misplaced_imports(module_of(path), ast.parse(path.read_text())) == set()


@each_file
def test_outside_imports(path):
    roots = imported_roots(ast.parse(path.read_text()))
    assert not roots & NEVER
    if LAYER_OF.get(module_of(path)) == 1:
        assert "flax" not in roots


@each_file
def test_only_parallel_knows_devices(path):
    if module_of(path) != "parallel":
        assert device_words(ast.parse(path.read_text())) == set()


@each_file
def test_nothing_is_printed(path):
    assert prints(ast.parse(path.read_text())) == []


@each_file
def test_module_is_one_room(path):
    assert len(path.read_text().splitlines()) <= MAX_LINES


class TestTheRulesThemselves:
    """Each rule finds an offence in a small piece of source."""

    def test_upward_imports_in_every_spelling(self):
        for line in (
            "from instanas_jax import layers",
            "from instanas_jax.layers import fold",
            "import instanas_jax.layers",
            "def f():\n    from instanas_jax import layers",
        ):
            assert misplaced_imports("policy", ast.parse(line)) == {"layers"}
            assert misplaced_imports("supernet", ast.parse(line)) == set()
        unknown = ast.parse("from instanas_jax import nowhere")
        assert misplaced_imports("parallel", unknown) == {"nowhere"}

    def test_outside_roots(self):
        source = "import tensorflow.io\nfrom absl import flags\nimport tensorflow_datasets"
        found = imported_roots(ast.parse(source))
        assert found & NEVER == {"tensorflow", "absl"}

    def test_device_words_in_code_but_not_in_prose(self):
        for line in (
            "jax.pmap(f)",
            "from jax import pmap",
            "n = jax.local_device_count()",
            "jax.distributed.initialize()",
            "from jax import distributed",
        ):
            assert device_words(ast.parse(line))
        assert not device_words(ast.parse('"""Runs under jax.pmap."""\nlax.pmean(x, "d")'))

    def test_prints(self):
        assert prints(ast.parse("x = 1\nprint(x)")) == [2]
        assert prints(ast.parse("writer.print(x)")) == []
