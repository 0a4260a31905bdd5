"""The losses in the form that their papers' codes have, frozen: what `medkd_fast.losses` is measured against.

Whole affinity matrices, masks and copies of the features for every class, probabilities before their logarithm where the codes have
them. Each gives the value of its module with the default settings (tests/test_published_losses.py), for maps without ignored
pixels and labels of the maps' size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from baselines import published_channel_relation, published_class_kl, published_pixel_relation

Tensor = torch.Tensor


def cpkd(student: Tensor, teacher: Tensor) -> Tensor:
    return published_channel_relation(student, teacher) + published_pixel_relation(student, teacher)


def kd(student: Tensor, teacher: Tensor) -> Tensor:
    return published_class_kl(student, teacher, 4.0)


def dkd(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    return _dkd_per_pixel(student, teacher, target).mean()


def _dkd_per_pixel(student: Tensor, teacher: Tensor, target: Tensor, alpha: float = 1.0, beta: float = 8.0) -> Tensor:
    s, t = (x.movedim(1, -1).reshape(-1, x.shape[1]) / 4.0 for x in (student, teacher))
    own = torch.zeros_like(s).scatter_(1, target.reshape(-1, 1), 1)
    other = 1 - own
    p_s, p_t = F.softmax(s, 1), F.softmax(t, 1)
    merged_s, merged_t = (torch.stack([(p * own).sum(1), (p * other).sum(1)], 1) for p in (p_s, p_t))
    tckd = F.kl_div(merged_s.log(), merged_t, reduction="none").sum(1)
    nckd = F.kl_div(F.log_softmax(s - 1000 * own, 1), F.softmax(t - 1000 * own, 1), reduction="none").sum(1)
    return 16.0 * (alpha * tckd + beta * nckd)


def dmd(student: Tensor, teacher: Tensor, target: Tensor, feature: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """One scale: the projected feature learns the non-target classes, the logits the target class."""
    projected = torch.einsum("oc,bcyx->boyx", weight, feature) + bias.view(-1, 1, 1)
    projected = F.interpolate(projected, size=teacher.shape[2:], mode="bilinear", align_corners=False)
    nontarget = _dkd_per_pixel(projected, teacher, target, 0.0, 1.0).mean()
    return nontarget + _dkd_per_pixel(student, teacher, target, 1.0, 0.0).mean()


def cwd(student: Tensor, teacher: Tensor) -> Tensor:
    s, t = ((x.flatten(2) / 4.0).flatten(0, 1).softmax(1) for x in (student, teacher))
    return F.kl_div(s.log(), t, reduction="sum") * 16.0 / (student.shape[0] * student.shape[1])


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + 1e-8)


def _pearson(a: Tensor, b: Tensor) -> Tensor:
    return _cosine(a - a.mean(1).unsqueeze(1), b - b.mean(1).unsqueeze(1))


def dist(student: Tensor, teacher: Tensor) -> Tensor:
    s, t = (x.movedim(1, -1).reshape(-1, x.shape[1]).softmax(1) for x in (student, teacher))
    return (1 - _pearson(s, t).mean()) + (1 - _pearson(s.T, t.T).mean())


def sdd(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    """Image labels: of 21 regions each one a sample."""
    s, t = (torch.cat([F.adaptive_avg_pool2d(x, k).flatten(2) for k in (1, 2, 4)], 2) for x in (student, teacher))
    regions = s.shape[2]
    labels = target.unsqueeze(1).expand(-1, regions)
    value = _dkd_per_pixel(s, t, labels).reshape(-1, regions)
    right = t.argmax(1) == labels
    return (value * torch.where(right != right[:, :1], 2.0, 1.0)).sum() / value.numel()


def boundary_kd(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    label = target.unsqueeze(1).to(student.dtype)
    edge = F.max_pool2d(label, 3, 1, 1) != -F.max_pool2d(-label, 3, 1, 1)
    value = F.kl_div(F.log_softmax(student, 1), F.softmax(teacher, 1), reduction="none").sum(1, keepdim=True)
    return (value * edge).sum() / edge.sum()


def fitnet(student: Tensor, teacher: Tensor) -> Tensor:
    return ((student - teacher) ** 2).mean()


def _attention(x: Tensor, p: int) -> Tensor:
    return F.normalize(x.pow(p).mean(1).flatten(1))


def at(student: Tensor, teacher: Tensor) -> Tensor:
    return (_attention(student, 2) - _attention(teacher, 2)).pow(2).mean()


def skd(student: Tensor, teacher: Tensor) -> Tensor:
    s, t = (F.normalize(F.max_pool2d(x, 2, ceil_mode=True).flatten(2), dim=1) for x in (student, teacher))
    return ((s.mT @ s - t.mT @ t) ** 2).mean()


def sp(student: Tensor, teacher: Tensor) -> Tensor:
    s, t = (F.normalize(x.flatten(1) @ x.flatten(1).T, dim=1) for x in (student, teacher))
    return ((s - t) ** 2).sum() / student.shape[0] ** 2


def ifvd(student: Tensor, teacher: Tensor, target: Tensor, classes: int) -> Tensor:
    """For every class masks and centres as large as the features."""

    def closeness(x: Tensor) -> Tensor:
        label, centre = target.unsqueeze(1).expand_as(x), x
        for c in range(classes):
            mask = (label == c).to(x.dtype)
            mean = (mask * x).sum((2, 3)) / (mask.sum((2, 3)) + 1e-6)
            centre = (1 - mask) * centre + mask * mean[:, :, None, None]
        return F.cosine_similarity(x, centre, 1)

    return F.mse_loss(closeness(student), closeness(teacher))


def ickd(student: Tensor, teacher: Tensor) -> Tensor:
    s, t = (F.normalize(x.flatten(2) @ x.flatten(2).mT, dim=2) for x in (student, teacher))
    return ((s - t) ** 2).sum() / (student.shape[0] * student.shape[1])


def cirkd(student: Tensor, teacher: Tensor) -> Tensor:
    """For every pair of images both V×V matrices."""
    s, t = (F.normalize(x, dim=1).flatten(2) for x in (student, teacher))
    total = student.new_zeros(())
    for i in range(len(s)):
        for j in range(len(s)):
            log_s, p_t = F.log_softmax(s[i].T @ s[j] / 0.1, 1), F.softmax(t[i].T @ t[j] / 0.1, 1)
            total = total + F.kl_div(log_s, p_t, reduction="batchmean")
    return total / len(s) ** 2


def pkd(student: Tensor, teacher: Tensor) -> Tensor:
    def standardised(x: Tensor) -> Tensor:
        x = x.transpose(0, 1).flatten(1)
        return (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-6)

    return F.mse_loss(standardised(student), standardised(teacher)) / 2


def dsd(student: Tensor, teacher: Tensor, students: list[Tensor], teachers: list[Tensor]) -> Tensor:
    s, t = (
        F.softmax(F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False).flatten(2) / 4.0, 2)
        for x in (student, teacher)
    )
    category = ((s @ s.mT - t @ t.mT) ** 2).mean()
    maps_s, maps_t = [_attention(x, 2) for x in students], [_attention(x, 2) for x in teachers]
    pixel, pairs = student.new_zeros(()), 0
    for n in range(len(maps_s) - 1):
        for m in range(n + 1, len(maps_s)):
            residual_s, residual_t = F.normalize(maps_s[m] - maps_s[n]), F.normalize(maps_t[m] - maps_t[n])
            pixel, pairs = pixel + (residual_s - residual_t).pow(2).mean(), pairs + 1
    return category + pixel / pairs


def emkd(student: Tensor, teacher: Tensor, target: Tensor, feature_s: Tensor, feature_t: Tensor) -> Tensor:
    """One layer; for more than two classes the code's contrast of two regions, for every two."""
    classes = student.shape[1]
    prediction = published_class_kl(student, teacher, 4.0)
    importance = (_attention(feature_s, 4) - _attention(feature_t, 4)).pow(2).sum(1).mean()
    masks = [(target == c).unsqueeze(1).to(student.dtype) for c in range(classes)]

    def regions(x: Tensor) -> list[Tensor]:
        return [(x * mask).sum((2, 3)) / mask.sum((2, 3)) for mask in masks]

    of_s, of_t, region = regions(feature_s), regions(feature_t), student.new_zeros(())
    for a in range(classes - 1):
        for b in range(a + 1, classes):
            contrast = F.cosine_similarity(of_s[a], of_s[b], 1) - F.cosine_similarity(of_t[a], of_t[b], 1)
            region = region + contrast.pow(2).mean()
    return 0.1 * prediction + 0.9 * importance + 0.9 * region / (classes * (classes - 1) // 2)
