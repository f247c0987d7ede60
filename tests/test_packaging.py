"""What an import costs and what the package says of itself; `make package` builds it and tries it elsewhere."""

import ast
import itertools
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import lsgd_jax

ROOT = Path(__file__).parents[1]


def test_the_import_leaves_heavy_libraries_alone():
    heavy = ("matplotlib", "tensorflow_datasets", "grain", "orbax", "scipy", "sklearn", "tyro")
    code = f"import sys, lsgd_jax; lsgd_jax.leader_pull; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=120)
    assert done.stdout == "[]\n"


def test_nobody_is_told_to_install_the_package_from_an_index():
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "lsgd_jax").rglob("*.py")]
    for page in pages:
        assert not re.search(r"pip install '?lsgd[-_]jax", page.read_text()), page


def test_the_page_on_the_structure_names_every_room():
    page = (ROOT / "docs" / "structure.md").read_text()
    to_know, plumbing = (re.findall(r"^\| \[(.+?)/?\]", half, re.MULTILINE) for half in page.split("## Plumbing"))
    assert len(to_know) <= 12
    package = ROOT / "lsgd_jax"
    rooms = [path.name for path in package.glob("[!_]*.py")] + [
        path.parent.name for path in package.glob("*/__init__.py")
    ]
    assert sorted([*to_know, *plumbing]) == sorted(rooms)


def test_types_go_with_the_package():
    assert (Path(lsgd_jax.__file__).parent / "py.typed").exists()


def test_every_library_that_is_imported_is_a_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = [*project["dependencies"], *itertools.chain(*project["optional-dependencies"].values())]
    allowed = {re.split(r"[>\[]", requirement)[0].lower() for requirement in required} | {"lsgd-jax", "jaxlib"}
    distributions = packages_distributions()
    for path in (ROOT / "lsgd_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            for name in {name.partition(".")[0] for name in names} - sys.stdlib_module_names:
                owners = {owner.lower().replace("_", "-") for owner in distributions.get(name, [name])}
                assert owners & allowed, f"{path.name} imports {name}"
