"""The walls of the house: who may import whom, and that the README tells the truth about it."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

from config import CONFIG, RECIPES
from engine.cli.command_line import key_comments

SCRIPTS = {"train", "evaluate", "lr_finder", "prepare_data", "report", "benchmark"}
MAY_IMPORT = {  # of the project's own; engine, config and model import no script
    "evaluate.py": {"engine", "config", "model"},
    "train.py": {"engine", "config", "model", "evaluate"},
    "lr_finder.py": {"engine", "config", "model", "evaluate", "train"},
    "prepare_data.py": {"engine"},
    "report.py": {"engine", "config"},
    "benchmark.py": {"engine", "benchmarks"},
    "benchmarks": {"engine", "config", "model", "evaluate", "train", "benchmarks"},
    "config.py": {"engine"},
    "engine": {"engine"},
    "model.py": {"engine"},
}
SOURCES = sorted([*REPOSITORY.glob("*.py"), *(REPOSITORY / "engine").rglob("*.py"), *(REPOSITORY / "benchmarks").glob("*.py")])


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_imports_run_one_way(path):
    own = set(imports_of(path)) & (SCRIPTS | {"engine", "config", "model", "benchmarks"})
    allowed = MAY_IMPORT[path.name if path.parent == REPOSITORY else path.parent.name]
    assert own <= allowed


def test_importing_a_module_does_nothing(tmp_path):
    names = [".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__") for path in SOURCES]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "PYTHONDONTWRITEBYTECODE": "1"}
    imports = "\n".join(f"import {name}" for name in names)
    done = subprocess.run([sys.executable, "-c", imports], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_every_public_function_and_class_says_what_it_does(path):
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            exempt = path.parent == REPOSITORY and node.name == "main"
            short = isinstance(node, ast.ClassDef) or len(node.body) == 1
            assert ast.get_docstring(node) or exempt or short, f"{path.name}: {node.name}"


def test_every_key_of_config_is_used_outside_of_it():
    source = "\n".join(path.read_text() for path in SOURCES if path.name != "config.py")
    assert [key for key in CONFIG if f'config["{key}"]' not in source] == []


# The README ----------------------------------------------------------------------------------------------------------

BEGIN, END = "<!-- configuration: written by PYTHONPATH=. python tests/test_structure.py -->", "<!-- end of configuration -->"


def configuration_table():
    recipes = [name for name in RECIPES if name != "seed"]
    rows = [
        f"| key | default | {' | '.join(f'`{name}`' for name in recipes)} | what it is |",
        "|---" * (3 + len(recipes)) + "|",
    ]
    for key, comment in key_comments().items():
        cells = [f"`{RECIPES[name][key]}`" if key in RECIPES[name] else "" for name in recipes]
        rows.append(f"| `{key}` | `{CONFIG[key]}` | {' | '.join(cells)} | {comment} |")
    return "\n".join(rows)


def readme():
    return (REPOSITORY / "README.md").read_text()


def test_the_readmes_configuration_table_is_the_configuration():
    table = readme().split(BEGIN)[1].split(END)[0].strip()
    assert table == configuration_table(), "run PYTHONPATH=. python tests/test_structure.py"


def test_every_file_that_the_readme_names_exists():
    named = set(re.findall(r"`((?:engine/|tests/)?\w+\.(?:py|txt|toml|md))`", readme()))
    assert "train.py" in named
    assert "engine/data/loader.py" in named
    assert [name for name in named if not (REPOSITORY / name).exists()] == []


def test_every_module_is_on_the_readmes_map():
    assert [p.name for p in SOURCES if p.name != "__init__.py" and f"`{p.relative_to(REPOSITORY)}`" not in readme()] == []


def test_every_flag_that_the_readme_shows_exists():
    own = {
        "plan",
        "hours",
        "images-per-s",
        "price-per-hour",
        "resume",
        "overwrite",
        "recipe",
        "help",
        "lowest-rate",
        "highest-rate",
        "steps",
        "output",
    }
    shown = set(re.findall(r"python (?:train|lr_finder)\.py([^`\n]*)", readme()))
    flags = {flag for line in shown for flag in re.findall(r"--([a-z-]+)", line)}
    assert flags
    assert {flag.replace("-", "_") for flag in flags} <= set(CONFIG) | {name.replace("-", "_") for name in own}


def test_the_ci_script_runs_the_readmes_test_command():
    assert "python -m pytest" in readme()
    assert "python -m pytest" in (REPOSITORY / ".ci/run").read_text()


if __name__ == "__main__":
    path = Path(REPOSITORY / "README.md")
    before, rest = path.read_text().split(BEGIN)
    path.write_text(f"{before}{BEGIN}\n\n{configuration_table()}\n\n{END}{rest.split(END)[1]}")


def test_each_accident_that_the_documentation_lists_is_a_test():
    tests = re.findall(r"^def (test_\w+)", "".join(path.read_text() for path in Path(__file__).parent.rglob("test_*.py")), re.M)
    rows = [line for line in (REPOSITORY / "docs/accidents.md").read_text().splitlines() if line.startswith("| ")][1:]
    named = [re.findall(r"`(test_\w+)`", row) for row in rows]
    assert len(rows) > 20 and all(named)
    assert set().union(*named) <= set(tests)
