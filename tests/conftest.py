"""What needs a GPU is skipped where there is none."""

from __future__ import annotations

import pytest
import torch

NO_GPU = "needs a GPU, and torch.cuda.is_available() is False here"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests with the mark ``cuda``."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda") is not None:
            item.add_marker(pytest.mark.skip(reason=NO_GPU))
