"""What tells the samples of a batch apart refuses a model that puts tokens before samples."""

from __future__ import annotations

import pytest

import burnish
from burnish.testing import choose, conformance
from burnish.testing.models import tiny

#: methods, and what makes them tell samples apart where that is a setting
METHODS = {
    "alora": {}, "dvpt": {}, "film": {}, "gbt_sam": {}, "hyperformer": {}, "idpt": {},
    "lite_residual": {}, "mip": {}, "missing_modality": {}, "mixda": {}, "mtlora": {"tasks": 2},
    "mv_adapter": {}, "petalface": {}, "point_gst": {}, "point_peft": {}, "poly": {"tasks": 2},
    "polyhistor": {}, "sema": {}, "ut_adapter": {}, "vl_adapter": {"share": "none"}}


@pytest.mark.parametrize("method", METHODS)
def test_tokens_before_samples_are_refused(method):
    """Whichever module says so."""
    model = choose.models_for(method, all=False)[0]
    recipe = conformance.part(method, **METHODS[method])
    net, batch = tiny(model)
    list(net.modules())[-1].batch_first = False
    with pytest.raises(burnish.RecipeError, match=f"^{method} tells the samples.*before samples"):
        burnish.tune(net, recipe, head=False, calibration=[batch])
