"""Converts well-known architectures into ACNets, trains a step, folds them, and prints a table of what came out.

    python tools/architectures.py [NAME ...]

Weights are random (nothing is downloaded), batch-norm statistics too. Equalities are judged in float64.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from acnet_kernels import ACBlock, convert, explain, fuse


class UNet(nn.Module):
    """The usual U-Net in small: double convolutions, pooling down, transposed convolutions up, skips."""

    def __init__(self, width: int = 8):
        super().__init__()

        def double(c: int, k: int) -> nn.Sequential:
            layers = []
            for i in (c, k):
                layers += [nn.Conv2d(i, k, 3, padding=1, bias=False), nn.BatchNorm2d(k), nn.ReLU(inplace=True)]
            return nn.Sequential(*layers)

        widths = [width, 2 * width, 4 * width]
        self.downs = nn.ModuleList([double(3, widths[0]), double(widths[0], widths[1])])
        self.bottom = double(widths[1], widths[2])
        self.ups = nn.ModuleList([nn.ConvTranspose2d(2 * w, w, 2, 2) for w in widths[1::-1]])
        self.joins = nn.ModuleList([double(2 * w, w) for w in widths[1::-1]])
        self.head = nn.Conv2d(width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for down in self.downs:
            x = down(x)
            skips.append(x)
            x = nn.functional.max_pool2d(x, 2)
        x = self.bottom(x)
        for up, join in zip(self.ups, self.joins, strict=True):
            x = join(torch.cat([skips.pop(), up(x)], 1))
        return self.head(x)


def from_torchvision(name: str, **options: object) -> Callable[[], nn.Module]:
    """Builds the model without weights."""
    return lambda: torchvision.models.get_model(name, weights=None, **options)


def backbone(name: str) -> Callable[[], nn.Module]:
    """The backbone of a detection or segmentation model, with the norms that model has."""
    return lambda: torchvision.models.get_model(name, weights=None, weights_backbone=None).backbone


def frozen_backbone(name: str) -> Callable[[], nn.Module]:
    """A feature pyramid on a ResNet with FrozenBatchNorm2d, as detectors with pretrained backbones have it."""
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    norm = torchvision.ops.FrozenBatchNorm2d
    return lambda: resnet_fpn_backbone(backbone_name=name, weights=None, norm_layer=norm, trainable_layers=5)


def from_timm(name: str, **options: object) -> Callable[[], nn.Module]:
    """Builds the model without weights."""
    return lambda: timm.create_model(name, pretrained=False, **options)


ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {
    "torchvision resnet18": from_torchvision("resnet18"),
    "torchvision resnet50": from_torchvision("resnet50"),
    "torchvision vgg11_bn": lambda: torchvision.models.vgg11_bn(weights=None).features,
    "torchvision densenet121": from_torchvision("densenet121"),
    "torchvision regnet_y_400mf": from_torchvision("regnet_y_400mf"),
    "torchvision mobilenet_v2": from_torchvision("mobilenet_v2"),
    "torchvision mobilenet_v3_small": from_torchvision("mobilenet_v3_small"),
    "torchvision shufflenet_v2_x0_5": from_torchvision("shufflenet_v2_x0_5"),
    "torchvision convnext_tiny": from_torchvision("convnext_tiny"),
    "torchvision efficientnet_b0": from_torchvision("efficientnet_b0"),
    "torchvision mnasnet0_5": from_torchvision("mnasnet0_5"),
    "torchvision googlenet": from_torchvision("googlenet", init_weights=False, aux_logits=False),
    "torchvision squeezenet1_1": from_torchvision("squeezenet1_1"),
    "torchvision fcn_resnet50 backbone": backbone("fcn_resnet50"),
    "torchvision deeplabv3_mobilenet_v3_large backbone": backbone("deeplabv3_mobilenet_v3_large"),
    "torchvision resnet18 + FPN, FrozenBatchNorm2d": frozen_backbone("resnet18"),
    "torchvision ssdlite320_mobilenet_v3_large backbone": backbone("ssdlite320_mobilenet_v3_large"),
    "timm resnet10t": from_timm("resnet10t"),
    "timm resnext26ts": from_timm("resnext26ts"),
    "timm regnetx_002": from_timm("regnetx_002"),
    "timm mobilenetv3_small_050": from_timm("mobilenetv3_small_050"),
    "timm efficientnet_lite0": from_timm("efficientnet_lite0"),
    "timm convnext_atto": from_timm("convnext_atto"),
    "timm dla34": from_timm("dla34"),
    "timm ghostnet_050": from_timm("ghostnet_050"),
    "timm repvgg_a0": from_timm("repvgg_a0"),
    "timm ese_vovnet19b_slim": from_timm("ese_vovnet19b_slim"),
    "U-Net": UNet,
}
KERNELS = {"torchvision convnext_tiny": (3, 5, 7), "timm convnext_atto": (3, 5, 7)}


@dataclass(frozen=True)
class Row:
    """What came out for one architecture; errors are relative, in float64."""

    name: str
    convolutions: int  # square ones of the sizes asked for
    blocks: int
    absorbed: int  # of the blocks, those that took a batch norm in
    parameters: tuple[int, int, int]  # plain, ACNet, folded
    from_conv_error: float
    loss: float
    trained: bool  # every block's hor and ver γ left 0
    fold_error: float


def randomise(model: nn.Module) -> None:
    """Random batch norms of every kind, so that no term vanishes from the comparisons."""
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, torchvision.ops.FrozenBatchNorm2d)):
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 1.5)
            with torch.no_grad():
                module.weight.uniform_(0.7, 1.3)
                module.bias.uniform_(-0.2, 0.2)


def outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Every tensor that comes out of model, whatever it is wrapped in."""
    return [t for t in tree_leaves(model(x)) if isinstance(t, Tensor)]


def error(got: nn.Module, want: nn.Module, x: Tensor) -> float:
    """The largest relative difference between two networks' outputs in eval, in float64."""
    got, want = copy.deepcopy(got).double().eval(), copy.deepcopy(want).double().eval()
    with torch.no_grad():
        pairs = zip(outputs(got, x.double()), outputs(want, x.double()), strict=True)
        return max(float((a - b).norm() / b.norm()) for a, b in pairs)


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def examine(name: str) -> Row:
    """Builds, converts, compares, trains a step, folds, compares."""
    torch.manual_seed(0)
    model = ARCHITECTURES[name]()
    randomise(model)
    sizes = KERNELS.get(name, (3, 5))
    x = torch.randn(2, 3, 64, 64)
    acnet = convert(model, init="from_conv", kernel_sizes=sizes)
    blocks = [m for m in acnet.modules() if isinstance(m, ACBlock)]
    from_conv_error = error(acnet, model, x)
    optimizer = torch.optim.SGD([p for p in acnet.parameters() if p.requires_grad], 1e-2)
    loss = torch.stack([t.square().mean() for t in outputs(acnet.train(), x)]).sum()
    loss.backward()
    optimizer.step()
    gammas = [norm.weight for b in blocks for side, norm in b.norms().items() if side != "square"]
    acnet.eval()
    folded = fuse(acnet)
    done = [c for c in explain(acnet).conversions if c.converted]
    return Row(
        name=name,
        convolutions=sum(
            isinstance(m, nn.Conv2d) and m.kernel_size in [(k, k) for k in sizes] for m in model.modules()
        ),
        blocks=len(blocks),
        absorbed=sum(c.note == "with its batch norm" for c in done),
        parameters=(size(model), size(acnet), size(folded)),
        from_conv_error=from_conv_error,
        loss=loss.item(),
        trained=all(bool((gamma != 0).any()) for gamma in gammas),
        fold_error=error(folded, acnet, x),
    )


def table(rows: list[Row]) -> str:
    """The rows in Markdown."""
    lines = [
        "| architecture | square convolutions | blocks (with their batch norm) | parameters: plain → ACNet → "
        "folded | `from_conv` error | one step | fold error |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        millions = " → ".join(f"{p / 1e6:.2f} M" for p in r.parameters)
        step = "trains" if r.trained else "does not train"
        lines.append(
            f"| {r.name} | {r.convolutions} | {r.blocks} ({r.absorbed}) | {millions} | {r.from_conv_error:.0e} "
            f"| {step} | {r.fold_error:.0e} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="one of: " + "; ".join(ARCHITECTURES))
    names = parser.parse_args().names or list(ARCHITECTURES)
    unknown = sorted(set(names) - set(ARCHITECTURES))
    if unknown:
        parser.error(f"unknown architecture {unknown[0]!r}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision's notes on initialisation
        print(table([examine(name) for name in names]))


if __name__ == "__main__":
    main()
