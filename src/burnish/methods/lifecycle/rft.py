from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ...blocks.state.taps import evaluating
from ...blocks.update.rewarded import advantages, answered, policy_loss
from ...core.errors import ConfigError
from ...core.method import Method, setting
from ...core.outputs import next_token
from ._adapted import untargeted

#: (a prompt, the tokens of an answer to it) -> how good it is
Reward = Callable[[Mapping[str, Tensor], Tensor], float]


@dataclass(frozen=True)
class Kept:
    """What a filter found. rows: numbers of the prompts that stay.  rewards: (prompts, G)."""

    rows: list[int]
    rewards: Tensor

    @property
    def dropped(self) -> float:
        """Share of the prompts that were left out."""
        return 1 - len(self.rows) / max(1, len(self.rewards))


@dataclass(frozen=True, kw_only=True)
class Rft(Method):
    """Reinforcement fine-tuning, which forgets less, and its filter of prompts by rollouts.

    For each prompt G answers are drawn and rewarded, r_g; with A_g = (r_g - mean r) / std r

        loss = - mean_g A_g (1 / |o_g|) sum_t log p(o_g,t | prompt, o_g,<t)

    (GRPO's, at the policy that drew them; no KL term, which retention does not need). Answers that
    are all worth the same say nothing: A = 0. Before a task, with the model as it then is, prompts
    all of whose answers are worth 0 are left out, once::

        method = burnish.parse("rft(longest=32)")[0]
        tuned = burnish.tune(model, "lora(rank=16)")
        kept = method.lifecycle(tuned, prompts, reward)      # .rows, .dropped, .rewards
        for some in batches(kept.rows):
            method.step(tuned, [prompts[i] for i in some], reward)       # through tuned.step

    prompts: of one row each, ``input_ids`` (1, L) and, where it is not all ones,
    ``attention_mask``; for the filter whatever ``model.generate`` takes. reward(prompt, answer
    (T,)) -> float. Answers are drawn in evaluation mode by the model's own ``generate``, at
    `temperature`, from all words.

    A step is a forward and backward of those prompts' answers that differ in worth; where none do
    no update is made. Trains what stands beside it. (The filter's rule is the paper's; that G is 8
    is a best reading, and std is over the G themselves.)
    """

    paper: ClassVar[str] = ("Reinforcement Fine-Tuning Naturally Mitigates Forgetting in Continual "
                            "Post-Training (2025), arXiv:2507.05386; GRPO: DeepSeekMath (2024), "
                            "arXiv:2402.03300")
    tier: ClassVar[str] = "checked against an independent equation"

    rollouts: int = setting(8, "G, answers drawn for a prompt")
    longest: int = setting(64, "of an answer at most")
    temperature: float = setting(1.0, "of the draws")

    def __post_init__(self) -> None:
        untargeted(self, "what trains is the recipe's")
        if self.rollouts < 2 or self.longest < 1 or not self.temperature > 0:
            raise ConfigError("rft: rollouts of at least 2, a longest of at least 1 and a positive "
                              f"temperature are expected, got {self.rollouts}, {self.longest} and "
                              f"{self.temperature:g}")

    def lifecycle(self, tuned: Any, prompts: Iterable[Mapping[str, Tensor]], reward: Reward,
                  say: Callable[[str], None] = lambda line: None) -> Kept:
        """The prompts that are worth training on, for the model as it is."""
        rewards = [self._rewarded(tuned, row, reward)[2] for row in prompts]
        if not rewards:
            raise ConfigError("rft: there are no prompts")
        found = torch.stack(rewards)
        kept = Kept((found != 0).any(1).nonzero().flatten().tolist(), found)
        say(f"{len(kept.rows)} of {len(found)} prompts have an answer that is worth something; "
            f"{kept.dropped:.1%} are left out")
        return kept

    def step(self, tuned: Any, prompts: Sequence[Mapping[str, Tensor]], reward: Reward) -> Tensor:
        """One update on new answers to these prompts; (prompts, G), what they were worth."""
        if odd := sorted({k for row in prompts for k in row} - {"input_ids", "attention_mask"}):
            raise ConfigError(f"rft does not know what becomes of {odd[0]} where answers are drawn "
                              "for a prompt: a prompt has input_ids and attention_mask")
        drawn = [self._rewarded(tuned, row, reward) for row in prompts]
        if not drawn:
            raise ConfigError("rft: there are no prompts")
        rewards = torch.stack([r for *_, r in drawn])
        A = advantages(rewards)
        some = [i for i in range(len(drawn)) if bool(A[i].any())]
        if not some:
            return rewards
        long = max(drawn[i][0].shape[1] for i in some)

        def together(parts: Sequence[Tensor], fill: int) -> Tensor:
            return torch.cat([F.pad(t, (0, long - t.shape[1]), value=fill) for t in parts])

        ids = together([drawn[i][0] for i in some], 0)
        labels = together([drawn[i][1] for i in some], -100)
        seen = together([_mask(prompts[i], drawn[i][1]) for i in some], 0)
        weights = A[some].flatten().to(ids.device)
        tuned.step({"input_ids": ids, "attention_mask": seen}, lambda out, _: policy_loss(
            out.logits, labels, weights, rewards.numel()))
        return rewards

    def _rewarded(self, tuned: Any, row: Mapping[str, Tensor], reward: Reward
                  ) -> tuple[Tensor, Tensor, Tensor]:
        """(G, L) sequences, their labels, and (G,) what the answers are worth."""
        model = tuned.model
        if not next_token(model):
            raise ConfigError(f"rft draws answers that go on from a prompt, and "
                              f"{type(model).__name__} writes nothing on")
        if row["input_ids"].dim() != 2 or len(row["input_ids"]) != 1:
            raise ConfigError("rft: a prompt is one row of input_ids, (1, L), not "
                              f"{list(row['input_ids'].shape)}")
        found = model.generation_config.eos_token_id
        ends = found if isinstance(found, list) else [] if found is None else [found]
        with evaluating([m for m in model.modules() if m.training]), torch.no_grad():
            ids = model.generate(**row, do_sample=True, temperature=self.temperature, top_k=0,
                                 top_p=1.0, num_return_sequences=self.rollouts,
                                 max_new_tokens=self.longest,
                                 pad_token_id=(*ends, 0)[0]).detach().clone()
        labels = answered(ids, row["input_ids"].shape[1], ends)
        worth = [float(reward(row, one[right != -100])) for one, right in
                 zip(ids, labels, strict=True)]
        told = torch.tensor(worth, dtype=torch.float64)
        if not bool(told.isfinite().all()):
            raise ConfigError(f"rft: a reward is {worth[int((~told.isfinite()).nonzero()[0])]}")
        return ids, labels, told


def _mask(row: Mapping[str, Tensor], labels: Tensor) -> Tensor:
    """Of sequences: the prompt's own, and the answer's tokens."""
    mask = (labels != -100).to(row["input_ids"].dtype)
    given = row.get("attention_mask")
    n = row["input_ids"].shape[1]
    mask[:, :n] = 1 if given is None else given
    return mask
