"""What a series does next."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...core.errors import ConfigError, DataError
from .. import series
from ..kinds import KINDS
from ..rows import Rows
from .base import Task

#: steps before a forecast that the report draws, at most; and its channels
DRAWN, CHANNELS = 256, 4


class Windows(Rows):
    """Every stretch of `past` and `ahead` steps whose last `ahead` may be foretold: ``past_values``
    (past, C) and ``future_values`` (ahead, C). at: (series, first step that is foretold)."""

    def __init__(self, rows: Any, past: int, ahead: int, split: str):
        self.past, self.ahead = past, ahead
        self.names = rows["series"][:]
        self.values = [torch.tensor(v, dtype=torch.float32) for v in rows["values"]]
        self.at: list[tuple[int, int]] = []
        short = 0
        for k, (v, begin) in enumerate(zip(self.values, rows["begin"], strict=True)):
            first, end = max(begin, past), len(v) - ahead + 1
            self.at += [(k, t) for t in range(first, end)]
            short += first >= end
        if not self.at:
            most = max(len(v) for v in self.values)
            taken = max(len(v) - b for v, b in zip(self.values, rows["begin"], strict=True))
            if any(rows["begin"]) and most >= past + ahead:
                raise DataError(f"{split}: {taken} rows are set aside, fewer than the {ahead} that "
                                f"the model foretells; give validation={ahead} or more, or 0")
            raise DataError(f"{split}: {most} rows are fewer than one window, {past} that the "
                            f"model reads and {ahead} that it foretells")
        self.notes = [f"{split}: {short} of {len(self.values)} series have fewer rows than a "
                      f"window of {past} + {ahead}, and are left out"] if short else []

    def __len__(self) -> int:
        return len(self.at)

    def source(self, i: int) -> int:
        return self.at[i][0]

    def row(self, i: int) -> dict[str, Any]:
        k, t = self.at[i]
        v = self.values[k]
        return {"past_values": v[t - self.past:t], "future_values": v[t:t + self.ahead]}

    def unmoved(self) -> Tensor:
        """(C,) what the absolute errors of all windows would sum to, had the last value read been
        said `ahead` times."""
        total = torch.zeros(self.values[0].shape[1], dtype=torch.float64)
        for k, v in enumerate(self.values):
            t = torch.tensor([at for of, at in self.at if of == k], dtype=torch.long)
            for h in range(self.ahead):
                total += (v[t + h] - v[t - 1]).double().abs().sum(0)
        return total


class TimeSeriesForecasting(Task):
    """``past_values`` (B, context_length, C) and ``future_values`` (B, prediction_length, C), as
    they stand: the model scales what it reads by itself, and the loss is the mean squared error in
    units of the data. Validation is each series' last steps, which read those before them."""

    metric = "loss"
    greater_is_better = False
    smooths = False
    heavy = True
    takes = ("values",)
    truth = ("future_values",)

    def prepare(self) -> None:
        if self.processor is not None:
            raise ConfigError("a series is read as it stands, by the model itself; leave "
                              "processor= out")
        if self.max_length is not None:
            raise ConfigError(f"max_length={self.max_length} counts tokens; how many steps are "
                              "read is the context_length of the model's config")

    # -- the model -----------------------------------------------------------------------------
    def settle(self, model: nn.Module) -> None:
        super().settle(model)
        name, config = type(model).__name__, getattr(model, "config", None)
        if name not in {m for _, m in KINDS[self.data.task].also}:
            raise ConfigError(f"{name} foretells no series; forecasting is served for "
                              f"{' and '.join(m for _, m in KINDS[self.data.task].also)}")
        if config.loss != "mse":
            raise ConfigError(f"{name} has loss={config.loss!r} in its config, and foretells a "
                              "distribution; forecasting is served for loss='mse'")
        self.past, self.ahead = config.context_length, config.prediction_length
        self.which = getattr(config, "prediction_channel_indices", None)
        for rows in self.data.splits.values():
            self._agree(len(rows[0]["values"][0]), name, config)

    def _agree(self, many: int, name: str, config: Any) -> None:
        """Raises ConfigError where the model reads another number of channels."""
        has = config.num_input_channels
        if has == many:
            return
        names = ", ".join(self.data.roles.get("channels", ())[:6])
        apart = name.startswith("PatchTSTF") and config.share_embedding and config.share_projection
        make = (f"its weights are the same for any number: transformers.{name}.from_pretrained("
                f"'MODEL', num_input_channels={many}).save_pretrained('FOLDER') makes one that fits"
                if apart else
                f"transformers.{name}(transformers.{type(config).__name__}(num_input_channels="
                f"{many}, context_length={self.past}, prediction_length={self.ahead}, loss='mse'"
                ")).save_pretrained('FOLDER') makes one that fits, drawn at random")
        raise ConfigError(f"{name} reads {has} channel{'s' * (has != 1)} and the data have {many}"
                          f"{f' ({names})' if names else ''}: name {has} of them with label=; or "
                          f"{make}")

    # -- the rows ------------------------------------------------------------------------------
    def make(self, split: str) -> Rows:
        made = Windows(self.data.splits[split], self.past, self.ahead, split)
        self.notes += made.notes
        return made

    def preview(self, n: int = 3) -> list[str]:
        names = self.data.roles.get("channels", ())
        said = []
        for row in self.data.train.select(range(min(n, len(self.data.train)))):
            of = f"series={row['series']!r}  " if row["series"] else ""
            said.append(f"{of}{len(row['values'])} rows  " + "  ".join(
                f"{c}={', '.join(f'{v[k]:.4g}' for v in row['values'][:4])}, ..."
                for k, c in enumerate(names[:6])))
        return said

    # -- figures -------------------------------------------------------------------------------
    def logits(self, outputs: Any) -> Tensor:
        if isinstance(outputs, Tensor):
            return outputs
        return outputs["prediction_outputs"] if isinstance(outputs, Mapping) else outputs[0]

    def right(self, truth: Any) -> Tensor:
        """(B, ahead, C) of the channels that the model foretells."""
        true = super().right(truth)
        return true if self.which is None or true.dim() < 3 else true[..., self.which]

    def kept(self, outputs: Any, truth: Any) -> tuple[Tensor, Tensor]:
        """((B, C) absolute errors, summed over steps; (B, 2) squared errors and how many)."""
        wrong = self.logits(outputs).float() - self.right(truth).float()
        squares = wrong.square().flatten(1)
        return wrong.abs().sum(1), torch.stack(
            [squares.sum(1), torch.full_like(squares[:, 0], squares.shape[1])], -1)

    def told(self, labels: Tensor) -> Tensor:
        return labels[:, 0, 0]

    def figures(self, answers: Any, losses: Any, labels: Any, rows: Rows | None = None
                ) -> dict[str, float]:
        """``mse`` (the loss) and ``mae`` over all steps and channels, in units of the data; and
        ``mae_to_naive``, a channel's absolute errors over those of saying its last value again,
        the mean of the channels that move: 1 is to have learnt nothing."""
        assert isinstance(rows, Windows)
        total, count = torch.as_tensor(losses).double().sum(0).tolist()
        wrong, naive = torch.as_tensor(answers).double().sum(0), rows.unmoved()
        naive = naive if self.which is None else naive[self.which]
        moves = naive > 0
        ratio = {"mae_to_naive": float((wrong[moves] / naive[moves]).mean())} if moves.any() else {}
        mse = total / max(count, 1.0)
        return {"loss": mse, "mse": mse, "mae": float(wrong.sum()) / max(count, 1.0), **ratio}

    # -- answers to people ---------------------------------------------------------------------
    def names(self, many: int) -> list[str]:
        names = list(self.data.roles.get("channels", ())) or [f"channel {k}" for k in range(many)]
        return names if self.which is None else [names[k] for k in self.which]

    def ahead_of(self, model: Any, values: Any, where: str) -> Tensor:
        """(ahead, C): what comes after the last of `values` (T, C)."""
        if len(values) < self.past:
            raise DataError(f"{where}: {len(values)} rows, and the model reads {self.past}")
        x = torch.tensor(values[-self.past:], dtype=torch.float32)
        return self.logits(model(**self.agreed({"past_values": x[None]})))[0].float().cpu()

    def answer(self, model: nn.Module, row: Mapping[str, Any], tokens: int) -> dict[str, Any]:
        """forecast: channel -> the values of the next rows; time: when they are, where the rows are
        evenly apart."""
        said = self.ahead_of(model, row["values"], row.get("where", "the series"))
        names = self.names(len(row["values"][0]))
        made: dict[str, Any] = {"forecast": dict(zip(names, said.T.tolist(), strict=True))}
        after = series.following(row.get("times") or (), len(said))
        return made | ({"time": after, "time_column": row["time"]} if after else {})

    def said(self, answer: Mapping[str, Any]) -> str:
        """The next rows as lines of a CSV, with their time or their number."""
        columns = answer["forecast"]
        steps = answer.get("time") or range(1, len(next(iter(columns.values()))) + 1)
        lines = [series.listed([answer.get("time_column") or "ahead", *columns])]
        lines.insert(0, f"the next {len(steps)} rows")
        return "\n".join(lines + [series.listed([str(at), *(f"{v:.6g}" for v in row)])
                                  for at, *row in zip(steps, *columns.values(), strict=True)])

    def parted(self, row: Mapping[str, Any]) -> tuple[dict[str, Any], str, str]:
        """A series up to its last `ahead` steps, and these."""
        values, names = row["values"], self.names(len(row["values"][0]))
        if len(values) < self.past + self.ahead:
            raise DataError(f"samples= asks what each series does, and series {row['series']!r} is "
                            f"shorter than a window of {self.past} + {self.ahead}")
        asked, true = values[:-self.ahead], torch.tensor(values[-self.ahead:])
        true = true if self.which is None else true[:, self.which]
        right = self.said({"forecast": dict(zip(names, true.T.tolist(), strict=True))})
        return {"values": asked}, f"{len(asked)} rows of {row['series'] or 'the series'}", right

    @torch.no_grad()
    def shown(self, tuned: Any, device: Any) -> dict[str, Any]:
        """``forecast``: of the last window that was held out what came before, what came, what was
        foretold."""
        split = next((s for s in ("validation", "test") if s in self.data.splits), None)
        if split is None:
            return {}
        rows = self.rows(split)
        assert isinstance(rows, Windows)
        k, t = rows.at[-1]
        v, which = rows.values[k], self.which or range(rows.values[k].shape[1])
        past = v[t - self.past:t].to(device)
        said = self.logits(tuned.model(**self.agreed({"past_values": past[None]})))[0].float().cpu()
        drawn = [{"name": n, "past": v[max(0, t - self.past, t - DRAWN):t, c].tolist(),
                  "truth": v[t:t + self.ahead, c].tolist(), "forecast": said[:, i].tolist()}
                 for i, (n, c) in enumerate(zip(self.names(v.shape[1]), which, strict=True))]
        return {"forecast": {"split": split, "series": rows.names[k],
                             "channels": drawn[:CHANNELS]}}
