"""The paper's networks: published sizes, plain and ACB on one skeleton, recipes."""

import pytest
import torch
from torch import nn

from acnet_kernels import ACBlock, fuse
from acnet_kernels.paper import models
from acnet_kernels.paper.models import imagenet
from acnet_kernels.paper.training.folding import branchwise
from acnet_kernels.paper.training.presets import PRESETS


def meta(name, classes, block):
    """The network without its weights: fast, whatever its size."""
    with torch.device("meta"):
        return models.build(name, classes, 3, block)


def count(model):
    return sum(p.numel() for p in model.parameters())


def blocks_of(model):
    return [m for m in model.modules() if isinstance(m, ACBlock)]


# Published: Caffe's cifar10_quick 145,578 (with 128 convolution biases, without the 256 of our batch norms);
# VGG-16 for CIFAR 1.5·10⁷ (Li et al. 2017); WRN-16-8 11.0 M (Zagoruyko and Komodakis 2016, table 4); DenseNet-40
# 1.0 M (Huang et al. 2017, table 2); torchvision's model pages for the last three, AlexNet's with 384 channels for
# 256 between conv4 and conv5. ResNets are in test_models.
SIZES = [
    ("cifar-quick", 10, 145_578 - 128 + 256, 145_706),
    ("vgg16", 10, 15.0e6, 14_986_698),
    ("wrn16-8", 10, 11.0e6, 10_961_370),
    ("densenet40", 10, 1.0e6, 1_019_722),
    ("alexnet", 1000, 61_100_840 + 128 * (384 * 9 + 1) + 128 * 256 * 9, 61_838_248),
    ("resnet18", 1000, 11_689_512, 11_689_512),
    ("densenet121", 1000, 7_978_856, 7_978_856),
]


@pytest.mark.parametrize(("name", "classes", "published", "exact"), SIZES)
def test_plain_networks_have_the_published_sizes(name, classes, published, exact):
    found = count(meta(name, classes, "plain"))
    assert found == exact
    rounded = found if isinstance(published, int) else round(found / 1e5) * 1e5
    assert rounded == published


@pytest.mark.parametrize("name", [name for name, *_ in SIZES])
def test_acb_adds_two_strips_and_its_norms_to_every_layer_beyond_1x1(name):
    classes = 10 if name not in imagenet.NAMES else 1000
    plain, acb = meta(name, classes, "plain"), meta(name, classes, "acb")
    layers = [m for m in plain.modules() if isinstance(m, nn.Conv2d) and 1 < m.kernel_size[0] < 7]
    assert len(blocks_of(acb)) == len(layers)
    strips = sum(2 * m.kernel_size[0] * m.in_channels * m.out_channels for m in layers)
    outputs = sum(m.out_channels for m in layers)
    # Three norms where there was one; where the plain layer has none, three, and its bias goes (AlexNet).
    norms = {"alexnet": 6 - 1, "wrn16-8": 6, "densenet40": 6, "densenet121": 6}.get(name, 4)
    assert count(acb) - count(plain) == strips + norms * outputs


@pytest.mark.parametrize("name", ["cifar-quick", "vgg16", "wrn10-2", "densenet10", "resnet18"])
def test_one_seed_gives_both_forms_the_same_square_kernels(name):
    kernels = {}
    for block in ("plain", "acb"):
        torch.manual_seed(5)
        model = models.build(name, 10, 3, block)
        skip = {id(b.convs()[n]) for b in blocks_of(model) for n in ("hor", "ver")}
        layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear)) and id(m) not in skip]
        kernels[block] = [layer.weight for layer in layers]
    assert len(kernels["plain"]) == len(kernels["acb"]) > 3
    assert all(torch.equal(a, b) for a, b in zip(*kernels.values(), strict=True))


@pytest.mark.parametrize(
    ("name", "size"),
    [("cifar-quick", 32), ("cifar-quick", 8), ("vgg16", 28), ("vgg16", 8), ("wrn10-1", 9), ("densenet10", 8)],
)
def test_folded_networks_predict_the_same(name, size):
    model = models.build(name, 7, 3, "acb")
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.3, 1)
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        expected = branchwise(model)(images)
        found = fuse(model.eval())(images)
    assert expected.shape == (2, 7)
    assert (found - expected).norm() <= 1e-5 * expected.norm()


def test_cifar_quick_ends_with_caffes_4x4_map():
    seen = []
    model = models.build("cifar-quick", 10, 3, "plain")
    model.hidden.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape))
    model.conv3.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape))
    model(torch.randn(1, 3, 32, 32))
    assert seen == [(1, 32, 8, 8), (1, 64 * 4 * 4)]


def test_wide_resnets_normalise_before_their_layers():
    torch.manual_seed(1)
    model = models.build("wrn10-1", 10, 3, "plain").eval()
    block = model.stages[1][0]
    x = torch.randn(2, 16, 6, 6)
    a = torch.relu(block.bn1(x))
    expected = block.conv2(torch.relu(block.bn2(block.conv1(a)))) + block.shortcut(a)
    torch.testing.assert_close(block(x), expected)
    assert isinstance(block.conv1, nn.Conv2d)
    assert model.stages[0][0].shortcut is None


@pytest.mark.parametrize(
    ("block", "branches", "norms", "gamma"),
    [
        ("acb", {"square", "hor", "ver"}, {"square", "hor", "ver"}, 1 / 3),
        ("acb-hor", {"square", "hor"}, {"square", "hor"}, 1 / 3),
        ("acb-ver", {"square", "ver"}, {"square", "ver"}, 1 / 3),
        ("acb-sum", {"square", "hor", "ver"}, {"sum"}, 1.0),
        ("acb-border", {"square", "hor", "ver"}, {"square", "hor", "ver"}, 1 / 3),
    ],
)
def test_variants_are_the_papers(block, branches, norms, gamma):
    for name, shift in (("resnet8", 1), ("cifar-quick", 2), ("resnet18", 1)):
        if name == "resnet18":
            gamma = 1.0
        for layer in blocks_of(models.build(name, 10, 3, block)):
            assert (set(layer.convs()), set(layer.norms())) == (branches, norms)
            assert layer.shift == ((shift, shift) if block == "acb-border" else (0, 0))
            assert all(bn.weight.eq(torch.tensor(gamma)).all() for bn in layer.norms().values())


def test_the_border_variant_strengthens_the_bottom_row_and_the_right_column():
    block = blocks_of(models.build("resnet8", 10, 3, "acb-border"))[0].eval()
    with torch.no_grad():
        block.square_conv.weight.zero_()
        block.hor_conv.weight.fill_(1)
        block.ver_conv.weight.fill_(1)
        kernel = block.get_equivalent_kernel_bias()[0][0, 0]
    assert kernel.ne(0).tolist() == [[False, False, True], [False, False, True], [True, True, True]]


def test_imagenet_networks_start_at_gamma_one_and_keep_their_stem():
    model = models.build("resnet18", 10, 3, "acb", backend="eager")
    blocks = blocks_of(model)
    assert type(model.conv1) is nn.Conv2d
    assert {b.backend for b in blocks} == {"eager"}
    assert all(bn.weight.eq(1).all() for b in blocks for bn in b.norms().values())


@pytest.mark.parametrize("name", ["alexnet", "alexnet-bn"])
@pytest.mark.parametrize("block", ["plain", "acb"])
def test_alexnet_has_the_papers_384_channels_in_its_fourth_layer(name, block):
    model = meta(name, 1000, block)
    layers = [m for m in model.features if isinstance(m, (nn.Conv2d, ACBlock))]
    assert [(m.in_channels, m.out_channels) for m in layers] == [
        (3, 64), (64, 192), (192, 384), (384, 384), (384, 256),
    ]  # fmt: skip
    assert [m.kernel_size for m in layers] == [(11, 11), (5, 5), (3, 3), (3, 3), (3, 3)]
    if block == "plain":
        assert model(torch.zeros(2, 3, 224, 224, device="meta")).shape == (2, 1000)


def test_alexnet_bn_differs_by_its_batch_norms_alone():
    plain, normalised = meta("alexnet", 1000, "plain"), meta("alexnet-bn", 1000, "plain")
    assert count(normalised) - count(plain) == 2 * (64 + 192 + 384 + 384 + 256)
    assert len(blocks_of(meta("alexnet-bn", 1000, "acb"))) == 4


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"name": "wrn15-8"}, r"6n\+4 layers.*got 15-8"),
        ({"name": "wrn16-0"}, "got 16-0"),
        ({"name": "densenet41"}, r"3n\+4 layers.*got 41"),
        ({"name": "resnet18", "in_channels": 1}, "net resnet18 takes images of 3 channels, the data has 1"),
        ({"name": "alexnet", "block": "acb-top"}, "block must be one of.*got 'acb-top'"),
        ({"name": "resnet18", "norm": "sums"}, "norm must be"),
        ({"name": "resnet18", "block": "plain", "backend": "eager"}, r"takes no block options, got \['backend'\]"),
        ({"name": "cifar-quick", "block": "plain", "backend": "eager"}, "takes no block options"),
    ],
)
def test_wrong_arguments_are_named(arguments, said):
    with pytest.raises(ValueError, match=said):
        models.build(num_classes=10, **arguments)


def test_presets_are_the_papers_recipes():
    found = {name: (p.batch_size, p.lr, p.epochs, p.weight_decay, p.bias_lr_factor) for name, p in PRESETS.items()}
    imagenet_recipe = (256, 0.1, 100, 1e-4, 2.0)
    assert found == {
        "cifar-quick": (128, 0.1, 150, 1e-4, 2.0),
        "vgg16": (128, 0.1, 400, 1e-4, 2.0),
        "resnet20": (128, 0.1, 400, 1e-4, 2.0),
        "resnet56": (128, 0.2, 400, 1e-4, 2.0),
        "wrn16-8": (128, 0.1, 400, 5e-4, 2.0),
        "densenet40": (128, 0.1, 400, 1e-4, 2.0),
        "alexnet-bn": imagenet_recipe,
        "resnet18": imagenet_recipe,
        "densenet121": imagenet_recipe,
    }
    assert all(name == recipe.net for name, recipe in PRESETS.items())
