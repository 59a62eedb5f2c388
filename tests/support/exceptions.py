"""Every operator that vmap does not run as it runs others, with the reason. The tests fail if an entry is not needed."""

from __future__ import annotations

#: Results are uninitialised memory: only shapes and dtypes are compared.
ONLY_SHAPES = {"empty_like", "new_empty", "new_empty_strided", "empty_strided"}

#: Meaning depends on the strides of the argument: compared only where examples are contiguous.
CONTIGUOUS_ONLY = {
    "view",
    "view_as_complex",
    "view_as",
    "as_strided",
    "as_strided_copy",
    "as_strided_scatter",
    "as_strided.partial_views",
}
