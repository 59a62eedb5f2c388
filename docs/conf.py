"""How Sphinx builds the documentation site: `make docs`."""

import re
import shutil
from pathlib import Path

from sphinx.application import Sphinx

import functorch_lite

HERE = Path(__file__).parent
REPOSITORY = "https://github.com/functorch-lite/functorch_lite"

project = "functorch_lite"
author = "the functorch_lite authors"
version = release = functorch_lite.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]

# Pages are written to be read on GitHub, too.
myst_enable_extensions = ["amsmath", "dollarmath"]
myst_heading_anchors = 3

# Recipes run when the site is built, unless their code is as it was in the last build.
ignored = shutil.ignore_patterns("*.py", ".*", "__pycache__")
shutil.copytree(HERE.parent / "notebooks", HERE / "notebooks", dirs_exist_ok=True, ignore=ignored)
nb_execution_mode = "cache"
nb_execution_cache_path = str(HERE.parent / "build" / "docs-cache")
nb_execution_timeout = 300
nb_execution_raise_on_error = True
nb_merge_streams = True

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the sections of a docstring say what is taken and returned
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
python_display_short_literal_types = True
default_role = "py:obj"  # `vmap` in a docstring is a link
# What other packages define is not looked for.
nitpick_ignore_regex = [("py:.*", r"(?!functorch_lite\.).*")]

html_theme = "furo"
html_title = "functorch_lite"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_show_copyright = False
html_copy_source = False
html_theme_options = {
    "source_repository": REPOSITORY,
    "source_branch": "main",
    "source_directory": "docs/",
    "light_css_variables": {"color-brand-primary": "#1d4ed8", "color-brand-content": "#1d4ed8"},
    "dark_css_variables": {"color-brand-primary": "#93c5fd", "color-brand-content": "#93c5fd"},
}


def point_outside(app: Sphinx, name: str, source: list[str]) -> None:
    """Make links to files outside `docs/` links to the page of a notebook, or into the repository."""
    page = HERE / name

    def target(match: re.Match[str]) -> str:
        path = (page.parent / match[1]).resolve().relative_to(HERE.parent)
        if path.suffix == ".ipynb":
            return f"]({'../' * name.count('/')}{path})"
        kind = "tree" if (HERE.parent / path).is_dir() else "blob"
        return f"]({REPOSITORY}/{kind}/main/{path})"

    up = "../" * (1 + name.count("/"))
    source[0] = re.sub(rf"\]\(({re.escape(up)}[^)#]+)\)", target, source[0])


def setup(app: Sphinx) -> None:
    """Connect the function above."""
    app.connect("source-read", point_outside)
