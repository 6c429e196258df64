"""The walls of the house: who may import whom, and that README and docs tell the truth about it."""

import ast
import functools
import graphlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY, run_program

from config import CONFIG, RECIPES, SETTINGS
from engine.cli.command_line import key_comments
from engine.cli.resume_rule import RULED_ON_RESUME

SCRIPTS = {"train", "evaluate", "lr_finder", "prepare_data", "report", "benchmark"}
FOLDERS = [  # of engine/; each may import those of the earlier lines, and its own modules
    {"system"},
    {"cli"},
    {"preparation"},
    {"data", "run"},
    {"inference", "report"},
    {"training"},
]
ENGINE = {f"engine/{folder}" for level in FOLDERS for folder in level}
MAY_IMPORT = {  # of the project's own; engine, config and model import no script
    "evaluate.py": ENGINE | {"config", "model"},
    "train.py": ENGINE | {"config", "model"},
    "lr_finder.py": ENGINE | {"config", "model", "train"},
    "prepare_data.py": ENGINE,
    "report.py": ENGINE | {"config"},
    "benchmark.py": ENGINE | {"benchmarks"},
    "benchmarks": ENGINE | {"config", "model", "train", "benchmarks"},
    "config.py": set(),
    "engine": set(),
    "model.py": ENGINE,
}
for number, level in enumerate(FOLDERS):
    below = {f"engine/{folder}" for lower in FOLDERS[:number] for folder in lower}
    MAY_IMPORT |= {f"engine/{folder}": below | {f"engine/{folder}", "config"} for folder in level}
SOURCES = sorted([*REPOSITORY.glob("*.py"), *(REPOSITORY / "engine").rglob("*.py"), *(REPOSITORY / "benchmarks").glob("*.py")])


def module_name(path):
    return ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")


def imports_of(path):
    """Yield the modules that a file imports, also inside of functions: engine.data.images; of others, too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                inner = REPOSITORY.joinpath(*node.module.split("."), alias.name)
                is_module = inner.is_dir() or inner.with_suffix(".py").exists()
                yield f"{node.module}.{alias.name}" if is_module else node.module


def room_of(module):
    """engine/data of engine.data.images, and the first part of every other name."""
    return "/".join(module.split(".")[: 2 if module.startswith("engine.") else 1])


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_imports_run_one_way(path):
    own = set(map(room_of, imports_of(path))) & (SCRIPTS | ENGINE | {"engine", "config", "model", "benchmarks"})
    allowed = MAY_IMPORT[path.name if path.parent == REPOSITORY else path.parent.relative_to(REPOSITORY).as_posix()]
    assert own <= allowed


def test_the_folders_of_the_engine_are_those_that_have_a_place_in_the_order():
    found = {path.parent.relative_to(REPOSITORY).as_posix() for path in SOURCES if "engine" in path.parts} - {"engine"}
    assert found == ENGINE


def test_no_modules_import_each_other_in_a_circle():
    names = {module_name(path) for path in SOURCES}
    graphlib.TopologicalSorter({module_name(p): names & set(imports_of(p)) for p in SOURCES}).prepare()  # raises CycleError


def test_importing_a_module_does_nothing(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "PYTHONDONTWRITEBYTECODE": "1"}
    imports = "\n".join(f"import {module_name(path)}" for path in SOURCES)
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


# README and docs -----------------------------------------------------------------------------------------------------

README, CONFIGURATION = REPOSITORY / "README.md", REPOSITORY / "docs/configuration.md"
PAGES = sorted([*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").glob("*.md"), REPOSITORY / "checkpoints/README.md"])
BEGIN = "<!-- configuration: written by PYTHONPATH=.:tests python tests/test_structure.py -->"
END = "<!-- end of configuration -->"
OTHERS_FLAGS = {"--signal", "--requeue"}  # Slurm's


def configuration_table():
    recipes = [name for name in RECIPES if name != "seed"]
    rows = [
        f"| key | default | {' | '.join(f'`{name}`' for name in recipes)} | what it is | on resume |",
        "|---" * (4 + len(recipes)) + "|",
    ]
    for key, comment in key_comments().items():
        cells = [f"`{RECIPES[name][key]}`" if key in RECIPES[name] else "" for name in recipes]
        resume = "may change" if key in SETTINGS else "by rule" if key in RULED_ON_RESUME else ""
        rows.append(f"| `{key}` | `{CONFIG[key]}` | {' | '.join(cells)} | {comment} | {resume} |")
    return "\n".join([*rows, "", "By rule:", "", *(f"- `{key}`: {rule}" for key, rule in RULED_ON_RESUME.items())])


def readme():
    return README.read_text()


def all_pages():
    return "\n".join(path.read_text() for path in PAGES)


def test_the_readme_fits_on_three_screens():
    assert README.stat().st_size <= 9_000


def test_the_readmes_configuration_table_is_the_configuration():
    table = CONFIGURATION.read_text().split(BEGIN)[1].split(END)[0].strip()
    assert table == configuration_table(), "run PYTHONPATH=.:tests python tests/test_structure.py"


def test_every_file_that_the_readme_names_exists():
    folders = "|".join(sorted(re.escape(path.name) for path in REPOSITORY.iterdir() if path.is_dir() and path.name != "data"))
    in_backticks = set(re.findall(rf"`((?:\w+\.(?:py|txt|toml|md|yaml)|(?:{folders})/[\w./-]*\w/?))`", all_pages()))
    in_commands = set(re.findall(r"\b(?:python3?|torchrun(?: --?\S+)*) ([\w/]+\.py)\b", all_pages()))
    assert {"config.py", "engine/cli/keys.py", "engine/data/"} <= in_backticks
    assert {"train.py", "tests/test_structure.py"} <= in_commands
    written_by_runs = {name for name in in_backticks if name.startswith("checkpoints/") and name != "checkpoints/README.md"}
    assert [name for name in (in_backticks | in_commands) - written_by_runs if not (REPOSITORY / name).exists()] == []


@functools.cache
def anchors_of(path):
    """The anchors that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"(?ms)^```.*?^```", "", path.read_text()), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_every_link_of_the_documentation_leads_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" not in link:
            file, _, anchor = link.partition("#")
            target = (page.parent / file).resolve() if file else page
            assert target.is_relative_to(REPOSITORY) and target.exists(), link
            assert not anchor or anchor in anchors_of(target), link


def test_every_page_is_reached_from_the_readme():
    linked = {(REPOSITORY / link.partition("#")[0]).resolve() for link in re.findall(r"\]\(([^)\s:]+)\)", readme())}
    assert set(REPOSITORY.glob("docs/*.md")) <= linked


def test_every_module_is_on_the_readmes_map():
    """The map has the programs and the folders of the engine; docs/how_it_is_built.md says the same in more words."""
    tree = readme().split("## The tree")[1].split("##")[0]
    programs = [path.name for path in REPOSITORY.glob("*.py")]
    folders = sorted({path.parent for path in SOURCES if path.parent.parent == REPOSITORY / "engine"})
    assert [name for name in programs if not re.search(rf"^    {name} ", tree, re.M)] == []
    assert [path.name for path in folders if not re.search(rf"^      {path.name}/ ", tree, re.M)] == []
    house = (REPOSITORY / "docs/how_it_is_built.md").read_text()
    assert [name for name in programs if f"`{name}`" not in house] == []
    assert [path.name for path in folders if f"| `engine/{path.name}/` |" not in house] == []


@functools.cache
def flags_of(*command):
    """The flags that a program's --help names."""
    status, output = run_program(command[0], [*command[1:], "--help"])
    assert status == 0, output
    return set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", output))


def test_every_flag_that_the_readme_shows_exists():
    text = re.sub(r"\\\n\s*", "", all_pages())  # a command of several lines
    programs = "|".join(path.stem for path in REPOSITORY.glob("*.py"))
    shown = re.findall(rf"\b((?:{programs})\.py)\b((?: [^`\n]*)?)", text)
    known, count = {}, 0
    for program, rest in shown:
        rest = rest.split(" #")[0]
        flags = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", rest))
        part = re.match(r" ([a-z]+)", rest) if program == "benchmark.py" else None
        if flags:
            known[program] = flags_of(program, *(part.groups() if part else ()))
            assert flags <= known[program], f"{program}{rest}"
            count += len(flags)
    assert count > 30 and {"train.py", "evaluate.py", "report.py", "lr_finder.py"} <= set(known)


def test_every_flag_named_in_the_documentation_exists():
    named = set(re.findall(r"`(--[a-z][a-z0-9-]*)[^`]*`", all_pages())) - OTHERS_FLAGS
    programs = [(f"{name}.py",) for name in sorted(SCRIPTS)] + [("benchmark.py", "gpu")]
    assert named and named <= set().union(*(flags_of(*program) for program in programs))


def test_the_ci_script_runs_the_readmes_test_command():
    assert "python -m pytest" in readme()
    assert "python -m pytest" in (REPOSITORY / ".ci/run").read_text()


def test_each_accident_that_the_documentation_lists_is_a_test():
    tests = re.findall(r"^def (test_\w+)", "".join(path.read_text() for path in Path(__file__).parent.rglob("test_*.py")), re.M)
    rows = [line for line in (REPOSITORY / "docs/accidents.md").read_text().splitlines() if line.startswith("| ")][1:]
    named = [re.findall(r"`(test_\w+)`", row) for row in rows]
    assert len(rows) > 20 and all(named)
    assert set().union(*named) <= set(tests)


# Requirements --------------------------------------------------------------------------------------------------------


def requirements(name):
    """{package: what its line says of versions} of a requirements file."""
    lines = [line.split("#")[0].strip() for line in (REPOSITORY / name).read_text().splitlines()]
    return dict(re.match(r"([\w.-]+)(?:\[\w+\])?(.*)", line).groups() for line in lines if line and not line.startswith("-r"))


def test_every_requirement_has_a_tested_version_inside_its_range():
    specifiers = pytest.importorskip("packaging.specifiers")
    ranges, pins = requirements("requirements.txt") | requirements("requirements-dev.txt"), requirements("constraints.txt")
    assert ranges.keys() == pins.keys()
    for name, pin in pins.items():
        assert pin.startswith("==") and specifiers.SpecifierSet(ranges[name]).contains(pin[2:]), name


def test_the_hooks_run_the_linter_that_the_ci_script_runs():
    hooks = (REPOSITORY / ".pre-commit-config.yaml").read_text()
    assert f"rev: v{requirements('constraints.txt')['ruff'][2:]}" in hooks


if __name__ == "__main__":
    before, rest = CONFIGURATION.read_text().split(BEGIN)
    CONFIGURATION.write_text(f"{before}{BEGIN}\n\n{configuration_table()}\n\n{END}{rest.split(END)[1]}")
