from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.errors import ConfigError, RecipeError
from ...core.method import setting
from ..bank import Features, Gaussians, added, check_alone, linear_head, mean_of
from ..learner import Learner, Stored, Study, count
from ..training import Given, cross_entropy, masked


@dataclass
class ModelSurgery(Learner):
    """MOS (Model Surgery): an adapter a task, kept near its predecessors, found again by what it
    makes of a row.

        A_b <- (1 - alpha) A_b + alpha mean_{k < b} A_k           after each update, once
        loss = CE(classes of the task) + weight CE(M M^T / 0.8, identity)

    M: rows of the stored class means and of the batch's features, what enters the head; each is
    pushed from all others. A_b begins from A_{b-1}'s values. After a task: mean and covariance
    (+ 1e-4 on the diagonal) of each class's features under its adapter; from the second task on the
    linear head, one for all, is aligned on 5 batches of draws from every class seen, `align` epochs
    of SGD at 0.005.

    An answer begins with the class whose mean under A_1 is nearest by cosine: its task is i. Then,
    4 rounds at most: the head's answer on the features under A_i names a task, until it is i. Given
    is ``softmax(head) + softmax(b cosine)``. Stores every adapter, the statistics (``covariance=
    "diagonal"``: variances alone, the features' width in place of its square, a class) and the
    head; answers cost about two passes.

    (The authors' code merges inside every forward too, in evaluation as well, so that stored
    adapters drift; here once an update and never in a forward.) ``mos`` is another method, Mixture
    of Shards. The paper: ``parallel(bottleneck=16, scale=1.0, tap="norm") + sgd``, rate 0.03, the
    head's 0.003.
    """

    paper: ClassVar[str] = ("MOS: Model Surgery for Pre-Trained Model-Based Class-Incremental "
                            "Learning (2025), arXiv:2412.09441")
    current: ClassVar[bool] = True

    alpha: float = setting(0.1, "share of the mean of earlier adapters, at every update")
    weight: float = setting(0.1, "of the term that pushes features apart")
    temperature: float = setting(0.8, "divides the products of features in that term")
    align: int = setting(30, "epochs of the head on drawn features after a task; 0: none")
    rounds: int = setting(4, "of looking for a row's adapter, at most")
    covariance: Literal["full", "diagonal"] = setting("full", "of each class's features")

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1 or self.weight < 0 or not self.temperature > 0 \
                or self.align < 0 or self.rounds < 1:
            raise ConfigError("model_surgery: alpha from 0 to 1, a weight and align of at least 0, "
                              "a temperature above 0 and rounds of at least 1 are expected, got "
                              f"{self.alpha}, {self.weight}, {self.align}, {self.temperature} and "
                              f"{self.rounds}")

    def check(self, study: Study) -> None:
        super().check(study)
        check_alone(study, "model_surgery")
        if study.stream.scenario != "class":
            raise RecipeError("model_surgery finds a row's task by its class, so the stream is one "
                              f"of scenario 'class', not {study.stream.scenario!r}")
        if study.stream.head not in ("auto", True):
            raise RecipeError("model_surgery trains the head, and this stream's model keeps its "
                              "own (head=False)")

    def joined(self, name: str = "task1", head: bool | str | None = None) -> Any:
        return super().joined("task1", head)

    def begin(self, study: Study) -> None:
        super().begin(study)
        self.path = linear_head(self.tuned, "model_surgery")
        head = self.tuned.model.get_submodule(self.path)
        self.seen = Features(head)
        if not set(self.head) <= set(self.tuned.active.selected):
            raise RecipeError(f"model_surgery: {study.recipe} does not train the head")
        if not (self.adapter(1) and set(self.tuned.active.selected) == set(self.head)):
            raise RecipeError("model_surgery: an adapter is what a recipe adds to the model, and "
                              f"{study.recipe} trains weights of the base: 'lora(rank=4)', "
                              "'parallel(bottleneck=16)'")
        assert isinstance(head, nn.Linear)
        self.linear = nn.Linear(head.in_features, head.out_features, head.bias is not None)
        self.gaussians = Gaussians(diagonal=self.covariance == "diagonal")
        self.prototypes: dict[int, Tensor] = {}
        self.known = 0
        self.before: dict[str, Tensor] = {}

    def adapter(self, b: int) -> dict[str, nn.Parameter]:
        """Tensors of A_b, b from 1."""
        return added(self.tuned, f"task{b}")

    # -- learning ---------------------------------------------------------------------------------
    def learn(self, t: int) -> None:
        study, b = self.study, t + 1
        rows = study.stream.tasks[t].train
        if b > 1:
            self.tuned.add(f"task{b}", study.recipe, targets=study.stream.targets,
                           head=study.stream.head, seed=study.seed + t,
                           calibration=self.reads(rows))
            self.tuned.use(f"task{b}")
            self._begin_from(b - 1)
            self.before = mean_of([self.adapter(k) for k in range(1, b)])
        with self.seen.seen():
            self.teach(rows, t, after=self.merge if b > 1 else None)
        self.linear.load_state_dict(self._head())
        self._statistics(t)
        if b > 1 and self.align:
            self._align(t)
        self.known = b

    @torch.no_grad()
    def _begin_from(self, b: int) -> None:
        now, old = self.adapter(b + 1), self.adapter(b)
        for n, p in now.items():
            p.copy_(old[n])
        for n, p in self.tuned.model.get_submodule(self.path).named_parameters():
            if ".burnish." not in f".{n}":
                p.copy_(self.linear.get_parameter(n))

    def _head(self) -> dict[str, Tensor]:
        head = self.tuned.model.get_submodule(self.path)
        return {n: head.get_parameter(n).detach().float().cpu()
                for n, _ in self.linear.named_parameters()}

    @torch.no_grad()
    def merge(self) -> None:
        """A_b a step nearer to the mean of those before it; once an update."""
        for n, p in self.adapter(self.known + 1).items():
            p.lerp_(self.before[n].to(p), self.alpha)

    def loss(self, z: Tensor, given: Given, t: int) -> Tensor:
        out = cross_entropy(z, given.labels, self.allowed(given, t))
        return out + self.weight * self.apart(self.seen.last) if self.weight else out

    def apart(self, features: Tensor) -> Tensor:
        """CE(M M^T / temperature, identity), M the stored means and then these features."""
        means = [self.gaussians.mean[c].to(features) for c in sorted(self.gaussians.mean)]
        M = torch.cat([torch.stack(means), features]) if means else features
        wide = M.to(torch.promote_types(M.dtype, torch.float32))
        return F.cross_entropy(wide @ wide.t() / self.temperature,
                               torch.arange(len(M), device=M.device))

    def _statistics(self, t: int) -> None:
        task = self.study.stream.tasks[t]
        for c in task.classes:
            rows = [x for x, y in task.train if y == c]
            if not rows:                             # a class that is only tested
                continue
            self.gaussians.learn(c, self._under(t + 1, rows))
            self.prototypes[c] = self._under(1, rows).mean(0)

    def _under(self, b: int, rows: list[Any]) -> Tensor:
        """Features of rows under A_b."""
        self.tuned.use(f"task{b}")
        n = self.study.training.batch
        return torch.cat([self.seen.of(self.tuned, self.study.stream.collate(rows[i:i + n])).cpu()
                          for i in range(0, len(rows), n)])

    def _align(self, t: int) -> None:
        draw = torch.Generator().manual_seed(6029 * self.study.seed + t)
        allowed, n = self.study.stream.classes(t), 5 * self.study.training.batch
        classes = sorted(self.gaussians.mean)
        y = torch.tensor(classes).repeat_interleave(n)
        optimizer = torch.optim.SGD(self.linear.parameters(), 0.005, momentum=0.9,
                                    weight_decay=5e-4)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.align)
        for _ in range(self.align):
            x = torch.cat([self.gaussians.draw(c, n, draw) for c in classes])
            for some in torch.randperm(len(x), generator=draw).split(n):
                optimizer.zero_grad()
                cross_entropy(self.linear(x[some]), y[some], allowed).backward()
                optimizer.step()
            schedule.step()

    # -- answering --------------------------------------------------------------------------------
    @torch.no_grad()
    def scores(self, inputs: Any, allowed: Tensor, task: int | None) -> Tensor:
        logits, _, _ = self.retrieve(inputs, allowed)
        return logits.softmax(-1) + masked(self.known * self.cosines(inputs), allowed).softmax(-1)

    def cosines(self, inputs: Any) -> Tensor:
        """(rows, width): to class means, under A_1; classes not seen at -inf."""
        self.tuned.use("task1")
        f = F.normalize(self.seen.of(self.tuned, inputs).cpu(), dim=-1)
        out = torch.full((len(f), self.study.stream.width), -torch.inf)
        for c, mean in self.prototypes.items():
            out[:, c] = f @ F.normalize(mean, dim=-1)
        return out

    @torch.no_grad()
    def retrieve(self, inputs: Any, allowed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(logits of the head among `allowed`, the task each row ended with from 0, rounds)."""
        of = {c: k for k, task in enumerate(self.study.stream.tasks) for c in task.classes}
        task_of = torch.tensor([of.get(c, 0) for c in range(self.study.stream.width)])
        now = task_of[masked(self.cosines(inputs), allowed).argmax(-1)]
        logits = torch.zeros(len(now), self.study.stream.width)
        rounds = torch.zeros(len(now), dtype=torch.long)
        going = torch.ones(len(now), dtype=torch.bool)
        features: dict[int, Tensor] = {}
        for _ in range(self.rounds):
            for k in now[going].unique().tolist():
                if k not in features:                # a pass of all rows under it, once
                    self.tuned.use(f"task{k + 1}")
                    features[k] = self.seen.of(self.tuned, inputs).cpu()
                rows = going & (now == k)
                logits[rows] = masked(self.linear(features[k][rows]), allowed)
            found = task_of[logits.argmax(-1)]
            rounds += going
            moves = going & (found != now)
            now = torch.where(moves, found, now)
            going = moves
            if not going.any():
                break
        return logits, now, rounds

    def stored(self) -> Stored:
        own = [p.detach() for b in range(1, self.known + 1) for p in self.adapter(b).values()]
        return count([*own, *self.linear.parameters(), *self.gaussians.tensors(),
                      *self.prototypes.values()])
