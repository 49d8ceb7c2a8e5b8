"""The benchmark compares like with like. How fast is no test's business."""
import pytest
import torch

import bench


def test_ours_and_theirs_do_the_same_work():
    """The first case of the Circle loss: the same gradient from both, and a row of the table."""
    name, _, cases = next(bench.circle(quick=True))
    ours, = cases["ours"]()()
    row = {"work": name, "ours": {"seconds": 0.002, "bytes": 2 ** 20},
           "peer": {"seconds": 0.005, "bytes": None}}
    assert bench.table([row]).splitlines()[-1] == f"| {name} | 2.0 ms | 5.0 ms (peer) | 2.50 | 1 MB | - |"
    pytest.importorskip("pytorch_metric_learning")
    theirs, = cases["pytorch-metric-learning"]()()
    assert torch.allclose(ours, theirs, atol=1e-4 * ours.abs().max().item())


def test_both_models_have_the_same_shape():
    pytest.importorskip("transformers")
    ours = bench.GPT(bench.SMALL)
    theirs = bench.llama(bench.SMALL)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
