# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""GaussianLayoutBank: stored layouts per class, which stand in for a layout generator (paper Sec. 3.3).

Shapes: B batch, L tokens, N layouts, T tokens of all layouts together.

The bank is a diffusers ModelMixin, so it saves, loads, pushes and travels inside a pipeline as safetensors. Its
layouts may differ in length: they lie one after another in one array, and `offsets` says where each begins.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.accelerate_utils import apply_forward_hook

from .gaussians import NUM_GAUSSIAN_PARAMS, check_gaussians
from .layout import GaussianLayout
from .loading import StrictDiffusersMixin, check_number

# ImageNet-21k has 14 million images; 300 tokens of each fill 80 GB.
MAX_LAYOUTS, MAX_BANK_TOKENS = 2**28, 2**32


@dataclass(eq=False)
class BankLayout(GaussianLayout):
    """Layouts drawn from a bank: a [`GaussianLayout`] without boxes.

    Args:
        indices (`torch.Tensor` of shape `(B,)`): int64, which layouts of the bank they are. Pass them as `exclude` to
            a later call to draw without replacement over several calls.
    """

    indices: torch.Tensor = None


class GaussianLayoutBank(StrictDiffusersMixin, ModelMixin, ConfigMixin):
    """Layouts (sets of Gaussians) with the class of the image that each was taken from.

    Build one with `from_layouts`, from the authors' pickle with `conversion.convert_layout_bank`, or from a labelled
    dataset with `pipelines.build_layout_bank`.

    Args:
        num_layouts: N, at least 1.
        total_tokens: T, the tokens of all layouts together, at least N.

    The buffers are `gaussians` `(T, 5)` float32 (they stay float32 whatever the module is cast to: a bfloat16 mean is
    off by up to half a pixel at 256), `offsets` `(N + 1,)` int64 and `class_labels` `(N,)` int64.
    """

    _keep_in_fp32_modules = ["gaussians"]  # noqa: RUF012 (the base class reads a list)
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
            layouts: class id (an integer >= 0) -> layouts of that class, each an `(L, 5)` array or tensor of floats
                with L >= 1, which may differ from layout to layout.

        Raises:
            ValueError: no layout at all, a class id below 0, or a layout of a wrong shape or with illegal Gaussians.
        """
        tensors, labels = [], []
        for label in sorted(layouts):
            if label < 0:
                raise ValueError(f"class ids must be at least 0, got {label}")
            for position, layout in enumerate(layouts[label]):
                tensor = torch.as_tensor(layout).to(device="cpu", dtype=torch.float32)
                name = f"layout {position} of class {label}"
                if tensor.ndim != 2 or tensor.shape[0] < 1 or tensor.shape[1] != NUM_GAUSSIAN_PARAMS:
                    raise ValueError(
                        f"{name} must be of shape (tokens >= 1, {NUM_GAUSSIAN_PARAMS}), got {tuple(tensor.shape)}"
                    )
                check_gaussians(tensor, name)
                tensors.append(tensor)
                labels.append(int(label))
        if not tensors:
            raise ValueError("a bank needs at least one layout, got none")
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
        """The number of layouts, N."""
        return self.config["num_layouts"]

    @property
    def class_ids(self) -> list[int]:
        """The classes that the bank has layouts of, ascending."""
        return sorted(self.class_counts)

    @property
    def class_counts(self) -> dict[int, int]:
        """Class id -> number of its layouts."""
        return _counts(self.class_labels)

    @property
    def token_counts(self) -> dict[int, int]:
        """Number of tokens of a layout -> number of layouts that have as many."""
        return _counts(self.offsets.diff())

    def gaussians_of(self, index: int) -> torch.Tensor:
        """The Gaussians `(L, 5)` of one layout, by its index from 0 to N - 1."""
        if not 0 <= index < len(self):
            raise ValueError(f"index must be between 0 and {len(self) - 1}, got {index}")
        return self.gaussians[self.offsets[index] : self.offsets[index + 1]]

    def layouts_by_class(self) -> dict[int, list[torch.Tensor]]:
        """Class id -> the Gaussians `(L, 5)` of its layouts: the argument of `from_layouts`."""
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
        """Draw one layout for each class label, every layout of the class being equally likely.

        Args:
            class_labels: `(B,)` class ids.
            num_tokens: take only layouts of exactly so many tokens; one number for all or B numbers. None: any.
            generator: source of the draws, or B of them, one per sample. With one per sample and with replacement, a
                sample's layout does not depend on the others of its batch.
            replacement: False: no layout comes twice in this call.
            exclude: indices of layouts that must not be drawn, such as the `indices` of earlier calls.

        Raises:
            ValueError: a class without (enough) layouts, or a number of token counts or generators other than B.
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
                    raise ValueError(
                        f"class {label} has too few layouts for {labels.count(label)} draws without replacement; "
                        f"it has {self.class_counts[label]} of all lengths, some of them excluded or of another length"
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
        """The same as `sample`."""
        return self.sample(class_labels, **kwargs)

    def _candidates(
        self, label: int, num_tokens: int | None, exclude: torch.Tensor | Sequence[int] | None
    ) -> list[int]:
        """Indices of the layouts of one class (and length) that may be drawn; ValueError when there is none."""
        of_class = self.class_labels.cpu() == label
        if not of_class.any():
            ids = self.class_ids
            shown = f"{ids[:8]} ... {ids[-1]} ({len(ids)} classes)" if len(ids) > 12 else str(ids)
            raise ValueError(f"the bank has layouts of the classes {shown}, got class {label}")
        allowed = of_class
        if num_tokens is not None:
            lengths = self.offsets.cpu().diff()
            allowed = of_class & (lengths == num_tokens)
            if not allowed.any():
                present = sorted(_counts(lengths[of_class]))
                raise ValueError(f"class {label} has layouts of {present} tokens, got num_tokens={num_tokens}")
        if exclude is not None:
            allowed = allowed.clone()
            allowed[torch.as_tensor(exclude, dtype=torch.int64).reshape(-1).cpu()] = False
            if not allowed.any():
                raise ValueError(f"all layouts of class {label} are excluded: expected at least one that is not")
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
    """One value for all samples, or one for each."""
    if isinstance(value, torch.Tensor):
        value = value.tolist()
    if not isinstance(value, (list, tuple)):
        return [value] * batch_size
    if len(value) != batch_size:
        raise ValueError(f"{name} must be one value or one for each of the {batch_size} samples, got {len(value)}")
    return list(value)
