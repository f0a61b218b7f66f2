"""A second tuned.optimizer() covers what the recipe trains, not what a schedule had left live."""

from __future__ import annotations

import torch

import burnish
from burnish.testing.models import tiny


def test_every_block_goes_on_to_train_after_a_second_optimizer():
    net, batch = tiny("vit")                                          # findings 2.3
    tuned = burnish.tune(net, "lisa(layers=1, every=1)", head=False)
    everything = {n for n, p in net.named_parameters()}
    first = tuned.optimizer(lr=1e-2)
    for _ in range(3):
        tuned.step(batch)
    second = tuned.optimizer(lr=1e-2)
    held = {n for g in second.param_groups for n in g["param_names"]}
    assert held == everything == {n for g in first.param_groups for n in g["param_names"]}
    start = {n: p.detach().clone() for n, p in net.named_parameters()}
    for _ in range(12):
        tuned.step(batch)
    moved = {b.path for b in tuned.anatomy.blocks
             if any(not torch.equal(start[n], p) for n, p in net.named_parameters()
                    if n.startswith(f"{b.path}."))}
    assert moved == {b.path for b in tuned.anatomy.blocks}


def test_what_the_user_froze_stays_frozen():
    net, batch = tiny("vit")
    tuned = burnish.tune(net, "full", head=False)
    still = next(p for n, p in net.named_parameters() if n.endswith("bias"))
    still.requires_grad_(False)
    before = still.detach().clone()
    tuned.optimizer(lr=1e-2)
    tuned.step(batch)
    assert torch.equal(before, still)


def test_norms_of_houlsby_do_not_decay():
    net, _ = tiny("bert")                                             # findings 2.6
    tuned = burnish.tune(net, "houlsby(bottleneck=4)", head=False)
    opt = tuned.optimizer(lr=1e-2, weight_decay=0.1)
    norms = {n for p in tuned.anatomy.norms for n, _ in net.named_parameters() if n.startswith(p)
             and ".burnish." not in n}
    decayed = {n for g in opt.param_groups if g["weight_decay"] for n in g["param_names"]}
    assert norms and not norms & decayed
    assert all(".burnish." in n for n in decayed)
