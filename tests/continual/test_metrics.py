"""Figures of a matrix of accuracies, by hand."""

from __future__ import annotations

import pytest

from burnish.continual.metrics import Matrix
from burnish.core.errors import ConfigError

#: three tasks of 10, 10 and 20 test rows
A = Matrix([[0.9, 0.2, None], [0.7, 0.8, 0.4], [0.5, 0.9, 0.6]], [10, 10, 20], [None, 0.1, 0.3])


def test_figures_by_hand():
    assert A.last == pytest.approx((0.5 * 10 + 0.9 * 10 + 0.6 * 20) / 40)          # 0.65
    assert A.last_by_task == pytest.approx(2.0 / 3)
    assert [A.after(t) for t in range(3)] == pytest.approx([0.9, 0.75, 0.65])
    assert A.average == pytest.approx((0.9 + 0.75 + 0.65) / 3)
    # task 0: best of 0.9, 0.7 less 0.5; task 1: 0.8 less 0.9
    assert A.forgetting == pytest.approx((0.4 - 0.1) / 2)
    assert A.backward == pytest.approx(((0.5 - 0.9) + (0.9 - 0.8)) / 2)
    assert A.forward == pytest.approx(((0.2 - 0.1) + (0.4 - 0.3)) / 2)
    assert A.drop == pytest.approx(0.9 - 0.65)


def test_the_best_of_a_task_is_looked_for_before_the_last():
    late = Matrix([[0.5, None, None], [0.9, 0.5, None], [0.6, 0.5, 0.5]], [1, 1, 1], [None] * 3)
    assert late.forgetting == pytest.approx((0.3 + 0.0) / 2)
    assert late.backward == pytest.approx((0.1 + 0.0) / 2)


def test_an_oracle_forgets_nothing():
    whole = Matrix([[1.0, 1.0, 1.0]] * 3, [3, 4, 5], [0.0] * 3)
    assert whole.forgetting == whole.backward == whole.drop == 0.0
    assert whole.last == whole.average == whole.forward == 1.0


def test_what_was_not_read_has_no_figure():
    once = Matrix([[None, None], [0.5, 1.0]], [1, 3], [None, None])
    assert once.last == pytest.approx(0.875)
    assert once.average is once.forgetting is once.backward is once.forward is once.drop is None
    unseen = Matrix([[0.9, None], [0.5, 1.0]], [1, 3], [None, None])
    assert unseen.forward is None and unseen.backward == pytest.approx(-0.4)
    one = Matrix([[0.5]], [4], [None])
    assert one.last == one.average == 0.5 and one.forgetting is one.drop is None


@pytest.mark.parametrize("rows, sizes, start, why", [
    ([[0.5]], [1, 1], [None, None], "2 rows of 2"),
    ([[0.5, None]] * 2, [1, 1], [None, None], "last"),
    ([[50.0]], [1], [None], "from 0 to 1"), ([[0.5]], [1], [None, None], "a start of 1")])
def test_what_is_no_matrix_is_refused(rows, sizes, start, why):
    with pytest.raises(ConfigError, match=why):
        Matrix(rows, sizes, start)
