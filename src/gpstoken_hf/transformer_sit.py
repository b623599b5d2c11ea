# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""SiTTransformer1DModel: the velocity network of both generators, a SiT over a sequence of tokens (paper Sec. 3.3).

Shapes: B batch, L tokens, C channels of a token, D width of the network, H heads, E channels of the condition.

One class serves the layout generator (C = 5, no condition), the texture generator (C = 5 + texture, conditioned on
the initial Gaussians) and the one-stage baseline (C = 5 + texture, no condition). Only their configs differ.

Time. The paper has t = 0 for noise, t = 1 for data, `x_t = t x_1 + (1 - t) x_0` and the velocity `v = x_1 - x_0`.
Diffusers has `sigma = 1 - t`, `timestep = 1000 sigma` and models that return `noise - data = -v`. `forward` follows
diffusers; `timestep_to_time` and one change of sign convert to the paper. See docs/conventions.md.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin, FeedForward
from diffusers.models.attention_dispatch import _AttentionBackendRegistry, dispatch_attention_fn
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import USE_PEFT_BACKEND, scale_lora_layers, unscale_lora_layers
from torch import nn

from .file_checks import check_number, check_statistics
from .gaussians import NUM_GAUSSIAN_PARAMS, gaussians_to_logits, join_tokens, logits_to_gaussians, split_tokens
from .loading import SafetensorsAdapterMixin, StrictDiffusersMixin

# SiT-S makes layouts, SiT-XL textures (paper App. B). Parameters for 128 tokens of 21 channels, 1000 classes.
SIT_PRESETS: dict[str, dict[str, int]] = {
    "S": {"num_layers": 12, "num_attention_heads": 6, "attention_head_dim": 64},  # 33 M
    "B": {"num_layers": 12, "num_attention_heads": 12, "attention_head_dim": 64},  # 130 M
    "L": {"num_layers": 24, "num_attention_heads": 16, "attention_head_dim": 64},  # 458 M
    "XL": {"num_layers": 28, "num_attention_heads": 16, "attention_head_dim": 72},  # 675 M
}
# What a config may ask for. SiT-XL has 28 layers of 16 heads of 72 channels.
LIMITS: dict[str, tuple[float, float]] = {
    "sample_size": (1, 2**20),
    "in_channels": (NUM_GAUSSIAN_PARAMS, 2**16),
    "num_classes": (1, 2**24),
    "num_layers": (1, 1000),
    "num_attention_heads": (1, 2**10),
    "attention_head_dim": (1, 2**10),
    "condition_channels": (1, 2**16),
    "class_dropout_prob": (0.0, 1.0),
    "mlp_ratio": (0.01, 100.0),
    "norm_eps": (0.0, 1.0),
}
GAUSSIAN_TARGETS = ("offset", "absolute", "logit")
CONDITION_INJECTIONS = ("input", "every_block")
TIMESTEP_SCALE = 1000.0
# The attention backends of diffusers that take a mask, beside those for sequences of varying length ("varlen").
MASKED_BACKENDS = ("native", "_native_cudnn", "_native_efficient", "_native_math", "_native_npu", "flex")

TimeT = TypeVar("TimeT", torch.Tensor, float)


def timestep_to_time(timestep: TimeT) -> TimeT:
    """Timestep of diffusers (1000 is noise, 0 is data) -> time of the paper (0 is noise, 1 is data)."""
    return 1.0 - timestep / TIMESTEP_SCALE


def tokens_to_latents(
    tokens: torch.Tensor,
    mean: torch.Tensor,
    std: torch.Tensor,
    gaussian_target: str,
    layout: torch.Tensor | None = None,
) -> torch.Tensor:
    """Tokens -> the latents that a generator models: Gaussians as a target, then every channel standardised.

    Args:
        tokens (`torch.Tensor` of shape `(B, L, 5 + C)`): Gaussians and texture; C may be 0 (a layout).
        mean, std (`torch.Tensor` of shape `(5 + C,)`): statistics of the channels of the target.
        gaussian_target (`str`): `"offset"` for `g - g_init`, the target of the texture generator (paper Sec. 3.3);
            `"absolute"` for `g`; `"logit"` for `logit(sigma)` and, of rho and mu, `logit((1 + v) / 2)`.
        layout (`torch.Tensor` of shape `(B, L, 5)`, *optional*): the initial Gaussians; for `"offset"` only.

    Returns:
        `torch.Tensor` of shape `(B, L, 5 + C)`.

    Raises:
        ValueError: if `gaussian_target` is unknown, or `layout` is missing for `"offset"` or given without it.
    """
    gaussians, texture = split_tokens(tokens)
    _check_target(gaussian_target, layout)
    if gaussian_target == "offset":
        gaussians = gaussians - layout
    elif gaussian_target == "logit":
        gaussians = gaussians_to_logits(gaussians)
    return (join_tokens(gaussians, texture) - mean) / std


def latents_to_tokens(
    latents: torch.Tensor,
    mean: torch.Tensor,
    std: torch.Tensor,
    gaussian_target: str,
    layout: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    """The inverse of `tokens_to_latents`; takes the same arguments.

    Clamps sigma to [eps, 1 - eps] and rho to [-1 + eps, 1 - eps]. Means may lie outside the image: the part of such a
    Gaussian that reaches into the image is drawn.
    """
    target, texture = split_tokens(latents * std + mean)
    _check_target(gaussian_target, layout)
    if gaussian_target == "offset":
        gaussians = target + layout
    elif gaussian_target == "logit":
        gaussians = logits_to_gaussians(target)
    else:
        gaussians = target
    sigma, rho, mu = gaussians.split([2, 1, 2], dim=-1)
    gaussians = torch.cat([sigma.clamp(eps, 1 - eps), rho.clamp(-1 + eps, 1 - eps), mu], dim=-1)
    return join_tokens(gaussians, texture)


def _check_target(gaussian_target: str, layout: torch.Tensor | None) -> None:
    if gaussian_target not in GAUSSIAN_TARGETS:
        raise ValueError(f"gaussian_target must be one of {list(GAUSSIAN_TARGETS)}, got {gaussian_target!r}")
    if (gaussian_target == "offset") != (layout is not None):
        expected, got = ("a tensor", None) if layout is None else ("None", "a tensor")
        raise ValueError(f"layout must be {expected} with gaussian_target={gaussian_target!r}, got {got}")


class SiTAttnProcessor:
    """Self-attention through `dispatch_attention_fn`, so that `set_attention_backend` chooses the kernel."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self, attn: SiTAttention, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        if attn.fused_projections:
            query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        query, key, value = (x.unflatten(-1, (-1, attn.head_dim)) for x in (query, key, value))  # (B, L, H, D / H)
        if attention_mask is None or self._takes_mask():
            hidden_states = self._attend(query, key, value, attention_mask)
        else:
            # One image after another, without its padding: every backend can do that.
            hidden_states = torch.zeros_like(query)
            for i, is_token in enumerate(attention_mask.flatten(1)):
                rows = is_token.nonzero().squeeze(1)
                hidden_states[i, rows] = self._attend(
                    query[i : i + 1, rows], key[i : i + 1, rows], value[i : i + 1, rows]
                )[0]
        return attn.to_out[0](hidden_states.flatten(2, 3).to(query.dtype))

    def _takes_mask(self) -> bool:
        backend = self._attention_backend or _AttentionBackendRegistry.get_active_backend()[0]
        name = getattr(backend, "value", backend)
        return name in MASKED_BACKENDS or "varlen" in name

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        return dispatch_attention_fn(
            query,
            key,
            value,
            attn_mask=attention_mask,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )


class SiTAttention(nn.Module, AttentionModuleMixin):
    """Multi-head self-attention; every projection has a bias."""

    _default_processor_cls = SiTAttnProcessor
    _available_processors = [SiTAttnProcessor]  # noqa: RUF012 - diffusers reads a list

    def __init__(self, dim: int, heads: int, head_dim: int):
        super().__init__()
        self.heads = heads
        self.head_dim = head_dim
        self.use_bias = True  # read by fuse_projections
        self.is_cross_attention = False  # read by hooks that skip layers
        self.to_q = nn.Linear(dim, heads * head_dim)
        self.to_k = nn.Linear(dim, heads * head_dim)
        self.to_v = nn.Linear(dim, heads * head_dim)
        self.to_out = nn.ModuleList([nn.Linear(heads * head_dim, dim)])
        self.set_processor(SiTAttnProcessor())

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """`hidden_states` `(B, L, D)` -> `(B, L, D)`; `kwargs` go to the processor."""
        unknown = kwargs.keys() - inspect.signature(self.processor.__call__).parameters.keys() if kwargs else ()
        if unknown:
            raise ValueError(
                f"attention_kwargs must hold 'scale' and arguments of {type(self.processor).__name__}, "
                f"got {sorted(unknown)}"
            )
        return self.processor(self, hidden_states, attention_mask, **kwargs)


class SiTConditionEmbedding(nn.Module):
    """Embeds the condition token by token: Linear, SiLU, Linear; `(B, L, E)` -> `(B, L, D)`."""

    def __init__(self, condition_channels: int, dim: int):
        super().__init__()
        self.linear_1 = nn.Linear(condition_channels, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, condition: torch.Tensor) -> torch.Tensor:
        return self.linear_2(F.silu(self.linear_1(condition)))


class SiTTransformerBlock(nn.Module):
    """Attention and MLP, each after an adaptive layer norm and before a gate that starts at zero (adaLN-Zero)."""

    def __init__(self, dim: int, heads: int, head_dim: int, mlp_ratio: float, norm_eps: float):
        super().__init__()
        self.modulation = nn.Linear(dim, 6 * dim)
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps, elementwise_affine=False)
        self.attn = SiTAttention(dim, heads, head_dim)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps, elementwise_affine=False)
        self.ff = FeedForward(dim, inner_dim=int(dim * mlp_ratio), activation_fn="gelu-approximate")

    def forward(
        self,
        hidden_states: torch.Tensor,
        temb: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        condition: torch.Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> torch.Tensor:
        """`hidden_states` `(B, L, D)`, `temb` `(B, D)` and an embedded `condition` `(B, L, D)` -> `(B, L, D)`."""
        if condition is not None:
            hidden_states = hidden_states + condition
        modulation = self.modulation(F.silu(temb)).unsqueeze(1)  # (B, 1, 6 D)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=-1)
        normed = self.norm1(hidden_states) * (1 + scale_msa) + shift_msa
        hidden_states = hidden_states + gate_msa * self.attn(normed, attention_mask, **(attention_kwargs or {}))
        normed = self.norm2(hidden_states) * (1 + scale_mlp) + shift_mlp
        return hidden_states + gate_mlp * self.ff(normed)


def register_blocks() -> None:
    """Tell diffusers' hooks (caches, guiders that skip layers) what our blocks return."""
    from diffusers.hooks._helpers import (
        AttentionProcessorMetadata,
        AttentionProcessorRegistry,
        TransformerBlockMetadata,
        TransformerBlockRegistry,
    )

    TransformerBlockRegistry.register(
        SiTTransformerBlock,
        TransformerBlockMetadata(return_hidden_states_index=0, return_encoder_hidden_states_index=None),
    )
    AttentionProcessorRegistry.register(
        SiTAttnProcessor,
        AttentionProcessorMetadata(lambda _attention, hidden_states, *_args, **_kwargs: hidden_states),
    )


class SiTTransformer1DModel(
    StrictDiffusersMixin, ModelMixin, ConfigMixin, AttentionMixin, SafetensorsAdapterMixin, CacheMixin
):
    r"""A SiT with patch size 1 over a sequence of tokens (paper Sec. 3.3, App. B).

    Args:
        sample_size (`int`, *optional*, defaults to 128): L, tokens per generated sequence, and rows of the position
            embedding.
        in_channels (`int`, *optional*, defaults to 21): C, channels per token: 5 for a layout, else 5 + texture
            channels.
        num_classes (`int`, *optional*, defaults to 1000): classes. The embedding has one more row, the last, for "no
            class".
        num_layers (`int`, *optional*, defaults to 28): transformer blocks.
        num_attention_heads (`int`, *optional*, defaults to 16): attention heads per block.
        attention_head_dim (`int`, *optional*, defaults to 72): width of a head; heads times this width is D.
        condition_channels (`int`, *optional*): E, channels of the condition, 5 for initial Gaussians. `None` makes a
            model without condition.
        condition_injection (`str`, *optional*, defaults to `"input"`): `"input"` adds the embedded condition to the
            embedded tokens once, as the authors' checkpoints need it; `"every_block"` adds it before every block, as
            the paper describes.
        learn_sigma (`bool`, *optional*, defaults to `True`): give the output layer 2 C channels and use the first C,
            as the authors' checkpoints do.
        class_dropout_prob (`float`, *optional*, defaults to 0.1): probability in [0, 1] with which `forward` replaces
            a label by "no class" in training mode, as classifier-free guidance needs.
        mlp_ratio (`float`, *optional*, defaults to 4.0): inner width of an MLP over D.
        norm_eps (`float`, *optional*, defaults to 1e-6): epsilon of the layer norms.
        gaussian_target (`str`, *optional*): what the first 5 channels hold: `"offset"` (refined minus initial
            Gaussian), `"absolute"` (the Gaussian) or `"logit"` (its logits). Defaults to `"offset"` with a condition
            and to `"absolute"` without.
        latents_mean, latents_std (`list[float]`, *optional*): C statistics each, by which targets are standardised. A
            pipeline takes those of its tokenizer where they are `None`.

    Raises:
        ValueError: if `condition_injection` or `gaussian_target` is unknown, `in_channels` is below 5,
            `class_dropout_prob` leaves [0, 1], or the statistics are not C finite numbers each, std above 0.

    Examples:
        ```python
        >>> import torch
        >>> from gpstoken_hf import SiTTransformer1DModel, bundled

        >>> model = SiTTransformer1DModel.from_pretrained(bundled("gpstoken-digits"), subfolder="layout_transformer")
        >>> noise = torch.randn(2, 16, 5, generator=torch.Generator().manual_seed(0))
        >>> with torch.no_grad():
        ...     output = model(noise, timestep=1000.0, class_labels=torch.tensor([3, 7]))
        >>> output.sample.shape  # noise - data
        torch.Size([2, 16, 5])

        ```
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["SiTTransformerBlock"]  # noqa: RUF012 - diffusers reads lists
    _repeated_blocks = ["SiTTransformerBlock"]  # noqa: RUF012
    _skip_layerwise_casting_patterns = ["pos_embed", "time_embedder", "norm"]  # noqa: RUF012
    # bfloat16 rounds the embedding of the time to steps of 1/128.
    _keep_in_fp32_modules = ["time_embedder"]  # noqa: RUF012
    # Tokens are split over devices between the embeddings and the output.
    _cp_plan = {  # noqa: RUF012
        "transformer_blocks.0": {"hidden_states": ContextParallelInput(split_dim=1, expected_dims=3)},
        "transformer_blocks.*": {"condition": ContextParallelInput(split_dim=1, expected_dims=3)},
        "proj_out": ContextParallelOutput(gather_dim=1, expected_dims=3),
    }

    @register_to_config
    def __init__(
        self,
        sample_size: int = 128,
        in_channels: int = 21,
        num_classes: int = 1000,
        num_layers: int = 28,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        condition_channels: int | None = None,
        condition_injection: str = "input",
        learn_sigma: bool = True,
        class_dropout_prob: float = 0.1,
        mlp_ratio: float = 4.0,
        norm_eps: float = 1e-6,
        gaussian_target: str | None = None,
        latents_mean: list[float] | None = None,
        latents_std: list[float] | None = None,
    ):
        super().__init__()
        if condition_injection not in CONDITION_INJECTIONS:
            raise ValueError(
                f"condition_injection must be one of {list(CONDITION_INJECTIONS)}, got {condition_injection!r}"
            )
        if gaussian_target is None:
            gaussian_target = "absolute" if condition_channels is None else "offset"
            self.register_to_config(gaussian_target=gaussian_target)
        if gaussian_target not in GAUSSIAN_TARGETS:
            raise ValueError(f"gaussian_target must be one of {list(GAUSSIAN_TARGETS)}, got {gaussian_target!r}")
        for name, (low, high) in LIMITS.items():
            if self.config[name] is not None or name != "condition_channels":
                check_number(name, self.config[name], low, high)
        if not isinstance(learn_sigma, bool):
            raise ValueError(f"learn_sigma must be True or False, got {learn_sigma!r}")
        check_statistics(("latents_mean", "latents_std"), latents_mean, latents_std, in_channels)

        dim = num_attention_heads * attention_head_dim
        self.proj_in = nn.Linear(in_channels, dim)
        self.pos_embed = nn.Parameter(torch.empty(1, sample_size, dim))
        # A model with a condition does not use the table. It has one because checkpoints do, but does not learn it.
        self.pos_embed.requires_grad_(condition_channels is None)
        self.time_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedder = TimestepEmbedding(256, dim)
        self.class_embedder = nn.Embedding(num_classes + 1, dim)
        self.condition_embedder = (
            None if condition_channels is None else SiTConditionEmbedding(condition_channels, dim)
        )
        self.transformer_blocks = nn.ModuleList(
            SiTTransformerBlock(dim, num_attention_heads, attention_head_dim, mlp_ratio, norm_eps)
            for _ in range(num_layers)
        )
        self.norm_out = nn.LayerNorm(dim, eps=norm_eps, elementwise_affine=False)
        self.modulation_out = nn.Linear(dim, 2 * dim)
        self.proj_out = nn.Linear(dim, 2 * in_channels if learn_sigma else in_channels)
        self.gradient_checkpointing = False
        self._initialize_weights()

    @classmethod
    def preset(cls, name: str, **config: Any) -> SiTTransformer1DModel:
        """A new model of a named size.

        Args:
            name (`str`): `"S"`, `"B"`, `"L"` or `"XL"`.
            config: arguments of the constructor; they win over the preset.

        Raises:
            ValueError: if no preset has this name.

        Examples:
            ```python
            >>> from gpstoken_hf import SiTTransformer1DModel

            >>> model = SiTTransformer1DModel.preset("S", num_layers=2, in_channels=5, num_classes=10)
            >>> model.config.num_attention_heads
            6

            ```
        """
        if name not in SIT_PRESETS:
            raise ValueError(f"name must be one of the presets {list(SIT_PRESETS)}, got {name!r}")
        return cls(**{**SIT_PRESETS[name], **config})

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load from a folder or the Hub, strictly and never from a pickle; see [`~loading.StrictLoadingMixin`]."""
        # diffusers refuses `low_cpu_mem_usage=False` for a model with modules that stay in float32. With and without
        # it the loaded model is the same.
        if kwargs.get("low_cpu_mem_usage") is False:
            del kwargs["low_cpu_mem_usage"]
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    @property
    def null_class(self) -> int:
        """The label for "no class"."""
        return self.config.num_classes

    def _initialize_weights(self) -> None:
        """Initialise as DiT does: Xavier, with zero gates and output, so that every block starts as the identity."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for embedding in (self.pos_embed, self.class_embedder.weight):
            nn.init.normal_(embedding, std=0.02)
        for layer in (self.time_embedder.linear_1, self.time_embedder.linear_2):
            nn.init.normal_(layer.weight, std=0.02)
        for layer in (*(block.modulation for block in self.transformer_blocks), self.modulation_out, self.proj_out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor | float,
        class_labels: torch.Tensor,
        encoder_condition: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """Predict `noise - data` for noised tokens.

        Args:
            hidden_states (`torch.Tensor` of shape `(B, L, C)`): noised targets, `sigma noise + (1 - sigma) data`.
            timestep (`float` or `torch.Tensor` of shape `(B,)`): 1000 sigma; 1000 is noise.
            class_labels (`torch.Tensor` of shape `(B,)`): integers from 0 to `num_classes`; the last means "no class".
                In training mode some are replaced by it (`class_dropout_prob`).
            encoder_condition (`torch.Tensor` of shape `(B, L, E)`, *optional*): initial Gaussians. With them L is
                free. Without them the position embedding takes their place and L must be `sample_size`. A model made
                for a condition also runs without one, but has never learned its position embedding.
            attention_mask (`torch.Tensor` of shape `(B, L)`, *optional*): 1 (or True) for tokens, 0 for padding.
                Padding does not change the output at tokens. The output at padding has no meaning.
            attention_kwargs (`dict`, *optional*): keyword arguments of the attention processors; `{"scale": s}` scales
                the LoRAs of the model.
            return_dict (`bool`, *optional*, defaults to `True`): return an output object instead of a tuple.

        Returns:
            [`~diffusers.models.modeling_outputs.Transformer2DModelOutput`] or `tuple`: `.sample` `(B, L, C)`, minus
            the velocity of the paper.

        Raises:
            ValueError: if a shape does not fit the config or another shape; if a model without condition is given one;
                if the attention processor does not take one of `attention_kwargs`.
        """
        attention_kwargs = dict(attention_kwargs or {})
        scale = attention_kwargs.pop("scale", 1.0)
        inputs = (hidden_states, timestep, class_labels, encoder_condition, attention_mask, attention_kwargs)
        if scale == 1.0 or not USE_PEFT_BACKEND:
            sample = self._predict(*inputs)
        else:
            scale_lora_layers(self, scale)
            try:
                sample = self._predict(*inputs)
            finally:
                unscale_lora_layers(self, scale)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _predict(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor | float,
        class_labels: torch.Tensor,
        encoder_condition: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        attention_kwargs: dict[str, Any],
    ) -> torch.Tensor:
        self._check_inputs(hidden_states, class_labels, encoder_condition, attention_mask)
        batch, dtype = hidden_states.shape[0], hidden_states.dtype
        timestep = torch.as_tensor(timestep, dtype=torch.float32, device=hidden_states.device).expand(batch)
        if self.training and self.config.class_dropout_prob > 0:
            dropped = torch.rand(batch, device=class_labels.device) < self.config.class_dropout_prob
            class_labels = torch.where(dropped, self.null_class, class_labels)

        time = self.time_proj(timestep_to_time(timestep)).to(self.time_embedder.linear_1.weight.dtype)
        temb = self.time_embedder(time).to(dtype) + self.class_embedder(class_labels).to(dtype)  # (B, D)
        hidden_states = self.proj_in(hidden_states)  # (B, L, D)
        if encoder_condition is None:
            condition = self.pos_embed.to(dtype)
        else:
            assert self.condition_embedder is not None  # _check_inputs
            condition = self.condition_embedder(encoder_condition.to(dtype))
        every_block = self.config.condition_injection == "every_block" and encoder_condition is not None
        if not every_block:
            hidden_states = hidden_states + condition
        if attention_mask is not None:
            attention_mask = attention_mask.bool()[:, None, None, :]  # (B, heads, queries, keys)

        shared = (temb, attention_mask, condition if every_block else None, attention_kwargs)
        for block in self.transformer_blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, hidden_states, *shared)
            else:
                hidden_states = block(hidden_states, *shared)

        shift, scale = self.modulation_out(F.silu(temb)).unsqueeze(1).chunk(2, dim=-1)
        output = self.proj_out(self.norm_out(hidden_states) * (1 + scale) + shift)
        return -output[..., : self.config.in_channels]

    def enable_cache(self, config: Any) -> None:
        """Turn on one of diffusers' caches (first block, pyramid attention broadcast, ...).

        Args:
            config: the config of the cache, see [`~diffusers.CacheMixin.enable_cache`]. FasterCache caches attention
                only, with `is_guidance_distilled=True`.

        Raises:
            ValueError: if FasterCache should also replace the calls without a class.
        """
        # Importing this registers our blocks, and imports all models of diffusers: only when a cache is wanted.
        from diffusers.hooks import FasterCacheConfig

        if isinstance(config, FasterCacheConfig):
            if not config.is_guidance_distilled:
                raise ValueError(
                    "is_guidance_distilled must be True for FasterCache on tokens, which then caches attention (the "
                    "call without a class is predicted from frequencies of a pixel grid, and tokens have none), "
                    "got False"
                )
            timestep, last = config.current_timestep_callback, self.transformer_blocks[-1].attn

            def timestep_if_filled() -> float:
                # Inside its range of timesteps FasterCache reads the cache even where it is empty.
                hook = last._diffusers_hook.get_hook("faster_cache_block")
                return math.inf if hook.state.cache is None else timestep()

            config = replace(
                config,
                spatial_attention_block_identifiers=("transformer_blocks.*attn",),
                current_timestep_callback=timestep_if_filled,
            )
        register_blocks()
        super().enable_cache(config)

    def _check_inputs(
        self,
        hidden_states: torch.Tensor,
        class_labels: torch.Tensor,
        condition: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
    ) -> None:
        channels, sample_size = self.config.in_channels, self.config.sample_size
        if hidden_states.ndim != 3 or hidden_states.shape[-1] != channels:
            raise ValueError(f"hidden_states must be (B, L, {channels}), got {tuple(hidden_states.shape)}")
        batch, length = hidden_states.shape[:2]
        if tuple(class_labels.shape) != (batch,):
            raise ValueError(f"class_labels must be ({batch},), got {tuple(class_labels.shape)}")
        if attention_mask is not None and tuple(attention_mask.shape) != (batch, length):
            raise ValueError(f"attention_mask must be ({batch}, {length}), got {tuple(attention_mask.shape)}")
        if condition is None:
            if length != sample_size:
                raise ValueError(
                    f"hidden_states must have sample_size = {sample_size} tokens without encoder_condition, "
                    f"got {length}"
                )
        elif self.condition_embedder is None:
            raise ValueError("encoder_condition must be None for a model with condition_channels=None, got a tensor")
        elif tuple(condition.shape) != (batch, length, self.config.condition_channels):
            expected = (batch, length, self.config.condition_channels)
            raise ValueError(f"encoder_condition must be {expected}, got {tuple(condition.shape)}")
