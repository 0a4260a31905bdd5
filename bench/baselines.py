"""What the fused operators are measured against, frozen.

`published_*` is the form that the papers' codes have: masks of −1000, probabilities before logarithms, N×N matrices.
`plain_*` is the best plain PyTorch that we can write: log-odds, sums instead of large matrices. Both give the value of the
operator with reduction "mean" (tests/test_baselines.py), each for student [B, C, *S] and teacher [B, C, *S]; attention maps, means
and similarities by class and maxima are of the student alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

MODES = {1: "linear", 2: "bilinear", 3: "trilinear"}


def upsampled(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    if student.shape[2:] == teacher.shape[2:]:
        return student
    return F.interpolate(student, size=teacher.shape[2:], mode=MODES[student.dim() - 2], align_corners=False)


def published_decoupled_kl(
    student: torch.Tensor, teacher: torch.Tensor, target: torch.Tensor, temperature: float = 4.0
) -> torch.Tensor:
    """Every pixel as a sample of the image-classification code: masks, merged probabilities, −1000 on the label."""
    student = upsampled(student, teacher)
    s, t = (x.movedim(1, -1).reshape(-1, x.shape[1]) / temperature for x in (student, teacher))
    own = torch.zeros_like(s).scatter_(1, target.reshape(-1, 1), 1)
    other = 1 - own
    p_s, p_t = F.softmax(s, 1), F.softmax(t, 1)
    merged_s, merged_t = (torch.stack([(p * own).sum(1), (p * other).sum(1)], 1) for p in (p_s, p_t))
    target_part = F.kl_div(merged_s.log(), merged_t, reduction="sum")
    nontarget_part = F.kl_div(F.log_softmax(s - 1000 * own, 1), F.softmax(t - 1000 * own, 1), reduction="sum")
    return (target_part + nontarget_part) * temperature**2 / target.numel()


def plain_decoupled_kl(
    student: torch.Tensor, teacher: torch.Tensor, target: torch.Tensor, temperature: float = 4.0
) -> torch.Tensor:
    """Log-odds and logsumexp in the layout of the maps."""
    s, t = upsampled(student, teacher) / temperature, teacher / temperature
    index = target.unsqueeze(1)
    own = torch.arange(s.shape[1], device=s.device).view(-1, *[1] * (s.dim() - 2)) == index
    log_sum_s, log_sum_t = (x.masked_fill(own, -torch.inf).logsumexp(1, keepdim=True) for x in (s, t))
    d_s, d_t = s.gather(1, index) - log_sum_s, t.gather(1, index) - log_sum_t
    b = torch.sigmoid(d_t)
    target_part = b * (F.logsigmoid(d_t) - F.logsigmoid(d_s)) + (1 - b) * (F.logsigmoid(-d_t) - F.logsigmoid(-d_s))
    log_t = t - log_sum_t
    nontarget_part = (log_t.exp() * (log_t - (s - log_sum_s))).masked_fill(own, 0).sum(1, keepdim=True)
    return (target_part + nontarget_part).mean() * temperature**2


def published_class_kl(student: torch.Tensor, teacher: torch.Tensor, temperature: float = 4.0) -> torch.Tensor:
    s = F.log_softmax(upsampled(student, teacher) / temperature, 1)
    t = F.softmax(teacher / temperature, 1)
    return F.kl_div(s, t, reduction="none").sum(1).mean() * temperature**2


def plain_class_kl(student: torch.Tensor, teacher: torch.Tensor, temperature: float = 4.0) -> torch.Tensor:
    s = F.log_softmax(upsampled(student, teacher) / temperature, 1)
    t = F.log_softmax(teacher / temperature, 1)
    return (t.exp() * (t - s)).sum() * (temperature**2 * t.shape[1] / t.numel())


def published_channel_relation(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    s, t = (F.normalize(x.flatten(2), dim=2) for x in (student, teacher))
    return F.mse_loss(s @ s.transpose(1, 2), t @ t.transpose(1, 2))


def plain_channel_relation(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """One Gram matrix each; its diagonal has the norms."""

    def relation(x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(2)
        gram = torch.bmm(x, x.transpose(1, 2))
        norm = gram.diagonal(dim1=1, dim2=2).sqrt().clamp_min(1e-12)
        return gram / (norm.unsqueeze(1) * norm.unsqueeze(2))

    return F.mse_loss(relation(student), relation(teacher))


def published_pixel_relation(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Both N×N matrices."""
    s, t = (F.normalize(x.flatten(2), dim=1) for x in (student, teacher))
    return F.mse_loss(s.transpose(1, 2) @ s, t.transpose(1, 2) @ t)


def plain_pixel_relation(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """The C×C identity: ‖SᵀS − TᵀT‖² = ½(⟨AAᵀ, PPᵀ⟩ + tr((PAᵀ)²)), A = S − T, P = S + T."""
    s, t = (F.normalize(x.flatten(2), dim=1) for x in (student, teacher))
    a, p = s - t, s + t
    aa, pp, pa = a @ a.transpose(1, 2), p @ p.transpose(1, 2), p @ a.transpose(1, 2)
    squared = 0.5 * ((aa * pp).sum((1, 2)) + (pa * pa.transpose(1, 2)).sum((1, 2)))
    return squared.mean() / s.shape[2] ** 2


def published_pixel_relation_kl(student: torch.Tensor, teacher: torch.Tensor, temperature: float = 0.1) -> torch.Tensor:
    """Both N×N matrices through softmax."""
    s, t = (F.normalize(x.flatten(2), dim=1) for x in (student, teacher))
    s, t = s.transpose(1, 2) @ s / temperature, t.transpose(1, 2) @ t / temperature
    return F.kl_div(F.log_softmax(s, 2), F.softmax(t, 2), reduction="none").sum(2).mean()


class RowsOfPixels(torch.autograd.Function):
    """512 whole rows of both matrices at a time: value and gradient out of one softmax each, nothing of them kept."""

    @staticmethod
    def forward(ctx, s: torch.Tensor, t: torch.Tensor, temperature: float) -> torch.Tensor:
        value, as_columns, as_rows = s.new_zeros(()), torch.zeros_like(s), []
        for first in range(0, s.shape[2], 512):
            rows_s, rows_t = s[:, :, first : first + 512], t[:, :, first : first + 512]
            log_s = F.log_softmax(rows_s.transpose(1, 2) @ s / temperature, 2)
            log_t = F.log_softmax(rows_t.transpose(1, 2) @ t / temperature, 2)
            p_t = log_t.exp()
            value = value + (p_t * (log_t - log_s)).sum()
            difference = log_s.exp() - p_t
            as_columns = as_columns + rows_s @ difference
            as_rows.append(s @ difference.transpose(1, 2))
        scale = 1 / (s.shape[0] * s.shape[2])
        ctx.save_for_backward((as_columns + torch.cat(as_rows, 2)) * (scale / temperature))
        return value * scale

    @staticmethod
    def backward(ctx, v_value: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return v_value * ctx.saved_tensors[0], None, None


def plain_pixel_relation_kl(student: torch.Tensor, teacher: torch.Tensor, temperature: float = 0.1) -> torch.Tensor:
    s, t = (F.normalize(x.flatten(2), dim=1) for x in (student, teacher))
    return RowsOfPixels.apply(s, t, temperature)


def published_standardised_mse(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Both networks standardised, channel by channel."""

    def standardised(x: torch.Tensor) -> torch.Tensor:
        x = x.transpose(0, 1).flatten(1)
        return (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-6)

    return F.mse_loss(standardised(student), standardised(teacher))


def plain_standardised_mse(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """From variances and the covariance, so that nothing but the centred teacher is made of every pixel."""
    over = [0, *range(2, student.dim())]
    number = student.numel() // student.shape[1]
    variance_s = student.var(over)
    variance_t, mean_t = torch.var_mean(teacher, over, keepdim=True)
    covariance = (student * (teacher - mean_t)).sum(over) / (number - 1)
    a, b = variance_s.sqrt() + 1e-6, variance_t.flatten().sqrt() + 1e-6
    value = variance_s / a.square() + variance_t.flatten() / b.square() - 2 * covariance / (a * b)
    return value.mean() * ((number - 1) / number)


def published_attention_map(x: torch.Tensor) -> torch.Tensor:
    """Flat, with a mean over channels, which the norm takes out again."""
    return F.normalize(x.pow(2).mean(1).flatten(1)).view(x.shape[0], *x.shape[2:])


def plain_attention_map(x: torch.Tensor) -> torch.Tensor:
    """A product of every pixel's channels with themselves is one pass, where a square and its sum are two."""
    energy = (x * x).sum(1)
    return energy / energy.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, *[1] * (x.dim() - 2))


def published_class_means(x: torch.Tensor, target: torch.Tensor, classes: int) -> torch.Tensor:
    """For every class a mask as large as the features."""
    dims = tuple(range(2, x.dim()))
    means = []
    for c in range(classes):
        mask = (target.unsqueeze(1).expand_as(x) == c).to(x.dtype)
        means.append((mask * x).sum(dims) / mask.sum(dims).clamp(min=1))
    return torch.stack(means, 1)


def indicator_of(target: torch.Tensor, classes: int, dtype: torch.dtype) -> torch.Tensor:
    """[B, N, K]: which pixel is of which class."""
    return (target.flatten(1).unsqueeze(2) == torch.arange(classes, device=target.device)).to(dtype)


def plain_class_means(x: torch.Tensor, target: torch.Tensor, classes: int) -> torch.Tensor:
    """One product with the labels' indicators."""
    indicator = indicator_of(target, classes, x.dtype)
    return (x.flatten(2) @ indicator).mT / indicator.sum(1).clamp(min=1).unsqueeze(2)


def published_importance_and_affinity(
    student: torch.Tensor, teacher: torch.Tensor, target: torch.Tensor, classes: int
) -> torch.Tensor:
    """The sum of both numbers: maps of fourth powers, masks as large as the features, and a contrast for every two classes."""
    map_s, map_t = (F.normalize(x.pow(4).mean(1).flatten(1)) for x in (student, teacher))
    importance = (map_s - map_t).pow(2).sum(1).mean()
    of_s, of_t = (published_class_means(x, target, classes).unbind(1) for x in (student, teacher))
    contrasts = importance.new_zeros(student.shape[0])
    for a in range(classes - 1):
        for b in range(a + 1, classes):
            contrast = F.cosine_similarity(of_s[a], of_s[b], 1) - F.cosine_similarity(of_t[a], of_t[b], 1)
            contrasts = contrasts + contrast.pow(2)
    there = torch.stack([(target == c).flatten(1).any(1) for c in range(classes)], 1).sum(1)
    pairs = there * (there - 1) / 2
    return importance + (contrasts / pairs.clamp(min=1)).sum() / pairs.count_nonzero().clamp(min=1)


def plain_importance_and_affinity(
    student: torch.Tensor, teacher: torch.Tensor, target: torch.Tensor, classes: int
) -> torch.Tensor:
    """Squares of squares, and one product with the labels' indicators: cosines of sums are those of means."""
    indicator = indicator_of(target, classes, student.dtype)

    def map_and_cosines(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        square, sums = x * x, F.normalize(x.flatten(2) @ indicator, dim=1)
        energy = (square * square).sum(1).flatten(1)
        return energy / energy.norm(dim=1, keepdim=True).clamp_min(1e-12), sums.mT @ sums

    (map_s, cosines_s), (map_t, cosines_t) = map_and_cosines(student), map_and_cosines(teacher)
    there = indicator.any(1).sum(1)
    pairs = there * (there - 1)
    contrasts = (cosines_s - cosines_t).square().sum((1, 2)) / pairs.clamp(min=1)
    importance = F.mse_loss(map_s, map_t, reduction="sum") / student.shape[0]
    return importance + contrasts.sum() / pairs.count_nonzero().clamp(min=1)


def published_class_similarity(x: torch.Tensor, target: torch.Tensor, classes: int) -> torch.Tensor:
    """For every class masks and centres as large as the features."""
    dims = tuple(range(2, x.dim()))
    label, centre = target.unsqueeze(1).expand_as(x), x
    for c in range(classes):
        mask = (label == c).to(x.dtype)
        mean = (mask * x).sum(dims) / (mask.sum(dims) + 1e-6)
        centre = (1 - mask) * centre + mask * mean[(..., *[None] * len(dims))]
    return F.cosine_similarity(x, centre, 1)


def plain_class_similarity(x: torch.Tensor, target: torch.Tensor, classes: int) -> torch.Tensor:
    """Products of every pixel with every prototype, and its own class's out of them."""
    indicator, features, own = indicator_of(target, classes, x.dtype), x.flatten(2), target.flatten(1)
    prototypes = features @ indicator / (indicator.sum(1) + 1e-6).unsqueeze(1)  # [B, C, K]
    products = (prototypes.mT @ features).gather(1, own.unsqueeze(1)).squeeze(1)
    norm_p, norm_x = (y.square().sum(1).clamp_min(1e-16).sqrt() for y in (prototypes, features))
    return (products / (norm_p.gather(1, own) * norm_x)).view(target.shape)


MAX_POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


def published_max_pool(x: torch.Tensor, window: int = 2) -> torch.Tensor:
    """As the codes of SKD pool their features."""
    return MAX_POOL[x.dim() - 2](x, window, ceil_mode=True)


def plain_max_pool(x: torch.Tensor, window: int = 2) -> torch.Tensor:
    """The larger of neighbours, axis by axis, for whole windows of two; autograd halves the gradient of equal values."""
    assert window == 2
    for axis in range(x.dim() - 1, 1, -1):
        x = torch.maximum(*x.unflatten(axis, (-1, 2)).unbind(axis + 1))
    return x


AVERAGE_POOL = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


def published_average_pool(x: torch.Tensor, window: int = 2) -> torch.Tensor:
    """As the code of DSD pools its logits."""
    return AVERAGE_POOL[x.dim() - 2](x, window, ceil_mode=True, count_include_pad=False)


def plain_average_pool(x: torch.Tensor, window: int = 2) -> torch.Tensor:
    """The sum of neighbours, axis by axis, for whole windows of two."""
    assert window == 2
    axes = range(2, x.dim())
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    for axis in axes:
        x = torch.add(*x.unflatten(axis, (-1, 2)).unbind(axis + 1))
    return x / 2 ** len(axes)
