"""PEFT's types that are rows in front of a text, or of the keys and values of every attention.

    PROMPT_TUNING, P_TUNING   prompt_embeddings (L, D)
    CPT                       prompt_embeddings (L, D): the tokens of a context, moved
    MULTITASK_PROMPT_TUNING   prompt_embeddings (L, D), prefix_task_cols (tasks, L, r),
                              prefix_task_rows (tasks, r, D); a call is told ``task_ids``
    PREFIX_TUNING, CARTRIDGE  prompt_embeddings (L, layers 2 H h), keys before values

What made rows is gone once they are saved. All other tensors are modules saved whole.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..blocks.state.examples import Examples
from ..blocks.state.keys_values import KeysValues, Moved, OwnMass, Trunk
from ..blocks.state.prompts import Behind, Lengthened, Prepended
from ..blocks.state.task_prompts import TaskRows
from ..core.errors import FormatError, RecipeError
from ..core.method import Method
from ..core.reading import shown
from ..core.recipe import make
from ..engine.slot import slots
from ..engine.tuned import Tuned
from .peft_folder import PeftFolder

ROWS = "prompt_embeddings"
#: why a prompt of some models has no counterpart on the other side
BEHIND = ("this model has a pooler, which reads the first of PEFT's rows, and in burnish the first "
          "token: two functions")
Put = Callable[[Tensor, Tensor, str], None]


class Rows:
    """One of these types. settings: PEFT's that are acted upon or say nothing, beside those of all;
    fields: what those that are read should be. beside: tensors beside the rows -> the module's."""

    settings: ClassVar[set[str]] = {"prompt_tuning_init", "prompt_tuning_init_text",
                                    "tokenizer_name_or_path", "tokenizer_kwargs"}
    fields: ClassVar[dict[str, str]] = {}
    beside: ClassVar[dict[str, str]] = {}

    # -- in -------------------------------------------------------------------------------------
    def part(self, what: PeftFolder, where: str) -> Method:
        """The part of a recipe that has them. Raises FormatError, RecipeError."""
        assert what.prompt is not None
        return make("prompt_tuning", {"length": len(what.prompt), "init": "normal"})

    def fill(self, added: list[nn.Module], what: PeftFolder, put: Put, where: str) -> None:
        """Give the modules that were added the values of a file."""
        for m in added:
            if isinstance(m, Behind):
                raise FormatError(f"{where}: {BEHIND}")
            if isinstance(m, Prepended):
                self.place(m, what, put, where)

    def place(self, module: Any, what: PeftFolder, put: Put, where: str) -> None:
        """Give the module that owns the rows its values."""
        put(module.rows, what.prompt, ROWS)      # type: ignore[arg-type]

    # -- out ------------------------------------------------------------------------------------
    def give(self, module: Any, method: Method) -> tuple[Tensor, dict[str, Any]]:
        """(the rows, what settings say of them beside their number and width)."""
        return module.made().detach(), {"prompt_tuning_init": "RANDOM"}


class Made(Rows):
    settings = {"encoder_reparameterization_type", "encoder_hidden_size", "encoder_num_layers",
                "encoder_dropout"}


class Context(Rows):
    """CPT: rows that are the embeddings of a context's tokens, each moved a little."""

    #: `cpt_mask` is looked at by nobody
    settings = {"cpt_token_ids", "cpt_mask", "cpt_tokens_type_mask", "opt_weighted_loss_type",
                "opt_loss_decay_factor", "opt_projection_epsilon",
                "opt_projection_format_epsilon", "tokenizer_name_or_path"}
    fields = {"cpt_token_ids": "list", "cpt_tokens_type_mask": "list?",
              "opt_weighted_loss_type": "text?", "opt_loss_decay_factor": "number?",
              "opt_projection_epsilon": "number?", "opt_projection_format_epsilon": "number?"}

    def part(self, what: PeftFolder, where: str) -> Method:
        said, n = what.config, len(what.prompt)  # type: ignore[arg-type]
        ids, types = (said.get(k) for k in ("cpt_token_ids", "cpt_tokens_type_mask"))
        types = [1] * n if types is None else types
        for name, given in (("cpt_token_ids", ids), ("cpt_tokens_type_mask", types)):
            if len(given) != n or not all(type(i) is int and i >= 0 for i in given):
                raise FormatError(f"{where}: {name} = {shown(given)}; expected {n} numbers from 0, "
                                  f"one for each row")
        loss = said.get("opt_weighted_loss_type") or "none"
        if loss not in ("none", "decay"):
            raise FormatError(f"{where}: opt_weighted_loss_type = {shown(loss)}; expected 'none' "
                              "or 'decay'")
        kinds = {t % 4 if t else None for t in types}
        args: dict[str, Any] = {"ids": tuple(ids), "types": tuple(types)}
        for kind, ours, name in (({2}, "input_radius", "opt_projection_epsilon"),
                                 ({1, 3}, "format_radius", "opt_projection_format_epsilon")):
            if kind & kinds and said.get(name) is not None:
                args[ours] = float(said[name])
        if 0 in kinds:
            decay = said.get("opt_loss_decay_factor")
            args["label_decay"] = 1.0 if loss == "none" or decay is None else float(decay)
        return make("cpt", args)

    def place(self, module: Any, what: PeftFolder, put: Put, where: str) -> None:
        assert what.prompt is not None
        if what.prompt.shape != module.rows.shape:
            super().place(module, what, put, where)      # which says so
        start = module.plain().detach()
        moved = what.prompt.to(start) - start
        fixed = torch.tensor(module.radii) <= 0
        near = 1e-3 * start.norm(dim=1).clamp_min(1e-3)
        if bool((off := fixed.to(near.device) & (moved.norm(dim=1) > near)).any()):
            k = int(off.nonzero()[0])
            raise FormatError(f"{where}: row {k} of {ROWS} is of a label or free text, which stays "
                              f"as it is, and is not what this model has for token "
                              f"{module.ids[k]}: it is of another base")
        moved[fixed.to(moved.device)] = 0
        put(module.rows, moved, ROWS)

    def give(self, module: Any, method: Method) -> tuple[Tensor, dict[str, Any]]:
        said: dict[str, Any] = method.settings()
        types = list(method.coded().codes)       # type: ignore[attr-defined]
        return module.made().detach(), {
            "cpt_token_ids": list(said["ids"]), "cpt_mask": [1] * len(types),
            "cpt_tokens_type_mask": types, "opt_weighted_loss_type": "decay",
            "opt_loss_decay_factor": said["label_decay"],
            "opt_projection_epsilon": said["input_radius"],
            "opt_projection_format_epsilon": said["format_radius"]}


class Shared(Rows):
    """Multitask prompt tuning: a factor of the rows for each task."""

    settings = Rows.settings | {"prompt_tuning_init_state_dict_path", "prompt_tuning_init_task",
                                "num_ranks", "num_tasks"}
    fields = {"num_ranks": "count?", "num_tasks": "count?"}
    beside = {"prefix_task_cols": "U", "prefix_task_rows": "V"}

    def part(self, what: PeftFolder, where: str) -> Method:
        tasks, rank = (1 if (n := what.config.get(k)) is None else n
                       for k in ("num_tasks", "num_ranks"))
        return make("mpt", {**super().part(what, where).changed(), "tasks": tasks, "rank": rank})

    def place(self, module: Any, what: PeftFolder, put: Put, where: str) -> None:
        super().place(module, what, put, where)
        for theirs, ours in self.beside.items():
            if theirs not in what.beside:
                raise FormatError(f"{where} lacks {theirs}")
            put(getattr(module, ours), what.beside[theirs], theirs)

    def give(self, module: Any, method: Method) -> tuple[Tensor, dict[str, Any]]:
        said = method.settings()
        return module.rows.detach(), {"prompt_tuning_init": "RANDOM", "num_tasks": said["tasks"],
                                      "num_ranks": said["rank"]}


class Prefixed(Rows):
    settings = {"encoder_hidden_size", "prefix_projection"}

    def part(self, what: PeftFolder, where: str) -> Method:
        assert what.prompt is not None
        args = {"length": len(what.prompt), "moved": True}
        if frozen := what.config.get("num_frozen_tokens"):
            args["frozen_rows"] = frozen
        return make("prefix", args)

    def fill(self, added: list[nn.Module], what: PeftFolder, put: Put, where: str) -> None:
        assert what.prompt is not None
        banks = [m for m in added if isinstance(m, KeysValues)]
        each, odd = divmod(what.prompt.shape[1], 2 * len(banks))
        layers = what.prompt[:, None] if odd else what.prompt.unflatten(1, (-1, each))
        for k, bank in enumerate(banks):
            rows = layers[:, 2 * k : 2 * k + 2].transpose(0, 1)
            put(bank.rows, rows[:, bank.frozen :], ROWS)
            if bank.frozen:
                put(bank.first, rows[:, : bank.frozen], ROWS)


class Cartridge(Prefixed):
    """A prefix whose first rows never train."""

    settings = {"num_frozen_tokens"}
    fields = {"num_frozen_tokens": "count?"}

    def part(self, what: PeftFolder, where: str) -> Method:
        given = what.config.get("num_frozen_tokens")
        what.config = {**what.config, "num_frozen_tokens": 1 if given is None else given}
        return super().part(what, where)


OF_ROWS: dict[str, Rows] = {"PROMPT_TUNING": Rows(), "P_TUNING": Made(), "CPT": Context(),
                            "MULTITASK_PROMPT_TUNING": Shared(), "PREFIX_TUNING": Prefixed(),
                            "CARTRIDGE": Cartridge()}
PROMPTS = tuple(OF_ROWS)
_OF_MODULE: dict[type[nn.Module], str] = {Examples: "CPT", TaskRows: "MULTITASK_PROMPT_TUNING"}
#: types whose rows PEFT makes for both stacks of an encoder-decoder, and puts before the first
FIRST = ("PROMPT_TUNING", "P_TUNING")
#: settings of all of them
OF_ALL = {"num_virtual_tokens", "num_transformer_submodules", "token_dim", "num_attention_heads",
          "num_layers"}


def listeners(tuned: Tuned, adapters: Collection[str]) -> list[nn.Module]:
    """What these adapters have added, in order."""
    return [slot.module_of(p) for _, _, slot in slots(tuned.model) for p in slot.parts
            if p.adapter in adapters]


# -- in -----------------------------------------------------------------------------------------
def read(out: PeftFolder, tensors: Mapping[str, Tensor], config: Mapping[str, Any],
         folder: Path) -> None:
    """Raises FormatError, one line."""
    if (rows := tensors.get(ROWS)) is None or rows.dim() != 2 or not rows.numel() \
            or not rows.is_floating_point():
        said = "nothing" if rows is None else f"{rows.dtype} {list(rows.shape)}"
        raise FormatError(f"{folder}: {ROWS} should be a matrix, a row for each token, got {said}")
    stacks = config.get("num_transformer_submodules") or 1
    if stacks == 2 and out.kind in FIRST:        # PEFT makes rows for a decoder and reads none
        half, odd = divmod(len(rows), 2)
        if odd:
            raise FormatError(f"{folder}: {ROWS} has {len(rows)} rows, which are not as many for "
                              "an encoder as for a decoder")
        rows = rows[:half]
    elif stacks != 1:
        raise FormatError(f"{folder} has rows for an encoder and a decoder; burnish puts them "
                          "before the encoder alone")
    if (n := config.get("num_virtual_tokens") or len(rows)) != len(rows):
        raise FormatError(f"{folder}: {ROWS} has {len(rows)} rows{' a stack' * (stacks == 2)}, its "
                          f"settings say {n}")
    out.prompt, out.config = rows, config
    out.beside = {n: tensors[n] for n in OF_ROWS[out.kind].beside if n in tensors}
    for key, value in tensors.items():           # no tuner wraps the base: one name less in front
        if key != ROWS and key not in out.beside:
            out.whole[key.removeprefix("base_model.")] = value


def part(what: PeftFolder, folder: str | Path) -> list[Method]:
    """The part of a recipe that has the rows, if there are any. Raises FormatError."""
    if what.prompt is None:
        return []
    try:
        return [OF_ROWS[what.kind].part(what, str(folder))]
    except RecipeError as e:
        raise FormatError(f"{folder}: {e}") from None


def fill(tuned: Tuned, what: PeftFolder, put: Put, folder: str | Path, adapter: str) -> None:
    """Give the modules that hold rows the values of a file. Raises FormatError."""
    if what.prompt is not None:
        OF_ROWS[what.kind].fill(listeners(tuned, (adapter,)), what, put, str(folder))


# -- out ----------------------------------------------------------------------------------------
def as_prompt(tuned: Tuned, what: PeftFolder, weights: dict[str, float],
              counts: Callable[[nn.Module], bool]) -> None:
    """The adapter as PEFT's prompt or prefix tuning when rows in front of the input, or of keys and
    values, are all there is."""
    mine = [m for m in listeners(tuned, weights) if counts(m)]
    if mine and all(isinstance(m, KeysValues | Moved | Trunk) for m in mine) \
            and set(weights.values()) == {1.0}:
        if any(isinstance(m, OwnMass) for m in mine):
            raise FormatError("prefix(mass='own') gives its rows a share of attention that PEFT's "
                              "prefix tuning has no words for; train with mass='shared' to export")
        made = [m.made().detach() for m in mine if isinstance(m, KeysValues)]
        if not any(isinstance(m, Moved) for m in mine):
            raise FormatError("prefix: in PEFT real tokens count from the length of the prefix on; "
                              "train with prefix(moved=True) to export")
        what.kind, what.prompt = "PREFIX_TUNING", torch.cat(made).transpose(0, 1).flatten(1)
        n, width = made[0].shape[1:]
        frozen = max(m.frozen for m in mine if isinstance(m, KeysValues))
        what.settings = {"num_virtual_tokens": n, "token_dim": width, "num_layers": len(made),
                         "num_transformer_submodules": 1}
        what.settings["num_frozen_tokens" if frozen else "prefix_projection"] = frozen or False
        what.kind = "CARTRIDGE" if frozen else what.kind
        return
    rows = [m for m in mine if isinstance(m, Prepended) and m.edit is None and m.maker is None]
    if len(rows) != 1 or any(not isinstance(m, Prepended | Behind | Lengthened) for m in mine) \
            or set(weights.values()) != {1.0}:
        return
    if any(isinstance(m, Behind) for m in mine):
        raise FormatError(f"prompt_tuning: {BEHIND}")
    what.kind = _OF_MODULE.get(type(rows[0]), "PROMPT_TUNING")
    method = next(m for a in weights for m in tuned.adapters[a].recipe if "prompt" in m.axes())
    what.prompt, said = OF_ROWS[what.kind].give(rows[0], method)
    what.beside = {theirs: getattr(rows[0], ours).detach()
                   for theirs, ours in OF_ROWS[what.kind].beside.items()}
    n, d = what.prompt.shape
    what.settings = {"num_virtual_tokens": n, "token_dim": d, "num_transformer_submodules": 1,
                     **said}


def check_task(what: PeftFolder, model: nn.Module) -> None:
    """Raises FormatError for rows before a model that PEFT puts none before."""
    if what.prompt is not None and what.task_type is None:
        raise FormatError("PEFT puts rows before models whose task it is told (a causal language "
                          "model, one that writes from what it reads, a classifier with its head "
                          f"in the adapter), and {type(model).__name__} is none")
    if what.kind == "CPT" and what.task_type != "CAUSAL_LM":
        raise FormatError("PEFT has CPT for causal language models alone, and "
                          f"{type(model).__name__} is none")
