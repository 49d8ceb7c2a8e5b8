"""What `dcr.py` claims of the method: the Circle loss is its definition, its gradient takes the weights as
constants, and nothing that should not matter does; the objective of refinement is the sum it says, and its
three retention terms vanish at the base.

Every test is run twice: with all anchors of a class in one strip, and in strips of 5."""
import copy
import dataclasses
import functools
import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import dcr
from data import collate
from dcr import circle_loss, drift, forgetting, refinement_loss
from model import last_states


@pytest.fixture(params=[256, 5], autouse=True)
def strip(request, monkeypatch):
    monkeypatch.setattr(dcr, "STRIP", request.param)
    return request.param


def some_features(n=12, d=5, classes=2, dtype=torch.float64, seed=0):
    """Features and labels; every class has at least two members."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator).to(dtype), torch.arange(n) % classes


def at_angles(*degrees):
    angles = torch.tensor(degrees, dtype=torch.float64) * math.pi / 180
    return torch.stack((angles.cos(), angles.sin()), 1)


def naive(features, labels, m, gamma):
    """The definition: one anchor, one positive and one negative at a time."""
    def cosine(i, j):
        return (features[i] @ features[j]) / (features[i].norm() * features[j].norm())
    losses = []
    for i in range(len(features)):
        others = [j for j in range(len(features)) if j != i]
        positives = [cosine(i, j) for j in others if labels[j] == labels[i]]
        negatives = [cosine(i, j) for j in others if labels[j] != labels[i]]
        total = 0
        for s_n in negatives:
            for s_p in positives:
                a_n = max(s_n.detach() + m, 0)
                a_p = max(1 + m - s_p.detach(), 0)
                total = total + torch.exp(gamma * a_n * (s_n - m)) * torch.exp(-gamma * a_p * (s_p - (1 - m)))
        if positives and negatives:
            losses.append(torch.log(1 + total))
    return sum(losses) / len(losses)


# ------------------------------------------------------------------------------------ definition and gradient

@pytest.mark.parametrize("m, gamma", [(0.25, 16.0), (0.25, 32.0), (0.4, 80.0), (0.1, 1.0)])
@pytest.mark.parametrize("classes", [2, 3, 5])
def test_circle_loss_is_its_definition_pair_by_pair(m, gamma, classes):
    """A swapped margin, a missing relu or a mean over the wrong number shows; any number of classes will do.
    torch's softplus would not do: beyond 20 it takes log(1 + e^x) for x."""
    features, labels = some_features(classes=classes)
    expected = naive(features, labels, m, gamma)
    assert torch.allclose(circle_loss(features, labels, margin=m, gamma=gamma), expected, rtol=1e-12, atol=0)
    single = circle_loss(features.float(), labels, margin=m, gamma=gamma)
    assert single.dtype == torch.float32 and torch.allclose(single.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("m, gamma, value", [(0.25, 256.0, 176.0280751016), (0.4, 80.0, 39.4087734693)])
def test_golden_values(m, gamma, value):
    """From pytorch-metric-learning: five unit vectors 20 degrees apart, the last one alone in its class."""
    loss = circle_loss(at_angles(0, 20, 40, 60, 80), torch.tensor([0, 0, 1, 1, 2]), margin=m, gamma=gamma)
    assert loss.item() == pytest.approx(value, abs=1e-9)


def test_golden_gradient_by_angle():
    """Of the same five vectors, from pytorch-metric-learning."""
    angles = (torch.tensor([0, 20, 40, 60, 80.0], dtype=torch.float64) * math.pi / 180).requires_grad_()
    features = torch.stack((angles.cos(), angles.sin()), 1)
    circle_loss(features, torch.tensor([0, 0, 1, 1, 2]), margin=0.4, gamma=80.0).backward()
    golden = [8.69300258, 24.62545032, -39.61582873, 15.46141307, -9.16403724]
    assert angles.grad.tolist() == pytest.approx(golden, abs=1e-7)


def test_the_gradient_is_the_closed_form_with_constant_weights():
    """dL_i/ds_n = gamma a_n Z softmax_n and dL_i/ds_p = -gamma a_p Z softmax_p, where Z = 1 - exp(-L_i):
    a gradient through the weights would be nearly twice that for some pairs."""
    m = 0.25
    gamma = 8.0
    features, labels = some_features(n=8, classes=2)
    features.requires_grad_()
    circle_loss(features, labels, margin=m, gamma=gamma).backward()
    with torch.no_grad():
        n = len(features)
        length = features.norm(dim=1, keepdim=True)
        unit = features / length
        s = unit @ unit.T
        D = torch.zeros(n, n, dtype=torch.float64)                # D[i, j] = d loss / d s_ij, anchor i
        for i in range(n):
            p = [j for j in range(n) if j != i and labels[j] == labels[i]]
            q = [j for j in range(n) if labels[j] != labels[i]]
            a_p = (1 + m - s[i, p]).clamp(min=0)
            a_n = (s[i, q] + m).clamp(min=0)
            e_p = (-gamma * a_p * (s[i, p] - 1 + m)).exp()
            e_n = (gamma * a_n * (s[i, q] - m)).exp()
            Z = 1 - 1 / (1 + e_p.sum() * e_n.sum())
            D[i, p] = -gamma * a_p * Z * e_p / e_p.sum() / n
            D[i, q] = gamma * a_n * Z * e_n / e_n.sum() / n
        by_unit = (D + D.T) @ unit                                         # s_ij moves with both of its ends
        by_hand = (by_unit - (by_unit * unit).sum(1, keepdim=True) * unit) / length
    assert torch.allclose(features.grad, by_hand, rtol=1e-10, atol=1e-12)


def test_the_gradient_is_not_that_of_the_value():
    """Finite differences of the value move the weights too. If they agreed, the detach would be lost."""
    features, labels = some_features(n=6)
    features.requires_grad_()
    assert not torch.autograd.gradcheck(lambda x: circle_loss(x, labels), features, raise_exception=False)
    assert torch.autograd.gradcheck(lambda x: drift(x, labels[:, None], 9), features)       # it can pass


@pytest.mark.parametrize("classes", [2, 4])
def test_circle_loss_is_that_of_pytorch_metric_learning(classes):
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    features, labels = some_features(n=24, d=8, classes=classes, dtype=torch.float32)
    ours = features.clone().requires_grad_()
    theirs = features.clone().requires_grad_()
    value = circle_loss(ours, labels, margin=0.4, gamma=80.0)
    expected = losses.CircleLoss(m=0.4, gamma=80)(theirs, labels)
    value.backward()
    expected.backward()
    assert torch.allclose(value, expected, rtol=1e-5)
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-4 * theirs.grad.abs().max().item())


# ------------------------------------------------------------------------------------------------ invariances

def test_order_length_and_names_of_the_classes_do_not_matter():
    features, labels = some_features(classes=3)
    loss = circle_loss(features, labels)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    scale = torch.linspace(0.1, 50, 12, dtype=torch.float64)[:, None]
    for same in (circle_loss(features[order], labels[order]), circle_loss(features * scale, labels),
                 circle_loss(features, torch.tensor([7, -1, 100])[labels])):
        assert torch.allclose(same, loss, rtol=1e-12)
    assert not torch.allclose(circle_loss(features, labels[order]), loss, rtol=1e-3)    # who is whose matters


def test_the_value_can_rise_while_the_classes_part():
    """Two classes of two equal vectors, their cosine c: log(1 + 2 exp(gamma (c^2 - m^2)) exp(-gamma m^2)) is
    least at c = 0, but the gradient goes on to push them apart until c = -m."""
    labels = torch.tensor([0, 0, 1, 1])

    def loss(c):
        apart = math.degrees(math.acos(c))
        return circle_loss(at_angles(0, 0, apart, apart), labels, gamma=32.0).item()
    for c in (0.2, 0.0, -0.2):
        assert loss(c) == pytest.approx(math.log(1 + 2 * math.exp(32 * (c * c - 2 * 0.25 ** 2))), rel=1e-9)
    assert loss(-0.2) == pytest.approx(loss(0.2)) and loss(-0.2) > loss(0.0)
    features = at_angles(0, 0, 100, 100).requires_grad_()
    value = circle_loss(features, labels, gamma=32.0)
    value.backward()
    with torch.no_grad():
        stepped = features - 0.02 * features.grad
        assert F.cosine_similarity(stepped[0], stepped[2], dim=0) < math.cos(math.radians(100))
        assert circle_loss(stepped, labels, gamma=32.0) > value


def test_a_step_joins_what_belongs_together_and_parts_what_does_not():
    features, labels = some_features(n=8, d=16, dtype=torch.float32)
    same = (labels[:, None] == labels[None]) & ~torch.eye(8, dtype=torch.bool)

    def similarities(x):
        s = F.normalize(x, dim=1) @ F.normalize(x, dim=1).T
        return s[same].mean(), s[labels[:, None] != labels[None]].mean()
    moved = features.clone()
    for _ in range(300):
        moved.requires_grad_()
        gradient, = torch.autograd.grad(circle_loss(moved, labels), moved)
        moved = (moved - 0.05 * gradient).detach()
    within_before, across_before = similarities(features)
    within, across = similarities(moved)
    assert within > 0.75 > 0.25 > within_before
    assert across < 0.25 and across < across_before


# ------------------------------------------------------------------------------------------------------ edges

def test_anchors_without_positive_or_without_negative_do_not_count():
    features = some_features(n=5)[0]
    alone = torch.tensor([0, 0, 0, 0, 1])                # the last has no positive: a mean over four anchors
    single = torch.tensor([0, 0, 1, 2, 3])               # only the first two have positives
    for labels in (alone, single):
        expected = naive(features, labels, 0.25, 32.0)
        assert torch.allclose(circle_loss(features, labels, gamma=32.0), expected, rtol=1e-12)


@pytest.mark.parametrize("labels", [[0, 0, 0, 0], [0, 1, 2, 3], [0, 1], [0]])
def test_without_any_pair_the_loss_is_zero_with_a_graph_and_no_gradient(labels):
    """A batch drawn badly must neither stop the training nor poison it: 0 * inf and inf - inf are NaN."""
    features = some_features(n=len(labels), dtype=torch.float32)[0].requires_grad_()
    loss = circle_loss(features, torch.tensor(labels))
    loss.backward()
    assert loss.item() == 0 and torch.equal(features.grad, torch.zeros_like(features))


@pytest.mark.parametrize("gamma", [1e-3, 256.0, 1e4, 1e6])
def test_neither_value_nor_gradient_overflows(gamma):
    """exp(gamma) alone would from gamma = 89 on."""
    features, labels = some_features(dtype=torch.float32)
    features = torch.cat((features, features[:2]))       # equal vectors, in the same class
    labels = torch.cat((labels, labels[:2]))
    features.requires_grad_()
    loss = circle_loss(features, labels, gamma=gamma)
    loss.backward()
    assert loss.isfinite() and features.grad.isfinite().all() and features.grad.abs().max() > 0


def test_solved_pairs_exert_no_pull():
    """Equal within a class, and s_n = -1/2 < -m between, which has weight 0; at s_p = 1 a cosine is flat."""
    features = at_angles(0, 0, 120, 120).requires_grad_()
    circle_loss(features, torch.tensor([0, 0, 1, 1])).backward()
    assert features.grad.abs().max() < 1e-6


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_features_are_compared_in_fp32(autocast):
    """In bf16 a cosine has three digits; times gamma that is noise. Only equality to the bit is sure."""
    features, labels = some_features(n=16, d=32)
    features = features.bfloat16()
    expected = circle_loss(features.float(), labels)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = circle_loss(features, labels)
        assert torch.equal(circle_loss(features.float(), labels), expected)
    assert loss.dtype == torch.float32 and torch.equal(loss, expected)


# ----------------------------------------------------------------------------------------- at any batch size

@functools.cache
def features_and_naive_gradient(dtype, classes):
    """Features and labels; value and gradient by autograd through the naive loops, in fp64."""
    features, labels = some_features(n=53, d=6, classes=classes, dtype=dtype)
    double = features.clone().double().requires_grad_()
    loss = naive(double, labels, 0.25, 32.0)
    gradient, = torch.autograd.grad(loss, double)
    return features, labels, loss.detach(), gradient


@pytest.mark.parametrize("dtype, error, of_gradient", [(torch.float32, 1e-6, 4e-6),
                                                       (torch.float64, 1e-12, 1e-12)])
@pytest.mark.parametrize("classes", [2, 7, 40])
def test_strips_give_the_value_and_the_gradient_of_the_naive_loops(dtype, error, of_gradient, classes):
    """53 is no multiple of 5, and of 40 classes some rows have no positive. Gradients are in units of the
    largest. In fp32 they agree to 4e-6, not to 1e-6: a matrix of all pairs is 1e-6 to 2e-6 off itself."""
    features, labels, expected, gradient = features_and_naive_gradient(dtype, classes)
    x = features.clone().requires_grad_()
    value = circle_loss(x, labels)
    value.backward()
    assert torch.allclose(value.double(), expected, rtol=error, atol=0)
    assert (x.grad - gradient).abs().max() < of_gradient * gradient.abs().max()


def test_no_tensor_of_all_pairs_is_ever_made(strip):
    """The point of strips. The largest tensor of a step on 300 rows in strips of 5: the features, 300 x 8.
    One strip for each class of 150 has 150 x 150 cosines to its positives, and as many to its negatives."""
    x, labels = some_features(n=300, d=8, dtype=torch.float32)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            kwargs = kwargs or {}
            result = function(*args, **kwargs)
            for tensor in torch.utils._pytree.tree_leaves(result):
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return result
    with Watch():
        circle_loss(x.requires_grad_(), labels).backward()
    assert largest == {256: 150 * 150, 5: 300 * 8}[strip]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_it_is_the_same(backend):
    """The sizes of the classes are known at run time alone, so a compiler steps out of the graph for it."""
    x, labels = some_features(n=12, d=5)
    a = x.clone().requires_grad_()
    b = x.clone().requires_grad_()
    torch._dynamo.reset()
    torch.compile(lambda x: circle_loss(2 * x, labels), backend=backend)(a).backward()
    circle_loss(2 * b, labels).backward()
    assert torch.allclose(a.grad, b.grad, rtol=1e-10, atol=1e-14)


def test_where_no_gradient_is_needed_none_is_computed(monkeypatch):
    """The three products with the features are two thirds of the work."""
    x, labels = some_features()
    whole = circle_loss(x.clone().requires_grad_(), labels).item()
    monkeypatch.setattr(torch.Tensor, "addmm_", None)                       # every gradient goes through it
    assert circle_loss(x, labels).item() == whole
    with pytest.raises(TypeError):
        circle_loss(x.requires_grad_(), labels)


def test_what_does_not_fit_is_named():
    x, labels = some_features()
    for wrong in ((x, labels[1:]), (x[0], labels)):
        with pytest.raises(ValueError, match="should be"):
            circle_loss(*wrong)


# -------------------------------------------------------------------------------------------------- retention

def test_forgetting_is_the_divergence_from_the_base():
    """KL(base || model), not the reverse, and a mean over positions, not over positions and vocabulary."""
    base, new = torch.randn(2, 7, 11, generator=torch.Generator().manual_seed(0))
    expected = torch.distributions.kl_divergence(torch.distributions.Categorical(logits=base),
                                                 torch.distributions.Categorical(logits=new)).mean()
    assert torch.allclose(forgetting(new, base), expected, rtol=1e-5) and expected > 0.1
    assert not torch.allclose(forgetting(base, new), expected, rtol=1e-2)
    assert torch.allclose(forgetting(new + 3, base - 5), expected, rtol=1e-4)        # logits have no own zero
    assert forgetting(new.bfloat16(), base.bfloat16()).dtype == torch.float32


def test_forgetting_is_least_at_the_base():
    base = torch.randn(7, 11, generator=torch.Generator().manual_seed(0))
    new = base.clone().requires_grad_()
    loss = forgetting(new, base)
    loss.backward()
    assert abs(loss.item()) < 1e-6 and new.grad.abs().max() < 1e-6


def test_drift_of_a_worked_example():
    """Moved by (0, 1) and (1, 0): 1 + 1; the base lies (0, 0) and (2, 2) from the centre: 8."""
    base = torch.tensor([[1.0, 1], [3, 3]])
    centre = torch.tensor([1.0, 1])
    hidden = torch.tensor([[1.0, 2], [4, 3]])
    assert drift(hidden, base, centre).item() == 0.25 and drift(base, base, centre).item() == 0
    shifted = drift(10 * hidden + 5, 10 * base + 5, 10 * centre + 5)
    assert shifted.item() == pytest.approx(0.25)                             # no unit, no origin of its own


# -------------------------------------------------------------------------------------------------- objective

@pytest.mark.parametrize("keep, hold", [(10.0, 2.0), (10.0, 0.0), (0.0, 2.0), (0.0, 0.0)])
def test_the_objective_is_the_circle_loss_and_four_terms_of_retention(keep, hold, model, run, parts):
    """Each term by itself, one prompt and one text at a time; packing must not mix the texts."""
    s = dataclasses.replace(run.s, keep=keep, hold=hold, still=3.0)
    base = copy.deepcopy(model)
    model.layers[0].mlp.up_proj.weight.data *= 1.3
    prompts = [run.chat.prompt(e.prompt) for e in parts.seemingly[:3] + parts.toxic[:3]]
    prompts = prompts[::2] + prompts[1::2]
    labels = torch.tensor([0, 0, 1, 0, 1, 1])                   # of these, not of the first half, are held
    sequences = run.exchanges(parts.general[:5], 128)
    tokens, targets = collate(sequences, "cpu")
    mean = last_states(base, prompts, s.layer).mean(0).detach()
    loss = refinement_loss(model, base, prompts, labels, tokens, targets, mean, s)

    h = torch.stack([model(torch.tensor([ids]), upto=s.layer)[0, -1] for ids in prompts])
    circle = circle_loss(h, labels, margin=s.margin, gamma=s.gamma)
    h_base = torch.stack([base(torch.tensor([ids]), upto=s.layer)[0, -1] for ids in prompts])
    harmless = [0, 1, 3]
    held = sum((h[i] - h_base[i]).square().sum() for i in harmless)
    held = held / sum((h_base[i] - mean).square().sum() for i in harmless)
    toxic = [2, 4, 5]
    before = [h_base[i].norm() for i in toxic]
    after = [h[i].norm() for i in toxic]
    grown = sum((a - b).square() for a, b in zip(after, before)) / sum(b.square() for b in before)
    moved = 0
    size = 0
    divergence = 0
    count = 0
    for ids, _ in sequences:
        text = torch.tensor([ids[:-1]])
        new = model(text, upto=s.layer)
        old = base(text, upto=s.layer)
        moved += (new - old).square().sum()
        size += (old - mean).square().sum()
        divergence += len(ids[:-1]) * forgetting(model(text)[0], base(text)[0])
        count += len(ids[:-1])
    expected = circle + hold * (held + grown) + 3.0 * moved / size + keep * divergence / count
    assert torch.allclose(loss, expected, rtol=1e-5)
    # each term is seen
    assert held > 0.01 and grown > 0.001 and moved / size > 0.003 and divergence / count > 1e-4


def test_at_the_base_the_objective_is_the_circle_loss_alone(model, run, parts):
    assert run.s.hold > 0 and run.s.still > 0 and run.s.keep > 0
    prompts = [run.chat.prompt(e.prompt) for e in parts.seemingly[:3] + parts.toxic[:3]]
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    tokens, targets = collate(run.exchanges(parts.general[:5], 128), "cpu")
    loss = refinement_loss(model, model, prompts, labels, tokens, targets, torch.zeros(16), run.s)
    alone = circle_loss(last_states(model, prompts, run.s.layer), labels)
    assert torch.allclose(loss, alone, rtol=1e-5)
