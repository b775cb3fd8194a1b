"""Who may import whom: each floor of the package knows only the floors below it."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# What the files of a floor may import from this package, beside their own floor.
FLOORS = {
    "aal/ops": (),
    "aal/rules": ("aal.ops",),
    "aal/lean": ("aal.ops",),
    "aal/indicator.py": ("aal.ops", "aal.rules", "aal.lean"),
    "aal/memory.py": ("aal.ops", "aal.rules", "aal.lean", "aal.preserved"),
    "aal/preserved.py": (),
    "aal/pretrained.py": (),
    "aal/patch_embedding.py": (),
    "aal/method.py": ("aal.ops", "aal.rules", "aal.lean"),
    "aal/feed_forward.py": ("aal.ops", "aal.rules", "aal.lean", "aal.method"),
    "aal/attention.py": ("aal.ops", "aal.rules", "aal.lean", "aal.method"),
    "aal/compression": ("aal.ops", "aal.lean", "aal.preserved"),
    "aal/conversion": ("aal.ops", "aal.rules", "aal.lean", "aal.method", "aal.memory"),
    "aal/__init__.py": (
        "aal.ops",
        "aal.rules",
        "aal.compression",
        "aal.conversion",
        "aal.indicator",
    ),
    "aal/integrations": (
        "aal.compression",
        "aal.conversion",
        "aal.indicator",
        "aal.memory",
        "aal.preserved",
    ),
    "aal/training": ("aal",),
}
MODEL_FOLDERS = sorted(path.parent for path in ROOT.glob("*/train.py"))
DATA_NAMES = {
    "Transformer": ("corpora", "cldr", "tokens", "data"),
    "BERT": ("babel_pairs", "tsv", "labelled", "wordpiece", "batches"),
}
DATA_FILES = [ROOT / folder / f"{n}.py" for folder, names in DATA_NAMES.items() for n in names]
SCRIPTS = ("train.py", "translation_run.py", "text_flags.py", "text_task.py")
SCRIPTS += ("text_run.py",)
LIBRARIES = {"BERT": ("transformers",)}  # that models of a folder are made of, beside torch
MODEL_FILES = [
    path
    for folder in MODEL_FOLDERS
    for path in folder.glob("*.py")
    if path.name not in SCRIPTS and path not in DATA_FILES
]


def imports_of(path: Path) -> Iterator[str]:
    """Every module that a file imports anywhere; ``from a import b`` counts as ``a``."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            yield node.module


def is_within(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def files_of(floor: str) -> list[Path]:
    path = ROOT / floor
    return [path] if path.is_file() else sorted(path.rglob("*.py"))


@pytest.mark.parametrize("floor", FLOORS)
def test_floor_imports_only_what_lies_below(floor):
    own = floor.removesuffix(".py").replace("/", ".")
    allowed = (own, *FLOORS[floor])
    wrong = [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in files_of(floor)
        for module in imports_of(path)
        if is_within(module, ("aal",)) and not is_within(module, allowed)
    ]
    assert not wrong


def test_every_file_of_the_package_has_a_floor():
    covered = {path for floor in FLOORS for path in files_of(floor)}
    assert set((ROOT / "aal").rglob("*.py")) == covered


@pytest.mark.parametrize("path", MODEL_FILES, ids=lambda path: path.name)
def test_model_imports_only_torch_and_the_layers(path):
    siblings = [other.stem for other in MODEL_FILES if other.parent == path.parent]
    libraries = ("torch", "aal", *LIBRARIES.get(path.parent.name, ()))
    allowed = (*libraries, *siblings, *sys.stdlib_module_names)
    wrong = [
        module
        for module in imports_of(path)
        if not is_within(module, allowed) or is_within(module, ("aal.training",))
    ]
    assert not wrong


@pytest.mark.parametrize("path", DATA_FILES, ids=lambda path: path.name)
def test_text_data_use_training_but_no_model_except_for_the_ids_of_special_tokens(path):
    siblings = ("transformer", "hub", *DATA_NAMES[path.parent.name])
    packages = ("torch", "numpy", "spacy", "babel", "tokenizers", "transformers", "aal.training")
    allowed = (*packages, *siblings, *sys.stdlib_module_names)
    assert not [module for module in imports_of(path) if not is_within(module, allowed)]


@pytest.mark.parametrize("folder", MODEL_FOLDERS, ids=lambda folder: folder.name)
def test_a_folder_imports_no_other(folder):
    others = {path.stem for path in ROOT.glob("*/*.py") if path.parent in MODEL_FOLDERS}
    others -= {path.stem for path in folder.glob("*.py")}
    files = folder.glob("*.py")
    assert not [module for path in files for module in imports_of(path) if module in others]


def test_package_imports_no_model():
    models = tuple(path.stem for path in MODEL_FILES + DATA_FILES)
    models += tuple(f.name for f in MODEL_FOLDERS)
    wrong = [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in (ROOT / "aal").rglob("*.py")
        for module in imports_of(path)
        if is_within(module, models)
    ]
    assert not wrong


def test_importing_the_package_stays_light():
    heavy = ["triton", "torchvision", "matplotlib", "sklearn", "tensorboard"]
    heavy += [
        "spacy",
        "babel",
        "sacrebleu",
        "tokenizers",
        "transformers",
        "lightning",
        "tensorboard",
    ]
    code = f"import sys, aal; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == "[]"
