"""timm's and torchvision's architectures as ACNets: the checks behind the table of tools/architectures.py."""

import pytest
from toolbox import load_tool

pytest.importorskip("timm", reason="its networks are converted: extra `test`")
architectures = load_tool("architectures")

NOTHING_ABSORBED = {  # the convolution's reader is no plain nn.BatchNorm2d, or reads other tensors too
    "torchvision densenet121",
    "torchvision convnext_tiny",
    "torchvision squeezenet1_1",
    "torchvision resnet18 + FPN, FrozenBatchNorm2d",
    "timm resnext26ts",
    "timm regnetx_002",
    "timm mobilenetv3_small_050",
    "timm efficientnet_lite0",
    "timm convnext_atto",
    "timm repvgg_a0",
    "timm ese_vovnet19b_slim",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", architectures.ARCHITECTURES)
def test_architecture(name):
    row = architectures.examine(name)
    assert row.blocks == row.convolutions > 0
    assert row.absorbed == (0 if name in NOTHING_ABSORBED else row.blocks)
    assert row.from_conv_error < 1e-6
    assert row.trained
    assert 0 < row.loss < 100
    assert row.fold_error < 1e-6
    plain, acnet, folded = row.parameters
    assert acnet > plain
    # folding leaves the convolutions' size: each absorbed γ, β pair becomes a bias, each bare one gains a bias
    assert abs(folded - plain) < 0.005 * plain + 200


def test_the_table_has_a_line_for_each():
    row = architectures.examine("U-Net")
    assert len(architectures.table([row, row]).splitlines()) == 4
    assert f"| U-Net | 10 | 10 (10) | {row.parameters[0] / 1e6:.2f} M →" in architectures.table([row])
    assert len(architectures.ARCHITECTURES) >= 20
