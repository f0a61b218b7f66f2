"""Nothing shows a bar while a model is written."""

from __future__ import annotations

import pytest
from transformers.utils import logging

from burnish.formats import staged


@pytest.mark.parametrize("on", [True, False])
def test_models_are_written_without_a_bar_and_the_bars_stay_as_they_were(tmp_path, on):
    before = logging.is_progress_bar_enabled()
    try:
        (logging.enable_progress_bar if on else logging.disable_progress_bar)()
        with staged.replace(tmp_path / "model", "model"):
            assert not logging.is_progress_bar_enabled()
        assert logging.is_progress_bar_enabled() == on
        with pytest.raises(ZeroDivisionError), staged.replace(tmp_path / "other", "model"):
            raise ZeroDivisionError
        assert logging.is_progress_bar_enabled() == on
    finally:
        (logging.enable_progress_bar if before else logging.disable_progress_bar)()
