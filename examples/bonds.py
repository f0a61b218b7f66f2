"""Tell whether an atom is bound to two others, from a folder of the TU collection to an answer.

    python examples/bonds.py                 # a minute

Graphs that look like molecules are grown and written as MUTAG and its kin lie (``_A.txt``,
``_graph_indicator.txt``, ...), and a small graph network is saved with its code beside its weights.
Nothing is downloaded. With graphs of your own it is ``burnish fit --model m/gin --data MUTAG/
--trust_remote_code true``. `examples/molecules.py` compares recipes in a loop of one's own.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import burnish
from burnish.fit.finished import Finished
from burnish.testing.own import made, rows_of_graphs, tu


def main(many: int = 400, epochs: int = 30, recipe: str = "full") -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, "model")
        data = tu(Path(folder, "BONDS"), rows_of_graphs(many), "BONDS")
        made("graph", blocks=3).save_pretrained(model)
        run = burnish.fit(str(model), str(data), recipe, output=Path(folder, "out"), lr=2e-3,
                          epochs=epochs, validation=0.2, quiet=True, trust_remote_code=True)
        row = rows_of_graphs(1, seed=1)[0]
        for answer in Finished.open(run.folder, trust=True).predict([json.dumps(row)]):
            print(f"{len(row['node_feat'])} atoms: {answer['said']}, it is {row['y'][0]}")
    found = run.metrics["validation"]
    print(", ".join(f"{k} {v:.3f}" for k, v in found.items()))
    return found


if __name__ == "__main__":
    main()
