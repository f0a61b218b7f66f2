"""The fingerprint of a base: what changes it, what does not, and what is said about it."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from torch import nn

from burnish.formats.fingerprint import fingerprint, first_difference, line


def model(seed=0, width=6):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.Linear(width, 2))


def test_it_is_the_hash_of_sorted_hashes():
    m = model()
    f = fingerprint(m)
    lines = []
    for name, t in m.state_dict().items():
        text = f"{name} {str(t.dtype)[6:]}{str(list(t.shape)).replace(' ', '')}"
        if isinstance(m.get_parameter(name) if name in dict(m.named_parameters()) else 0,
                      nn.Parameter):
            text += " " + hashlib.sha256(t.numpy().tobytes()).hexdigest()
        lines.append(text)
    assert f.digest == hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()
    assert fingerprint(model()).digest == f.digest
    assert json.loads(json.dumps(f.to_json())) == {"sha256": f.digest, "tensors": f.tensors}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int8, torch.bool])
def test_every_dtype_has_a_line(dtype):
    a, b = torch.zeros(3, 5).to(dtype), torch.zeros(3, 5).to(dtype)
    b[2, 4] = 1
    assert line(a) == line(a.clone()) != line(b)
    assert line(a.t()) != line(a) and line(a, content=False) == f"{str(dtype)[6:]}[3,5]"


def test_the_first_difference_is_named():
    f = fingerprint(model())
    assert first_difference(f.tensors, model()) is None
    other = model()
    with torch.no_grad():
        other[2].weight[1, 3] += 1e-7
    assert first_difference(f.tensors, other) == \
        "2.weight has the shape of the adapter's base but other values"
    assert first_difference(f.tensors, model(width=8)) == \
        "0.bias is float32[8], the adapter's base has float32[6]"
    assert first_difference(f.tensors, model().double()) == \
        "0.bias is float64[6], the adapter's base has float32[6]"
    assert "3.bias (float32[1]) is not in the adapter's base" == \
        first_difference(f.tensors, model().append(nn.Linear(2, 1)))
    assert first_difference(f.tensors, model()[:2]) == \
        "2.bias is missing (float32[2] in the adapter's base)"


def test_a_changed_parameter_is_hashed_again():
    m = model()
    before = fingerprint(m)
    with torch.no_grad():
        m[0].weight.add_(1)
    assert fingerprint(m).digest != before.digest
    m[0].weight.data = m[0].weight.data - 1
    assert fingerprint(m).tensors["0.weight"].startswith("float32[6,4] ")
    m.load_state_dict(model().state_dict())
    assert fingerprint(m).digest == before.digest


def test_running_statistics_and_what_the_adapter_carries_do_not_count():
    m = model()
    f = fingerprint(m, whole={"2.weight", "2.bias"})
    m(torch.randn(9, 4))
    with torch.no_grad():
        m[2].weight.zero_()
    assert first_difference(f.tensors, m) is None
    assert fingerprint(m, whole={"2.weight", "2.bias"}).digest == f.digest
    assert f.tensors["2.weight"] == "float32[2,6]"


def test_a_line_taken_before_stands_for_what_is_gone():
    m, f = model(), fingerprint(model())
    taken = {"0.weight": line(m[0].weight)}
    m[0].weight = nn.Parameter(torch.empty(0))
    assert fingerprint(m, taken=taken).digest == f.digest
    assert first_difference(f.tensors, m, taken) is None
    assert "0.weight" in first_difference(f.tensors, m, {"0.weight": line(torch.zeros(6, 4))})


def test_what_was_added_is_no_base():
    m, f = model(), fingerprint(model())
    m[0].add_module("burnish", nn.Linear(3, 3))
    m.add_module("burnish", nn.Linear(3, 3))
    assert fingerprint(m).digest == f.digest and first_difference(f.tensors, m) is None


def test_meta_models_are_compared_by_shape():
    f = fingerprint(model())
    assert first_difference(f.tensors, model().to("meta")) is None
    assert fingerprint(model().to("meta")).tensors["0.weight"] == "float32[6,4]"


def test_tied_parameters_are_one():
    m = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    m[1].weight = m[0].weight
    assert "1.weight" not in fingerprint(m).tensors
