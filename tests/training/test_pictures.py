"""Figures: what is written on them can be read, whatever the pictures' shape and however many classes there are."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from medkd_fast.training.pictures import Row, class_colours, classes_figure, curves_figure, oklab, overlay_figure


@pytest.mark.parametrize(
    ("shape", "rows", "networks", "classes"),
    [((109, 91), 1, 10, 2), ((64, 64), 2, 1, 8), ((64, 64), 1, 1, 104), ((40, 80), 3, 4, 20)],
)
def test_titles_and_legend_of_an_overlay_are_whole(shape, rows, networks, classes):
    masks = {f"network {i}": np.random.default_rng(i).integers(0, classes + 1, shape) for i in range(networks)}
    names = {c: f"lung_lower_lobe_{c}_left" for c in range(1, classes + 1)}
    figure = overlay_figure([Row(f"1.3.6.1.4.1.14519.5.2.1.{3**60}, slice 12", np.zeros(shape), masks)] * rows, names)
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    written = [axis.title for axis in figure.axes] + [axis.yaxis.label for axis in figure.axes] + figure.legends
    for text in written:
        box = text.get_window_extent(renderer)
        assert min(box.x0, box.y0) >= -0.5 and box.x1 <= figure.bbox.x1 + 0.5 and box.y1 <= figure.bbox.y1 + 0.5, text
    titles = [axis.yaxis.label.get_window_extent(renderer) for axis in figure.axes[:: networks + 1]]
    assert all(above.y0 > below.y1 for above, below in itertools.pairwise(titles))
    pictures = [axis.get_window_extent(renderer) for axis in figure.axes]
    legend = figure.legends[0].get_window_extent(renderer)
    assert min(p.y0 for p in pictures) > legend.y1
    assert max(max(p.width, p.height) for p in pictures) > 200  # 2 of the 2.4 inches that each has


def test_no_two_classes_of_a_picture_have_one_colour():
    """However many; seen, the nearest two of 254 are as far apart as matplotlib's tab20 and the first eight were among them."""
    seen = oklab(class_colours())
    assert len(seen) == 254
    apart = np.linalg.norm(seen[:, None] - seen, axis=-1)[~np.eye(254, dtype=bool)]
    assert apart.min() > 0.05
    masks = {"label": np.arange(1, 255).reshape(2, 127)}
    figure = overlay_figure([Row("a", np.zeros((2, 127)), masks)], {c: f"class {c}" for c in range(1, 255)})
    picture = figure.axes[1].images[0].get_array()
    assert len({tuple(pixel) for pixel in picture.reshape(-1, 3)}) == 254
    legend = [tuple(patch.get_facecolor()) for patch in figure.legends[0].get_patches()]
    assert len(set(legend)) == 254


def test_curves_of_many_runs_can_be_told_apart(tmp_path):
    logs = tmp_path / "logs" / "version_0" / "metrics.csv"
    logs.parent.mkdir(parents=True)
    logs.write_text("step,task,val_dice\n4,1.5,0.2\n9,1.2,0.4\n")
    figure = curves_figure({f"student_{i}/seed-0": tmp_path for i in range(30)})
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    legend = figure.legends[0].get_window_extent(renderer)
    assert legend.y0 >= 0 and legend.x1 <= figure.bbox.x1
    for axis in figure.axes:
        box = axis.get_window_extent(renderer)
        assert box.x1 < legend.x0 and min(box.width, box.height) > 300
        assert len({(line.get_color(), line.get_linestyle()) for line in axis.lines}) == 30


def test_between_two_classes_there_is_one_line():
    networks = {f"network {i}": {"liver": [0.5, 0.7], "spleen": [0.1], "aorta": []} for i in range(9)}
    lines = [line for line in classes_figure(networks, "Dice").axes[0].lines if line.get_alpha() == 0.12]
    assert [line.get_ydata()[0] for line in lines] == [0.5, 1.5]
