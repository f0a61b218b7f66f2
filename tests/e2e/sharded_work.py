"""What each of several processes runs (test_sharded.py starts them), and one runs alone."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy

import burnish
from burnish.core.processes import leave
from burnish.fit import state


def model(kind="llama", blocks=2, **kw):
    import transformers as t
    torch.manual_seed(0)
    size = dict(vocab_size=40, hidden_size=16, num_hidden_layers=blocks, num_attention_heads=2,
                intermediate_size=24, max_position_embeddings=32, **kw)
    if kind == "llama":
        made = t.LlamaForCausalLM(t.LlamaConfig(num_key_value_heads=1, **size))
    else:
        made = t.BertForSequenceClassification(t.BertConfig(
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **size))
    return made.double()


def batches():
    ids = torch.randint(0, 40, (4, 4, 6), generator=torch.Generator().manual_seed(1))
    return [dict(input_ids=b) for b in ids]


def loss_of(out, batch):
    """In the model's own precision: the next token, or a class that the first one tells."""
    ids = batch["input_ids"]
    if out.logits.dim() == 3:
        return cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    return cross_entropy(out.logits, ids[:, 0] % 2)


def train(tuned, steps, rank=0, world=1, norm=0.0, kept=None, micro=1):
    """(losses of the whole batches, the optimizer)."""
    tuned.total_steps = 4
    opt = tuned.optimizer(1e-2, max_grad_norm=norm)
    if kept is not None:
        state.load_optimizer_state(opt, list(tuned.model.named_parameters()), kept)
    losses = []
    for batch in batches()[steps]:
        opt.zero_grad()
        found = []
        for k in range(micro):
            part = {n: v.chunk(world * micro)[k * world + rank] for n, v in batch.items()}
            found.append(tuned.backward(part, loss_of, scale=1 / micro))
        opt.step()
        loss = torch.stack(found).mean()
        if world > 1:
            torch.distributed.all_reduce(loss)
        losses.append(float(loss) / world)
    return losses, opt


def said_by(call):
    try:
        return f"done: {call()}"
    except burnish.BurnishError as e:
        return str(e)


def plan_first():
    """A tensor-parallel plan, as transformers lays one over a model."""
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
    made = model()
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    parallelize_module(made.model.layers[0].mlp, mesh, {"gate_proj": ColwiseParallel()})
    return burnish.tune(made, "lora(rank=2)")


def plan_of_transformers(folder):
    """`tp_plan`, as a user asks for it."""
    import transformers
    made = transformers.AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto")
    return burnish.tune(made, "lora(rank=2)")


def shares_first():
    made = model()
    fully_shard(made)
    return burnish.tune(made, "lora(rank=2)")


def shares_of_others():
    """fully_shard, where burnish.shard was meant: what was added is in shares too."""
    tuned = burnish.tune(model(), "lora(rank=2)")
    fully_shard(tuned.model)
    return tuned.optimizer(1e-3)


def statistics():
    net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))
    return burnish.shard(burnish.tune(net, "lora(rank=2)", targets="0"))


def main():
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        model().save_pretrained(folder)          # (among others only the first would write)
        work(folder)


def work(folder):
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    said = {}
    for name, job in json.loads(sys.argv[1]).items():
        kind, out = job.get("kind", "llama"), Path(job["out"])
        made = model(kind, job.get("blocks", 2))
        try:
            if "load" in job:
                tuned = burnish.load(made, job["load"])
            else:
                if rank:                             # all start from the first one's values
                    torch.manual_seed(9)
                tuned = burnish.tune(made, job["recipe"], seed=rank if job.get("drawn") else 0)
            burnish.shard(tuned, offload=job.get("offload", False))
        except burnish.BurnishError as e:
            said[name] = str(e)
            continue
        sharded = sum(hasattr(p, "full_tensor") for p in made.parameters())
        tuned.save(out / "start")
        kept = state.load_tree(Path(job["load"]), "optimizer") if "load" in job else None
        losses, opt = train(tuned, slice(*job.get("steps", [0, 3])), rank, world,
                            job.get("norm", 0.0), kept, job.get("micro", 1))
        tuned.save(out / "end", whole=True)
        tree = state.optimizer_state(opt, list(made.named_parameters()))
        if rank == 0:
            state.save_tree(tree, out / "end", "optimizer")
        held = sum(getattr(p, "_local_tensor", p).numel() for p in made.parameters())
        refused = {}
        for what in job.get("refused", []):
            try:
                eval(what, {"tuned": tuned, "burnish": burnish})
                refused[what] = "done"
            except burnish.BurnishError as e:
                refused[what] = str(e)
        said[name] = dict(losses=losses, sharded=sharded, held=held, refused=refused)
    said["foreign"] = [said_by(f) for f in (
        plan_first, lambda: plan_of_transformers(folder), shares_first, shares_of_others,
        statistics)]
    print("\n" + json.dumps(said), flush=True)
    leave()


if __name__ == "__main__":
    main()
