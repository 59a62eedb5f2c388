"""Every example in a docstring is right, and every public name says what it takes and returns."""

import doctest
import importlib
import inspect
import pkgutil

import pytest

import functorch_lite
import functorch_lite.compile

MODULES = sorted(
    m.name for m in pkgutil.walk_packages(functorch_lite.__path__, "functorch_lite.") if not m.name.endswith("._C")
)
#: make_fx is PyTorch's own.
PUBLIC = {
    **{name: getattr(functorch_lite, name) for name in functorch_lite.__all__ if name != "make_fx"},
    **{f"compile.{n}": getattr(functorch_lite.compile, n) for n in functorch_lite.compile.__all__ if n != "make_fx"},
}
FUNCTIONS = sorted(name for name, value in PUBLIC.items() if inspect.isfunction(value))


@pytest.mark.parametrize("name", [name for name, value in PUBLIC.items() if not isinstance(value, dict)])
def test_examples_of_public_name(name, capsys):
    text = inspect.getdoc(PUBLIC[name])
    runner = doctest.DocTestRunner()
    runner.run(doctest.DocTestParser().get_doctest(text, {}, name, None, 0))
    assert runner.summarize(verbose=False).failed == 0, capsys.readouterr().out


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_module(name, capsys):
    failed, _ = doctest.testmod(importlib.import_module(name))
    assert failed == 0, capsys.readouterr().out


@pytest.mark.parametrize("name", PUBLIC)
def test_public_name_has_a_docstring(name):
    first_line = inspect.getdoc(PUBLIC[name]).splitlines()[0]
    assert len(first_line) > 10


@pytest.mark.parametrize("name", FUNCTIONS)
def test_docstring_has_its_sections(name):
    function = PUBLIC[name]
    doc = inspect.getdoc(function)
    arguments = ["Args:"] if inspect.signature(function).parameters else []
    for section in (*arguments, "Returns:", "Example:"):
        assert f"\n{section}\n" in doc, f"{name} has no {section}"
    assert ">>> " in doc


@pytest.mark.parametrize("name", FUNCTIONS)
def test_docstring_names_every_argument(name):
    function = PUBLIC[name]
    described = inspect.getdoc(function).partition("Args:\n")[2].partition("\nReturns:")[0]
    for parameter in inspect.signature(function).parameters:
        assert f"\n    {parameter}: " in f"\n{described}", f"{name} does not describe {parameter}"


def test_all_is_sorted_and_complete():
    assert functorch_lite.__all__ == sorted(functorch_lite.__all__)
    public = {n for n, value in vars(functorch_lite).items() if n[0] != "_" and not inspect.ismodule(value)}
    assert public <= set(functorch_lite.__all__)
