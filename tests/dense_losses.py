"""The losses of the papers as anyone would write them: dense, in plain autograd. `p` are the
parameters by name, `o` the options, `s` the setting; `counted` is `silent` after this batch.
"""

import torch
import torch.nn.functional as F

# B batch, D d_in, M d_sae


def fvu(x, out, s):
    return (out - x).pow(2).sum(-1).mean() / s.variance


def keep_largest(pre, k):
    """ReLU of the k largest of each row, 0 elsewhere."""
    kth = pre.topk(k).values[:, -1:]
    return torch.where(pre >= kth, pre, torch.zeros_like(pre)).clamp_min(0)


def auxk(x, out, p, o, counted):
    """Gao et al. 2024, A.2: ‖e - e_hat‖² / ‖e - mean(e)‖²."""
    dead = counted > o.dead_after_tokens
    if not dead.any():
        return torch.zeros((), dtype=x.dtype)
    pre = ((x - p["b_dec"]) @ p["W_enc"].T + p["b_enc"]).masked_fill(~dead, -torch.inf)
    k = min(o.auxk or -(-x.shape[1] // 2), int(dead.sum()))
    error = (x - out).detach()
    guess = keep_largest(pre, k) @ p["W_dec"]
    return (guess - error).pow(2).sum() / (error - error.mean(0)).pow(2).sum()


def topk(x, p, o, s, step, counted):
    pre = (x - p["b_dec"]) @ p["W_enc"].T + p["b_enc"]
    out = keep_largest(pre, o.k_at(step)) @ p["W_dec"] + p["b_dec"]
    loss = fvu(x, out, s) + o.auxk_coefficient * auxk(x, out, p, o, counted)
    if o.multi_k:
        wide = keep_largest(pre, o.multi_k) @ p["W_dec"] + p["b_dec"]
        loss = loss + o.multi_coefficient * fvu(x, wide, s)
    return loss


def matryoshka(x, p, o, s, step, counted):
    """BatchTopK is the case of one group."""
    acts = F.relu((x - p["b_dec"]) @ p["W_enc"].T + p["b_enc"])
    count = o.k_at(step) * len(x)
    smallest = acts.flatten().topk(count).values[-1]
    acts = acts * (acts >= smallest)
    sizes = o.group_sizes() if hasattr(o, "group_sizes") else [o.d_sae]
    weights = getattr(o, "group_weights", None) or [1 / len(sizes)] * len(sizes)
    loss, end = 0, 0
    for size, weight in zip(sizes, weights, strict=True):
        end += size
        out = acts[:, :end] @ p["W_dec"][:end] + p["b_dec"]
        loss = loss + weight * fvu(x, out, s)
    return loss + o.auxk_coefficient * auxk(x, out, p, o, counted)


def warmed(o, s, step):
    return min(1.0, step / max(o.sparsity_warmup * s.steps, 1))


def gated(x, p, o, s, step, _counted):
    """Rajamanoharan et al. 2024a, equation 8."""
    projected = (x - p["b_dec"]) @ p["W_enc"].T
    gate = projected + p["b_gate"]
    magnitude = projected * p["r_mag"].exp() + p["b_mag"]
    out = (F.relu(magnitude) * (gate > 0)) @ p["W_dec"] + p["b_dec"]
    frozen = F.relu(gate) @ p["W_dec"].detach() + p["b_dec"].detach()
    l1 = F.relu(gate).sum(-1).mean()
    return fvu(x, out, s) + o.l1_coefficient * warmed(o, s, step) * l1 + fvu(x, frozen, s)


def relu(x, p, o, s, step, _counted):
    """Conerly et al., April 2024."""
    acts = F.relu(x @ p["W_enc"].T + p["b_enc"])
    l1 = (acts * p["W_dec"].norm(dim=1)).sum(-1).mean()
    return fvu(x, acts @ p["W_dec"] + p["b_dec"], s) + o.l1_coefficient * warmed(o, s, step) * l1


def jumprelu(x, p, o, s, step, counted):
    """Rajamanoharan et al. 2024b. A straight-through gradient is written as a term of value 0 whose
    slope is the estimator's.
    """
    z = (x - p["b_dec"] if o.subtract_b_dec else x) @ p["W_enc"].T + p["b_enc"]
    threshold, width = p["threshold"], o.bandwidth
    on = (z > threshold).to(z.dtype)
    u = (z - threshold).detach() / width
    kernel = ((u > -0.5) & (u < 0.5)).to(z.dtype) / width
    moved = -(threshold - threshold.detach())
    if o.ste_to_input:
        moved = moved + (z - z.detach())
    acts = z * on + threshold.detach() * kernel * moved
    l0 = (on + kernel * moved).sum(-1).mean()
    penalty = (
        o.l0_coefficient * l0
        if o.target_l0 is None
        else o.target_coefficient * (l0 / o.target_l0 - 1) ** 2
    )
    loss = fvu(x, acts @ p["W_dec"] + p["b_dec"], s) + warmed(o, s, step) * penalty
    dead = counted > o.dead_after_tokens
    short = F.relu(threshold - z) * p["W_dec"].norm(dim=1) * dead
    return loss + o.pre_act_coefficient * short.sum(-1).mean()


DENSE = {
    "topk": topk,
    "batchtopk": matryoshka,
    "matryoshka": matryoshka,
    "gated": gated,
    "jumprelu": jumprelu,
    "relu": relu,
}
