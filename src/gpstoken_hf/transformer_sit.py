# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""SiTTransformer1DModel: the velocity network of both generators, a SiT over a sequence of tokens (paper Sec. 3.3).

Letters: B batch, L tokens, C channels of a token, D width of the network, H heads, E channels of the condition.

One class serves the layout generator (C = 5, no condition), the texture generator (C = 5 + texture, conditioned on
the initial Gaussians) and the one-stage baseline (C = 5 + texture, no condition); they differ by config only.

Time. The paper has t = 0 for noise, t = 1 for data, `x_t = t x_1 + (1 - t) x_0` and the velocity `v = x_1 - x_0`.
Diffusers has `sigma = 1 - t`, `timestep = 1000 sigma` and models that return `noise - data = -v`. `forward` speaks
diffusers' convention; `timestep_to_time` and one change of sign are the whole conversion. See docs/conventions.md.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin, FeedForward
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from .gaussians import NUM_GAUSSIAN_PARAMS, gaussians_to_logits, join_tokens, logits_to_gaussians, split_tokens
from .loading import StrictDiffusersMixin, check_number, check_statistics, only_safetensors

# SiT-S makes layouts, SiT-XL textures (paper App. B). Parameters for 128 tokens of 21 channels, 1000 classes.
SIT_PRESETS: dict[str, dict[str, int]] = {
    "S": {"num_layers": 12, "num_attention_heads": 6, "attention_head_dim": 64},  # 33 M
    "B": {"num_layers": 12, "num_attention_heads": 12, "attention_head_dim": 64},  # 130 M
    "L": {"num_layers": 24, "num_attention_heads": 16, "attention_head_dim": 64},  # 458 M
    "XL": {"num_layers": 28, "num_attention_heads": 16, "attention_head_dim": 72},  # 675 M
}
# Modules of the authors' checkpoint (below `ema_model.`, N a block) and ours; `.weight` and `.bias` keep their names.
# The convolution of x_embedder has a 1 x 1 kernel to be squeezed; qkv holds its three parts one below the other.
ORIGINAL_MODULES: dict[str, str | tuple[str, str, str]] = {
    "pos_embed": "pos_embed",
    "x_embedder.proj": "proj_in",
    "t_embedder.mlp.0": "time_embedder.linear_1",
    "t_embedder.mlp.2": "time_embedder.linear_2",
    "y_embedder.embedding_table": "class_embedder",
    "cond_embedder.0": "condition_embedder.linear_1",
    "cond_embedder.2": "condition_embedder.linear_2",
    "blocks.N.adaLN_modulation.1": "transformer_blocks.N.modulation",
    "blocks.N.attn.qkv": (
        "transformer_blocks.N.attn.to_q",
        "transformer_blocks.N.attn.to_k",
        "transformer_blocks.N.attn.to_v",
    ),
    "blocks.N.attn.proj": "transformer_blocks.N.attn.to_out.0",
    "blocks.N.mlp.fc1": "transformer_blocks.N.ff.net.0.proj",
    "blocks.N.mlp.fc2": "transformer_blocks.N.ff.net.2",
    "final_layer.adaLN_modulation.1": "modulation_out",
    "final_layer.linear": "proj_out",
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


def timestep_to_time(timestep: torch.Tensor) -> torch.Tensor:
    """Diffusers' timestep (1000 = noise, 0 = data) -> the paper's time (0 = noise, 1 = data)."""
    return 1.0 - timestep / TIMESTEP_SCALE


def tokens_to_latents(
    tokens: torch.Tensor,
    mean: torch.Tensor,
    std: torch.Tensor,
    gaussian_target: str,
    layout: torch.Tensor | None = None,
) -> torch.Tensor:
    """Tokens -> what a generator models: the target of its Gaussian channels, standardised per channel.

    Args:
        tokens: `(B, L, 5 + C)`; C may be 0 (a layout).
        mean, std: `(5 + C,)`, of the target's channels.
        gaussian_target: "offset": `g - g_init`, the texture generator's target (paper Sec. 3.3); "absolute": `g`;
            "logit": `logit(sigma)` and `logit((1 + v) / 2)` for rho and mu.
        layout: `(B, L, 5)` initial Gaussians; needed for "offset" and only there.
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
    """The inverse of `tokens_to_latents`; sigma is clamped into [eps, 1 - eps] and rho into [-1 + eps, 1 - eps].

    Means are left as they come: a Gaussian centred outside of the frame is drawn as far as it reaches into it.
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
        given = "none" if layout is None else "one"
        raise ValueError(
            f"a layout belongs to gaussian_target 'offset' and only there, got {gaussian_target!r} and {given}"
        )


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
        hidden_states = dispatch_attention_fn(
            query,
            key,
            value,
            attn_mask=attention_mask,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        return attn.to_out[0](hidden_states.flatten(2, 3).to(query.dtype))


class SiTAttention(nn.Module, AttentionModuleMixin):
    """Multi-head self-attention with biases on all projections."""

    _default_processor_cls = SiTAttnProcessor
    _available_processors = [SiTAttnProcessor]  # noqa: RUF012 - diffusers reads a list

    def __init__(self, dim: int, heads: int, head_dim: int):
        super().__init__()
        self.heads = heads
        self.head_dim = head_dim
        self.use_bias = True  # read by fuse_projections
        self.to_q = nn.Linear(dim, heads * head_dim)
        self.to_k = nn.Linear(dim, heads * head_dim)
        self.to_v = nn.Linear(dim, heads * head_dim)
        self.to_out = nn.ModuleList([nn.Linear(heads * head_dim, dim)])
        self.set_processor(SiTAttnProcessor())

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.processor(self, hidden_states, attention_mask)


class SiTConditionEmbedding(nn.Module):
    """The condition `(B, L, E)` embedded token by token: Linear, SiLU, Linear -> `(B, L, D)`."""

    def __init__(self, condition_channels: int, dim: int):
        super().__init__()
        self.linear_1 = nn.Linear(condition_channels, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, condition: torch.Tensor) -> torch.Tensor:
        return self.linear_2(F.silu(self.linear_1(condition)))


class SiTTransformerBlock(nn.Module):
    """Attention and MLP, each between an adaptive layer norm and a gate, all zero at the start (adaLN-Zero)."""

    def __init__(self, dim: int, heads: int, head_dim: int, mlp_ratio: float, norm_eps: float):
        super().__init__()
        self.modulation = nn.Linear(dim, 6 * dim)
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps, elementwise_affine=False)
        self.attn = SiTAttention(dim, heads, head_dim)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps, elementwise_affine=False)
        self.ff = FeedForward(dim, inner_dim=int(dim * mlp_ratio), activation_fn="gelu-approximate")

    def forward(
        self, hidden_states: torch.Tensor, temb: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`hidden_states` (B, L, D), `temb` (B, D) -> (B, L, D)."""
        modulation = self.modulation(F.silu(temb)).unsqueeze(1)  # (B, 1, 6 D)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=-1)
        normed = self.norm1(hidden_states) * (1 + scale_msa) + shift_msa
        hidden_states = hidden_states + gate_msa * self.attn(normed, attention_mask)
        normed = self.norm2(hidden_states) * (1 + scale_mlp) + shift_mlp
        return hidden_states + gate_mlp * self.ff(normed)


class SiTTransformer1DModel(
    StrictDiffusersMixin, ModelMixin, ConfigMixin, AttentionMixin, PeftAdapterMixin, CacheMixin
):
    r"""A SiT with patch size 1 over a sequence of tokens (paper Sec. 3.3, App. B).

    Args:
        sample_size: L, the number of tokens of a generated sequence, and of rows of the position embedding.
        in_channels: C, channels of a token's target: 5 for a layout, 5 + texture channels otherwise.
        num_classes: classes; the embedding has one row more, the last, for "no class".
        num_layers: transformer blocks.
        num_attention_heads, attention_head_dim: their product is the width D.
        condition_channels: E, channels of the condition, 5 for initial Gaussians; `None`: no condition.
        condition_injection: "input": the embedded condition is added to the embedded tokens once, as the authors'
            checkpoints need it; "every_block": before every block, as the paper says.
        learn_sigma: the output layer has 2 C channels, of which the first C are used (the authors' checkpoints).
        class_dropout_prob: in training mode `forward` replaces each label by "no class" with this probability,
            which is what classifier-free guidance needs; 0 turns that off. Not active in `eval()`.
        mlp_ratio: width of the MLP over D.
        norm_eps: eps of the layer norms.
        gaussian_target: what the first 5 channels are: "offset" (refined minus initial Gaussian), "absolute" (the
            Gaussian) or "logit" (its logits); `None` takes "offset" with a condition and "absolute" without.
        latents_mean, latents_std: C channel statistics of the target, by which it is standardised; `None` leaves
            them to the pipeline, which then takes those of its tokenizer.

    Raises:
        ValueError: an unknown `condition_injection` or `gaussian_target`, statistics of another length than
            `in_channels` or with a standard deviation of 0.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["SiTTransformerBlock"]  # noqa: RUF012 - diffusers reads lists
    _repeated_blocks = ["SiTTransformerBlock"]  # noqa: RUF012
    _skip_layerwise_casting_patterns = ["pos_embed", "time_embedder", "norm"]  # noqa: RUF012

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
        # A conditioned model carries the table (checkpoints have it) but does not learn it: it is never used there.
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
        """A new model of size "S", "B", "L" or "XL"; `config` sets the rest, and wins over the preset.

        Raises:
            ValueError: no preset of that name.
        """
        if name not in SIT_PRESETS:
            raise ValueError(f"SiT presets are {list(SIT_PRESETS)}, got {name!r}")
        return cls(**{**SIT_PRESETS[name], **config})

    def load_lora_adapter(self, pretrained_model_name_or_path_or_dict: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a LoRA as diffusers does, but never from a pickle."""
        only_safetensors(kwargs)
        return super().load_lora_adapter(pretrained_model_name_or_path_or_dict, *args, **kwargs)

    @property
    def null_class(self) -> int:
        """The label that stands for "no class"."""
        return self.config.num_classes

    def _initialize_weights(self) -> None:
        """DiT's initialisation: Xavier, and zero where a block or the output is to begin as nothing."""
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
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """Predict `noise - data` for noised tokens.

        Args:
            hidden_states: `(B, L, C)` noised targets, `sigma noise + (1 - sigma) data`.
            timestep: 1000 sigma, one number or `(B,)`; 1000 is noise.
            class_labels: `(B,)` integers from 0 to `num_classes`, the last meaning "no class". In training mode some
                are replaced by it, see `class_dropout_prob`.
            encoder_condition: `(B, L, E)` initial Gaussians. With a condition L may be anything. Without, the learned
                position embedding takes its place and L must be `sample_size`; a model made for a condition may be
                called without, its table then being whatever its checkpoint holds.
            attention_mask: `(B, L)`, 1 (or True) for tokens, 0 for padding. Padding changes no token's output; what
                comes out at padded positions has no meaning.
            return_dict: return an output object instead of a tuple.

        Returns:
            `.sample` `(B, L, C)`: minus the velocity of the paper.

        Raises:
            ValueError: shapes that do not fit together or the config.
        """
        self._check_inputs(hidden_states, class_labels, encoder_condition, attention_mask)
        batch, dtype = hidden_states.shape[0], hidden_states.dtype
        timestep = torch.as_tensor(timestep, dtype=torch.float32, device=hidden_states.device).expand(batch)
        if self.training and self.config.class_dropout_prob > 0:
            dropped = torch.rand(batch, device=class_labels.device) < self.config.class_dropout_prob
            class_labels = torch.where(dropped, self.null_class, class_labels)

        time = self.time_embedder(self.time_proj(timestep_to_time(timestep)).to(dtype))
        temb = time + self.class_embedder(class_labels).to(dtype)  # (B, D)
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

        for block in self.transformer_blocks:
            if every_block:
                hidden_states = hidden_states + condition
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, hidden_states, temb, attention_mask)
            else:
                hidden_states = block(hidden_states, temb, attention_mask)

        shift, scale = self.modulation_out(F.silu(temb)).unsqueeze(1).chunk(2, dim=-1)
        output = self.proj_out(self.norm_out(hidden_states) * (1 + scale) + shift)
        sample = -output[..., : self.config.in_channels]
        if not return_dict:
            return (sample,)
        return Transformer2DModelOutput(sample=sample)

    def enable_cache(self, config: Any) -> None:
        """Diffusers' caches (first block, pyramid attention broadcast, ...); see `CacheMixin.enable_cache`."""
        # Diffusers looks blocks up by class and knows only its own; registering there imports all its models, so
        # it is done when a cache is asked for and not when this module is imported.
        from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry

        TransformerBlockRegistry.register(
            SiTTransformerBlock,
            TransformerBlockMetadata(return_hidden_states_index=0, return_encoder_hidden_states_index=None),
        )
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
                    f"without a condition the learned positions need exactly {sample_size} tokens, got {length}"
                )
        elif self.condition_embedder is None:
            raise ValueError("encoder_condition was given, but the config has condition_channels=None")
        elif tuple(condition.shape) != (batch, length, self.config.condition_channels):
            expected = (batch, length, self.config.condition_channels)
            raise ValueError(f"encoder_condition must be {expected}, got {tuple(condition.shape)}")
