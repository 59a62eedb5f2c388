"""Running a client on PyTorch's transforms and on ours."""

from contextlib import contextmanager

import torch

from functorch_lite import _jvp, _vjp, _vmap, overlay


@contextmanager
def calls_of_ours():
    """How often vmap, reverse mode and forward mode of ours have run a function, by name."""
    calls = {}
    places = {"vmap": (_vmap, "_map"), "vjp": (_vjp.Pullback, "run"), "jvp": (_jvp, "push_leaves")}
    originals = {kind: getattr(*place) for kind, place in places.items()}

    def counting(kind, original):
        def count_and_run(*args, **kwargs):
            calls[kind] = calls.get(kind, 0) + 1
            return original(*args, **kwargs)

        return count_and_run

    for kind, place in places.items():
        setattr(*place, counting(kind, originals[kind]))
    try:
        yield calls
    finally:
        for kind, place in places.items():
            setattr(*place, originals[kind])


def on_both(example, seed=0):
    """What an example returns on PyTorch's transforms and on ours, from the same random numbers. Ours did run."""
    torch.manual_seed(seed)
    with calls_of_ours() as calls:
        theirs = example()
    assert not calls
    torch.manual_seed(seed)
    with calls_of_ours() as calls, overlay():
        ours = example()
    assert calls
    return theirs, ours


def assert_equal_on_both(example, rtol=1e-5, atol=1e-6, seed=0):
    """Run an example on both, compare all tensors and numbers of the result, and return ours."""
    theirs, ours = on_both(example, seed)
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)
    return ours
