"""LoRA in PEFT's other forms: the same outputs here, and the same form on the way back."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import BdLoraConfig, KasaConfig, MontecloraConfig

import burnish
from burnish.core.errors import FormatError
from burnish.formats.peft import export_peft, load_peft
from burnish.testing import stir
from burnish.testing.models import tiny

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
TOKENS = [57, 52]
IN = {
    "bias": ("llama", LoraConfig(target_modules=["q_proj", "down_proj"], r=3, lora_alpha=5,
                                 lora_bias=True), {"lora_bias": True}),
    "bias gpt2": ("gpt2", LoraConfig(
        target_modules=["c_attn", "c_fc"], r=3, lora_alpha=5, lora_bias=True, use_rslora=True,
        rank_pattern={"c_fc": 2}, fan_in_fan_out=True), {"lora_bias": True}),
    "blocks": ("llama", LoraConfig(
        target_modules=["q_proj", "o_proj", "down_proj"], r=4, lora_alpha=5, lora_dropout=0.25,
        use_bdlora=BdLoraConfig(target_modules_bd_a=["o_proj", "down"], nblocks=2,
                                target_modules_bd_b=["q_proj"])),
        {"lora_dropout": 0.25, "use_bdlora": {
            "target_modules_bd_a": ["down_proj", "o_proj"], "target_modules_bd_b": ["q_proj"],
            "nblocks": 2, "match_strict": True}}),
    "blocks by layer": ("llama", LoraConfig(
        target_modules=["q_proj"], r=4, use_rslora=True, alpha_pattern={"layers.1.*": 3},
        use_bdlora=BdLoraConfig(target_modules_bd_a=["layers.0"], nblocks=4,
                                target_modules_bd_b=["layers.1"])),
        {"use_bdlora": {"target_modules_bd_a": ["model.layers.0.self_attn.q_proj"], "nblocks": 4,
                        "target_modules_bd_b": ["model.layers.1.self_attn.q_proj"],
                        "match_strict": True}}),
    "blocks and none": ("llama", LoraConfig(
        target_modules=["q_proj", "v_proj"], r=4, rank_pattern={"v_proj": 2},
        use_bdlora=BdLoraConfig(target_modules_bd_b=["q_proj"], nblocks=2, match_strict=False)),
        {"use_bdlora": None}),                   # one number of blocks for all: as plain LoRA
    "kasa": ("llama", LoraConfig(
        target_modules=["q_proj", "down_proj"], r=3, lora_alpha=5, lora_dropout=0.25,
        rank_pattern={"down_proj": 2}, kasa_config=KasaConfig(beta=0.25, gamma=0.5)),
        {"kasa_config": {"beta": 0.25, "gamma": 0.5}}),
    "alora": ("llama", LoraConfig(
        target_modules=["q_proj", "down_proj"], r=3, lora_alpha=5, task_type="CAUSAL_LM",
        use_rslora=True, alora_invocation_tokens=TOKENS), {"alora_invocation_tokens": TOKENS}),
    "alora gpt2": ("gpt2", LoraConfig(
        target_modules=["c_attn"], r=3, fan_in_fan_out=True, task_type="CAUSAL_LM",
        alora_invocation_tokens=TOKENS, alpha_pattern={"h.0.attn.c_attn": 3}),
        {"alora_invocation_tokens": TOKENS, "fan_in_fan_out": True}),
}


def batch_of(name):
    batch = tiny(name)[1]
    batch["input_ids"][0, 3:5] = batch["input_ids"][0, 1:3] = torch.tensor(TOKENS)
    return batch


def outputs(model, batch):
    model.eval()
    with torch.no_grad():
        return model(**{k: v for k, v in batch.items() if k != "labels"}).logits


def theirs_of(case, folder, size=0.1):
    name, config, _ = IN[case]
    theirs = get_peft_model(tiny(name)[0], config)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.add_(size * torch.randn_like(p))
    theirs.save_pretrained(folder)
    return name, theirs


def config_in(folder):
    return json.loads((folder / "adapter_config.json").read_text())


@pytest.mark.parametrize("case", IN)
def test_we_compute_what_peft_saved_and_give_it_back(case, tmp_path):
    name, theirs = theirs_of(case, tmp_path / "peft")
    batch = batch_of(name)
    want = outputs(theirs, batch)
    model, _ = tiny(name)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    assert (outputs(model, batch) - want).abs().max() > 1e-3
    tuned = load_peft(model, tmp_path / "peft")
    assert torch.allclose(outputs(model, batch), want, rtol=1e-5, atol=2e-6)
    tuned.save(tmp_path / "ours")
    again = burnish.load(tiny(name)[0], tmp_path / "ours")
    assert torch.allclose(outputs(again.model, batch), want, rtol=1e-5, atol=2e-6)
    export_peft(tuned, tmp_path / "again")
    said = config_in(tmp_path / "again")
    assert {n: said.get(n) for n in IN[case][2]} == IN[case][2]
    back = PeftModel.from_pretrained(tiny(name)[0], tmp_path / "again")
    assert torch.allclose(outputs(back, batch), want, rtol=1e-5, atol=2e-6)
    tuned.detach()
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize("case", ["bias", "blocks by layer", "alora", "alora gpt2"])
def test_steps_of_plain_descent_are_pefts(case, tmp_path):
    name, theirs = theirs_of(case, tmp_path)
    batch, tuned = batch_of(name), load_peft(tiny(name)[0], tmp_path)
    start = outputs(theirs, batch)
    for net in (theirs, tuned.model):
        net.train()
        if name == "gpt2":
            net.eval()                           # its own dropout would draw otherwise
        sgd = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=3.0)
        for _ in range(3):
            sgd.zero_grad()
            net(**batch).loss.backward()
            sgd.step()
    assert (outputs(theirs, batch) - start).abs().max() > 1e-3
    torch.testing.assert_close(outputs(tuned.model, batch), outputs(theirs, batch), rtol=1e-4,
                               atol=1e-5)


def test_kasas_penalty_is_pefts(tmp_path):
    _, theirs = theirs_of("kasa", tmp_path)
    tuned = load_peft(tiny("llama")[0], tmp_path)
    ours = sum(p.value() for part in tuned.recipe for p in part.objective(tuned, None))
    # two parts here, and each sees the terms of both
    torch.testing.assert_close(ours / len(tuned.recipe), theirs.base_model._get_kasa_loss())


@pytest.mark.parametrize("recipe, said", [
    ("bd_lora(rank=4, shards=2, targets='q,o')", "use_bdlora"),
    ("kasa(rank=3, targets='q')", "kasa_config"),
    ("alora(rank=3, invocation=(57, 52), targets='q')", "alora_invocation_tokens"),
    ("lora(rank=3, alpha=6, targets='q') + beft(scale=2.0, targets='q')", "lora_bias"),
    ("lora(rank=3, targets='q,v') + beft(targets='q')", "lora_bias")])
def test_what_began_here_goes_there(recipe, said, tmp_path):
    net, batch = tiny("llama")[0], batch_of("llama")
    tuned = burnish.tune(net, recipe, head=False)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in tuned.parameters():
            p.add_(0.1 * torch.randn_like(p))
    export_peft(tuned, tmp_path)
    assert config_in(tmp_path)[said]
    back = PeftModel.from_pretrained(tiny("llama")[0], tmp_path)
    torch.testing.assert_close(outputs(back, batch), outputs(net, batch), rtol=1e-5, atol=2e-6)
    assert config_in(tmp_path)["peft_type"] == "LORA"


def test_a_fused_weights_shift_is_a_bias_of_all_its_rows(tmp_path):
    """bitfit of some rows of a fused weight stands behind it, as beft does."""
    net, batch = tiny("gpt2")
    tuned = burnish.tune(net, "lora(rank=2, targets='q,v') + beft(targets='v')", head=False)
    with torch.no_grad():
        for p in tuned.parameters():
            p.add_(0.1 * torch.randn_like(p))
    export_peft(tuned, tmp_path)
    back = PeftModel.from_pretrained(tiny("gpt2")[0], tmp_path)
    torch.testing.assert_close(outputs(back, batch), outputs(net, batch), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("init", ["batch_average", "random"])
def test_what_velora_keeps_is_said_both_ways(init, tmp_path):
    from peft.tuners.lora.config import VeloraConfig

    config = LoraConfig(target_modules=["q_proj"], r=2, velora_config=VeloraConfig(
        num_groups=8, scale=1.5, init_type=init))
    theirs = get_peft_model(tiny("llama")[0], config)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    batch = batch_of("llama")
    theirs.train()
    theirs(**batch).loss.backward()
    theirs.save_pretrained(tmp_path / "peft")
    tuned = load_peft(tiny("llama")[0], tmp_path / "peft")
    assert str(tuned.recipe[1]).startswith("velora(groups=8, scale=1.5")
    want = outputs(theirs, batch)
    assert torch.allclose(outputs(tuned.model, batch), want, rtol=1e-5, atol=2e-6)
    export_peft(tuned, tmp_path / "again")
    assert config_in(tmp_path / "again")["velora_config"] == {
        "num_groups": 8, "scale": 1.5, "init_type": init}
    back = PeftModel.from_pretrained(tiny("llama")[0], tmp_path / "again", is_trainable=True)
    assert torch.allclose(outputs(back, batch), want, rtol=1e-5, atol=2e-6)


def test_a_down_projections_gradient_is_pefts():
    """On a linear that stands by itself, where no tape makes its input again."""
    from peft.tuners.lora.config import VeloraConfig

    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(20, 6))
    config = LoraConfig(target_modules=["0"], r=2, lora_alpha=5, velora_config=VeloraConfig(
        num_groups=3, scale=1.5))
    theirs = get_peft_model(torch.nn.Sequential(torch.nn.Linear(20, 6)), config)
    theirs.base_model.model[0].base_layer.load_state_dict(net[0].state_dict())
    tuned = burnish.tune(net, "lora(rank=2, alpha=5) + velora(groups=3, scale=1.5)", head=False,
                         targets="0")
    ours = dict(tuned.named_parameters())
    with torch.no_grad():
        for n, p in theirs.named_parameters():
            if "lora_A" in n or "lora_B" in n:
                p.copy_(torch.randn_like(p))
                next(q for m, q in ours.items() if m.endswith(n.split("lora_")[1][0])).copy_(p)
    x, y = torch.randn(30, 20), torch.randn(30, 6)
    theirs.train(), net.train()
    (theirs(x) - y).square().mean().backward()
    tuned.loss((x, y), lambda out, b: (out - b[1]).square().mean()).backward()
    for n, p in theirs.named_parameters():
        if "lora_A" in n or "lora_B" in n:
            mine = next(q for m, q in ours.items() if m.endswith(n.split("lora_")[1][0]))
            torch.testing.assert_close(mine.grad, p.grad, rtol=1e-5, atol=1e-6)


def test_qalora_is_what_pefts_layers_of_gptq_compute(tmp_path):
    """PEFT builds it on quantised layers alone; its forward is asked on a plain one."""
    from peft.tuners.lora.variants import QALoraLinearVariant

    config = LoraConfig(target_modules=["q_proj", "down_proj"], r=2, lora_alpha=5, use_rslora=True)
    theirs = get_peft_model(tiny("llama")[0], config)
    asked = LoraConfig(**config.to_dict() | {"use_qalora": True, "qalora_group_size": 8})
    torch.manual_seed(1)
    for module in theirs.modules():
        if isinstance(module, peft.tuners.lora.layer.Linear):
            module.other_param_names = ()
            QALoraLinearVariant.init(module, "default", asked)
            module.lora_variant["default"] = QALoraLinearVariant()
    with torch.no_grad():
        for n, p in theirs.named_parameters():
            if "lora_" in n:
                p.copy_(0.3 * torch.randn_like(p))
    theirs.peft_config["default"] = asked
    batch = batch_of("llama")
    want = outputs(theirs, batch)
    theirs.save_pretrained(tmp_path / "peft")
    net = tiny("llama")[0]
    assert (outputs(net, batch) - want).abs().max() > 1e-3
    tuned = load_peft(net, tmp_path / "peft")
    assert {m.name for m in tuned.recipe} == {"qa_lora"}
    assert torch.allclose(outputs(net, batch), want, rtol=1e-5, atol=2e-6)
    export_peft(tuned, tmp_path / "again")           # as the pair that it is
    back = PeftModel.from_pretrained(tiny("llama")[0], tmp_path / "again")
    assert torch.allclose(outputs(back, batch), want, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("recipe, words", [
    ("dora(rank=2, targets='q') + beft(targets='q')", "not beside a DoRA"),
    ("lora(rank=2, targets='q') + beft(targets='v')", "computes on hidden states"),
    ("lora(rank=2, targets='q') + beft(targets='q') + dora(rank=2, targets='v')",
     "a linear alone, not beside a DoRA|no plain update of a linear"),
    ("lora(rank=2, targets='q,embedding') + beft(targets='q')", "no plain update of a linear"),
    ("alora(rank=2, invocation=(3,), targets='q') + lora(targets='v')",
     "computes on hidden states")])
def test_what_peft_has_not_is_refused(recipe, words, tmp_path):
    with pytest.raises(FormatError, match=words):
        export_peft(burnish.tune(tiny("llama")[0], recipe, head=False), tmp_path)


def test_aloras_rows_of_a_fused_weight_are_refused(tmp_path):
    tuned = burnish.tune(tiny("gpt2")[0], "alora(rank=2, invocation=(3,), targets='q')",
                         head=False)
    with pytest.raises(FormatError, match="some rows of a fused weight"):
        export_peft(tuned, tmp_path)


def test_directions_that_peft_would_not_find_are_the_low_rank_pair_they_are(tmp_path):
    net, batch = tiny("llama")
    tuned = burnish.tune(net, "kasa(rank=2, targets='q')", head=False)
    for _, term in tuned.terms(torch.nn.Module):
        for b in term.buffers():
            b.mul_(1.1)
    want = outputs(net, batch)
    export_peft(tuned, tmp_path)
    assert config_in(tmp_path)["r"] == 4 and "kasa_config" not in config_in(tmp_path)
    back = PeftModel.from_pretrained(tiny("llama")[0], tmp_path)
    torch.testing.assert_close(outputs(back, batch), want, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("case, change, words", [
    ("bias", {"lora_bias": False}, "lora_bias is False but .* has a bias"),
    ("bias", {"lora_bias": 3}, "lora_bias"),
    ("blocks", {"use_bdlora": {"nblocks": 0}}, "names none of its factors"),
    ("blocks", {"use_bdlora": {"nblocks": 0, "target_modules_bd_a": ["_proj"]}}, "1 or more"),
    ("blocks", {"use_bdlora": {"nblocks": 2.5}}, "nblocks = 2.5; expected int"),
    ("blocks", {"use_bdlora": {"target_modules_bd_a": ["_proj"], "target_modules_bd_b": ["_proj"]}},
     "names both of its factors"),
    ("blocks", {"use_bdlora": {"later": 1}}, "use_bdlora.later = 1 has no counterpart in burnish"),
    ("blocks", {"use_bdlora": [3]}, "use_bdlora"),
    ("blocks", {"use_bdlora": {"target_modules_bd_a": ["o_proj", "down"], "nblocks": 4,
                               "target_modules_bd_b": ["q_proj"]}}, "the model needs"),
    ("blocks", {"r": 2}, "has rank 4, its settings say 2"),
    ("blocks", {"use_dora": True}, "use_dora = True has no counterpart"),
    ("blocks", {"kasa_config": {"beta": 1.0}}, "use_bdlora and kasa_config are two functions"),
    ("blocks", {"lora_bias": True}, "lora_bias = True has no counterpart"),
    ("blocks", {"velora_config": {"num_groups": 8}}, "velora_config = .* has no counterpart"),
    ("kasa", {"init_lora_weights": "mica"}, "'mica' and kasa_config are two functions"),
    ("bias", {"velora_config": {"init_type": ["random"]}}, "velora_config.init_type"),
    ("kasa", {"kasa_config": {"delta": 1.0}}, "kasa_config.delta = 1.0 has no counterpart"),
    ("kasa", {"kasa_config": {"beta": "a"}}, "kasa_config.beta = 'a'; expected float"),
    ("kasa", {"kasa_config": {"beta": -1.0}}, "0 or more"),
    ("kasa", {"kasa_config": None}, "no counterpart in burnish"),
    ("alora", {"alora_invocation_tokens": ["a"]}, "expected token ids"),
    ("alora", {"alora_invocation_tokens": 3}, "alora_invocation_tokens"),
    ("alora", {"lora_dropout": 2}, "expected a share from 0 to 1")])
def test_a_folder_that_would_be_misread_is_refused(case, change, words, tmp_path):
    theirs_of(case, tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(config_in(tmp_path) | change))
    model = tiny(IN[case][0])[0]
    with pytest.raises(FormatError, match=words):
        load_peft(model, tmp_path)
    assert not any("burnish" in n for n, _ in model.named_modules())


def test_every_field_of_a_variants_own_settings_is_known(tmp_path):
    """What PEFT writes inside them is what we read."""
    import dataclasses

    from burnish.formats.peft_variants import VARIANTS

    config = {f.name: f for f in dataclasses.fields(peft.LoraConfig)}
    assert all(form.says in config for form in VARIANTS)
    for case in ("blocks", "kasa"):
        said = IN[case][1].to_dict()
        name = "use_bdlora" if case == "blocks" else "kasa_config"
        cls = BdLoraConfig if case == "blocks" else KasaConfig
        theirs_of(case, tmp_path / case)
        assert set(config_in(tmp_path / case)[name]) == {f.name for f in dataclasses.fields(cls)}
        assert name in said
        load_peft(tiny("llama")[0], tmp_path / case)


# -- blocks that are run again --------------------------------------------------------------------
@pytest.mark.parametrize("name, more", [("llama", {}), ("bert", {}), ("llama", {"use_dora": True})])
def test_blocks_that_are_repeated_go_both_ways(name, more, tmp_path):
    targets = ["q_proj", "down_proj"] if name == "llama" else ["query", "value"]
    config = LoraConfig(r=2, target_modules=targets, layer_replication=[[0, 2], [1, 2], [0, 1]],
                        **more)
    theirs, (_, batch) = stir(get_peft_model(tiny(name)[0], config), size=0.3), tiny(name)
    want = outputs(theirs, batch)
    assert (want - outputs(tiny(name)[0], batch)).abs().max() > 1e-3
    theirs.save_pretrained(tmp_path / "peft")
    model = tiny(name)[0]
    size = sum(p.numel() for p in model.parameters())
    tuned = load_peft(model, tmp_path / "peft")
    own = sum(p.numel() for p in tuned.parameters())
    assert sum(p.numel() for p in model.parameters()) == size + own, "weights are held once"
    torch.testing.assert_close(outputs(model, batch), want, rtol=1e-5, atol=2e-6)
    export_peft(tuned, tmp_path / "again")
    said = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert said["layer_replication"] == [[0, 2], [1, 2], [0, 1]]
    back = PeftModel.from_pretrained(tiny(name)[0], tmp_path / "again")
    torch.testing.assert_close(outputs(back, batch), want, rtol=1e-5, atol=2e-6)
    again = load_peft(tuned.detach(), tmp_path / "again")        # its blocks are repeated already
    torch.testing.assert_close(outputs(again.model, batch), want, rtol=1e-5, atol=2e-6)


def test_a_folder_for_other_runs_leaves_the_model_as_it_was(tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj"], layer_replication=[[0, 2], [0, 2]])
    get_peft_model(tiny("llama")[0], config).save_pretrained(tmp_path)
    model, batch = tiny("llama")
    want, names = outputs(model, batch), list(model.state_dict())
    file = tmp_path / "adapter_config.json"
    said = json.loads(file.read_text())
    file.write_text(json.dumps(said | {"layer_replication": [[0, 2], [0, 1]]}))
    with pytest.raises(FormatError, match=r"adapts model\.layers\.3\.self_attn"):
        load_peft(model, tmp_path)
    assert torch.equal(outputs(model, batch), want) and list(model.state_dict()) == names
    assert model.config.num_hidden_layers == 2
    burnish.repeat_blocks(model, [(0, 1), (0, 2)])
    with pytest.raises(FormatError, match="this model runs .* of its base's"):
        load_peft(model, tmp_path)
    tuned = burnish.tune(model, "loha(rank=2)")
    with pytest.raises(FormatError, match="beside LoRA alone"):
        export_peft(tuned, tmp_path / "b")


def test_monteclora_answers_as_the_lora_it_is_and_says_what_is_not_here(tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj"], lora_alpha=5,
                        monteclora_config=MontecloraConfig(num_samples=3))
    theirs, (_, batch) = stir(get_peft_model(tiny("llama")[0], config), size=0.3), tiny("llama")
    want = outputs(theirs, batch)
    theirs.save_pretrained(tmp_path)
    tuned = load_peft(tiny("llama")[0], tmp_path)
    torch.testing.assert_close(outputs(tuned.model, batch), want, rtol=1e-5, atol=2e-6)
    assert [m.name for m in tuned.recipe] == ["lora"]
    assert [n for n in tuned.summary()["notes"] if "MonteCLoRA draws noise while it trains" in n]
    with pytest.raises(FormatError, match="monteclora_config"):
        file = tmp_path / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"use_bdlora": {
            "target_modules_bd_b": ["q_proj"], "nblocks": 1}}))
        load_peft(tiny("llama")[0], tmp_path)
