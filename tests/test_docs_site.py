"""The documentation site has every page, every recipe and every public name; `make docs` builds it without warnings."""

import re
from pathlib import Path

import pytest

import functorch_lite
import functorch_lite.compile
import functorch_lite.extend

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
MODULES = (functorch_lite, functorch_lite.compile, functorch_lite.extend)


def toctree_entries(page):
    blocks = re.findall(r"```\{toctree\}\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line and not line.startswith(":")]


def test_every_page_is_in_the_contents_once():
    pages = {path.relative_to(DOCS).with_suffix("").as_posix() for path in [*DOCS.glob("*.md"), *DOCS.glob("api/*.md")]}
    assert sorted(toctree_entries("index.md")) == sorted(pages - {"index"})


def test_every_notebook_is_in_the_recipes_once():
    names = [path.stem for path in (ROOT / "notebooks").glob("*.ipynb")]
    assert sorted(toctree_entries("recipes.md")) == sorted(f"notebooks/{name}" for name in names)
    text = (DOCS / "recipes.md").read_text(encoding="utf-8")
    assert [name for name in names if f"](../notebooks/{name}.ipynb)" not in text] == []


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_every_public_name_is_in_the_reference_once(module):
    page = DOCS / "api" / f"{module.__name__.rpartition('.')[2]}.md"
    described = re.findall(
        r"^\.\. (?:auto\w+|py:function|py:data):: ([\w.]+)", page.read_text(encoding="utf-8"), re.MULTILINE
    )
    assert sorted(name.rpartition(".")[2] for name in described) == sorted(module.__all__)


def test_pictures_are_drawn_by_their_script():
    drawn = set(re.findall(r'p\.write\("(\w+\.svg)"\)', (DOCS / "pictures" / "draw.py").read_text(encoding="utf-8")))
    shown = {name for page in DOCS.glob("*.md") for name in re.findall(r"\(pictures/(\w+\.svg)\)", page.read_text())}
    assert drawn == shown - {"joint_graph.svg"}
