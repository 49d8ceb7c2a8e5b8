"""Contrastive refinement: the losses of the stage that the paper adds before safety tuning.

A refusal taught on a toxic prompt x moves every other prompt x' in proportion to their kernel K(x', x). With
all parameters after block l frozen, the paper bounds that kernel by a bilinear similarity of the states at
block l (Proposition 1),

    ||K(x', x)||_F  <=  c_l  h_x'^T Q_l h_x  +  Delta,

so refinement makes the h of toxic and of seemingly toxic prompts dissimilar before any refusal is taught.
The pull within a class and the push between classes is the Circle loss (Sun et al. 2020); two retention
terms keep the model what it was otherwise. Everything here is a pure function of tensors.

Read `train.py` next.
"""
import torch
import torch.nn.functional as F


def circle_loss(features, labels, margin=0.25, gamma=32.0):
    """The Circle loss of features (N, d) with integer labels (N,), a scalar (Sun et al. 2020).

    Every row is an anchor once. With s_p its cosine similarities to the others of its class (positives) and
    s_n those to the other classes (negatives), its loss is

        log(1 + sum_n exp(gamma a_n (s_n - m)) * sum_p exp(-gamma a_p (s_p - (1 - m))))
        a_p = [1 + m - s_p]_+     a_n = [s_n + m]_+     both constants for the gradient

    so the loss wants s_p > 1 - m and s_n < m, and pulls hardest at the pairs farthest from it. Returned is
    the mean over the anchors that have a positive and a negative; a zero with a graph when there are none.
    Computed in fp32, or in fp64 for fp64 features, whatever the autocast.

    The value may rise while the classes part: for s_n > -m, a_n (s_n - m) = s_n^2 - m^2 has its minimum at
    0. Watch the similarities.
    """
    x = features if features.dtype == torch.float64 else features.float()
    with torch.autocast(x.device.type, enabled=False):
        x = F.normalize(x, dim=1)
        s = x @ x.T                                                            # (N, N) cosines
        same = labels[:, None] == labels[None, :]
        positive = same & ~torch.eye(len(x), dtype=torch.bool, device=x.device)  # not itself
        a_p, a_n = (1 + margin - s.detach()).relu(), (s.detach() + margin).relu()
        # the most negative finite number, not -inf: a row without positives then has no inf - inf anywhere
        nothing = torch.finfo(s.dtype).min
        l_p = (-gamma * a_p * (s - (1 - margin))).masked_fill(~positive, nothing)
        l_n = (gamma * a_n * (s - margin)).masked_fill(same, nothing)
        log_sums = l_p.logsumexp(1) + l_n.logsumexp(1)                         # (N,)
        # log(1 + e^x) to the last digit; F.softplus returns x from x = 20 on
        loss = torch.logaddexp(log_sums, torch.zeros_like(log_sums))
        counts = positive.any(1) & ~same.all(1)
        return (loss * counts).sum() / counts.sum().clamp(min=1)


def forgetting(logits, base_logits):
    """KL(base || model) of the next token, mean over positions (n, V) each: retention of what the model SAYS.

    Unlike a likelihood of some text it has nothing to teach, only something to keep.
    """
    base, new = base_logits.float().log_softmax(-1), logits.float().log_softmax(-1)
    return F.kl_div(new, base, log_target=True, reduction="sum") / len(base)


def drift(hidden, base_hidden, centre):
    """||h - h_base||^2 over positions (n, d), relative to ||h_base - centre||^2: retention of states."""
    return (hidden - base_hidden).square().sum() / (base_hidden - centre).square().sum()
