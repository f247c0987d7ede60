"""README.md and the pages of docs/: their Python runs, their commands are understood, their links lead somewhere."""

import contextlib
import functools
import importlib
import re
import shlex
import tempfile
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest

from lsgd_jax import cli, leader_pull
from lsgd_jax.cli import commands as commands_module
from lsgd_jax.cli import costs, faults, launch, preparation

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
FENCED = re.compile(r"^```(?P<info>.*?)\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE)
QUOTED = re.compile(r'python title="(.+)"')


def fenced(text, info):
    """The code of a text's fenced blocks whose info matches, with the match."""
    for block in FENCED.finditer(text):
        if found := re.fullmatch(info, block["info"]):
            yield found, block["code"]


def run(page):
    """Run the Python of a page; returns its namespace."""
    return list(sections(page).values())[-1]


@functools.cache
def sections(page):
    """Run the Python of a page, in one namespace, with what pages take for given and a run.

    Returns the names and values as they are after each section of the second level, by heading.
    """
    x = jax.random.normal(jax.random.key(0), (4, 8, 3))
    given = {
        "jax": jax,
        "jnp": jnp,
        "optax": optax,
        "leader_pull": leader_pull,
        "loss_fn": lambda params, batch: jnp.mean((batch[0] @ params["w"] - batch[1]) ** 2),
        "params": {"w": jnp.zeros((4, 3))},
        "batch": (x, x.sum(-1)),
    }
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        Path("runs/a").mkdir(parents=True)
        Path("runs/a/metrics.jsonl").write_text('{"event": "evaluation", "step": 50, "center_error": 0.1}\n')
        after = {}
        for section in re.split("^## ", page.read_text(), flags=re.MULTILINE):
            for _, code in fenced(section, "python"):
                exec(compile(code, page, "exec"), given)
            after[section.partition("\n")[0]] = dict(given)
    return after


def commands(text):
    """What follows `lsgd` or `make` on lines of code, variables and srun left out, and alone in cells of tables."""
    text = "".join([text, *(f"\n    {cell}\n" for cell in re.findall(r"\| `((?:lsgd|make) [^`]+)` (?=\|)", text))])
    text = FENCED.sub(lambda block: textwrap.indent(block["code"], "    "), text).replace("\\\n", " ")
    for line in re.findall(r"^ {4,}(?:[A-Z_]+=\S+ +|srun .*?)*((?:lsgd|make) .*)", text, re.MULTILINE):
        program, *arguments = shlex.split(line, comments=True)
        yield program, tuple(arguments)
        if "--" in arguments:
            yield program, tuple(arguments[arguments.index("--") + 1 :])


OF_PRESETS = [module.read_text().split('"""')[1] for module in (ROOT / "lsgd_jax" / "presets").glob("*.py")]
ALL_COMMANDS = sorted(
    {command for text in [*(p.read_text() for p in PAGES), *OF_PRESETS] for command in commands(text)}
)


def anchors(path):
    """Of a page's headings, as GitHub makes them, and of the modules that it documents."""
    text = FENCED.sub("", path.read_text())
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    "page",
    # That on libraries takes long, and is run by test_libraries.py, whole.
    [p for p in PAGES if list(fenced(p.read_text(), "python")) and p.stem != "libraries"],
    ids=lambda page: page.stem,
)
def test_the_python_of_a_page_runs(page):
    run(page)


@pytest.mark.parametrize("name", ["README.md", "docs/index.md"])
def test_the_first_example_trains_and_elects(name):
    of_page = run(ROOT / name)
    params, state, batch = of_page["params"], jax.vmap(of_page["tx"].init)(of_page["params"]), of_page["batch"]
    for _ in range(40):
        params, state = of_page["step"](params, state, batch)
    assert jnp.abs(params["w"] - 1).max() < 0.1  # The least-squares solution.
    assert state[-1].exchanges.tolist() == [10] * 4


def test_the_quickstart_comes_to_a_trained_center():
    of_page = run(ROOT / "docs" / "quickstart.md")
    assert of_page["error"] < 0.2 * of_page["losses"][0].mean()
    assert of_page["leaders"][:4] == [-1, -1, -1, of_page["leaders"][3]]
    assert set(of_page["leaders"][3:]) <= {0, 1, 2, 3}


@pytest.mark.parametrize("page", [p for p in PAGES if list(fenced(p.read_text(), QUOTED))], ids=lambda page: page.stem)
def test_what_is_quoted_stands_in_the_source(page):
    for title, code in fenced(page.read_text(), QUOTED):
        source = (ROOT / title[1]).read_text()
        assert any(textwrap.indent(code, " " * depth) in source for depth in range(0, 20, 4)), code


def test_there_are_commands():
    assert {program for program, _ in ALL_COMMANDS} == {"lsgd", "make"}


@pytest.mark.parametrize("arguments", [a for program, a in ALL_COMMANDS if program == "lsgd"], ids=" ".join)
def test_a_command_is_understood(arguments, monkeypatch):
    understood = []
    places = {
        commands_module: ("train", "compare", "report", "figure", "simulate"),
        costs: ("info", "compile_ahead"),
        faults: ("chaos", "replay"),
        launch: ("launch", "join"),
        preparation: ("data",),
    }
    for module, name in ((module, name) for module, names in places.items() for name in names):
        instead = functools.wraps(getattr(module, name))(lambda *_, **__: understood.append(True))
        monkeypatch.setattr(module, name, instead)
    assert cli.main(list(arguments)) == 0
    assert understood == [True]


def test_make_has_the_targets():
    texts = [page.read_text() for page in PAGES]
    named = {target for text in texts for target in re.findall(r"`make\s([a-z]+)`", text)}
    for program, arguments in ALL_COMMANDS:
        if program == "make":
            named |= {argument for argument in arguments if "=" not in argument}
    assert "docs" in named
    assert named <= set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.mark.parametrize(
    "page",
    [*PAGES, ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("benchmarks/**/*.md"))],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_links_lead_somewhere(page):
    for path, anchor in re.findall(r"\]\(([^)\s#:]*)(?:#([^)\s]+))?\)", FENCED.sub("", page.read_text())):
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), path
        if anchor.startswith("lsgd_jax"):
            module, _, name = anchor.rpartition(".")
            assert re.search(rf"^::: ({module}|{anchor})$", target.read_text(), re.MULTILINE), anchor
            assert hasattr(importlib.import_module(module), name), anchor
        elif anchor:
            assert anchor in anchors(target), anchor
