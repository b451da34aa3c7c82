"""mergekit 0.1.5's methods with mergekit's roundings: the same numbers, bit for bit, on a CPU.

The formulas are those of methods.py, geometry.py, sparsify.py, consensus.py and fusion.py. What differs is arithmetic:
everything is computed in the dtype that the inputs have, so that in bf16 every operation and every weight is rounded;
sums and sorts are torch's, whose order and choice among equals depend on its version and number of threads; and random
bits come from one torch generator, in the order in which tensors and models take them. Written from mergekit's
behaviour; an order of operations that looks arbitrary is one that shows in the last bit. Touches no files.

B is the base, M_i the models, delta_i = M_i - B the task vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .geometry import PARALLEL_COSINE

PIECE = 1 << 20  # elements; slerp adds up norms and dot products over runs of that length
SAMPLE = 1_000_000  # of a larger tensor arcee_fusion looks at so many elements, drawn with replacement


@dataclass(frozen=True)
class Operands:
    """One tensor of every model, in the dtype of the computation and the tensor's own shape.

    models: without the base, where there is one. parameters: as in `tensor_merge.Subject`.
    """

    base: Tensor | None
    models: list[Tensor]
    parameters: dict[str, Any]
    generator: torch.Generator

    @property
    def origin(self) -> Tensor:
        """The base of a method that requires one."""
        assert self.base is not None
        return self.base

    @property
    def deltas(self) -> Tensor:
        """[models, *shape]"""
        return torch.stack([model - self.origin for model in self.models])

    def of_models(self, parameter: str, dtype: torch.dtype) -> Tensor:
        """A parameter that each model has, rounded to a dtype, [models]."""
        return torch.tensor(self.parameters[parameter], dtype=dtype)


Formula = Callable[[Operands], Tensor]


def linear(x: Operands) -> Tensor:
    """sum_i w_i M_i, divided by sum_i w_i: fused multiplications and additions in float32, one rounding."""
    weights = x.of_models("weight", torch.float32)
    total = torch.zeros_like(x.models[0], dtype=torch.float32)
    for model, weight in zip(x.models, weights):
        total.addcmul_(model, weight.view(*[1] * model.ndim))
    if x.parameters["normalize"]:
        total /= weights.view(1, -1).sum(dim=1)
    return total.to(x.models[0].dtype)


def passthrough(x: Operands) -> Tensor:
    """scale M"""
    (scale,) = x.parameters["scale"]
    return x.models[0] if scale == 1 else x.models[0] * scale


def nearswap(x: Operands) -> Tensor:
    """w M + (1 - w) B with w = t / max(|M - B|, 1e-6) within [0, 1]"""
    near = (x.parameters["t"] / (x.origin - x.models[0]).abs().clamp(min=1e-6)).clamp(0, 1)
    return near * x.models[0] + (1 - near) * x.origin


# on task vectors


def on_task_vectors(x: Operands, thin: Callable[[Operands, int, Tensor], Tensor] | None, consensus: bool) -> Tensor:
    """B + lambda sum_i w_i tau_i, divided by the sum of weights; with `consensus` only of those whose sign is elected.

    The elected sign is that of the weighted sum, + where it is 0; then the divisor is of each element by itself.

    Args:
        thin: makes tau_i of (the operands, i, delta_i); None: tau_i = delta_i.
    """
    deltas = x.deltas
    if thin is not None:
        deltas = torch.stack([thin(x, number, delta) for number, delta in enumerate(deltas)])
    weights = x.of_models("weight", deltas.dtype).view(-1, *[1] * (deltas.ndim - 1))
    deltas = deltas * weights
    if consensus:
        elected = torch.where(deltas.sum(dim=0) >= 0, 1, -1).to(deltas.dtype)
        agreeing = deltas.sign() == elected
        merged, divisor = (deltas * agreeing).sum(dim=0), (weights * agreeing).sum(dim=0)
        divisor = divisor.masked_fill(divisor == 0, 1)
    else:
        merged, divisor = deltas.sum(dim=0), weights.sum(dim=0)
        divisor = divisor.masked_fill(divisor.abs() < 1e-8, 1)
    if x.parameters["normalize"]:
        merged = merged / divisor
    if x.parameters["lambda"] != 1:
        merged = merged * x.parameters["lambda"]
    return x.origin + merged


def masked(x: Operands, delta: Tensor, mask: Tensor) -> Tensor:
    """delta mask, times ||delta||_1 / ||delta mask||_1 if rescaled; norms under 1e-7 do not rescale."""
    kept = delta * mask
    if x.parameters["rescale"] == "none":
        return kept
    before, after = delta.abs().sum(), kept.abs().sum()
    return kept if before < 1e-7 or after < 1e-7 else kept * (before / after)


def trim(x: Operands, number: int, delta: Tensor) -> Tensor:
    """The int(density n) elements of largest magnitude, at least one; among equals as an unstable sort leaves them."""
    density = x.parameters["density"][number]
    if density >= 1:
        return delta
    if density <= 0 or not delta.numel():
        return torch.zeros_like(delta)
    order = torch.argsort(delta.abs().float().flatten(), descending=True)
    return masked(x, delta, _mask_of(order[: max(1, int(density * delta.numel()))], delta))


def trim_outliers(x: Operands, number: int, delta: Tensor) -> Tensor:
    """int(density n) elements: those below the int(gamma n) largest, or the least of all if there are not as many."""
    density, count = x.parameters["density"][number], delta.numel()
    if density >= 1:
        return delta
    kept = int(density * count)
    first = max(0, count - kept - int(x.parameters["gamma"][number] * count))
    order = torch.sort(delta.abs().float().flatten()).indices
    return masked(x, delta, _mask_of(order[first : first + kept], delta))


def _mask_of(kept: Tensor, like: Tensor) -> Tensor:
    mask = torch.zeros(like.numel(), dtype=like.dtype)
    mask[kept] = 1
    return mask.view(like.shape)


def dare(x: Operands, number: int, delta: Tensor) -> Tensor:
    """Each element with probability density."""
    density = x.parameters["density"][number]
    if density >= 1:
        return delta
    working = delta.to(_drawn_dtype(delta))
    mask = torch.bernoulli(torch.full_like(working, density), generator=x.generator)
    return masked(x, working, mask).to(delta.dtype)


def della(x: Operands, number: int, delta: Tensor) -> Tensor:
    """Each element with a probability that rises with its rank in its row, from density - epsilon to density + epsilon.

    Rows run along the second dimension, also where there is a third; ranks are rounded to the dtype.
    """
    density, epsilon = x.parameters["density"][number], x.parameters["epsilon"][number]
    if density >= 1:
        return delta
    if density <= 0:
        return torch.zeros_like(delta)
    rows = delta if delta.ndim > 1 else delta.unsqueeze(0)
    working = rows.to(_drawn_dtype(delta))
    ranks = rows.abs().argsort(dim=1).argsort(dim=1).to(working.dtype) + 1
    least, most = ranks.amin(dim=1, keepdim=True), ranks.amax(dim=1, keepdim=True)
    if rows.shape[1] == 1:
        raise ValueError("a row of one element has no ranks: mergekit 0.1.5 cannot draw from it either")
    probabilities = (density - epsilon) + ((ranks - least) / (most - least)).clamp(0, 1) * 2 * epsilon
    mask = torch.bernoulli(probabilities, generator=x.generator)
    return masked(x, working, mask).to(delta.dtype).view(delta.shape)


def _drawn_dtype(delta: Tensor) -> torch.dtype:
    """Torch draws no float16 on a CPU."""
    return torch.bfloat16 if delta.dtype == torch.bfloat16 else torch.float32


def sce(x: Operands) -> Tensor:
    """B + sum_i m_i w_i tau_i / sum_i m_i w_i: tau_i is delta_i where the models' variance is among the largest, w_i
    the mean of its squares, m_i whether its sign is that of the unweighted sum."""
    vectors, share = x.deltas, x.parameters["select_topk"]
    if share < 1:
        vectors = vectors * _selected(vectors, share)
    agreeing = vectors.sign() == torch.where(vectors.sum(dim=0) >= 0, 1, -1).to(vectors.dtype)
    energies = vectors.square().flatten(1).mean(dim=1)
    total = energies.sum().item()
    weights = torch.ones_like(energies) / len(energies) if abs(total) < 1e-6 else energies / total
    kept = weights.view(-1, *[1] * (vectors.ndim - 1)) * agreeing
    return x.origin + (vectors * kept).sum(dim=0) / kept.sum(dim=0).clamp(min=1e-6)


def _selected(vectors: Tensor, share: float) -> Tensor:
    variance = torch.var(vectors, dim=0, unbiased=False)
    count = int(torch.count_nonzero(variance) * share) if share > 0 else 0
    kept = torch.topk(variance.abs().view(-1), count).indices
    return _mask_of(kept, variance)


def ram(x: Operands, plus: bool) -> Tensor:
    """B + sum_i of delta_i where only model i changed the element, and of delta_i / k where k models changed it.

    Changed is what differs by more than epsilon. With `plus` the first kind times 1 + r rho_i, with rho_i = elements
    shared / elements of its own, within [0, alpha].
    """
    vectors = x.deltas.flatten(1)
    changed = vectors.abs() > x.parameters["epsilon"]
    times = changed.sum(dim=0, keepdim=True)
    shared, own = times > 1, times == 1
    vectors = vectors * changed
    alone = vectors * own
    if plus:
        counts = (changed & own).sum(dim=1).clamp(min=x.parameters["epsilon"])
        ratio = ((changed & shared).sum(dim=1) / counts).clamp(0, x.parameters["alpha"])
        alone = alone * (1 + x.parameters["r"] * ratio).unsqueeze(-1)
    merged = (alone + vectors * shared / times.clamp(min=1)).sum(dim=0, keepdim=True)
    return x.origin + merged.view(x.origin.shape)


def arcee_fusion(x: Operands) -> Tensor:
    """B + delta where |delta| KL(softmax M || softmax B) of the row is at least median + 1.5 (q3 - q1); in float32,
    whatever the inputs are, because of the mask's dtype."""
    base, (model,) = x.origin, x.models
    p, q = (torch.softmax(values, dim=-1) + 1e-8 for values in (model, base))
    scores = (model - base).abs() * (p * torch.log(p / q)).sum(dim=-1, keepdim=True)
    sample = scores.flatten()
    if sample.numel() > SAMPLE:
        sample = sample[torch.randint(sample.numel(), (SAMPLE,), generator=x.generator)]
    ordered = torch.sort(sample).values
    lower, median, upper = ordered[(torch.tensor([0.25, 0.5, 0.75]) * (len(ordered) - 1)).long()]
    return base + (model - base) * (scores >= median + 1.5 * (upper - lower)).float()


# on spheres


def slerp(x: Operands) -> Tensor:
    """(sin((1 - t) theta) B + sin(t theta) M) / sin theta, or on a line for |cos theta| > 0.9995, in float32."""
    a, b = x.origin.reshape(1, -1), x.models[0].reshape(1, -1)
    t = torch.tensor([[x.parameters["t"]]], dtype=torch.float32)
    if not a.numel():
        return x.origin
    pieces = [
        (u.float(), v.float(), lo) for u, v, lo in zip(a.split(PIECE, 1), b.split(PIECE, 1), range(0, a.numel(), PIECE))
    ]

    def length(parts: list[Tensor]) -> Tensor:
        norms = [torch.linalg.vector_norm(part, dim=1, keepdim=True) for part in parts]
        norm = torch.linalg.vector_norm(torch.stack(norms), dim=0)
        return torch.where(norm > 1e-8, norm, 1)

    norm_a, norm_b = length([u for u, _, _ in pieces]), length([v for _, v, _ in pieces])
    products = [((u / norm_a) * (v / norm_b)).sum(dim=1, keepdim=True) for u, v, _ in pieces]
    cosine = torch.stack(products).sum(dim=0).clamp(-1, 1)
    if cosine.abs() > PARALLEL_COSINE:
        share_a, share_b = 1 - t, t
    else:
        theta = torch.acos(cosine)
        share_a, share_b = (torch.sin(share * theta) / torch.sin(theta) for share in (1 - t, t))
    merged = torch.empty_like(a)
    for u, v, lo in pieces:
        merged[:, lo : lo + PIECE] = share_a * u + share_b * v
    return merged.view(x.origin.shape)


def nuslerp(x: Operands) -> Tensor:
    """Slerp of two models, or of task vectors on B, by t = w_1 / (w_0 + w_1): of all elements at once, along the last
    dimension, or along the first."""
    first, second = x.parameters["weight"]
    t = 0.5 if abs(first + second) < 1e-6 else second / (first + second)
    a, b = x.models if x.base is None else (model - x.base for model in x.models)
    if x.parameters["nuslerp_flatten"]:
        merged = _along_last(t, a.flatten(), b.flatten()).view(a.shape)
    elif x.parameters["nuslerp_row_wise"]:
        merged = _along_last(t, a.transpose(0, -1), b.transpose(0, -1)).transpose(0, -1)
    else:
        merged = _along_last(t, a, b)
    return merged if x.base is None else x.base + merged


def _along_last(t: float, a: Tensor, b: Tensor) -> Tensor:
    u, v = (y / torch.norm(y, dim=-1, keepdim=True).clamp(min=1e-7) for y in (a, b))
    cosine = (u * v).sum(dim=-1, keepdim=True).clamp(-1, 1)
    straight = 1 - cosine.square() <= 1e-16
    theta = torch.acos(torch.where(straight, 0, cosine))
    curve = (torch.sin((1 - t) * theta) * a + torch.sin(t * theta) * b) / torch.sin(theta)
    return torch.where(straight, (1 - t) * a + t * b, curve)


def multislerp(x: Operands) -> Tensor:
    """From the weighted mean direction m along the tangent sum_i w_i (u_i - <u_i, m> m), times sum_i w_i ||x_i||."""
    if len(x.models) == 1:
        return x.models[0]
    stack = torch.stack(x.models) if x.base is None else torch.stack(x.models) - x.base
    rows, epsilon = stack.flatten(1), x.parameters["eps"]
    weights = x.of_models("weight", stack.dtype)
    if x.parameters["normalize_weights"]:
        weights = weights / weights.sum()
    lengths = torch.norm(rows, dim=-1, keepdim=True)
    units = rows / (lengths + epsilon)
    shares = weights.unsqueeze(-1)
    mean = (units * shares).sum(0)
    size = torch.norm(mean)
    if size < epsilon:
        if len(x.models) > 2:
            raise ValueError("multislerp: the weighted unit vectors cancel, so there is no direction to go from")
        merged = stack[0] * weights[0] + stack[1] * weights[1]
        return merged if x.base is None else merged + x.base
    mean = mean / size
    tangent = ((units - (units * mean).sum(-1, keepdim=True) * mean) * shares).sum(0)
    angle = torch.norm(tangent) + epsilon
    direction = mean * torch.cos(angle) + tangent * (torch.sin(angle) / angle)
    merged = (direction * (lengths.squeeze(-1) * weights).sum()).view(stack.shape[1:])
    return merged if x.base is None else merged + x.base


def karcher(x: Operands) -> Tensor:
    """The Karcher mean of the unit vectors by fixed-point steps, times the mean length; vectors shorter than tol count
    for the length only. Lengths are float32, unit vectors and their cosines in the dtype."""
    if len(x.models) == 1:
        return x.models[0]
    tol, dtype = x.parameters["tol"], x.models[0].dtype
    share = 1.0 / len(x.models)
    lengths = [_length(model) for model in x.models]
    units = [(model / length).to(dtype) for model, length in zip(x.models, lengths) if length > tol]
    if not units:
        return sum((model * 0 for model in x.models[1:]), x.models[0] * 0)
    part = share / sum([share] * len(units))
    mean = _weighted(units, [part] * len(units))
    size = _length(mean)
    mean = units[0] if size < tol else (mean / size).to(dtype)
    for _ in range(int(x.parameters["max_iter"])):
        step = torch.zeros_like(mean)
        for unit in units:
            cosine = torch.dot(mean.flatten(), unit.flatten()).clamp(-1, 1)
            theta = torch.arccos(cosine)
            if theta >= tol:
                step += part * (theta / torch.sin(theta)) * (unit - cosine * mean)
        angle = _length(step)
        if angle < tol:
            break
        mean = (torch.cos(angle) * mean + torch.sin(angle) * (step / angle)).to(dtype)
        if (size := _length(mean)) > tol:
            mean = (mean / size).to(dtype)
    return sum(share * length for length in lengths) * mean


def _length(vector: Tensor) -> Tensor:
    return torch.linalg.vector_norm(vector.float())


def _weighted(vectors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    total = torch.zeros_like(vectors[0])
    for vector, weight in zip(vectors, weights):
        total += weight * vector
    return total


def model_stock(x: Operands) -> Tensor:
    """t mean_i M_i + (1 - t) B with t = N c / (1 + (N - 1) c), c the mean cosine of two task vectors: of the tensor, or
    of each row with `filter_wise`. B where the denominator vanishes."""
    by_row = x.parameters["filter_wise"]
    shape = (1, -1) if by_row and x.origin.ndim == 1 else x.origin.shape if by_row else (-1,)
    base, *models = (y.reshape(shape) for y in (x.origin, *x.models))
    deltas = [model - base for model in models]
    lengths = [torch.norm(delta, dim=-1) for delta in deltas]
    cosines = [
        ((deltas[i] * deltas[j]).sum(dim=-1) / (lengths[i] * lengths[j]).clamp(min=1e-6)).clamp(-1, 1)
        for i in range(len(deltas))
        for j in range(i + 1, len(deltas))
    ]
    cosine, count = torch.stack(cosines).mean(dim=0).unsqueeze(-1), len(models)
    below = 1 + (count - 1) * cosine
    vanishing = below.abs() < 1e-6
    t = (count * cosine / below.masked_fill(vanishing, 1)).masked_fill(vanishing, 0)
    average = sum(models[1:], 0 + models[0]) / count
    return (t * average + (1 - t) * base).view(x.origin.shape)


FORMULAS: dict[str, Formula] = {
    "linear": linear,
    "slerp": slerp,
    "nuslerp": nuslerp,
    "multislerp": multislerp,
    "karcher": karcher,
    "model_stock": model_stock,
    "task_arithmetic": partial(on_task_vectors, thin=None, consensus=False),
    "ties": partial(on_task_vectors, thin=trim, consensus=True),
    "dare_linear": partial(on_task_vectors, thin=dare, consensus=False),
    "dare_ties": partial(on_task_vectors, thin=dare, consensus=True),
    "breadcrumbs": partial(on_task_vectors, thin=trim_outliers, consensus=False),
    "breadcrumbs_ties": partial(on_task_vectors, thin=trim_outliers, consensus=True),
    "della": partial(on_task_vectors, thin=della, consensus=True),
    "della_linear": partial(on_task_vectors, thin=della, consensus=False),
    "sce": sce,
    "ram": partial(ram, plus=False),
    "ramplus_tl": partial(ram, plus=True),
    "nearswap": nearswap,
    "arcee_fusion": arcee_fusion,
    "passthrough": passthrough,
}
DRAWING = {"dare_linear", "dare_ties", "della", "della_linear", "arcee_fusion"}  # take from the generator
