"""P that serves several passes: what a pass took stays what it was."""

import pytest
import torch
from _cases import CELLS as NAMES
from _cases import matrices
from _compare import assert_identical

import tp_kernels as tp
from tp_kernels.ops.recurrence.cell import CELLS
from tp_kernels.ops.recurrence.feedback import RefreshedFeedback

RULE = tp.TargetProp()


@pytest.mark.parametrize("cell", NAMES)
def test_what_a_pass_took_stays_when_the_next_takes_another(cell, backend):
    """Its backward pass may come later."""
    weight = CELLS[cell].inverted(matrices((5 * CELLS[cell].gates, 5), torch.float64), RULE.inverse)
    refreshed = RefreshedFeedback(weight, 2)
    first, second = (refreshed(weight, RULE, backend) for _ in range(2))
    assert_identical(second, first, "P of the second pass")
    before = first.clone()
    third = refreshed(3 * weight, RULE, backend)
    assert not torch.equal(third, before)
    for found in (first, second):
        assert_identical(found, before, "P")
