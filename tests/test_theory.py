"""What `theory.ipynb` claims of the paper's Proposition 1: the terms of the bound are what they are
called. The definitions are read from the notebook, and held against Jacobians written out in full.
"""
import json

import torch

import dcr
from conftest import ROOT
from dcr import kernel
from model import last_states
from test_kernel import IDS, brute_force, residuals, scores, small


def of_the_notebook(*names):
    """{name: value} of the cells that define these; they hold imports and definitions alone."""
    notebook = json.loads((ROOT / "theory.ipynb").read_text(encoding="utf-8"))
    namespace = {"torch": torch, "dcr": dcr}                # what the notebook imports at its top
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code" and any(f"def {name}(" in source for name in names):
            exec(source, namespace)
    return namespace


DEFINED = of_the_notebook("kernel_form", "first_order", "tail_sensitivity", "bilinear", "proposition_1")
kernel_form = DEFINED["kernel_form"]
first_order = DEFINED["first_order"]
tail_sensitivity = DEFINED["tail_sensitivity"]
bilinear = DEFINED["bilinear"]
proposition_1 = DEFINED["proposition_1"]


def test_influence_is_the_inner_product_of_gradients_in_every_group_of_parameters():
    """left^T K right for left = right = e_y - pi, and each group's share of it alone; the shares add up."""
    model = small(qkv_bias=True)
    K = kernel(model, IDS)
    total = 0
    for group in [*K.groups, "head"]:
        parameters = [p for name, p in model.named_parameters() if dcr.group_of(name) == group]
        rows = []
        for score in scores(model):
            gradient = torch.autograd.grad(score, parameters, retain_graph=True)
            rows.append(torch.cat([g.flatten() for g in gradient]))
        rows = torch.stack(rows).double()
        share = kernel_form(K, residuals(K), residuals(K), [group])
        assert torch.allclose(share, rows @ rows.T, rtol=1e-3, atol=1e-5), group
        assert share.diagonal().min() > 0
        total = total + share
    assert torch.allclose(total, kernel_form(K, residuals(K), residuals(K)), rtol=1e-9)


def test_the_error_of_the_first_order_falls_with_the_square_of_the_step():
    """z(theta + change) - z - J change is O(change^2): ten times smaller a step, a hundred times the error
    less. With the wrong sign or factor in J it would be ten times. The change is SGD's on one prompt, and by
    the kernel the same to first order."""
    model = small()
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    gradient = dict(zip(parameters, torch.autograd.grad(scores(model)[0], list(model.parameters()))))
    errors = []
    for eta in (1e-2, 1e-3):
        z, dz = first_order(model, IDS, parameters, {name: eta * g for name, g in gradient.items()})
        moved = small()
        for p, g in zip(moved.parameters(), gradient.values()):
            p.data += eta * g
        z_moved = moved.tail(last_states(moved, IDS, 2), since=2)
        errors.append((z_moved - z - dz).norm().item())
    assert errors[1] < errors[0] / 50
    K = kernel(model, IDS)
    e = torch.eye(len(K.W), dtype=torch.float64)
    for token in (0, 7):
        by_kernel = 1e-3 * kernel_form(K, e[[token] * len(IDS)], residuals(K))[:, 0]
        assert torch.allclose(dz[:, token].double(), by_kernel, rtol=1e-3, atol=1e-7)


def test_tail_sensitivity_is_the_jacobian_of_the_logits_by_the_stream():
    model = small()
    T, elsewhere = tail_sensitivity(model, IDS, 1)
    for i, ids in enumerate(IDS):
        with torch.no_grad():
            H = model(torch.tensor([ids]), upto=1)[0]
        J = torch.autograd.functional.jacobian(lambda H: model.tail(H[None], since=1)[0, -1], H)   # (V, T, d)
        assert torch.allclose(T[i].float(), J[:, -1], atol=1e-4 * J.abs().max().item())
    assert elsewhere[1].abs() < 1e-6 < elsewhere[2] < 1           # a prompt of one token has no other token


def test_bilinear_form_of_linear_features_is_found_and_is_positive():
    """g = Phi h: Q must be Phi^T Phi, if there are more prompts than dimensions and little ridge."""
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(12, 5, generator=generator, dtype=torch.float64)
    Phi = torch.randn(9, 5, generator=generator, dtype=torch.float64)
    products = (h @ Phi.T) @ (h @ Phi.T).T
    assert torch.allclose(bilinear(h, products, ridge=1e-9), Phi.T @ Phi, rtol=1e-5, atol=1e-5)
    Q = bilinear(h, torch.eye(12, dtype=torch.float64))                    # nothing linear about that
    assert torch.allclose(Q, Q.T) and torch.linalg.eigvalsh(Q).min() > -1e-12


def test_the_terms_of_proposition_1_are_what_they_are_called():
    """Each against Jacobians written out; and the inequalities that the bound is made of, which no fitted Q
    or Delta can break: through the last token ||T' G' G^T T^T|| <= ||T'|| ||T|| ||G' G^T||, whole <=
    parts."""
    model = small()
    others = [[3, 1, 2], [11, 4], [6], [9, 9, 9, 1], [2, 17, 3], [12]]
    p = proposition_1(model, IDS, 1, others)
    names = {name for name, _ in model.named_parameters()}
    below = {name for name in names if dcr.group_of(name) in ("embeddings", "block 1")}
    tail = names - below
    assert torch.allclose(p["left"], brute_force(model, names, IDS), rtol=1e-4)
    assert torch.allclose(p["left_frozen"], brute_force(model, below, IDS), rtol=1e-4)
    assert torch.isclose(p["tau"] ** 2, tail_traces(model, tail).max(), rtol=1e-4)
    assert torch.isclose(p["c"], torch.linalg.matrix_norm(tail_sensitivity(model, IDS, 1)[0], 2).max() ** 2)
    assert torch.allclose(p["size"] ** 2, p["traces"].diagonal(), rtol=1e-9)
    assert (p["through"] <= p["c"] * p["products"] * (1 + 1e-9)).all()
    assert (p["traces"].abs() <= p["size"][:, None] * p["size"][None] * (1 + 1e-9)).all()
    assert (p["left"] <= (p["left_frozen"] + p["tau"] ** 2) * (1 + 1e-9)).all()
    assert torch.allclose(p["right"], p["right_frozen"] + p["crossed"] + p["tau"] ** 2)
    assert torch.allclose(p["right_frozen"], p["c"] * (p["h"] @ p["Q"] @ p["h"].T) + p["delta"])
    eigenvalues = torch.linalg.eigvalsh(p["Q"])
    assert p["delta"] >= 0 and eigenvalues.min() > -1e-9 * eigenvalues.max()           # of fp32 products


def tail_traces(model, names):
    """||dz/dtheta||_F^2 over the named parameters for each prompt."""
    parameters = [p for name, p in model.named_parameters() if name in names]
    traces = torch.zeros(len(IDS), dtype=torch.float64)
    for i, ids in enumerate(IDS):
        for z in model(torch.tensor([ids]))[0, -1]:
            gradient = torch.autograd.grad(z, parameters, retain_graph=True)
            traces[i] += sum(g.double().square().sum() for g in gradient)
    return traces
