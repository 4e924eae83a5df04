"""Networks of other libraries, untrained, by names like timm:mobileone_s0 and transformers:textnet."""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

from torch import Tensor, nn

from acnet_kernels.errors import UserError

PREFIXES = ("timm", "transformers")


class Images(nn.Module):
    """A network as one of images that gives N×classes: of what it returns, the logits or the last map's means."""

    def __init__(self, network: nn.Module, classes: int):
        super().__init__()
        self.network, self.classes = network, classes

    def forward(self, images: Tensor) -> Tensor:
        """N×C×H×W → N×classes."""
        found: Any = self.network(images)
        for name in ("logits", "feature_maps", "last_hidden_state"):
            found = getattr(found, name, found)
        found = found[-1] if isinstance(found, tuple) else found
        found = found.mean((2, 3)) if found.dim() == 4 else found
        return found[:, : self.classes]


class Name(NamedTuple):
    """A library and the name of a network there."""

    library: str
    network: str


def parse(text: str) -> Name | None:
    """The parts of a name, None where it is none of a library's."""
    library, colon, network = text.partition(":")
    return Name(library, network) if colon and library in PREFIXES else None


def check(name: Name) -> None:
    """UserError where the library is not here, or has no such network."""
    try:
        library = importlib.import_module(name.library)
    except ImportError:
        raise UserError(f"--networks {name.library}:… needs {name.library}: pip install {name.library}") from None
    if name.library == "timm":
        known = library.is_model(name.network)
    else:
        known = (
            name.network in importlib.import_module("transformers.models.auto.configuration_auto").CONFIG_MAPPING
        )
    if not known:
        raise UserError(f"--networks: {name.library} has no {name.network!r}")


def build(name: Name, classes: int) -> nn.Module:
    """The network, of random weights, in training mode."""
    library = importlib.import_module(name.library)
    if name.library == "timm":
        return library.create_model(name.network, num_classes=classes).train()
    config = library.AutoConfig.for_model(name.network, num_labels=classes)
    mapping = importlib.import_module("transformers.models.auto.modeling_auto")
    kind = library.AutoModel
    for names, auto in (
        (mapping.MODEL_FOR_BACKBONE_MAPPING_NAMES, library.AutoBackbone),
        (mapping.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES, library.AutoModelForImageClassification),
    ):
        kind = auto if name.network in names else kind
    return Images(kind.from_config(config), classes).train()


def image_size(name: Name) -> int:
    """The side of the images a network was made for; 224 where that is not said."""
    if name.library == "timm":
        timm = importlib.import_module("timm")
        return timm.get_pretrained_cfg(name.network).input_size[-1]
    return 224
