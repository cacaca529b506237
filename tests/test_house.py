"""The layout that the design gives: who imports whom, how long a file may be, what is public."""

import ast
import subprocess
import sys

import pytest
from conftest import ROOT

import rankwise

SOURCES = sorted((ROOT / "rankwise").rglob("*.py"))
LEVELS = [
    {"errors", "atomic"},
    {"lora"},
    {"models", "data", "plan", "engine"},
    {"train", "rank", "export", "serve"},
    {"finetune"},
    {"paired_runs"},
    {"cli"},
    {"__main__"},
]
LEVEL = {part: level for level, parts in enumerate(LEVELS) for part in parts}


def part_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def imports(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names if node.module == "rankwise")
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_from_its_own_folder_and_lower_levels(path):
    own = path.relative_to(ROOT / "rankwise").parts[0].removesuffix(".py")
    if own == "__init__":
        return
    for module in imports(path):
        part = part_of(module) if module.startswith("rankwise.") else None
        if part in LEVEL and part != own:
            lower = LEVEL[part] < LEVEL[own]
            siblings_that_may = LEVEL[part] == LEVEL[own] < 3
            assert lower or siblings_that_may, f"{path.name} imports {module}"
        if module.split(".")[0] in ("transformers", "gguf", "huggingface_hub"):
            assert own in ("models", "engine"), f"{path.name} imports {module}"
        if module.split(".")[0] == "peft":
            raise AssertionError("peft is a test dependency only")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_stay_short(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 60, node.name


def test_folders_hold_at_least_three_files_and_have_telling_names():
    for folder in {path.parent for path in SOURCES} - {ROOT / "rankwise"}:
        assert len(list(folder.glob("*.py"))) >= 3, folder
        assert folder.name not in ("utils", "common", "helpers")


def test_every_public_name_can_be_imported():
    for name in rankwise.__all__:
        assert getattr(rankwise, name) is not None


def test_help_imports_no_torch():
    code = (
        "import sys; from rankwise.cli.main import main; assert main(['--help']) == 0; "
        "heavy = {'torch', 'transformers', 'numpy'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize("command", ["plan", "train", "data", "eval", "generate", "merge", "shrink", "rank", "inspect"])
def test_help_of_a_command_imports_no_torch(command):
    code = (
        "import sys\nfrom rankwise.cli.main import main\n"
        f"try: main({[*command.split(), '--help']})\nexcept SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'transformers'} & set(sys.modules); assert not heavy, heavy"
    )
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "usage" in result.stdout
