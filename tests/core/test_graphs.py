"""The small graph network and the graphs it reads are what they say."""

from __future__ import annotations

import torch

from burnish.testing.graphs import VALENCE, GraphNetwork, molecules


def test_molecules_hold_what_is_said_of_them():
    nodes, adjacency, said = molecules(40, seed=1)
    assert torch.equal(adjacency, adjacency.mT) and not adjacency.diagonal(dim1=1, dim2=2).any()
    for x, A, what in zip(nodes, adjacency, said, strict=True):
        n = int(x.sum())
        assert 6 <= n <= 16 and int(x.sum(1).max()) == 1 and not A[x.sum(1) == 0].any()
        kinds = x.argmax(1)
        assert all(int(A[i].sum()) <= VALENCE[kinds[i]] for i in range(n))
        seen, todo = set(), [0]
        while todo:
            seen.add(i := todo.pop())
            todo += [j for j in range(n) if A[i, j] and j not in seen]
        assert len(seen) == n, "in one piece"
        assert what["rings"] == int(A.sum()) // 2 - n + 1
        assert what["pairs"] == sum({int(kinds[i]), int(kinds[j])} == {1, 2}
                                    for i in range(n) for j in range(i) if A[i, j])
        near = [{int(kinds[j]) for j in range(n) if A[i, j]} for i in range(n)]
        assert what["between"] == sum({1, 2} <= some for some in near)
    assert {s["rings"] for s in said} >= {0, 1, 2} and {bool(s["pairs"]) for s in said} == {0, 1}
    assert torch.equal(molecules(40, seed=1)[0], nodes)
    assert not torch.equal(molecules(40, seed=2)[0], nodes)


def test_neither_the_order_of_nodes_nor_padding_matters():
    net, batch = GraphNetwork().double().eval(), GraphNetwork().example(3)
    x, A = batch["nodes"].double(), batch["adjacency"].double()
    want = net(x, A).logits
    order = torch.randperm(x.shape[1])
    torch.testing.assert_close(net(x[:, order], A[:, order][:, :, order]).logits, want)
    wide, more = torch.zeros(3, 12, 4).double(), torch.zeros(3, 12, 12).double()
    wide[:, : x.shape[1]], more[:, : x.shape[1], : x.shape[1]] = x, A
    torch.testing.assert_close(net(wide, more).logits, want)
