"""SFPrompt: split passes against the whole model, bytes by the formula, pruning, FedAvg."""

from __future__ import annotations

import copy

import pytest
import torch

import burnish
from burnish.blocks.state.parted import averaged, el2n
from burnish.core.recipe import parse
from burnish.methods.lifecycle.sfprompt import Sfprompt
from burnish.testing.models import tiny

TOKENS, LENGTH, WIDTH = 17, 3, 32                            # 16 patches and the class token


def joined(model="vit", layers=4, recipe=f"vpt(length={LENGTH}, dropout=0.0)", head=True, n=8):
    more = {} if model == "timm_qkv" else {"num_hidden_layers": layers}
    net, batch = tiny(model, dtype=torch.float64, batch=n, **more)
    base = copy.deepcopy(net)
    tuned = burnish.tune(net, recipe, head=head)
    for p in tuned.parameters():
        p.data = p.data.double()
    return tuned, batch, base


def grads(tuned):
    found = {n: p.grad.clone() for n, p in tuned.named_parameters()}
    for p in tuned.parameters():
        p.grad = None
    return found


@pytest.mark.parametrize("layers, held", [(3, 1), (4, 1), (6, 2)])
def test_a_split_pass_has_the_gradients_of_the_whole_and_the_bytes_of_the_formula(layers, held):
    tuned, batch, _ = joined(layers=layers)
    tuned.loss(batch).backward()
    want = grads(tuned)
    with Sfprompt(client_blocks=held).split(tuned) as traffic:
        value = tuned.loss(batch)
        once = 8 * (TOKENS + LENGTH) * WIDTH * 8             # float64
        assert (traffic.sent, traffic.received) == (once, once)
        value.backward()
    got = grads(tuned)
    for n, g in want.items():
        torch.testing.assert_close(got[n], g, rtol=1e-6, atol=1e-12)
    assert traffic.total == 2 * 8 * (TOKENS + LENGTH) * WIDTH * 2 * 8
    with torch.no_grad():
        tuned.loss(batch)
    assert traffic.total == 4 * once                         # outside nothing is counted


def test_what_is_sent_is_what_arrives_both_ways():
    tuned, batch, base = joined()
    seen = []

    def send(t):
        seen.append(t)
        return t.to(torch.float16).to(t.dtype) * 0.5

    hook = tuned.model.vit.layers[1].register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    with Sfprompt().split(tuned, send):
        tuned.loss(batch).backward()
    hook.remove()
    assert len(seen) == 5 and torch.equal(seen[1].detach(), seen[0].half().double() * 0.5)


def short(base, batch, rows):
    """Head and tail alone: the first and the last block, with the prompt before the patches."""
    x = base.vit.embeddings(batch["pixel_values"])
    x = torch.cat([x[:, :1], rows.expand(len(x), -1, -1), x[:, 1:]], 1)
    for layer in (base.vit.layers[0], base.vit.layers[-1]):
        x = layer(x)
        x = x[0] if isinstance(x, tuple) else x
    x = torch.cat([x[:, :1], x[:, 1 + LENGTH:]], 1)
    return base.classifier(base.vit.layernorm(x)[:, 0])


def test_the_body_left_out_is_head_and_tail_and_never_runs():
    tuned, batch, base = joined()
    ran = []
    for layer in tuned.model.vit.layers[1:3]:
        layer.attention.register_forward_hook(lambda *_: ran.append(1))
    rows = next(p for n, p in tuned.named_parameters() if n.endswith("rows"))
    base.eval()
    tuned.model.eval()
    with Sfprompt().bypass(tuned), torch.no_grad():
        got = tuned.model(**batch).logits
    torch.testing.assert_close(got, short(base, batch, rows.detach()), rtol=1e-10, atol=1e-12)
    assert not ran
    with torch.no_grad():
        tuned.model(**batch)
    assert len(ran) == 2 and "forward" not in vars(tuned.model.vit.layers[1])


@pytest.mark.parametrize("pruned", [0.0, 0.4, 0.75])
def test_the_samples_that_stay_are_those_the_short_model_is_furthest_off_on(pruned):
    tuned, batch, base = joined(n=10)
    base.eval()
    rows = next(p for n, p in tuned.named_parameters() if n.endswith("rows")).detach()
    p = short(base, batch, rows).detach().softmax(-1)
    off = [float((p[i] - torch.eye(3, dtype=p.dtype)[batch["labels"][i]]).norm())
           for i in range(10)]
    torch.testing.assert_close(el2n(short(base, batch, rows), batch["labels"]),
                               torch.tensor(off, dtype=p.dtype))
    two = [{k: v[:6] for k, v in batch.items()}, {k: v[6:] for k, v in batch.items()}]
    found = Sfprompt(pruned=pruned).kept(tuned, two)
    want = sorted(sorted(range(10), key=lambda i: off[i])[int(pruned * 10):])
    assert [*found[0].tolist(), *(6 + found[1]).tolist()] == want


def test_a_share_that_floating_point_makes_smaller_is_whole():
    tuned, batch, _ = joined(n=50)
    assert 0.58 * 50 < 29
    assert sum(map(len, Sfprompt(pruned=0.58).kept(tuned, [batch]))) == 50 - 29


def test_fedavg_weighs_by_samples():
    a, b = ({"w": torch.full((3,), v), "h": torch.full((2,), v, dtype=torch.float64)}
            for v in (1.0, 5.0))
    out = averaged([a, b], [30, 10])
    assert out["w"].tolist() == [2.0] * 3 and out["w"].dtype == torch.float32
    assert out["h"].tolist() == [2.0] * 2 and out["h"].dtype == torch.float64


def test_a_round_is_its_four_stages_and_the_mean():
    tuned, batch, _ = joined(n=12)
    clients = [[{k: v[:4] for k, v in batch.items()}, {k: v[4:8] for k, v in batch.items()}],
               [{k: v[8:] for k, v in batch.items()}]]
    method = Sfprompt(local_updates=2, pruned=0.5)
    twins = [copy.deepcopy(tuned) for _ in clients]
    alone = [method.client(t, c, lr=1e-2) for t, c in zip(twins, clients, strict=True)]
    reports = method.lifecycle(tuned, clients, lr=1e-2)
    assert [(r.samples, r.kept) for r in reports] == [(8, 4), (4, 2)]
    for mine, his in zip(reports, alone, strict=True):
        assert all(torch.equal(mine.state[n], his.state[n]) for n in his.state)
        assert mine.traffic.total == 4 * mine.kept * (TOKENS + LENGTH) * WIDTH * 8
    for n, p in tuned.named_parameters():
        want = (8 * alone[0].state[n] + 4 * alone[1].state[n]) / 12
        torch.testing.assert_close(p.detach(), want, rtol=1e-12, atol=1e-14)
    with torch.no_grad():
        before = float(tuned.loss(batch))
    for _ in range(6):                                       # random blocks do without no body
        Sfprompt(local_updates=0, pruned=0.0).lifecycle(tuned, clients, lr=1e-2)
    with torch.no_grad():
        assert float(tuned.loss(batch)) < before
    assert method.lifecycle(tuned, []) == []


def test_a_round_that_breaks_off_leaves_the_server_s_state():
    tuned, batch, _ = joined()
    before = {n: p.detach().clone() for n, p in tuned.named_parameters()}

    def broken(t):
        raise ConnectionError("gone")

    with pytest.raises(ConnectionError):
        Sfprompt(local_updates=1).lifecycle(tuned, [[batch]], send=broken, lr=1e-2)
    assert all(torch.equal(p, before[n]) for n, p in tuned.named_parameters())
    assert "forward" not in vars(tuned.model.vit.layers[1])


def test_a_client_without_batches_does_nothing():
    tuned, batch, _ = joined()
    method, twin = Sfprompt(local_updates=1), copy.deepcopy(tuned)
    alone = method.client(twin, [batch], lr=1e-2)
    none, some = method.lifecycle(tuned, [[], [batch]], lr=1e-2)
    assert (none.state, none.samples, none.kept, none.traffic.total) == ({}, 0, 0, 0)
    assert some.samples == 8
    for n, p in tuned.named_parameters():
        torch.testing.assert_close(p.detach(), alone.state[n], rtol=1e-12, atol=1e-14)
    held = {n: p.detach().clone() for n, p in tuned.named_parameters()}
    assert [r.samples for r in method.lifecycle(tuned, [[], []], lr=1e-2)] == [0, 0]
    assert all(torch.equal(p, held[n]) for n, p in tuned.named_parameters())


@pytest.mark.parametrize("broken", [False, True])
def test_no_client_s_optimizer_is_left_behind(broken):
    tuned, batch, _ = joined()
    mine = tuned.optimizer(lr=1e-2)
    Sfprompt().lifecycle(tuned, [])
    assert tuned.current_optimizer is mine                   # no client, no other optimizer
    found = []

    def loss(out, batch):
        found.append(tuned.current_optimizer)
        if broken and len(found) > 1:
            raise ConnectionError("gone")
        return out.loss

    try:
        Sfprompt(local_updates=1).lifecycle(tuned, [[batch]], loss, lr=1e-2)
    except ConnectionError:
        assert broken
    assert found[0] not in (None, mine) and tuned.current_optimizer is None
    with pytest.raises(burnish.ConfigError, match="no optimizer yet"):
        tuned.timeline          # noqa: B018


def test_a_forward_that_another_library_has_put_on_a_block_comes_back():
    tuned, batch, _ = joined()
    block, seen = tuned.model.vit.layers[1], []
    own = block.forward

    def hooked(*args, **kw):
        seen.append(1)
        return own(*args, **kw)

    block.forward = hooked
    with Sfprompt().bypass(tuned), torch.no_grad():
        tuned.loss(batch)
    assert not seen and vars(block)["forward"] is hooked
    assert "forward" not in vars(tuned.model.vit.layers[2])
    with torch.no_grad():
        tuned.loss(batch)
    assert seen == [1]


def test_local_steps_send_nothing_and_train():
    tuned, batch, _ = joined()
    before = {n: p.detach().clone() for n, p in tuned.named_parameters()}
    tuned.optimizer(lr=1e-2)
    with Sfprompt().bypass(tuned):
        tuned.step(batch)
    assert all(not torch.equal(p, before[n]) for n, p in tuned.named_parameters())


def test_its_settings():
    made = parse("sfprompt")[0]
    assert (made.client_blocks, made.local_updates, made.pruned) == (1, 10, 0.4)
    assert Sfprompt(local_updates=0, pruned=0.0).local_updates == 0


def test_what_cannot_act_is_refused():
    for settings in ({"client_blocks": 0}, {"local_updates": -1}, {"pruned": 1.0},
                     {"pruned": -0.1}):
        with pytest.raises(burnish.ConfigError, match="client_blocks of at least 1"):
            Sfprompt(**settings)
    tuned, batch, _ = joined(layers=4)
    with pytest.raises(burnish.ConfigError, match="more than 4 blocks is expected.*has 4"):
        Sfprompt(client_blocks=2).parts(tuned)
    tuned, *_ = joined(recipe="lora(rank=2)")
    with pytest.raises(burnish.ConfigError, match="trains in the body"), Sfprompt().bypass(tuned):
        pass
    tuned, *_ = joined(recipe="vpt(length=2, deep=True)")
    with pytest.raises(burnish.ConfigError, match="rows trains in the body"):
        Sfprompt().parts(tuned)
    net, batch = tiny("clip")
    with pytest.raises(burnish.ConfigError, match="one stack of more than 2 blocks"):
        Sfprompt().parts(burnish.tune(net, "vpt(length=2)"))
