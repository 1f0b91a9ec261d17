"""Parameters of slow tests."""

import pytest


def slow_as_it_is(*values: object) -> object:
    """A parameter of the slow run, in which nodes compile no more than in the default one."""
    return pytest.param(*values, marks=pytest.mark.slow(compile_nodes=False))
