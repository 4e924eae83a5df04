"""The networks: sizes, skeletons, what is an ACBlock and what is not."""

import pytest
import torch
from torch import nn

from acnet_kernels import ACBlock
from acnet_kernels.paper import models


def count(model):
    return sum(p.numel() for p in model.parameters())


def resnet_parameters(depth, classes=10, channels=3, branches_taps=9, norms=1):
    """Counted by hand: 3×3 layers of `branches_taps` taps and `norms` batch norms, 1×1 shortcuts, one linear."""
    n, total, before = (depth - 2) // 6, 0, 16
    shapes = [(channels, 16)]
    for width in (16, 32, 64):
        for i in range(n):
            shapes += [(before if i == 0 else width, width), (width, width)]
        if width != before:
            total += before * width + 2 * width
        before = width
    return total + sum(c * k * branches_taps + 2 * k * norms for c, k in shapes) + 64 * classes + classes


@pytest.mark.parametrize(
    ("depth", "published_millions", "without_projection"),
    [(20, 0.27, 269_722), (32, 0.46, 464_154), (56, 0.85, 853_018)],
)
def test_plain_resnets_have_the_published_sizes(depth, published_millions, without_projection):
    # He et al. 2015, table 6, with parameter-free (option A) shortcuts; ours are 1×1 convolutions with batch
    # norm: 16·32 + 2·32 + 32·64 + 2·64 more.
    projections = 16 * 32 + 2 * 32 + 32 * 64 + 2 * 64
    found = count(models.build(f"resnet{depth}", 10, block="plain"))
    assert found == without_projection + projections == resnet_parameters(depth)
    assert round((found - projections) / 1e6, 2) == published_millions


@pytest.mark.parametrize(("classes", "channels"), [(10, 1), (100, 3)])
def test_acb_adds_two_strips_and_two_norms_a_layer(classes, channels):
    model = models.build("resnet20", classes, channels, "acb")
    assert count(model) == resnet_parameters(20, classes, channels, branches_taps=15, norms=3)


def test_every_3x3_layer_is_a_block_and_no_1x1_is():
    model = models.build("resnet14", 10, 3, "acb")
    blocks = [m for m in model.modules() if isinstance(m, ACBlock)]
    inside = {conv for block in blocks for conv in block.convs().values()}
    outside = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m not in inside]
    assert len(blocks) == 13
    assert [conv.kernel_size for conv in outside] == [(1, 1), (1, 1)]
    gammas = torch.cat([bn.weight for block in blocks for bn in block.norms().values()])
    assert torch.equal(gammas, torch.full_like(gammas, 1 / 3))


@pytest.mark.parametrize("block", ["acb", "acb-hor", "acb-border"])
def test_a_wide_resnets_inner_blocks_start_at_gamma_1(block):
    """As in the authors' code, whose reduced γ reaches the stem alone."""
    model = models.build("wrn10-2", 10, 3, block)
    gammas = {
        name: torch.cat([bn.weight for bn in module.norms().values()]).unique().tolist()
        for name, module in model.named_modules()
        if isinstance(module, ACBlock)
    }
    assert gammas.pop("stem") == pytest.approx([1 / 3])
    assert list(gammas.values()) == [[1.0]] * 6


def test_a_wide_resnets_gamma_is_the_users_where_given():
    model = models.build("wrn10-1", 10, 3, "acb", reduce_gamma=False, gamma_init=0.5)
    blocks = [m for m in model.modules() if isinstance(m, ACBlock)]
    assert all(bn.weight.eq(0.5).all() for b in blocks for bn in b.norms().values())


def test_one_seed_gives_plain_and_acb_the_same_skeleton():
    torch.manual_seed(3)
    plain = models.build("resnet8", 10, 1, "plain").state_dict()
    after_plain = torch.rand(())
    torch.manual_seed(3)
    acb = models.build("resnet8", 10, 1, "acb", branches=("square", "ver")).state_dict()
    assert torch.equal(torch.rand(()), after_plain)
    for name, value in plain.items():
        if value.dim() == 4 or "classifier" in name:
            skeleton = name if "shortcut" in name else name.replace(".conv.weight", ".square_conv.weight")
            assert torch.equal(acb[skeleton], value), name
    torch.manual_seed(4)
    other = models.build("resnet8", 10, 1, "plain").state_dict()
    assert not torch.equal(other["stem.conv.weight"], plain["stem.conv.weight"])


def test_block_options_reach_every_block():
    model = models.build("resnet8", 10, 1, "acb", norm="sum", reduce_gamma=False, gamma_init=0.5, backend="eager")
    blocks = [m for m in model.modules() if isinstance(m, ACBlock)]
    assert {(b.norm, b.backend, b.bn.weight[0].item()) for b in blocks} == {("sum", "eager", 0.5)}


@pytest.mark.parametrize("size", [(8, 8), (28, 28), (7, 13), (1, 1)])
def test_any_image_size_gives_logits(size):
    model = models.build("resnet8", 7, 2, "acb").eval()
    assert model(torch.randn(3, 2, *size)).shape == (3, 7)


@pytest.mark.parametrize("name", ["resnet50", "vgg16", "cifar-quick", "wrn16-8", "densenet40"])
def test_cifars_networks_are_not_made_for_photographs(name):
    models.check_size(name, (64, 64))
    for size in ((65, 64), (64, 224)):
        said = rf"net {name} is one for CIFAR's images, up to 64 .* {size[0]}×{size[1]}: for these take alexnet, "
        with pytest.raises(ValueError, match=said):
            models.check_size(name, size)


@pytest.mark.parametrize(("name", "least"), [("alexnet", 63), ("densenet121", 29), ("resnet18", 1)])
def test_imagenets_networks_name_the_smallest_images_that_they_can_take(name, least):
    models.check_size(name, (least, least))
    with torch.device("meta"):
        model = models.build(name, 10, 3, "plain").eval()
        assert model(torch.zeros(1, 3, least, least)).shape == (1, 10)
        if least > 1:
            with pytest.raises(RuntimeError):
                model(torch.zeros(1, 3, least - 1, least - 1))
            with pytest.raises(ValueError, match=f"net {name} takes images from {least} pixels a side on"):
                models.check_size(name, (least, least - 1))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"name": "resnet21"}, "6n.2 layers.*got 21"),
        ({"name": "resnet2"}, "got 2"),
        ({"name": "vgg"}, "net must be.*got 'vgg'"),
        ({"name": "resnet8", "block": "acnet"}, "block must be.*got 'acnet'"),
        ({"name": "resnet8", "block": "plain", "norm": "sum"}, r"takes no block options, got \['norm'\]"),
        ({"name": "resnet8", "branches": ("hor",)}, "branches must be"),
    ],
)
def test_wrong_arguments_are_named(arguments, said):
    with pytest.raises(ValueError, match=said):
        models.build(num_classes=10, **arguments)
