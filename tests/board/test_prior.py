"""The planner's prior: empirical Bayes against dense normals, and what it loses on a task left out.
"""

from __future__ import annotations

import numpy as np
import pytest

from burnish.board import Record, Records
from burnish.board import prior as p


def made(recipe, task, *scores, rate=1e-3, budget="as_is"):
    return Record(recipe, task, budget, recipe, scores=list(scores), rate=rate, date="2026-01-01")


LEVELS = {"handwriting": -0.02, "text": 0.0, "cells": 0.04, "patients": 0.01, "bytes": -0.01,
          "tones": 0.03}


def drawn(omega, tau, recipes=200, seed=0, left=0.0):
    """Gains under the model; left: the share of them that nobody ran."""
    g = np.random.default_rng(seed)
    out = {}
    for k in range(recipes):
        a = g.normal(0, omega)
        out[f"r{k}"] = {t: (level + a + g.normal(0, tau) + g.normal(0, 0.003), 0.003 ** 2)
                        for t, level in LEVELS.items() if g.random() >= left}
    return p.Gains(out, dict.fromkeys(p.KINDS, 0.8))


@pytest.mark.parametrize("left", [0.0, 0.4])
def test_the_spread_that_made_the_gains_is_found(left):
    at = p.spread(drawn(0.03, 0.01, left=left))
    assert at.omega == pytest.approx(0.03, rel=0.25) and at.tau == pytest.approx(0.01, rel=0.25)
    assert at.levels == pytest.approx(LEVELS, abs=0.007)


def test_the_likelihood_is_that_of_dense_contrasts():
    """Restricted likelihood is that of what no level can change: the scores projected on what is
    orthogonal to the tasks, under scipy's multivariate normal."""
    from scipy.linalg import null_space
    from scipy.stats import multivariate_normal

    found = drawn(0.02, 0.02, recipes=12, seed=3, left=0.3)
    at = p.spread(found)
    seen = [(r, t, *g) for r, by in found.of.items() for t, g in by.items()]
    design = np.array([[t == u for u in LEVELS] for _, t, _, _ in seen], float)
    y = np.array([g for *_, g, _ in seen])
    free = null_space(design.T)

    def cov(omega, tau):
        return np.array([[(r == q) * omega ** 2 + (k == i) * (tau ** 2 + v)
                          for i, (q, *_) in enumerate(seen)]
                         for k, (r, _, _, v) in enumerate(seen)])

    def likely(omega, tau):
        return multivariate_normal.logpdf(free.T @ y, cov=free.T @ cov(omega, tau) @ free)

    best = likely(at.omega, at.tau)
    step = 100 ** (1 / 24)                                                  # of the grid
    for omega, tau in ((at.omega * step, at.tau), (at.omega / step, at.tau),
                       (at.omega, at.tau * step), (at.omega, at.tau / step)):
        assert likely(omega, tau) < best
    inverse = np.linalg.inv(cov(at.omega, at.tau))
    levels = np.linalg.solve(design.T @ inverse @ design, design.T @ inverse @ y)
    assert list(at.levels.values()) == pytest.approx(levels.tolist(), rel=1e-6)


def test_who_ran_alone_where_lora_is_poor_owes_that_to_the_task():
    """Forty recipes gain five points on cells and none elsewhere; two ran on cells alone, at six
    and at four: they are expected a little beside the others, not five points."""
    made_ = {f"r{k}": {"text": (1e-3 * (k % 5 - 2), 1e-6),
                       "cells": (0.05 + 1e-3 * (k % 7 - 3), 1e-6)} for k in range(40)}
    made_ |= {"more": {"cells": (0.06, 1e-6)}, "less": {"cells": (0.04, 1e-6)},
              "lora": {"text": (0.0, 1e-6), "cells": (0.0, 1e-6)}}
    at = p.spread(p.Gains(made_, {"text": 0.8, "cells": 0.8}))
    more, less = (p.expected(made_[r], at)[0] for r in ("more", "less"))
    assert less < 0 < more < 0.01 and abs(more) == pytest.approx(abs(less), rel=0.35)


def test_an_expectation_is_the_conditional_mean_of_the_joint_normal():
    by = {"text": (0.02, 0.001 ** 2), "cells": (-0.03, 0.004 ** 2), "patients": (0.01, 0.002 ** 2)}
    at = p.Spread({"text": 0.01, "cells": -0.02, "patients": 0.0}, 0.03, 0.02)
    names = list(by)
    for kind, own in (("text", ["text"]), ("table", ["cells", "patients"]), (None, []),
                      ("image", [])):
        # unknowns: a, b of three tasks, b of a new one, e of three; gains and target are sums
        n = len(names)
        cov = np.diag([at.omega ** 2] + [at.tau ** 2] * (n + 1) + [by[t][1] for t in names])
        see = np.zeros((n, cov.shape[0]))
        for k in range(n):
            see[k, [0, 1 + k, n + 2 + k]] = 1
        target = np.zeros(cov.shape[0])
        target[0] = 1
        for t in own:
            target[1 + names.index(t)] = 1 / len(own)
        if not own:
            target[n + 1] = 1
        s = see @ cov @ see.T
        c = see @ cov @ target
        mean = c @ np.linalg.inv(s) @ np.array([by[t][0] - at.levels[t] for t in names])
        sd = (target @ cov @ target - c @ np.linalg.inv(s) @ c) ** 0.5
        assert p.expected(by, at, kind) == pytest.approx((mean, sd), rel=1e-9)


def test_a_recipe_that_never_ran_is_expected_in_the_middle():
    at = p.Spread({}, 0.03, 0.02)
    assert p.expected({}, at) == pytest.approx((0.0, (0.03 ** 2 + 0.02 ** 2) ** 0.5))


def test_gains_are_over_lora_and_no_further_than_ten_points():
    found = p.gains(Records([made("lora(rank=8)", "text", 0.8, 0.8), made("full", "text", 0.9, 0.8),
                             made("poor", "text", 0.2), made("full", "cells", 0.9),
                             made("full", "text", 0.1, budget="time")]))
    assert found.lora == {"text": 0.8} and set(found.of) == {"lora", "full", "poor"}
    gain, var = found.of["full"]["text"]
    assert gain == pytest.approx(0.05) and var == pytest.approx(0.005 / 2 + p.FLOOR ** 2)
    assert found.of["lora"] == {"text": (0.0, p.FLOOR ** 2)}
    assert found.of["poor"]["text"][0] == -p.MOST and found.of["full"].keys() == {"text"}


def test_the_regret_is_what_the_choice_without_the_task_loses_on_it():
    records = Records([made("lora", t, 0.8, 0.8) for t in p.KINDS]
                      + [made("good", t, 0.85, 0.85) for t in p.KINDS]
                      + [made("odd", t, 0.9 if t == "tones" else 0.7,
                              0.9 if t == "tones" else 0.7) for t in p.KINDS])
    found = p.regrets(p.gains(records))
    assert found["text"] == {"chosen": "good", "best": "good", "regret": 0.0, "of_lora": 0.05,
                             "order": 1.0}
    assert found["tones"] == {"chosen": "good", "best": "odd", "regret": 0.05, "of_lora": 0.1,
                              "order": -0.5}


def test_the_document_has_a_score_for_each_kind_and_for_any_other():
    records = Records([made("lora", "text", 0.7, 0.72), made("lora", "handwriting", 0.9, 0.92),
                       made("full", "text", 0.8, 0.8, rate=1e-4)])
    found = p.prior(records)
    assert found["lora"]["score"] == {"image": [0.91, 0.0], "text": [0.71, 0.0],
                                      "other": [0.81, 0.0]}
    full = found["full"]
    assert set(full["score"]) == {"image", "text", "other"}
    assert full["learning_rate"] == {"text": 1e-4} and full["source"] == "the board: text"
    assert full["score"]["text"][0] > 0.71 and full["score"]["image"][1] >= full["score"]["text"][1]
