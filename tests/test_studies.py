"""The studies: their arithmetic on kernels and images made by hand, and the command from training to page."""

import csv
import dataclasses
import errno
import io
import itertools
import json
import os
import re
import resource
import shutil
import signal
from fractions import Fraction
from types import SimpleNamespace

import matplotlib.text
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import nn

from acnet_kernels import ACBlock, cli
from acnet_kernels.errors import UserError
from acnet_kernels.paper.models.blocks import constructor
from acnet_kernels.paper.studies import (
    ablation,
    accuracy,
    command,
    config,
    magnitudes,
    paper,
    plots,
    pruning,
    rotation,
    shifted,
)
from acnet_kernels.paper.studies.evaluate import ORIENTATIONS, accuracies
from acnet_kernels.paper.studies.lab import Lab
from acnet_kernels.paper.studies.pruning import prune, prune_weight
from acnet_kernels.paper.studies.regions import kernel_of, regions
from acnet_kernels.paper.studies.store import Store, merged, read, write_csv, writing
from acnet_kernels.paper.studies.study import (
    Measured,
    Network,
    by,
    difference,
    mean_std,
    percent,
    subject,
    training_cells,
)
from acnet_kernels.paper.studies.watch import Forecast, duration
from acnet_kernels.paper.training import checkpoints
from acnet_kernels.paper.training.data import NAMES
from acnet_kernels.paper.training.loop import Recipe

TINY = [
    "--quick",
    "--limit",
    "64",
    "--test-limit",
    "90",
    "--epochs",
    "1",
    "--seeds",
    "2",
    "--prunings",
    "1",
    "--nets",
    "resnet8",
]


SEED_0 = {"data": "d", "net": "n", "recipe": "1 epoch", "backend": "auto", "block": "acb", "seed": 0}


ROW = {
    "epoch": 1,
    "train_loss": 1.0,
    "train_accuracy": 0.5,
    "test_loss": 1.0,
    "test_accuracy": 0.5,
    "images_per_second": 1.0,
}
QUICK_CELLS = training_cells(config.QUICK, ["plain"])


def run(capsys, *argv):
    """(exit code, stdout, stderr) of the study command."""
    try:
        code = cli.main(["study", *map(str, argv)])
    except SystemExit as exit:
        code = exit.code
    return (code, *capsys.readouterr())


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# Kernel magnitudes.


def network(*kernels):
    """A chain of k×k convolutions, every kernel of a layer being the given matrix, and a 1×1 and a 7×7 one."""
    layers = [nn.Conv2d(2, 2, len(kernel), bias=False) for kernel in kernels]
    for layer, kernel in zip(layers, kernels, strict=True):
        layer.weight.data[:] = torch.tensor(kernel)
    return nn.Sequential(*layers, nn.Conv2d(2, 4, 1), nn.Conv2d(4, 2, 7)).eval()


CROSS = [[1.0, 2, 1], [2, 2, 2], [1, 2, 1]]
CROSS_5 = [[1.0, 1, 2, 1, 1], [1, 1, 2, 1, 1], [2, 2, 2, 2, 2], [1, 1, 2, 1, 1], [1, 1, 2, 1, 1]]


def magnitudes_of(model, untrained=None):
    lab = SimpleNamespace(folded=lambda cell: model, untrained=lambda cell: untrained or model)
    return magnitudes.measure(lab, SEED_0)


def test_skeleton_2_and_corners_1_give_half_in_the_corners():
    expected = [[0.5, 1, 0.5], [1, 1, 1], [0.5, 1, 0.5]]
    found = magnitudes_of(network(CROSS, [[-7 * v for v in row] for row in CROSS]))
    assert found["mean"] == expected
    assert list(found["layers"].values()) == [expected, expected]


@pytest.mark.parametrize("cross", [CROSS, CROSS_5])
def test_a_cross_of_any_size_is_found_on_the_skeleton(cross):
    results = [Measured(SEED_0, magnitudes_of(network(cross)))]
    assert magnitudes.table(results).rows[-1][2:4] == ("0.500", "1.000")
    assert magnitudes.finding(results).startswith("ACNet, skeleton over corners: 2.00 untrained, 2.00 trained;")
    records = magnitudes.records(results)
    assert len(records[0]) == len(SEED_0) + 1 + len(cross) ** 2
    assert records[0][f"{len(cross) - 1}0"] == 0.5


def test_each_layer_is_scaled_by_its_own_maximum_before_the_mean():
    flat = [[100.0] * 3] * 3
    found = magnitudes_of(network(CROSS, flat))
    assert found["mean"] == [[0.75, 1, 0.75], [1, 1, 1], [0.75, 1, 0.75]]


def test_magnitudes_are_averaged_over_seeds_and_named_by_region():
    matrices = [[[0.2] * 3] * 3, [[0.4, 0.8, 0.4], [0.8, 1.0, 0.8], [0.4, 0.8, 0.4]]]
    results = [
        Measured({**SEED_0, "seed": seed}, {"mean": matrix, "untrained mean": CROSS, "layers": {"a": matrix}})
        for seed, matrix in enumerate(matrices)
    ]
    mean = magnitudes.mean_matrices(results, "trained")["acb"]
    torch.testing.assert_close(mean[0], torch.tensor([0.3, 0.5, 0.3], dtype=torch.float64))
    rows = magnitudes.table(results).rows
    assert rows[1:] == [
        ("ACNet, untrained", "2", "1.000", "2.000", "1.750", "1.400", "skeleton / corners 2.00 ± 0.00"),
        ("ACNet", "2", "0.300", "0.520", "0.475", "0.380", "skeleton / corners 1.55 ± 0.78"),
    ]
    records = magnitudes.records(results)
    assert [(r["seed"], r["layer"], r["01"]) for r in records] == [
        (0, "untrained mean", 2), (0, "mean", 0.2), (0, "a", 0.2),
        (1, "untrained mean", 2), (1, "mean", 0.8), (1, "a", 0.8),
    ]  # fmt: skip


def test_the_control_is_the_same_network_before_training():
    flat = [[1.0] * 3] * 3
    values = [magnitudes_of(network(CROSS), network(flat)), magnitudes_of(network(CROSS), network(CROSS))]
    results = [Measured({**SEED_0, "seed": seed}, v) for seed, v in enumerate(values)]
    assert magnitudes.finding(results) == (
        "ACNet, skeleton over corners: 1.50 untrained, 2.00 trained; training adds +0.50 ± 0.50 (2 seeds): "
        "inside two standard errors, so none is shown."
    )


def test_theory_of_the_untrained_network():
    # By hand: variances 1/9 in a corner, 1/9 + 1/3 on the skeleton, 1/9 + 2/3 in the centre.
    side, corner = 2 / 7**0.5, 1 / 7**0.5  # .756, .378
    skeleton = [[corner, side, corner], [side, 1, side], [corner, side, corner]]
    border = [[corner, corner, side], [corner, corner, side], [side, side, 1]]
    for block, expected in (("acb", skeleton), ("acb-border", border)):
        torch.testing.assert_close(magnitudes.theory(block, 3), torch.tensor(expected, dtype=torch.float64))
    assert magnitudes.theory("plain", 3).eq(1).all()
    assert magnitudes.theory("acb", 5)[0, 2] == pytest.approx((6 / 11) ** 0.5)


# Not cifar-quick's border-shifted one: its last maps are 2×2 pixels, so that a branch 2 rows down sees padding.
@pytest.mark.parametrize(("net", "kinds"), [("resnet8", 3), ("cifar-quick", 2)])
def test_untrained_networks_are_what_theory_says(tmp_path, net, kinds):
    """So an untrained ACNet has a strong skeleton: without this row a trained one's would be taken for learned."""
    quick = config.make(True, net=net, limit=256)
    lab = Lab(quick, tmp_path, torch.device("cpu"), None, 0)
    for cell in magnitudes.cells(dataclasses.replace(quick, seeds=1))[:kinds]:
        untrained, block = lab.untrained(cell), cell["block"]
        assert all(m.deploy for m in untrained.modules() if isinstance(m, ACBlock))
        found = torch.tensor(
            magnitudes.measure(SimpleNamespace(folded=lab.untrained, untrained=lab.untrained), cell)["mean"]
        )
        expected = magnitudes.theory(block, len(found))
        # Absolute values of few weights, not their deviations, and inputs that are correlated: near, not equal.
        assert (found - expected).abs().max() < 0.2, (block, found)
        assert magnitudes.ratio(found, block) == pytest.approx(magnitudes.ratio(expected, block), rel=0.15)
    assert list(tmp_path.iterdir()) == []


def test_the_untrained_network_shares_its_seeds_first_weights(tmp_path):
    lab = Lab(config.QUICK, tmp_path, torch.device("cpu"), None, 0)
    first, again, other = (lab.untrained(cell) for cell in (QUICK_CELLS[0], QUICK_CELLS[0], QUICK_CELLS[1]))
    weights = [model.stem.conv.weight for model in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


# Pruning.


def zeros(weight):
    """How many zeros each position has, k×k."""
    return weight.eq(0).sum((0, 1)).tolist()


def inside(region, kernel):
    """k×k: which positions are in the region."""
    mask = torch.zeros(kernel, kernel, dtype=torch.bool)
    for position in regions(kernel)[region]:
        mask[position] = True
    return mask


def drawn(region, kernel):
    return ["".join("#" if chosen else "." for chosen in row) for row in inside(region, kernel)]


def test_regions_are_the_papers():
    assert drawn("corners", 3) == ["#.#", "...", "#.#"]
    assert drawn("skeleton", 3) == [".#.", "###", ".#."]
    assert drawn("border", 3) == ["..#", "..#", "###"]
    assert drawn("top left", 3) == ["##.", "##.", "..."]
    assert drawn("anywhere", 3) == ["###"] * 3


def test_regions_grow_with_the_kernel():
    assert drawn("corners", 5) == ["##.##", "##.##", ".....", "##.##", "##.##"]
    assert drawn("skeleton", 5) == ["..#..", "..#..", "#####", "..#..", "..#.."]
    assert drawn("border", 5) == ["....#"] * 4 + ["#####"]
    assert drawn("top left", 5) == ["####."] * 4 + ["....."]


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("block", ["acb", "acb-border"])
def test_skeleton_and_border_are_where_the_branches_lie(kernel, block):
    layer = constructor(block, {})(1, 1, kernel, padding=kernel // 2)
    with torch.no_grad():
        layer.square_conv.weight.zero_()
    weight = layer.eval().get_equivalent_kernel_bias()[0]
    assert torch.equal(weight[0, 0] != 0, inside("skeleton" if block == "acb" else "border", kernel))


@pytest.mark.parametrize(("net", "kernel"), [("resnet8", 3), ("cifar-quick", 5), ("wrn10-1", 3), ("vgg16", 3)])
def test_the_studied_kernel_is_the_networks_commonest(net, kernel):
    before = torch.get_rng_state()
    assert kernel_of(net) == kernel
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("region", ["corners", "skeleton", "border", "top left", "anywhere"])
def test_the_largest_sparsity_zeroes_exactly_the_region(region, kernel):
    weight = torch.rand(5, 7, kernel, kernel) + 0.1
    before = weight.clone()
    prune_weight(weight, region, pruning.share(region, kernel), generator())
    mask = inside(region, kernel)
    assert weight[:, :, mask].eq(0).all()
    assert torch.equal(weight[:, :, ~mask], before[:, :, ~mask])
    assert torch.equal(mask.to(torch.float), torch.tensor(zeros(weight)).div(35))


def test_curves_end_with_the_whole_region():
    ends = {
        kernel: [pruning.sparsities(region, kernel)[-1] for region in ("corners", "skeleton", "border", "anywhere")]
        for kernel in (3, 5)
    }
    assert ends[3] == [Fraction(4, 9), Fraction(5, 9), Fraction(5, 9), Fraction(5, 9)]
    assert ends[5] == [Fraction(16, 25), Fraction(9, 25), Fraction(9, 25), Fraction(16, 25)]


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("sparsity", [Fraction(0), Fraction(1, 18), Fraction(2, 9), Fraction(1, 3)])
@pytest.mark.parametrize("region", ["corners", "skeleton", "anywhere"])
def test_sparsity_counts_all_weights_and_stays_in_the_region(region, sparsity, kernel):
    weight = torch.rand(5, 7, kernel, kernel) + 0.1
    prune_weight(weight, region, sparsity, generator())
    assert int(weight.eq(0).sum()) == round(sparsity * 5 * 7 * kernel**2)
    assert not torch.tensor(zeros(weight))[~inside(region, kernel)].any()


def test_every_weight_of_the_region_is_equally_likely():
    weight = torch.ones(200, 200, 3, 3)
    prune_weight(weight, "skeleton", Fraction(1, 9), generator())
    # 40,000 zeros over five positions: 8,000 each, with a standard deviation of √(40,000·0.2·0.8·0.8) = 72.
    counts = [zeros(weight)[row][column] for row, column in regions(3)["skeleton"]]
    assert all(abs(count - 8000) < 5 * 72 for count in counts)
    assert max(counts) != min(counts)


@pytest.mark.parametrize(("kernel", "share"), [(3, "4/9"), (5, "16/25")])
def test_more_zeros_than_the_region_has_are_refused(kernel, share):
    weight = torch.ones(2, 2, kernel, kernel)
    with pytest.raises(ValueError, match=rf"sparsity must be at most {share}, .* got 2/3"):
        prune_weight(weight, "corners", Fraction(2, 3), generator())
    assert weight.eq(1).all()


def test_pruning_copies_and_touches_layers_of_the_commonest_kernel_alone():
    model = network(CROSS, CROSS)
    pruned = prune(model, "corners", Fraction(4, 9), generator())
    assert [zeros(layer.weight) for layer in pruned[:2]] == [[[4, 0, 4], [0, 0, 0], [4, 0, 4]]] * 2
    assert all(torch.equal(pruned[i].weight, model[i].weight) for i in (2, 3))
    assert not model[0].weight.eq(0).any()
    larger = prune(network(CROSS_5), "corners", Fraction(16, 25), generator())
    assert torch.tensor(zeros(larger[0].weight)).eq(4).equal(inside("corners", 5))


def test_one_pruning_seed_gives_one_pruning():
    masks = [prune(network(CROSS), "anywhere", Fraction(1, 3), generator(s))[0].weight for s in (1, 1, 2)]
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


def test_cells_of_the_pruning_study_repeat_what_is_random():
    cells = pruning.cells(dataclasses.replace(config.QUICK, prunings=5, seeds=1))
    plain = [c for c in cells if (c["block"], c["region"]) == ("plain", "corners")]
    assert [(c["sparsity"], c["pruning"]) for c in plain[:7]] == [
        ("0", 0), *(("1/18", i) for i in range(5)), ("1/9", 0),
    ]  # fmt: skip
    assert len(plain) == 1 + 9 * 5


def test_every_network_is_pruned_in_corners_and_skeleton_and_the_shifted_one_in_its_border_too():
    cells = pruning.cells(config.QUICK)
    for block in ("plain", "acb", "acb-border"):
        pruned = {(c["seed"], c["region"]) for c in cells if c["block"] == block}
        shifted_parts = {"top left", "border"} if block == "acb-border" else set()
        parts = {"corners", "skeleton", "anywhere"} | shifted_parts
        assert pruned == {(seed, part) for seed in range(config.QUICK.seeds) for part in parts}


def test_the_papers_own_points_are_measured():
    assert Fraction(4, 9) in pruning.sparsities("corners", 3)
    assert all(Fraction(13, 100) in pruning.sparsities(part, k) for part in regions(3) for k in (3, 5))


def pruned(block, region, **accuracies):
    """Accuracies by sparsity, over seeds and prunings: {'4/9': [[first seed's prunings], …]}."""
    return [
        Measured(
            {**SEED_0, "block": block, "seed": seed, "kernel": 3, "region": region, "sparsity": at, "pruning": i},
            {"top1": value},
        )
        for at, networks in accuracies.items()
        for seed, prunings in enumerate(networks)
        for i, value in enumerate(prunings)
    ]


def test_the_spread_is_over_networks_and_the_papers_points_are_told():
    results = [
        *pruned("acb", "corners", **{"0": [[0.9], [0.7]], "2/9": [[0.8], [0.6]], "4/9": [[0.4, 0.8], [0.2, 0.6]]}),
        *pruned("acb", "skeleton", **{"0": [[0.9], [0.7]], "13/100": [[0.3], [0.3]], "2/9": [[0.1], [0.1]]}),
    ]
    assert pruning.curve(results, "acb", "corners")[Fraction(4, 9)] == pytest.approx([0.6, 0.4])
    header, (corners, skeleton) = pruning.table(results)
    assert header == ("network", "zeros in", "seeds", "0%", "11%", "13%", "22%", "33%", "44%", "56%")
    assert (corners[2], corners[-2], skeleton[5]) == ("2", "50.00 ± 14.14", "30.00 ± 0.00")
    assert pruning.finding(results) == (
        "ACNet: 80.0 % unpruned, 50.0 % with zeros in all corners (44 % of the weights), 30.0 % with 13 % zeros, "
        "in the skeleton; at 22 % zeros: corners 70.0 %, skeleton 10.0 %."
    )


def test_the_part_that_the_shifted_network_spares_is_named_whichever_it_is():
    kept = {"corners": 0.5, "skeleton": 0.2, "top left": 0.6, "border": 0.3}
    results = [
        r
        for part, value in kept.items()
        for r in pruned("acb-border", part, **{"0": [[0.9]], "13/100": [[0.8]], "2/9": [[value]], "4/9": [[0.1]]})
    ]
    assert pruning.finding(results).endswith(
        "22 % zeros: top left 60.0 %, corners 50.0 %, border 30.0 %, skeleton 20.0 %."
    )


def test_no_curve_is_left_out_of_the_figure(tmp_path, monkeypatch):
    parts = ("corners", "skeleton", "anywhere", "top left", "border")
    results = [r for part in parts for r in pruned("acb-border", part, **{"0": [[0.9]], "1/9": [[0.5]]})]
    drawn_axes = []
    original = plots.new_figure

    def remembering(*args, **kwargs):
        figure, axes = original(*args, **kwargs)
        drawn_axes.extend(axes)
        return figure, axes

    monkeypatch.setattr(plots, "new_figure", remembering)
    pruning.plot(results, tmp_path / "x.png")
    lines = {line.get_label(): line.get_color() for line in drawn_axes[-1].get_lines() if line.get_label() in parts}
    assert set(lines) == set(parts)
    assert len(set(lines.values())) == len(parts)


# Turned images.


class Images:
    """A data set of these test images."""

    def __init__(self, images, labels):
        self.images, self.labels, self.test_images = images, torch.tensor(labels), len(labels)

    def test_batches(self, batch_size):
        return zip(self.images.split(batch_size), self.labels.split(batch_size), strict=True)


class Brightest(nn.Module):
    """The class is the quadrant with the largest sum: 0 top left, 1 top right, 2 bottom left, 3 bottom right."""

    def forward(self, x):
        return nn.functional.adaptive_avg_pool2d(x, 2).sum(1).flatten(1)


def test_images_are_turned_as_named():
    x = torch.tensor([[1, 2], [3, 4]]).view(1, 1, 2, 2)
    turned = {name: turn(x)[0, 0].tolist() for name, turn in ORIENTATIONS.items()}
    assert turned == {
        "original": [[1, 2], [3, 4]],
        "rotated 90°": [[2, 4], [1, 3]],
        "rotated 180°": [[4, 3], [2, 1]],
        "flipped up-down": [[3, 4], [1, 2]],
    }


def test_turning_moves_what_a_network_sees():
    images = torch.zeros(4, 3, 6, 6)
    for label, (row, column) in enumerate([(0, 0), (0, 3), (3, 0), (3, 3)]):
        images[label, :, row : row + 2, column : column + 2] = 1
    data = Images(images, [0, 1, 2, 3])
    found = {name: accuracies(Brightest(), data, turn=turn)[0] for name, turn in ORIENTATIONS.items()}
    assert found == {"original": 1.0, "rotated 90°": 0.0, "rotated 180°": 0.0, "flipped up-down": 0.0}
    flipped = Images(images, [2, 3, 0, 1])
    assert accuracies(Brightest(), flipped, turn=ORIENTATIONS["flipped up-down"]) == [1.0]


def test_turning_symmetric_images_changes_nothing():
    images = torch.randn(12, 3, 8, 8)
    images = images + images.flip(2)
    images = images + images.flip(3)
    images = images + images.transpose(2, 3)
    assert all(torch.equal(turn(images), images) for turn in ORIENTATIONS.values())
    torch.manual_seed(2)
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 36, 3))
    data = Images(images, [i % 3 for i in range(12)])
    assert len({accuracies(model, data, turn=turn)[0] for turn in ORIENTATIONS.values()}) == 1


def test_top_k_counts_classes_among_the_k_largest():
    logits = torch.tensor([[4.0, 3, 2, 1], [1, 2, 3, 4], [4, 3, 2, 1], [2, 1, 4, 3]])
    model = nn.Sequential(nn.Flatten())
    data = Images(logits.view(4, 4, 1, 1), [0, 2, 3, 1])
    assert accuracies(model, data, top=(1, 2, 3, 4, 9)) == [0.25, 0.5, 0.5, 1.0, 1.0]


def test_a_model_in_training_mode_is_evaluated_in_eval():
    model = nn.Sequential(nn.Dropout(0.99), nn.Flatten())
    data = Images(torch.eye(8).view(8, 8, 1, 1), list(range(8)))
    assert accuracies(model.train(), data) == [1.0]


# Tables.


def test_means_and_standard_deviations():
    assert mean_std([1.0, 2, 3]) == (2.0, 1.0)
    assert mean_std([5.0]) == (5.0, 0.0)
    assert percent([0.5, 0.7]) == "60.00 ± 14.14"
    assert percent([0.5]) == "50.00"


def test_differences_are_paired_by_seed_and_come_with_their_standard_error():
    # The spread of paired differences, not of the values; seeds without a partner are left out.
    found = difference({0: 53.0, 3: 91.0, 2: 10.0, 9: 77.0}, {2: 9.0, 3: 90.0, 0: 49.0, 8: 5.0})
    assert str(found) == "+2.00 ± 1.00"  # of 4, 1, 1: standard deviation √3
    assert found.pairs == 3
    assert (
        difference({0: 50.0}, {0: 60.0}).verdict()
        == "-10.00 in one pair of networks, which says nothing about chance"
    )
    assert difference({0: 50.0}, {1: 60.0}) is None


@pytest.mark.parametrize(
    ("values", "shown"), [((4.0, 1.0, 1.0), False), ((4.0, 3.0, 2.0), True), ((-4, -3, -2), True)]
)
def test_nothing_inside_two_standard_errors_is_called_a_gain(values, shown):
    found = difference(dict(enumerate(values)), dict.fromkeys(range(3), 0.0))
    assert found.shown is shown
    assert ("none is shown" in found.verdict()) is not shown


def test_results_in_any_order_are_paired_by_their_seed():
    """As they come out of several shards, and with a seed that one kind does not have yet."""
    plain, acb = measured("plain", 0.1, 0.5, 0.9), measured("acb", 0.3, 0.6, 0.95)
    shuffled = [*acb[::-1], plain[1], plain[0]]
    assert ablation.finding(shuffled).startswith("ACNet over plain, in points: +15.00 ± 5.00 (2 seeds): beyond")
    assert shifted.table(shuffled).rows[0][3] == "+15.00 ± 5.00"
    assert accuracy.table(shuffled).rows[0][3:7] == ("2", "30.00 ± 28.28", "45.00 ± 21.21", "+15.00 ± 5.00")


def measured(block, *top1, **coordinates):
    cell = {**SEED_0, "net": "resnet56", "data": "cifar10", "block": block, **coordinates}
    rest = {"top5": 1.0, "data_set": cell["data"], "parameters_trained": 7}
    return [Measured({**cell, "seed": s}, {"top1": value, **rest}) for s, value in enumerate(top1)]


def test_the_accuracy_table_puts_the_papers_figures_beside_ours():
    results = measured("plain", 0.90, 0.92) + measured("acb", 0.93, 0.93)
    row = accuracy.table(results).rows[0]
    assert row[:7] == ("resnet56", "cifar10", "1 epoch", "2", "91.00 ± 1.41", "93.00 ± 0.00", "+2.00 ± 1.00")
    assert row[-3:] == ("94.31 → 95.09", "94.55 → 95.06", "94.57 → 94.86")
    assert accuracy.finding(results) == (
        "The ACNet's mean is above the plain network's for 1 of 1 networks; by more than two standard errors above "
        "for 0, below for 0."
    )
    other = measured("plain", 0.5, data="digits") + measured("acb", 0.6, data="digits")
    both = accuracy.table(results + other)
    assert [row[-3:] for row in both.rows] == [row[-3:], ("", "", "")]
    # Where nothing is published of what was measured, no column says so.
    assert accuracy.table(other).header == both.header[:-3]
    assert len(accuracy.table(other).rows[0]) == len(both.header) - 3


def test_the_first_versions_block_has_columns_of_its_own_where_it_is_another():
    asked = {(c["net"], c["block"]) for c in accuracy.cells(config.QUICK)}
    assert {block for net, block in asked if net == "cifar-quick"} == {"plain", "acb", "acb-3"}
    assert {block for net, block in asked if net == "resnet8"} == {"plain", "acb"}
    pair = measured("plain", 0.5, 0.6, net="cifar-quick") + measured("acb", 0.6, 0.6, net="cifar-quick")
    without = accuracy.table(pair)
    table = accuracy.table(pair + measured("acb-3", 0.7, 0.7, net="cifar-quick"))
    row = dict(zip(table.header, table.rows[0], strict=True))
    assert row["ACNet with 1×3 and 3×1, top-1 (%)"] == "70.00 ± 0.00"
    assert row["its gain (points, ± standard error)"] == "+15.00 ± 5.00"
    assert len(without.header) == len(table.header) - 2
    assert table.rows[0][:9] == without.rows[0][:9]  # what stands there is as without it


@pytest.mark.parametrize(
    ("data_set", "net", "expected"),
    [
        ("cifar10", "densenet40", "94.29 → 94.84"),
        ("imagenet", "resnet18", "70.36 → 71.14"),
        ("cifar100", "resnet56", ""),
        ("imagenet", "resnet56", ""),
        ("", "resnet18", ""),
    ],
)
def test_published_figures_are_found_by_network_and_data(data_set, net, expected):
    assert accuracy.published(paper.TABLES, measured("acb", 0.5, net=net, data=data_set)) == expected


def test_only_imagenets_own_folders_are_imagenet(tmp_path):
    assert [paper.data_set(name) for name in NAMES] == list(NAMES)
    for number in range(1000):
        (tmp_path / "imagenet/train" / f"n{number:08d}").mkdir(parents=True)
    assert paper.data_set(str(tmp_path / "imagenet")) == "imagenet"
    (tmp_path / "imagenet/train/n00000001").rmdir()
    assert paper.data_set(str(tmp_path / "imagenet")) == ""
    (tmp_path / "imagenet/train/cats").mkdir()
    assert paper.data_set(str(tmp_path / "imagenet")) == ""


@pytest.mark.parametrize(
    ("study", "net", "data", "papers"),
    [
        (ablation, "resnet18", "imagenet", ["70.36", "70.82", "71.14"]),
        (ablation, "alexnet-bn", "imagenet", ["55.92", "56.18", "57.44"]),
        (ablation, "resnet18", "cifar10", None),
        (shifted, "resnet56", "cifar10", ["94.31", "95.09", "94.67"]),
        (shifted, "resnet56", "cifar100", None),
        (shifted, "resnet20", "cifar10", None),
    ],
)
def test_the_papers_column_is_of_its_network_and_data_alone(study, net, data, papers):
    blocks = ("plain", "acb-sum", "acb") if study is ablation else ("plain", "acb", "acb-border")
    table = study.table([r for block in blocks for r in measured(block, 0.5, net=net, data=data)])
    assert ("paper" in table.header) == (papers is not None)
    assert all(len(row) == len(table.header) for row in table.rows)
    if papers:
        assert [row[-1] for row in table.rows] == papers


def test_the_authors_two_recipes_are_told_apart():
    """The presets follow the later one: its figures must stand under its name."""
    header = accuracy.table(measured("plain", 0.5) + measured("acb", 0.5)).header[-3:]
    assert header == ("paper", "authors' README, cosine and γ = 1/3", "authors' first README, steps")
    nets = ("cifar-quick", "vgg16", "resnet56", "wrn16-8")
    found = [accuracy.published(paper.AUTHORS_COSINE, measured("acb", 0.5, net=net)) for net in nets]
    assert found == ["86.20 → 86.87", "93.99 → 94.54", "94.55 → 95.06", "95.89 → 96.33"]
    found = [accuracy.published(paper.AUTHORS_STEPS, measured("acb", 0.5, net=net)) for net in nets]
    assert found == ["86.25 → 87.10", "94.25 → 94.86", "94.57 → 94.86", "95.58 → 95.92"]
    assert set(paper.AUTHORS_COSINE) - {("imagenet", "resnet18")} == set(paper.AUTHORS_STEPS)


def test_the_page_says_where_the_papers_text_and_table_differ_and_what_it_states_of_rotation():
    table = paper.TABLES["imagenet", "densenet121"]
    assert f"{table.acb - table.plain:+.2f} points, the text +1.18" in accuracy.STUDY.paper
    assert "+0.34 and +1.27 points, and +0.75" in rotation.STUDY.paper


def turned(block, *values):
    """Results that have each orientation's accuracy, folded or not, by seed."""
    names = [*ORIENTATIONS, *(f"{name}, unfolded" for name in ORIENTATIONS)]
    return [Measured({**SEED_0, "block": block, "seed": s}, dict.fromkeys(names, v)) for s, v in enumerate(values)]


def test_rotation_is_judged_by_paired_differences_against_plain_and_of_the_single_branches():
    results = turned("plain", 0.5, 0.7) + turned("acb", 0.51, 0.73) + turned("acb-hor", 0.6, 0.8)
    results += turned("acb-ver", 0.5, 0.7)
    results[-1].values["flipped up-down"] = 0.9
    assert rotation.finding(results) == (
        "ACNet over plain, in points (seeds: 2): original +2.00 ± 1.00, rotated 90° +2.00 ± 1.00, rotated 180° "
        "+2.00 ± 1.00, flipped up-down +2.00 ± 1.00; beyond two standard errors: none. "
        "+ horizontal over + vertical, in points (seeds: 2): original +10.00 ± 0.00, rotated 90° +10.00 ± 0.00, "
        "rotated 180° +10.00 ± 0.00, flipped up-down +0.00 ± 10.00; beyond two standard errors: original, "
        "rotated 90°, rotated 180°. Folding changed accuracies by up to 20.00 points."
    )


def test_the_three_kinds_are_compared_with_the_papers():
    results = measured("plain", 0.9, 0.9) + measured("acb", 0.95, 0.95) + measured("acb-border", 0.93, 0.93)
    assert [row[-1] for row in shifted.table(results).rows] == ["94.31", "95.09", "94.67"]
    assert shifted.finding(results) == (
        "Border-shifted over ACNet, in points: -2.00 ± 0.00 (2 seeds): beyond two standard errors."
    )


def test_rotation_reports_the_largest_change_by_folding():
    values = dict.fromkeys(ORIENTATIONS, 0.5) | {f"{name}, unfolded": 0.5 for name in ORIENTATIONS}
    changed = {**values, "rotated 90°": 0.52}
    results = [Measured(SEED_0, values), Measured({**SEED_0, "seed": 1}, changed)]
    assert rotation.table(results).rows == [
        ("ACNet", "2", "50.00 ± 0.00", "51.00 ± 1.41", "50.00 ± 0.00", "50.00 ± 0.00", "2.00")
    ]


def test_grouping_keeps_order():
    results = measured("plain", 0.1, 0.2) + measured("acb", 0.3)
    groups = by(results, "block")
    assert [(block, [v["top1"] for v in values]) for block, values in groups.items()] == [
        ("plain", [0.1, 0.2]), ("acb", [0.3]),
    ]  # fmt: skip
    assert list(by(results, "net", "seed")) == [("resnet56", 0), ("resnet56", 1)]


# Plans.


def test_without_quick_the_configuration_is_the_papers():
    full = config.make(False)
    assert (full.recipe.net, full.recipe.data, full.recipe.epochs, full.recipe.lr) == (
        "resnet56",
        "cifar10",
        400,
        0.2,
    )
    assert [p.net for p in full.accuracy] == [
        "cifar-quick", "vgg16", "resnet20", "resnet56", "wrn16-8", "densenet40",
    ]  # fmt: skip
    assert full.seeds == full.prunings == 5


def test_options_change_the_configuration():
    changed = config.make(False, data="cifar100", nets=["wrn16-8", "wrn10-1"], epochs=3, limit=5, seeds=2)
    assert [(p.net, p.data, p.epochs, p.weight_decay) for p in changed.accuracy] == [
        ("wrn16-8", "cifar100", 3, 5e-4), ("wrn10-1", "cifar100", 3, 1e-4),
    ]  # fmt: skip
    assert {r.limit for r in (changed.recipe, *changed.accuracy)} == {5}
    assert (changed.seeds, changed.prunings) == (2, 5)
    assert config.make(True).recipe.data == "digits"
    photographs = config.make(False, data="some/folder")
    assert photographs.recipe.net == "resnet18"
    assert [r.net for r in photographs.accuracy] == ["alexnet-bn", "resnet18", "densenet121"]
    assert {r.data for r in (photographs.recipe, *photographs.accuracy)} == {"some/folder"}
    assert photographs.recipe.batch_size == 256
    assert config.make(False, data="some/folder", net="alexnet").recipe.epochs == photographs.recipe.epochs == 100
    small = config.make(False, data="some/folder", image_size=32)
    assert [small.recipe.net, *(r.net for r in small.accuracy)] == [
        config.PAPER.recipe.net, *(r.net for r in config.PAPER.accuracy),
    ]  # fmt: skip
    assert config.make(True, net="resnet14").recipe.net == "resnet14"


# Results on disk.

RUN = {"command": "c", "machine": {"device": "d"}}


def test_results_survive_and_are_found_by_their_cell(tmp_path):
    path = tmp_path / "x.json"
    store = Store(path, RUN)
    store.add(SEED_0, {"top1": 0.1 + 0.2})
    again = Store(path, {**RUN, "command": "another"})
    assert dict(reversed(SEED_0.items())) in again
    assert all({**SEED_0, name: 1} not in again for name in SEED_0)
    again.add({**SEED_0, "seed": 1}, {"top1": 1.0})
    results = read(path)
    assert [r.values["top1"] for r in results] == [0.1 + 0.2, 1.0]
    # Every run's command stays beside what it measured.
    assert [r.run for r in results] == [RUN, {**RUN, "command": "another"}]
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.parametrize(
    "content",
    [
        "", "[]", "{}", '{"results": []}', '{"results": [], "runs": []}', '{"results": [3], "runs": [{}]}',
        '{"results": [{"cell": {"net": "n"}, "values": {}, "run": 0}], "runs": [{}]}',
    ],
)  # fmt: skip
def test_files_that_are_no_results_are_refused(tmp_path, content):
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(UserError, match="holds no results of a study"):
        read(path)


def test_csv_has_one_line_a_record(tmp_path):
    write_csv([{"a": 1, "b": "x, y"}, {"a": 2.5, "c": "ü"}], tmp_path / "x.csv")
    with (tmp_path / "x.csv").open(encoding="utf-8", newline="") as file:
        assert list(csv.DictReader(file)) == [{"a": "1", "b": "x, y", "c": ""}, {"a": "2.5", "b": "", "c": "ü"}]


# The command.


FEW_POINTS = (pruning, "STEP", Fraction(2, 9))  # a quarter of the curves', which are most of what is measured here


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """The folder of one tiny run of all studies."""
    out = tmp_path_factory.mktemp("all studies")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(*FEW_POINTS)
        assert cli.main(["study", "all", *TINY, "--out", str(out)]) == 0
    return out


def test_all_studies_write_their_files_and_one_page(everything):
    names = list(command.STUDIES)
    assert names == ["ablation", "rotation", "pruning", "magnitudes", "shifted", "accuracy"]
    for name in names:
        assert json.loads((everything / f"{name}.json").read_text())["results"]
        assert (everything / f"{name}.csv").read_text().count("\n") > 2
        assert (everything / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    # Trained once, used by all: five kinds of the ablation and the border-shifted one, two seeds each.
    assert len(list((everything / "networks").iterdir())) == 12


def test_the_page_needs_no_other_file(everything):
    text = (everything / "report.html").read_text(encoding="utf-8")
    assert re.findall(r'(?:src|href)="(?!data:image/png;base64,|#|https://arxiv\.org)', text) == []
    assert text.count("data:image/png;base64,") == 8
    for study in command.STUDIES.values():
        assert f'<h2 id="{study.name}">{study.title}</h2>' in text
    assert (
        text.count("study all --quick --nets resnet8 --epochs 1 --limit 64 --test-limit 90 --seeds 2 --prunings 1")
        == 6
    )


def test_folding_changes_no_accuracy(everything):
    for result in read(everything / "rotation.json"):
        for name in ORIENTATIONS:
            assert result.values[name] == result.values[f"{name}, unfolded"]


def test_the_unpruned_network_is_the_ablations(everything):
    ablated = {Network.of(r.cell): r.values["top1"] for r in read(everything / "ablation.json")}
    unpruned = [r for r in read(everything / "pruning.json") if r.cell["sparsity"] == "0"]
    assert {r.cell["seed"] for r in unpruned} == {0, 1}
    for result in unpruned:
        of = Network.of(result.cell)
        assert result.values["top1"] == ablated.get(of, result.values["top1"])


def test_plots_are_made_again_without_measuring(everything, capsys, monkeypatch):
    before = (everything / "ablation.csv").read_text()
    (everything / "ablation.csv").unlink()
    (everything / "ablation.png").unlink()
    monkeypatch.setattr(command, "Lab", None)
    code, printed, errors = run(capsys, "ablation", "--plot-only", "--out", everything)
    assert (code, errors) == (0, "")
    assert (everything / "ablation.csv").read_text() == before
    assert (everything / "ablation.png").exists()
    assert "ACNet, one batch norm" in printed


@pytest.mark.parametrize("name", list(command.STUDIES))
def test_unfinished_results_can_be_shown(everything, tmp_path, name):
    study, results = command.STUDIES[name], read(everything / f"{name}.json")[:1]
    assert all(len(row) == len(study.table(results).header) for row in study.table(results).rows)
    assert isinstance(study.finding(results), str)
    for file, plot in study.plots.items():
        plot(results, tmp_path / file)
        assert (tmp_path / file).exists()


def test_results_are_kept_unless_resumed(everything, capsys):
    before = (everything / "shifted.json").read_bytes()
    code, _, errors = run(capsys, "shifted", *TINY, "--out", everything)
    assert code == 2
    assert "already holds results: go on with --resume, or give another --out" in errors
    assert (everything / "shifted.json").read_bytes() == before
    code, printed, _ = run(capsys, "shifted", *TINY, "--out", everything, "--resume")
    assert code == 0
    assert "0 of 6 cells are to be measured" in printed


def test_networks_trained_otherwise_stay_apart(tmp_path, capsys):
    """One --out, three commands that differ in network, length or size: nothing is averaged over them."""
    one = [*TINY, "--seeds", 1, "--out", tmp_path]
    commands = [one, [*one, "--net", "resnet14"], [*one, "--epochs", 2]]
    alone = []
    for number, options in enumerate(commands):
        assert run(capsys, "shifted", *options, *(["--resume"] if number else []))[0] == 0
        alone.append(read(tmp_path / "shifted.json")[3 * number :])
    results = read(tmp_path / "shifted.json")
    groups = command.STUDIES["shifted"].groups(results)
    assert groups == alone
    assert [subject(group) for group in groups] == ["resnet8 on digits", "resnet14 on digits", "resnet8 on digits"]
    for group in groups:
        assert [row[1] for row in shifted.table(group).rows] == ["1"] * 3
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert text.count("<table>") == text.count("data:image/png") == 3
    assert [name.name for name in sorted(tmp_path.glob("*.png"))] == [
        "shifted-2.png", "shifted-3.png", "shifted.png",
    ]  # fmt: skip
    # Every command is there, beside what it measured.
    assert re.findall(r"<code>(.*?) --out", text) == [
        f"python -m acnet_kernels study shifted --quick {net}--nets resnet8 --epochs {epochs} --limit 64 "
        "--test-limit 90 --seeds 1 --prunings 1"
        for net, epochs in (("", 1), ("--net resnet14 ", 1), ("", 2))
    ]
    assert len({r.run["command"] for r in results}) == 3


def test_directories_of_one_name_are_two_data_sets(tmp_path):
    lab = Lab(config.QUICK, tmp_path, torch.device("cpu"), None, 0)
    places = {lab._place(Network.of({**SEED_0, **change})) for change in (
        {"data": "a/photos"}, {"data": "b/photos"}, {"recipe": "2 epochs"}, {"backend": "eager"},
        {"block": "plain"}, {"net": "m"}, {"seed": 1},
    )}  # fmt: skip
    assert len(places) == 7


def test_the_accuracy_table_has_a_row_a_training():
    results = [
        r
        for of in ({}, {"recipe": "2 epochs"}, {"backend": "eager"}, {"data": "cifar100"})
        for block in ("plain", "acb")
        for r in measured(block, 0.5, 0.7, **of)
    ]
    rows = accuracy.table(results).rows
    assert [row[:4] for row in rows] == [
        ("resnet56", "cifar10", "1 epoch", "2"),
        ("resnet56", "cifar10", "2 epochs", "2"),
        ("resnet56", "cifar10", "1 epoch, backend eager", "2"),
        ("resnet56", "cifar100", "1 epoch", "2"),
    ]


def test_words_of_a_recipe_tell_all_that_decides_its_weights():
    changes = {"epochs": 1, "lr": 1.0, "batch_size": 1, "weight_decay": 1.0, "bias_lr_factor": 3.0}
    changes |= {"amp": "bf16", "limit": 1}
    apart = {"data", "net", "block", "backend", "seed"}  # coordinates of their own
    assert {*changes, *apart, "image_size"} == {field.name for field in dataclasses.fields(Recipe)}
    recipes = [dataclasses.replace(config.QUICK.recipe, **{name: value}) for name, value in changes.items()]
    recipes += [config.QUICK.recipe, dataclasses.replace(config.QUICK.recipe, data="photos")]
    recipes += [dataclasses.replace(config.QUICK.recipe, data="photos", image_size=32)]
    words = [config.QUICK.words(recipe) for recipe in recipes]
    words += [dataclasses.replace(config.QUICK, test_limit=7).words(config.QUICK.recipe)]
    assert len(set(words)) == len(words)


def test_an_interrupted_study_goes_on_and_gives_the_same_numbers(everything, tmp_path, capsys, monkeypatch):
    study, calls = command.STUDIES["shifted"], []

    def interrupted(lab, cell):
        calls.append(cell)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return study.measure(lab, cell)

    monkeypatch.setitem(command.STUDIES, "shifted", dataclasses.replace(study, measure=interrupted))
    code, printed, _ = run(capsys, "shifted", *TINY, "--out", tmp_path)
    assert code == 130
    assert "stopped; the same command with --resume goes on from there" in printed
    assert "2 of 6 networks done" in printed
    assert "3 of 6 networks done" not in printed
    assert len(read(tmp_path / "shifted.json")) == 3
    assert run(capsys, "magnitudes", *TINY, "--out", tmp_path)[0] == 0  # leaves the unfinished one out of the page
    assert re.findall('h2 id="(.*?)"', (tmp_path / "report.html").read_text()) == ["magnitudes"]
    code, printed, _ = run(capsys, "shifted", *TINY, "--out", tmp_path, "--resume")
    assert code == 0
    assert "3 of 6 cells are to be measured" in printed
    assert len(calls) == 6
    again, before = read(tmp_path / "shifted.json"), read(everything / "shifted.json")
    assert [(r.cell, r.values) for r in again] == [(r.cell, r.values) for r in before]


@pytest.fixture
def photographs(tmp_path):
    """A directory of two classes of images, one each."""
    for part, name in itertools.product(("train", "val"), ("cat", "dog")):
        folder = tmp_path / "photographs" / part / name
        folder.mkdir(parents=True)
        Image.new("RGB", (80, 80)).save(folder / "1.png")
    return tmp_path / "photographs"


@pytest.mark.parametrize("study", ["pruning", "ablation", "accuracy"])
@pytest.mark.parametrize("net", ["resnet50", "vgg16", "cifar-quick"])
def test_cifars_networks_are_refused_for_photographs(tmp_path, capsys, photographs, study, net):
    out = tmp_path / "out"
    nets = ["--net", net, "--nets", net]
    code, _, errors = run(capsys, study, "--data", photographs, *nets, "--workers", 0, "--out", out)
    assert code == 2
    assert (
        f"net {net} is one for CIFAR's images, up to 64 pixels a side, and the data has images of 224×224" in errors
    )
    assert "alexnet, alexnet-bn, resnet18, densenet121" in errors
    assert errors.count("\n") == 1
    assert not out.exists()


def test_photographs_of_cifars_size_take_its_networks(tmp_path, capsys, photographs):
    options = [
        "--net",
        "resnet8",
        "--image-size",
        16,
        "--epochs",
        1,
        "--batch-size",
        2,
        "--seeds",
        1,
        "--workers",
        0,
    ]
    assert run(capsys, "shifted", "--data", photographs, *options, "--out", tmp_path / "out")[0] == 0
    results = read(tmp_path / "out/shifted.json")
    assert {r.cell["data"] for r in results} == {str(photographs)}
    assert all("16×16 pixels" in r.cell["recipe"] and r.values["data_set"] == "" for r in results)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["accuracy", "--nets", "resnet8", "nosuch"], "net must be cifar-quick, vgg16"),
        (["all", "--nets", "resnet8", "resnet10"], "6n+2 layers"),
        (["magnitudes", "--net", "wrn10-0"], "k ≥ 1"),
        (["pruning", "--net", "nosuch"], "net must be"),
        (["accuracy", "--nets", "resnet8", "resnet18"], "net resnet18 takes images of 3 channels"),
    ],
)
def test_every_name_is_checked_before_the_first_training(tmp_path, capsys, arguments, said):
    out = tmp_path / "out"
    code, printed, errors = run(capsys, *arguments, "--quick", "--out", out)
    assert (code, printed) == (2, "")
    assert said in errors
    assert errors.count("\n") == 1
    assert not out.exists()


def test_names_that_a_study_does_not_use_do_not_stop_it(tmp_path, capsys):
    assert run(capsys, "shifted", *TINY, "--seeds", 1, "--nets", "nosuch", "--out", tmp_path)[0] == 0


# Disks.

full_disk = pytest.mark.skipif(
    not os.path.exists("/dev/full"), reason="this system has no device that is always full"
)


@full_disk
def test_a_full_disk_is_one_sentence_and_loses_nothing(tmp_path, capsys):
    assert run(capsys, "shifted", *TINY, "--seeds", 1, "--out", tmp_path)[0] == 0
    before = (tmp_path / "shifted.json").read_bytes()
    (tmp_path / "shifted.json.tmp").symlink_to("/dev/full")
    code, _, errors = run(capsys, "shifted", *TINY, "--out", tmp_path, "--resume")
    assert code == 2
    assert (
        f"--out {tmp_path} cannot be written: No space left on device; whatever was finished before is kept"
        in errors
    )
    assert errors.count("\n") == 1
    assert (tmp_path / "shifted.json").read_bytes() == before
    assert not list(tmp_path.glob("*.tmp"))
    assert run(capsys, "shifted", *TINY, "--out", tmp_path, "--resume")[0] == 0
    assert len(read(tmp_path / "shifted.json")) == 6


@full_disk
@pytest.mark.parametrize("name", ["shifted.csv", "shifted.png", "report.html"])
def test_figures_and_tables_that_find_no_room_are_one_sentence(tmp_path, capsys, name):
    Store(tmp_path / "shifted.json", RUN).add(
        {**SEED_0, "block": "plain"}, {"top1": 0.5, "top5": 1.0, "data_set": ""}
    )
    (tmp_path / name).symlink_to("/dev/full")
    code, _, errors = run(capsys, "shifted", "--plot-only", "--out", tmp_path)
    assert code == 2
    assert "cannot be written: No space left on device" in errors
    assert errors.count("\n") == 1


def test_a_checkpoint_that_finds_no_room_is_one_sentence(tmp_path, capsys):
    """While no file may grow beyond 100 KB; torch's own message is of a position in a zip file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        code, _, errors = run(capsys, "shifted", *TINY, "--seeds", 1, "--out", tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert code == 2, errors
    assert f"--out {tmp_path} cannot be written: File too large; whatever was finished before is kept" in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_read_only_directory_is_one_sentence(tmp_path, number):
    with (
        pytest.raises(UserError, match=f"--out {tmp_path} cannot be written: {os.strerror(number)}"),
        writing(tmp_path),
    ):
        raise OSError(number, os.strerror(number))


@pytest.mark.parametrize("error", [BrokenPipeError(), RuntimeError("a bug"), FileNotFoundError(2, "missing")])
def test_other_errors_keep_their_own_name(tmp_path, error):
    with pytest.raises(type(error)), writing(tmp_path):
        raise error


# Shards.


def outcome(folder, name):
    """Cell → values of a study's results, in no order."""
    return {json.dumps(r.cell, sort_keys=True): r.values for r in merged(sorted(folder.glob(f"{name}*.json")))}


def test_shards_share_the_work_and_merge_into_what_one_run_gives(everything, tmp_path, capsys, monkeypatch):
    """In one directory, as of several sessions; one shard trains a network, and uses it for all studies."""
    monkeypatch.setattr(*FEW_POINTS)
    # These have every network, what is random, and several results a network; the others would be more of that.
    monkeypatch.setattr(command, "STUDIES", {n: command.STUDIES[n] for n in ("ablation", "pruning", "accuracy")})
    for part in (1, 2, 3):
        code, printed, _ = run(capsys, "all", *TINY, "--shard", f"{part}/3", "--out", tmp_path)
        assert code == 0
        assert f"part {part} of 3 is done; --resume without --shard merges the parts" in printed
        assert len(list((tmp_path / "networks").iterdir())) == 4 * part
    assert not list(tmp_path.glob("*.png"))
    assert not (tmp_path / "ablation.json").exists()
    code, printed, _ = run(capsys, "all", *TINY, "--resume", "--out", tmp_path)
    assert code == 0
    assert "networks done" not in printed
    for name in command.STUDIES:
        assert f"{name}: 0 of " in printed
        results = read(tmp_path / f"{name}.json")
        assert (
            outcome(tmp_path, name)
            == outcome(everything, name)
            == {json.dumps(r.cell, sort_keys=True): r.values for r in results}
        )
        # Each cell keeps the command of its shard; the tables are those of one run.
        assert {re.search(r"--shard ./3", r.run["command"])[0] for r in results} == {
            f"--shard {i}/3" for i in (1, 2, 3)
        }
        assert (tmp_path / f"{name}.csv").exists()
        tables = [
            [part.table for part in command.parts(command.STUDIES[name], folder)]
            for folder in (tmp_path, everything)
        ]
        assert tables[0] == tables[1]


def test_a_missing_shard_is_made_up_for_and_copied_ones_are_shown(tmp_path, capsys):
    one, other = tmp_path / "one machine", tmp_path / "another"
    assert run(capsys, "shifted", *TINY, "--shard", "1/2", "--out", one)[0] == 0
    assert run(capsys, "shifted", *TINY, "--shard", "2/2", "--out", other)[0] == 0
    shutil.copy(one / "shifted.shard-1-of-2.json", other)
    # Without measuring: what is there, merged.
    code, printed, _ = run(capsys, "shifted", "--plot-only", "--out", other)
    assert code == 0
    assert [row[1] for part in command.parts(command.STUDIES["shifted"], other) for row in part.table.rows] == [
        "2"
    ] * 3
    code, printed, _ = run(capsys, "shifted", *TINY, "--resume", "--out", one)
    assert code == 0
    assert "3 of 6 cells are to be measured" in printed
    assert outcome(one, "shifted") == outcome(other, "shifted")


def test_a_shard_goes_on_alone_and_is_not_begun_twice(tmp_path, capsys):
    shard = ["shifted", *TINY, "--shard", "1/2", "--out", tmp_path]
    assert run(capsys, *shard)[0] == 0
    code, _, errors = run(capsys, *shard)
    assert code == 2
    assert "shifted.shard-1-of-2.json already holds results: go on with --resume" in errors
    code, _, errors = run(capsys, "shifted", *TINY, "--out", tmp_path)
    assert code == 2
    assert "already holds results" in errors
    code, printed, _ = run(capsys, *shard, "--resume")
    assert code == 0
    assert "0 of 3 cells are to be measured" in printed


def test_shards_are_balanced_and_the_same_for_every_study():
    full = config.make(False)
    parts = [command._networks(full, (i, 4)) for i in (1, 2, 3, 4)]
    assert sum(map(len, parts)) == len(set().union(*parts)) == len(command._networks(full, None))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    for study in command.STUDIES.values():
        networks = {Network.of(cell) for cell in study.cells(full)}
        assert networks <= set().union(*parts)
        shares = [len(networks & part) for part in parts]
        assert max(shares) - min(shares) <= 2, study.name


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "1/0", "a/b", "1/2/3", "-1/2"])
def test_a_shard_that_is_none_is_refused(capsys, text):
    code, _, errors = run(capsys, "shifted", f"--shard={text}")
    assert code == 2
    assert f"argument --shard: must be I/N with I from 1 to N, as 1/4, got {text!r}" in errors


def test_a_shard_measures_and_a_plot_does_not(capsys):
    code, _, errors = run(capsys, "shifted", "--shard", "1/2", "--plot-only")
    assert code == 2
    assert "give one of them" in errors


# What else decides a training, and how long it takes.


def test_backend_and_weight_decay_reach_the_training_and_its_record(tmp_path, capsys):
    options = ["--backend", "eager", "--weight-decay", "0"]
    assert run(capsys, "shifted", *TINY, *options, "--seeds", 1, "--out", tmp_path)[0] == 0
    for result in read(tmp_path / "shifted.json"):
        assert result.cell["backend"] == "eager"
        assert "weight decay 0.0" in result.cell["recipe"]
        assert " --weight-decay 0.0 --backend eager " in result.run["command"]
    saved = checkpoints.load(next((tmp_path / "networks").glob("*-acb-seed0-*")) / "last.pt")
    assert (saved["recipe"]["backend"], saved["recipe"]["weight_decay"]) == ("eager", 0.0)
    assert "backend eager" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_the_forecast_is_of_the_whole_study():
    """Two networks of 10 epochs, one of 4 of another kind: by their own epochs, else by the mean; and measuring."""
    small, again, large = (
        Network.of({**SEED_0, "seed": s, "net": net}) for s, net in ((0, "a"), (1, "a"), (0, "b"))
    )
    now, text = [0.0], io.StringIO()
    forecast = Forecast({small: 10, again: 10, large: 4}, Console(file=text, width=200), clock=lambda: now[0])
    assert forecast.seconds() == 0  # nothing is known yet
    with forecast.training(small, "small") as observer:
        observer.start(10, 5, 0, 0)
        now[0] += 60
        observer.epoch(ROW)
        assert forecast.seconds() == 60 * (9 + 10 + 4)
        for _ in range(9):
            now[0] += 60
            observer.epoch(ROW)
    with forecast.measuring("small", 1):
        now[0] += 30
    forecast.done(small)
    assert forecast.seconds() == 60 * (10 + 4) + 2 * 30
    with forecast.training(large, "large") as observer:
        observer.start(4, 5, 3, 2)  # resumed: three of its epochs were done before
        now[0] += 600
        observer.epoch(ROW)
    assert forecast.seconds() == 60 * 10 + 2 * 30
    with forecast.measuring("large", 1):
        now[0] += 30
    forecast.done(large)
    lines = [line for line in text.getvalue().splitlines() if "networks done" in line]
    assert lines == [
        "0 of 3 networks done, about 23 min left for the rest",
        "1 of 3 networks done, about 15 min left for the rest",
        "2 of 3 networks done, about 10 min left for the rest",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (99, "99 s"), (125, "2 min"), (5940, "99 min"), (6000, "1 h 40 min"), (86400, "24 h 0 min")],
)
def test_durations_are_told_as_people_do(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["colours"], "invalid choice: 'colours'"),
        (["ablation", "--seeds", "0"], "argument --seeds: must be an int above 0, got '0'"),
        (["ablation", "--plot-only"], "ablation.json is missing: run the study before --plot-only"),
        (["ablation", *TINY, "--net", "resnet9"], "6n+2 layers"),
        (["ablation", *TINY, "--limit", "9999"], "--limit must be at most the 1437"),
        (["ablation", *TINY, "--test-limit", "361"], "--test-limit must be at most the 360 test images there are"),
    ],
)
def test_wrong_use_is_one_sentence(tmp_path, capsys, arguments, said):
    code, _, errors = run(capsys, *arguments, "--out", tmp_path)
    assert code == 2
    assert said in errors
    assert errors.count("\n") == 1


def test_larger_kernels_are_studied_and_drawn_under_their_own_name(tmp_path, capsys, monkeypatch):
    written = []
    monkeypatch.setattr(*FEW_POINTS)
    monkeypatch.setattr(matplotlib.text.Text, "set_text", lambda self, text: written.append(str(text)))
    for name in ("pruning", "magnitudes"):
        assert run(capsys, name, *TINY, "--seeds", 1, "--net", "cifar-quick", "--out", tmp_path)[0] == 0
    assert {"zeros (% of all 5×5 weights) in:", "5×5 layer, from the input", "16/25"} <= set(written)
    assert not any("3×3" in text for text in written)
    with (tmp_path / "magnitudes.csv").open(encoding="utf-8") as file:
        assert file.readline().rstrip().endswith("40,41,42,43,44")


def test_long_networks_can_be_drawn(tmp_path):
    panels = {"deep": {str(i): torch.rand(3, 3) for i in range(55)}}
    plots.layers(panels, "55 layers", tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 1000
