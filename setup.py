"""Builds functorch_lite._C next to the torch that is installed. Metadata is in pyproject.toml."""

import os
import sys
import sysconfig
from pathlib import Path

from setuptools import setup

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths
except ImportError:
    sys.exit(
        "functorch_lite builds against the PyTorch that it will run with, and found none.\n"
        "Install torch first (pip install torch), then: pip install --no-build-isolation ."
    )

ROOT = Path(__file__).parent

# Two headers that would make every file slow to compile are errors under these.
NARROW_HEADERS = [("AT_PER_OPERATOR_HEADERS", None), ("TORCH_ASSERT_ONLY_METHOD_OPERATORS", None)]
# Warnings are for our code: PyTorch's headers count as system headers.
SYSTEM_HEADERS = [flag for path in include_paths() for flag in ("-isystem", path)]


def unit(name: str, paths: list[Path]) -> str:
    """A file that includes these: PyTorch's headers take five seconds, and are read once for all of them."""
    file = ROOT / "build" / "units" / f"{name}.cpp"
    text = "".join(f'#include "../../{path.relative_to(ROOT)}"\n' for path in sorted(paths))
    if not file.exists() or file.read_text() != text:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return str(file.relative_to(ROOT))


# The files that know Python.
BINDINGS = [ROOT / "csrc" / f"{name}.cpp" for name in ("bindings", "call_cache", "trees")]

extension = CppExtension(
    "functorch_lite._C",
    sources=[
        unit("bindings", BINDINGS),
        unit("rules", list(ROOT.glob("csrc/rules/*.cpp"))),
        unit(
            "core",
            [path for path in ROOT.glob("csrc/*.cpp") if path not in BINDINGS]
            + list(ROOT.glob("csrc/derivatives/*.cpp")),
        ),
    ],
    depends=sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*.*")),
    define_macros=NARROW_HEADERS,
    # -O1 compiles a fifth faster, and benchmarks/overhead.py shows no difference: the time is PyTorch's.
    extra_compile_args=["-O1", "-g0", "-std=c++20", "-fvisibility=hidden", "-Wall", "-Wextra", *SYSTEM_HEADERS],
)


class Build(BuildExtension):
    """Records which torch the extension was built for: `import functorch_lite` compares."""

    def initialize_options(self):
        """Keep objects where every kind of build finds them again, apart for each torch and Python."""
        super().initialize_options()
        self.build_temp = f"build/torch-{torch.__version__}-{sysconfig.get_config_var('SOABI')}"

    def run(self):
        """Build, then leave the record beside the extension."""
        os.environ.setdefault("MAX_JOBS", str(os.cpu_count() or 1))
        super().run()
        package = ROOT if self.inplace else Path(self.build_lib)
        record = package / "functorch_lite" / "_built_for.py"
        record.write_text(f'TORCH_VERSION = "{torch.__version__}"\n')


setup(ext_modules=[extension], cmdclass={"build_ext": Build})
