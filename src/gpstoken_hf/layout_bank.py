# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""GaussianLayoutBank: stored layouts per class, which can replace a layout generator (paper Sec. 3.3).

Shapes: B batch, L tokens, N layouts, T tokens of all layouts together.

The bank is a diffusers ModelMixin, so a pipeline saves, loads and pushes it like its other components. Layouts may
differ in length. They lie one after another in one tensor; `offsets` holds where each starts.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.accelerate_utils import apply_forward_hook

from .file_checks import check_number
from .gaussians import NUM_GAUSSIAN_PARAMS, check_gaussians
from .layout import GaussianLayout
from .loading import StrictDiffusersMixin

# ImageNet-21k has 14 million images; 300 tokens of each fill 80 GB.
MAX_LAYOUTS, MAX_BANK_TOKENS = 2**28, 2**32


@dataclass(eq=False)
class BankLayout(GaussianLayout):
    """Layouts drawn from a bank: a [`GaussianLayout`] without boxes.

    Args:
        indices (`torch.Tensor` of shape `(B,)`): int64 indices of the layouts in the bank. Pass them as `exclude` to
            later calls to draw without replacement over several calls.
    """

    indices: torch.Tensor = None


class GaussianLayoutBank(StrictDiffusersMixin, ModelMixin, ConfigMixin):
    """Layouts of images, each with the class of its image.

    Build one with `from_layouts`, from the authors' pickle with `conversion.convert_layout_bank`, or from a labelled
    dataset with `pipelines.build_layout_bank`.

    The buffers are `gaussians` `(T, 5)` float32, `offsets` `(N + 1,)` int64 and `class_labels` `(N,)` int64. A cast of
    the module leaves the Gaussians in float32: in bfloat16 a mean is off by up to half a pixel of 256.

    Args:
        num_layouts (`int`): N, at least 1.
        total_tokens (`int`): T, tokens of all layouts together, at least N.

    Raises:
        ValueError: if an argument is out of its range.

    Examples:
        ```python
        >>> import torch
        >>> from gpstoken_hf import GaussianLayoutBank, partition_images

        >>> images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
        >>> first, second, third = partition_images(images, num_tokens=16, min_region_size=4).gaussians
        >>> bank = GaussianLayoutBank.from_layouts({4: [first, second], 7: [third]})
        >>> len(bank), bank.class_counts
        (3, {4: 2, 7: 1})
        >>> layout = bank.sample([7, 4], generator=torch.Generator().manual_seed(0))
        >>> layout.gaussians.shape
        torch.Size([2, 16, 5])

        ```
    """

    _keep_in_fp32_modules = ["gaussians"]  # noqa: RUF012 - the base class reads a list
    _supports_gradient_checkpointing = False

    gaussians: torch.Tensor
    offsets: torch.Tensor
    class_labels: torch.Tensor

    @register_to_config
    def __init__(self, num_layouts: int, total_tokens: int):
        super().__init__()
        check_number("num_layouts", num_layouts, 1, MAX_LAYOUTS)
        check_number("total_tokens", total_tokens, num_layouts, MAX_BANK_TOKENS)
        self.register_buffer("gaussians", torch.zeros(total_tokens, NUM_GAUSSIAN_PARAMS, dtype=torch.float32))
        self.register_buffer("offsets", torch.zeros(num_layouts + 1, dtype=torch.int64))
        self.register_buffer("class_labels", torch.zeros(num_layouts, dtype=torch.int64))

    @classmethod
    def from_layouts(cls, layouts: Mapping[int, Sequence[Any]]) -> "GaussianLayoutBank":
        """A bank of the given layouts.

        Args:
            layouts (`Mapping[int, Sequence]`): class id (at least 0) -> layouts of that class, each an array or tensor
                of shape `(L, 5)` with Gaussians `[sigma_x, sigma_y, rho, mu_x, mu_y]`. L may differ between layouts.

        Raises:
            ValueError: if there is no layout, a class id is below 0, or a layout has another shape or an illegal
                Gaussian.
        """
        tensors, labels = [], []
        for label in sorted(layouts):
            if label < 0:
                raise ValueError(f"class ids of layouts must be at least 0, got {label}")
            for position, layout in enumerate(layouts[label]):
                tensor = torch.as_tensor(layout).to(device="cpu", dtype=torch.float32)
                name = f"layout {position} of class {label}"
                if tensor.ndim != 2 or tensor.shape[0] < 1 or tensor.shape[1] != NUM_GAUSSIAN_PARAMS:
                    raise ValueError(
                        f"{name} must be of shape (L, {NUM_GAUSSIAN_PARAMS}) with L >= 1, got {tuple(tensor.shape)}"
                    )
                check_gaussians(tensor, name)
                tensors.append(tensor)
                labels.append(int(label))
        if not tensors:
            raise ValueError("layouts must hold at least one layout, got none")
        lengths = torch.tensor([0] + [len(tensor) for tensor in tensors])
        bank = cls(num_layouts=len(tensors), total_tokens=int(lengths.sum()))
        bank.gaussians = torch.cat(tensors)
        bank.offsets = lengths.cumsum(0)
        bank.class_labels = torch.tensor(labels)
        return bank

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load the buffers as `torch.nn.Module` does, but only those of a legal bank.

        Raises:
            ValueError: if `check_weights` would refuse them. The bank then keeps what it has.
            RuntimeError: if a name or a shape does not fit.
        """
        buffers = dict(self.named_buffers())
        given = {name: state_dict.get(name, buffer) for name, buffer in buffers.items()}
        if all(given[name].shape == buffer.shape for name, buffer in buffers.items()):
            # What is copied takes the dtype of the buffer, what is assigned keeps its own.
            _check_bank(**{name: given[name] if assign else given[name].to(buffers[name].dtype) for name in given})
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def check_weights(self) -> None:
        """Check the layouts. `from_pretrained` and `load_state_dict` call it.

        Raises:
            ValueError: if a Gaussian is not legal, the offsets do not rise from 0 to T, or a class label is below 0.
        """
        _check_bank(self.gaussians, self.offsets, self.class_labels)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "GaussianLayoutBank":
        exact = self.gaussians
        super()._apply(fn, recurse)
        if self.gaussians.dtype != torch.float32:
            self.gaussians = exact.to(self.gaussians.device)
        return self

    def __len__(self) -> int:
        """N, the number of layouts."""
        return self.config["num_layouts"]

    @property
    def class_ids(self) -> list[int]:
        """The classes that have layouts, ascending."""
        return sorted(self.class_counts)

    @property
    def class_counts(self) -> dict[int, int]:
        """Class id -> number of its layouts."""
        return _counts(self.class_labels)

    @property
    def token_counts(self) -> dict[int, int]:
        """Number of tokens -> number of layouts with as many."""
        return _counts(self.offsets.diff())

    def gaussians_of(self, index: int) -> torch.Tensor:
        """The Gaussians `(L, 5)` of the layout at `index`, from 0 to N - 1.

        Raises:
            ValueError: if `index` is out of its range.
        """
        if not 0 <= index < len(self):
            raise ValueError(f"index must be between 0 and {len(self) - 1}, got {index}")
        return self.gaussians[self.offsets[index] : self.offsets[index + 1]]

    def layouts_by_class(self) -> dict[int, list[torch.Tensor]]:
        """Class id -> the Gaussians `(L, 5)` of its layouts, as `from_layouts` takes them."""
        layouts: dict[int, list[torch.Tensor]] = {label: [] for label in self.class_ids}
        for index, label in enumerate(self.class_labels.tolist()):
            layouts[label].append(self.gaussians_of(index))
        return layouts

    @apply_forward_hook
    @torch.no_grad()
    def sample(
        self,
        class_labels: torch.Tensor | Sequence[int] | int,
        num_tokens: int | Sequence[int] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        replacement: bool = True,
        exclude: torch.Tensor | Sequence[int] | None = None,
    ) -> BankLayout:
        """Draw one layout for each class label. All layouts of a class are equally likely.

        Args:
            class_labels (`int`, or sequence or `torch.Tensor` of B `int`): class ids.
            num_tokens (`int` or sequence of B `int`, *optional*): draw only layouts of exactly so many tokens; one
                number for all labels or one each. Layouts of any length by default.
            generator (`torch.Generator` or list of B of them, *optional*): source of the draws, for all labels or for
                each. With one each and with replacement, a draw does not depend on the other labels.
            replacement (`bool`, *optional*, defaults to `True`): `False` draws no layout twice in this call.
            exclude (`torch.Tensor` or sequence of `int`, *optional*): indices of layouts not to draw, such as the
                `indices` of earlier calls.

        Returns:
            [`BankLayout`]: B layouts and their indices, padded to the longest.

        Raises:
            ValueError: if a class has no layouts, or too few that `num_tokens`, `exclude` and `replacement` allow; if
                the length of `num_tokens` or `generator` is not B.
        """
        labels = torch.as_tensor(class_labels).reshape(-1).tolist()
        if not labels:
            raise ValueError("class_labels must name at least one class, got none")
        tokens = _one_per_sample(num_tokens, len(labels), "num_tokens")
        generators = _one_per_sample(generator, len(labels), "generator")
        pools: dict[tuple[int, int | None], list[int]] = {}
        drawn: set[int] = set()
        indices = []
        for label, count, source in zip(labels, tokens, generators):
            if (label, count) not in pools:
                pools[label, count] = self._candidates(label, count, exclude)
            pool = pools[label, count]
            if not replacement:
                pool[:] = [index for index in pool if index not in drawn]
                if not pool:
                    available = len(self._candidates(label, count, exclude))
                    raise ValueError(
                        f"class_labels must hold class {label} at most {available} times without replacement, "
                        f"got {labels.count(label)} times"
                    )
            device = source.device if source is not None else "cpu"
            index = pool[int(torch.randint(len(pool), (1,), generator=source, device=device))]
            drawn.add(index)
            indices.append(index)
        drawn_layout = GaussianLayout.stack([GaussianLayout(self.gaussians_of(index)[None]) for index in indices])
        return BankLayout(
            drawn_layout.gaussians,
            None,
            drawn_layout.attention_mask if drawn_layout.is_padded else None,
            torch.tensor(indices, dtype=torch.int64, device=self.gaussians.device),
        )

    def forward(self, class_labels: torch.Tensor, **kwargs: Any) -> BankLayout:
        """Call `sample`, with the same arguments."""
        return self.sample(class_labels, **kwargs)

    def _candidates(
        self, label: int, num_tokens: int | None, exclude: torch.Tensor | Sequence[int] | None
    ) -> list[int]:
        """Indices of the layouts of one class that may be drawn. Raises a ValueError if there are none."""
        of_class = self.class_labels.cpu() == label
        if not of_class.any():
            ids = self.class_ids
            shown = f"{ids[:8]} ... {ids[-1]} ({len(ids)} classes)" if len(ids) > 12 else str(ids)
            raise ValueError(f"class_labels must be among {shown}, the classes of the bank, got {label}")
        allowed = of_class
        if num_tokens is not None:
            lengths = self.offsets.cpu().diff()
            allowed = of_class & (lengths == num_tokens)
            if not allowed.any():
                present = sorted(_counts(lengths[of_class]))
                raise ValueError(f"num_tokens must be among {present} for class {label}, got {num_tokens}")
        if exclude is not None:
            allowed = allowed.clone()
            allowed[torch.as_tensor(exclude, dtype=torch.int64).reshape(-1).cpu()] = False
            if not allowed.any():
                raise ValueError(f"exclude must leave at least one layout of class {label}, got all of them")
        return allowed.nonzero().flatten().tolist()


def _check_bank(gaussians: torch.Tensor, offsets: torch.Tensor, class_labels: torch.Tensor) -> None:
    dtypes = (gaussians.dtype, offsets.dtype, class_labels.dtype)
    if dtypes != (torch.float32, torch.int64, torch.int64):
        raise ValueError(f"gaussians must be float32, offsets and class_labels int64, got {dtypes}")
    check_gaussians(gaussians, "the Gaussians of a bank")
    if offsets[0] != 0 or offsets[-1] != len(gaussians) or not (offsets[1:] > offsets[:-1]).all():
        raise ValueError(
            f"offsets must rise from 0 to the {len(gaussians)} tokens of the bank, "
            f"got values from {offsets.min()} to {offsets.max()}"
        )
    if class_labels.min() < 0:
        raise ValueError(f"class_labels must be at least 0, got {class_labels.min()}")


def _counts(values: torch.Tensor) -> dict[int, int]:
    unique, counts = torch.unique(values, return_counts=True)
    return dict(zip(unique.tolist(), counts.tolist()))


def _one_per_sample(value: Any, batch_size: int, name: str) -> list[Any]:
    """A list of `batch_size` values, made from one value for all samples or from one each."""
    if isinstance(value, torch.Tensor):
        value = value.tolist()
    if not isinstance(value, (list, tuple)):
        return [value] * batch_size
    if len(value) != batch_size:
        raise ValueError(f"{name} must be one value or {batch_size}, one per class label, got {len(value)}")
    return list(value)
