"""HyperFormer: its adapters against the equation, one generator for all, one task's own file."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import burnish
from burnish.testing.models import tiny

SMALL = "tasks=3, reduction=8, embedding=5, hidden=7, code=6"
SITES = [f"vit.layers.{b}.{part}" for b in (0, 1) for part in ("attention.o_proj", "mlp.fc2")]
TASK = torch.tensor([2, 0, 2])


def make(recipe, model="vit", dtype=torch.float64, size=0.3, **kw):
    net, batch = tiny(model, dtype=dtype, batch=3, **kw)
    tuned = burnish.tune(net, recipe, head=False)
    net.to(dtype)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in tuned.parameters():
            p.add_(torch.randn(p.shape, generator=g, dtype=torch.float64).to(p.dtype) * size)
    return tuned, batch


def adapted(h, inside, t, w):
    """h + LN_task(U gelu(D h)) as in the specification; inside: [z; places], t: the network that
    makes I, w: the four weights that make the adapter of it."""
    made = t["outer.weight"] @ torch.clamp(t["inner.weight"] @ inside + t["inner.bias"], min=0)
    made = made + t["outer.bias"]
    D, U = (w["down"] @ made).reshape(-1, h.shape[-1]), (w["up"] @ made).reshape(h.shape[-1], -1)
    z = h @ D.T
    u = z * 0.5 * (1 + torch.erf(z / 2 ** 0.5)) @ U.T
    away = u - u.mean(-1, keepdim=True)
    normal = away / ((away ** 2).mean(-1, keepdim=True) + 1e-5) ** 0.5
    return h + normal * (w["gamma"] @ made) + w["beta"] @ made


@pytest.mark.parametrize("share", [False, True])
def test_each_sample_has_the_adapter_of_its_task_and_place(share):
    """Loss and all gradients against the equation, sample by sample: tensors that sites share get
    the sum over sites and tasks."""
    tuned, batch = make(f"hyperformer({SMALL}, share={share}, norms=False)")
    mine = {site: {n.partition(".hyperformer.")[2]: p for n, p in tuned.named_parameters()
                   if n.startswith(site)} for site in SITES}
    t = {n[7:]: p for n, p in mine[SITES[0]].items() if n.startswith("source.")}
    assert all(not n.startswith("source.") for s in SITES[1:] for n in mine[s])
    base = tiny("vit", dtype=torch.float64, batch=3)[0]

    def stand(site, block, place):
        heads = mine[SITES[0] if share else site]
        w = {n: heads[f"heads.{n}"] for n in ("down", "up", "gamma", "beta")}
        where = [t["layer.weight"][block], t["position.weight"][place]] if share else []
        base.get_submodule(site).register_forward_hook(lambda m, a, out: torch.stack(
            [adapted(out[k], torch.cat([t["task.weight"][TASK[k]], *where]), t, w)
             for k in range(3)]))

    for n, site in enumerate(SITES):
        stand(site, n // 2, n % 2)
    want, got = base(**batch).loss, tuned.loss({**batch, "task": TASK})
    torch.testing.assert_close(got, want, rtol=1e-11, atol=0)
    names, params = zip(*tuned.named_parameters(), strict=True)
    for n, a, b in zip(names, torch.autograd.grad(got, params), torch.autograd.grad(want, params),
                       strict=True):
        assert b.any(), n
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-13, msg=lambda m, n=n: f"{n}: {m}")


def count(recipe, **sizes):
    net, _ = tiny("bert", **sizes)
    return sum(p.numel() for p in burnish.tune(net, recipe, head=False).parameters())


def test_counts_are_the_formulas():
    """Per site 2 m d t + 2 d t; the network that makes I once; with share all once, and a model of
    more blocks only adds embeddings of them."""
    d, m, e, hid, t = 32, 4, 5, 7, 6
    per, net = 2 * m * d * t + 2 * d * t, hid * e + hid + t * hid + t
    plain = f"hyperformer({SMALL}, norms=False)"
    assert count(plain) == 3 * e + net + 4 * per
    assert count(plain, num_hidden_layers=5) == 3 * e + net + 10 * per
    shared = f"hyperformer({SMALL}, norms=False, share=True)"
    assert count(shared) == (3 + 2 + 2) * e + net + 2 * e * hid + per
    assert count(shared, num_hidden_layers=5) - count(shared) == 3 * e
    norms = count(f"hyperformer({SMALL})") - count(plain)
    assert norms == 5 * 2 * d                                # two per block, and the embeddings'


def test_the_start_is_near_the_function_and_not_on_it():
    net, batch = tiny("vit", batch=3)
    tuned = burnish.tune(net, "hyperformer", head=False)
    for n, p in tuned.named_parameters():
        if n.endswith(("down", "up", "gamma", "beta", "inner.weight", "outer.weight")):
            assert 0.005 < p.std() < 0.015, n
    with torch.no_grad():
        got = net(**batch, task=0).logits
        with tuned.disabled():
            base = net(**batch).logits
    assert 0 < (got - base).abs().max() < 0.1 * base.abs().max()


@pytest.mark.parametrize("share", [False, True])
def test_a_task_stored_by_itself_answers_as_the_generated_one(share, tmp_path):
    """Norms and head that trained come along, the file needs no task, the generator stays."""
    net, batch = tiny("bert", batch=3)
    recipe = f"hyperformer({SMALL}, share={share}) + lora(rank=2)"
    tuned = burnish.tune(net, recipe)
    tuned.optimizer(lr=1e-2)
    for _ in range(3):
        tuned.step({**batch, "task": TASK})
    net.eval()
    with torch.no_grad():
        want = [net(**batch, task=k).logits for k in range(3)]
    assert not torch.allclose(want[0], want[1])
    tuned.recipe.named("hyperformer").lifecycle(tuned, 1, "one")
    with torch.no_grad():
        torch.testing.assert_close(net(**batch).logits, want[1])
    tuned.save(tmp_path / "one")
    tuned.use("default")
    with torch.no_grad():
        torch.testing.assert_close(net(**batch, task=2).logits, want[2])
    again = burnish.load(tiny("bert")[0].eval(), tmp_path / "one")
    with torch.no_grad():
        torch.testing.assert_close(again.model(**batch).logits, want[1])
    tensors = sum("hyperformer" in n for n in again.tensors())
    assert tensors == 4 * 4                                  # down, up, gamma, beta at four sites
    with pytest.raises(burnish.RecipeError, match="tasks 0 to 2, not 3"):
        tuned.recipe.named("hyperformer").lifecycle(tuned, 3, "four")


@pytest.mark.parametrize("wrong, said", [(torch.tensor([0, 1, 3]), "0 to 2, not 3"),
                                         (-1, "0 to 2, not -1"), (torch.tensor(0.5), "float32"),
                                         ("mnli", "'mnli'")])
def test_a_task_that_is_none_is_refused(wrong, said):
    tuned, batch = make(f"hyperformer({SMALL})")
    with pytest.raises(burnish.RecipeError, match=f"hyperformer reads 'task'.*{said}"):
        tuned.loss({**batch, "task": wrong})


def test_entries_that_fit_no_sample_are_refused():
    tuned, batch = make(f"hyperformer({SMALL})")
    with pytest.raises(burnish.RecipeError, match="2 entries.*3 rows: give one entry per sample"):
        tuned.loss({**batch, "task": torch.tensor([0, 1])})


def test_windows_go_with_their_sample():
    """Swin's attention sees (samples * windows, ...): each sample answers as it does alone."""
    tuned, batch = make(f"hyperformer({SMALL})", "swin")
    with torch.no_grad():
        whole = tuned.model(**batch, task=TASK).logits
        for k in range(3):
            one = {n: v[k:k + 1] for n, v in batch.items()}
            torch.testing.assert_close(tuned.model(**one, task=int(TASK[k])).logits[0], whole[k])


def test_a_model_that_puts_tokens_first_is_refused():
    layer = nn.TransformerEncoderLayer(16, 2, 32)
    stack = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    net = nn.Sequential(nn.Linear(8, 16), stack)
    with pytest.raises(burnish.RecipeError, match="tokens before samples"):
        burnish.tune(net, "hyperformer")


def test_one_generator_needs_one_width():
    with pytest.raises(burnish.RecipeError, match="one width.*16, 32"):
        burnish.tune(tiny("swin")[0], "hyperformer(share=True)")


def test_nothing_generated_waits_for_backward(kept):
    """Between forward and backward a site keeps its input: the same bytes whatever is generated."""
    def bytes_of(reduction):
        tuned, batch = make(f"hyperformer(tasks=3, reduction={reduction}, norms=False)",
                            dtype=torch.float32)
        return kept(tuned, {**batch, "task": TASK})

    assert bytes_of(1) == bytes_of(16)


def test_the_defaults():
    m = burnish.parse("hyperformer")[0]
    assert (m.tasks, m.reduction, m.embedding, m.hidden, m.code) == (2, 32, 64, 128, 64)
    assert (m.share, m.norms, m.stored) == (False, True, False)


def test_a_reduction_beyond_the_width_leaves_one_channel():
    tuned = burnish.tune(tiny("vit")[0], "hyperformer(reduction=64, code=6)", head=False)
    assert {tuple(p.shape) for n, p in tuned.named_parameters() if n.endswith("heads.down")} \
        == {(32, 6)}


@pytest.mark.parametrize("share", [False, True])
def test_what_sites_share_stands_once(share):
    """In the model's state there is one entry for each tensor."""
    tuned, _ = make(f"hyperformer({SMALL}, share={share}, norms=False)")
    own = [t.data_ptr() for n, t in tuned.model.state_dict().items() if ".burnish." in n]
    assert len(own) == len(set(own)) == len(list(tuned.parameters()))


def test_the_first_task_is_stored_where_its_targets_say():
    tuned, batch = make(f"hyperformer({SMALL}, norms=False)")
    tuned.add("narrow", f"hyperformer({SMALL}, norms=False)", targets="fc2")
    tuned.use("narrow")
    tuned.model.double().eval()
    with torch.no_grad():
        for p in tuned.parameters():
            p.add_(0.1)
        want = tuned.model(**batch, task=0).logits
        tuned.recipe.named("hyperformer").lifecycle(tuned, 0, "plain")
        tuned.model.double()
        torch.testing.assert_close(tuned.model(**batch).logits, want, rtol=1e-5, atol=1e-6)
    assert {n.partition(".burnish")[0] for n, _ in tuned.named_parameters()} == \
        {f"vit.layers.{b}.mlp.fc2" for b in (0, 1)}
