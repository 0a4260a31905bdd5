"""What is drawn: the same whenever and wherever it is asked for, each class often enough, image and label together."""

from __future__ import annotations

import multiprocessing
import time
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import torch

from medkd_fast.training.data.dataset import IGNORE
from medkd_fast.training.data.prepare import Volume, volume_of
from medkd_fast.training.data.sampling import Draws, augmented, class_places, crop, train_loader
from medkd_fast.training.errors import WrongUse

PATCHES = {2: (24, 32), 3: (8, 24, 32)}


def volume(name: str, depth: int = 12, *, rare: bool = True) -> Volume:
    """Every voxel's image value says where it is: 10,000 z + 100 y + x, and class 1 is a big box, class 2 one voxel."""
    z, y, x = torch.meshgrid(torch.arange(depth), torch.arange(40), torch.arange(48), indexing="ij")
    label = ((y > 8) & (y < 30) & (x > 8) & (x < 40)).long()
    if rare:
        label[depth // 2, 35, 44] = 2
    return volume_of(name, (10_000 * z + 100 * y + x)[None], label[None])


@pytest.fixture
def volumes() -> dict[str, Volume]:
    return {"a": volume("a"), "b": volume("b", 10)}


def loader(volumes, dims=2, **options):
    settings = {"batch_size": 2, "steps": 4, "seed": 0, "num_classes": 3} | options
    return train_loader(volumes, list(volumes), dims=dims, patch=PATCHES[dims], **settings)


def batches(loader) -> list[torch.Tensor]:
    return [torch.cat([image.flatten(), label.flatten().float()]) for image, label in loader]


def equal(a, b) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_workers_share_the_volumes_whatever_python_would_do(volumes, monkeypatch):
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("forkserver", force=True)  # as Python 3.14
    try:
        monkeypatch.setattr(type(volumes["a"]), "__reduce__", lambda self: pytest.fail("a copy"), raising=False)
        assert equal(batches(loader(volumes, workers=2)), batches(loader(volumes)))
    finally:
        multiprocessing.set_start_method(before, force=True)


@pytest.mark.parametrize("dims", [2, 3])
def test_draws_depend_on_seed_and_epoch_alone(volumes, dims):
    first = loader(volumes, dims)
    epoch_0 = batches(first)
    state = torch.get_rng_state()
    assert equal(batches(first), epoch_0)
    assert torch.equal(torch.get_rng_state(), state)  # no number is taken from the generator that dropout uses
    first.sampler.set_epoch(1)
    epoch_1 = batches(first)
    assert not equal(epoch_1, epoch_0)
    torch.rand(3), np.random.rand(3)  # the global generators do not matter
    again = loader(volumes, dims)
    again.sampler.set_epoch(1)
    assert equal(batches(again), epoch_1)
    assert not equal(batches(loader(volumes, dims, seed=1)), epoch_0)
    assert len({b.sum().item() for b in epoch_0 + epoch_1}) == 8


def test_workers_draw_the_same(volumes):
    one, two = loader(volumes), loader(volumes, workers=2)
    for epoch in (0, 3):
        one.sampler.set_epoch(epoch)
        two.sampler.set_epoch(epoch)  # the workers live on and learn of it
        assert equal(batches(one), batches(two))


@pytest.mark.parametrize("dims", [2, 3])
def test_two_processes_draw_together_what_one_draws(volumes, dims):
    whole = loader(volumes, dims, batch_size=4)
    parts = [loader(volumes, dims, batch_size=2, rank=r, world_size=2) for r in range(2)]
    for each in (whole, *parts):
        each.sampler.set_epoch(2)
    for (image, label), *halves in zip(whole, *parts, strict=True):
        assert torch.equal(image, torch.cat([h[0] for h in halves]))
        assert torch.equal(label, torch.cat([h[1] for h in halves]))


def draws(volumes, dims, **options) -> Draws:
    settings = {"seed": 0, "num_classes": 3, "epoch_size": 60, "augment": False} | options
    return Draws(list(volumes.values()), patch=PATCHES[dims], **settings)


def test_every_slice_once_before_any_slice_twice(volumes):
    data = draws(volumes, 2, epoch_size=8)
    slices = [data._unit(*divmod(i, 8)) for i in range(44)]  # 12 + 10 slices, through the epochs
    assert Counter(slices[:22]) == Counter(slices[22:]) == Counter(data.units)
    assert slices[:22] != slices[22:]


@pytest.mark.parametrize("dims", [2, 3])
def test_a_third_of_the_draws_is_centred_on_a_class(volumes, dims):
    data = draws(volumes, dims)
    with_rare = 0
    for i in range(600):
        _, label = data[0, i]
        with_rare += bool((label == 2).any())
        assert label.shape == (1, *PATCHES[dims])
    # a third, half of it on class 2; by chance alone a slice shows it in 1 of 11, a patch (on either side of it) more often
    assert 600 * (1 / 6) * 0.8 < with_rare
    uncentred = draws({"a": volume("a")}, dims)
    places = uncentred.places[0]
    assert sorted(places) == [1, 2] and places[2].tolist() == [6 * 40 * 48 + 35 * 48 + 44]


def test_without_any_class_there_are_draws_too():
    empty = volume_of("e", torch.rand(1, 4, 40, 48), torch.zeros(1, 4, 40, 48))
    for dims in (2, 3):
        data = draws({"e": empty}, dims)
        assert all((data[0, i][1] == 0).all() for i in range(9))
        mixed = draws({"e": empty, "a": volume("a")}, dims)
        assert any((mixed[0, i][1] > 0).any() for i in range(20))


@pytest.mark.parametrize("dims", [2, 3])
def test_image_and_label_are_cut_at_one_place(volumes, dims):
    data = draws(volumes, dims)
    seen = set()
    for i in range(40):
        image, label = data[0, i]
        first = int(image.reshape(-1)[0])
        y, x = first // 100 % 100, first % 100
        rows, columns = PATCHES[dims][-2:]
        # the value of a voxel is its place: the patch is contiguous and unflipped
        assert image.reshape(-1)[-1] - first == (0 if dims == 2 else 7 * 10_000) + 100 * (rows - 1) + columns - 1
        expected = torch.zeros(rows, columns)
        yy, xx = torch.arange(y, y + rows)[:, None], torch.arange(x, x + columns)
        expected[(yy > 8) & (yy < 30) & (xx > 8) & (xx < 40)] = 1
        last = label.reshape(-1, rows, columns)[0]
        assert torch.equal(torch.where(last == 2, 0, last).float(), expected)
        seen.add((y, x))
    assert len(seen) > 20


@pytest.mark.parametrize("outside", [0, IGNORE])
def test_what_is_smaller_than_the_patch_is_filled(outside):
    small = volume_of("s", 5 + torch.rand(2, 3, 10, 12), torch.ones(1, 3, 10, 12))
    image, label = crop(small, [1, 5, 6], (8, 16, 20), outside)
    assert image.shape == (2, 8, 16, 20) and label.shape == (1, 8, 16, 20)
    assert torch.equal(image[:, 3:6, 3:13, 4:16], small.image) and (label[:, 3:6, 3:13, 4:16] == 1).all()
    assert (label == 1).sum() == 360 and (label == outside).sum() == label.numel() - 360
    for channel, inside in zip(image, small.image, strict=True):
        assert channel[0].unique().item() == pytest.approx(inside.min().item())
    names = {"s": small}
    ignore = outside or None
    ((image, label),) = train_loader(
        names, ["s"], dims=3, patch=(8, 16, 20), batch_size=1, steps=1, seed=0, num_classes=2, ignore_label=ignore
    )
    assert set(label.unique().tolist()) == {1, outside}


def test_augmentation_moves_image_and_label_together_and_keeps_ignored_voxels():
    label = torch.zeros(1, 64, 64)
    label[:, 10:30, 8:24], label[:, 36:56, 40:60] = 1, IGNORE
    image = label.where(label == 1, label / IGNORE * 2) + 0.05 * torch.rand(1, 64, 64)  # 1 and 2 where the label is
    for outside in (0, IGNORE):
        for seed in range(30):
            moved, mask = augmented(image, label.to(torch.uint8), outside, np.random.default_rng(seed))
            assert mask.dtype == torch.int64 and set(mask.unique().tolist()) <= {0, 1, IGNORE}
            assert mask.shape == moved.shape and moved.isfinite().all()
            one, ignored, nothing = (moved[mask == c].mean() for c in (1, IGNORE, 0))
            assert one > nothing + 0.4  # the label still lies on what it names
            assert outside == IGNORE or ignored > one + 0.4
            places = [torch.argwhere(mask[0] == c).float().mean(0) for c in (1, IGNORE)]
            assert outside == IGNORE or (places[0] < places[1]).all()  # never flipped
            assert 0.6 < (mask == 1).sum() / 320 < 1.5


def test_augmentation_turns_the_slices_of_a_patch_together_and_varies():
    image, label = torch.zeros(1, 6, 40, 60), torch.zeros(1, 6, 40, 60, dtype=torch.uint8)
    image[..., 10:30, 20:40], label[..., 10:30, 20:40] = 1, 1
    masks = set()
    for seed in range(20):
        _, mask = augmented(image, label, 0, np.random.default_rng(seed))
        assert all(torch.equal(mask[:, 0], mask[:, z]) for z in range(6))
        masks.add(tuple(mask[0, 0].flatten().tolist()))
    assert len(masks) > 15  # one in ten stays where it is


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("augment", [False, True])
def test_maps_are_moved_as_the_label_is(volumes, dims, augment):
    """The logits of a teacher, here of one that knows the label."""
    maps = {
        name: torch.nn.functional.one_hot(v.label[0], 3).movedim(-1, 0).to(torch.bfloat16)
        for name, v in volumes.items()
    }
    alike = []
    plain, with_maps = loader(volumes, dims, augment=augment), loader(volumes, dims, augment=augment, maps=maps)
    for (image, label), (image_, label_, replayed) in zip(plain, with_maps, strict=True):
        assert torch.equal(image, image_) and torch.equal(label, label_)
        assert replayed.shape == (2, 3, *PATCHES[dims]) and replayed.dtype == torch.float32
        seen = image > image.amin(tuple(range(1, image.dim())), keepdim=True)  # not what came in from outside
        alike.append((replayed.argmax(1, keepdim=True) == label)[seen].float().mean())
    # augmented, borders of a class differ: the label takes the nearest voxel, the map lies in between
    assert min(alike) > (0.95 if augment else 0.999)


def test_a_turn_is_a_turn_in_voxels():
    # a thin bar along x in a wide patch keeps its length: the turn is no shear
    from medkd_fast.training.data.sampling import _affine

    for seed in range(5):
        rng = np.random.default_rng(seed)
        angle, zoom = rng.uniform(-0.2, 0.2), rng.uniform(0.88, 1.12, 2)
        theta = _affine(30, 90, np.random.default_rng(seed)).double().numpy()
        half = np.array([45, 15])
        voxels = theta[:, :2] * half[:, None] / half / zoom
        turn = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
        np.testing.assert_allclose(voxels, turn, atol=1e-6)


def test_places_of_many_classes_cost_little_more_than_those_of_two():
    """A start on 100 volumes of 117 classes took minutes."""

    def seconds(classes: int) -> float:
        mask = (np.arange(1 << 22) % classes + 1).astype(np.uint8).reshape(64, 256, 256)
        return min(timed(lambda: class_places(mask, classes + 1)) for _ in range(3))

    def timed(call: Callable[[], object]) -> float:
        start = time.process_time()
        call()
        return time.process_time() - start

    assert seconds(200) < 3 * seconds(2)


def test_class_places_are_thinned_evenly():
    mask = np.zeros((40, 40, 40), np.uint8)
    mask[:, 5:35] = 1
    mask[0, 0, :7] = 3
    mask[1, 0, :7] = IGNORE
    places = class_places(mask, 4)
    assert sorted(places) == [1, 3] and places[3].tolist() == list(range(7))
    assert 8_000 < len(places[1]) <= 10_000 and (mask.reshape(-1)[places[1]] == 1).all()
    assert places[1].min() < 1_000 and places[1].max() > 63_000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dims": 4}, "patch must be 4 sizes"),
        ({"dims": 2, "patch": (8, 8, 8)}, "patch must be 2 sizes >= 1 for dims 2"),
        ({"patch": (0, 8)}, "patch must be 2 sizes >= 1"),
        ({"names": []}, "training needs labelled volumes"),
        ({"rank": 2, "world_size": 2}, "rank below world_size"),
        ({"steps": 0}, "steps and world_size must be >= 1"),
    ],
)
def test_loaders_that_make_no_sense(volumes, options, message):
    settings = {"names": ["a"], "dims": 2, "patch": (8, 8), "batch_size": 1, "steps": 1, "seed": 0, "num_classes": 3}
    with pytest.raises(WrongUse, match=message):
        train_loader(volumes, **settings | options)


def test_unlabelled_volumes_are_refused(volumes):
    volumes["u"] = volume_of("u", torch.zeros(1, 2, 40, 48))
    with pytest.raises(WrongUse, match="a volume without a label"):
        loader(volumes)


@pytest.mark.parametrize("dims", [2, 3])
def test_maps_are_cut_and_moved_with_the_image_and_keep_their_values(volumes, dims):
    maps = {name: torch.cat([v.image, -v.image]).to(torch.bfloat16) for name, v in volumes.items()}
    plain, mapped = loader(volumes, dims, augment=False), loader(volumes, dims, augment=False, maps=maps)
    for (image, label), (again, label_again, extra) in zip(plain, mapped, strict=True):
        assert torch.equal(image, again) and torch.equal(label, label_again)
        assert torch.equal(extra, torch.cat([image, -image], 1).to(torch.bfloat16).float())
    # augmented: the same places, with intensities of their own
    for (image, label), (again, label_again, extra) in zip(
        loader(volumes, dims), loader(volumes, dims, maps=maps), strict=True
    ):
        assert torch.equal(image, again) and torch.equal(label, label_again)
        assert torch.equal(extra[:, 0], -extra[:, 1])
        for one, other in zip(image[:, 0], extra[:, 0], strict=True):
            inside = one > one.min() + 0.2 * (one.max() - one.min())  # what came in from outside is another thing
            assert np.corrcoef(one[inside], other[inside])[0, 1] > 0.9
