"""The decoder: transformers' Chameleon as a plain language model over text tokens and image codes, and its loss.

What differs from stock: no VQ model inside (images arrive as token ids), no masking of image logits, dropout on each
residual branch, and a z-loss beside the cross-entropy. Training never holds all logits: the head computes both losses
and their gradients some positions at a time, and only where a token is predicted. Published weights load as they are:
their `q_norm` and `k_norm` hold one row per model-parallel shard and are expanded to one per head on the way in.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers.cache_utils import Cache
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.chameleon.modeling_chameleon import (
    ChameleonDecoderLayer,
    ChameleonModel,
    ChameleonPreTrainedModel,
    ChameleonRMSNorm,
    ChameleonRotaryEmbedding,
)
from transformers.utils import can_return_tuple

from .configuration_lumina_mgpt import LuminaMGPTConfig
from .generation_lumina_mgpt import LuminaMGPTGenerationMixin

IGNORED_LABEL = -100
LOGITS_PER_CHUNK = 2**25  # 128 MB in float32


@dataclass
class LuminaMGPTOutputWithPast(CausalLMOutputWithPast):
    """Stock output and the parts of the loss, detached: for logging.

    Attributes:
        z_loss: unweighted, divided as `loss` is, which already holds its share; scalar.
        cross_entropy, z_losses: `(batch, length)`; position t holds the losses of predicting token t + 1, and 0 where
            it is not predicted. All three are float32 (of a float64 model: float64).
    """

    z_loss: Tensor | None = None
    cross_entropy: Tensor | None = None
    z_losses: Tensor | None = None


class LuminaMGPTDecoderLayer(ChameleonDecoderLayer):
    """Normalizes before attention and MLP (7B) or after (swin: 30B, 34B); drops out each branch before its sum."""

    def __init__(self, config: LuminaMGPTConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.swin_norm = config.swin_norm
        self.residual_dropout = nn.Dropout(config.residual_dropout)

    def forward(self, hidden_states: Tensor, **kwargs) -> tuple[Tensor]:
        """`(batch, length, hidden_size)` to the same; `kwargs` are the attention's."""

        def attend(normed: Tensor) -> Tensor:
            return self.self_attn(hidden_states=normed, **kwargs)[0]

        for norm, branch in ((self.input_layernorm, attend), (self.post_attention_layernorm, self.mlp)):
            change = norm(branch(hidden_states)) if self.swin_norm else branch(norm(hidden_states))
            hidden_states = hidden_states + self.residual_dropout(change)
        return (hidden_states,)


class LuminaMGPTRotaryEmbedding(ChameleonRotaryEmbedding):
    """Stock's, with frequencies that stay in float32 whatever the model's dtype becomes: rounded, they are off by
    radians after an image's thousands of tokens.
    """

    def _apply(self, fn, recurse=True):
        exact = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            if (now := getattr(self, name)).dtype != buffer.dtype:
                setattr(self, name, buffer.to(now.device))
        return self


class LuminaMGPTPreTrainedModel(ChameleonPreTrainedModel):
    config_class = LuminaMGPTConfig
    output_modalities = ("image", "text")
    _no_split_modules: ClassVar[list[str]] = ["LuminaMGPTDecoderLayer"]


class LuminaMGPTModel(LuminaMGPTPreTrainedModel, ChameleonModel):
    """The decoder without its head; stock forward, no VQ model."""

    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"(^|\.)vqmodel\.", r"^lm_head\."]

    def __init__(self, config: LuminaMGPTConfig):
        ChameleonPreTrainedModel.__init__(self, config)  # not ChameleonModel's: it would build the VQ model
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(LuminaMGPTDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = ChameleonRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LuminaMGPTRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    def get_image_features(self, pixel_values: Tensor, **kwargs):
        """Not here: the model reads token ids."""
        raise ValueError("pixel_values are not accepted: LuminaMGPTProcessor turns images into input_ids")


class LinearLosses(torch.autograd.Function):
    """Cross-entropy and z-loss of a linear head, and their gradients, in the one pass that has the logits.

    Written here because no kept library gives both terms of each position in that one pass: torch's
    `linear_cross_entropy` has no z-loss, and liger's kernel gives single losses only by computing the logits twice.
    """

    @staticmethod
    def forward(ctx, hidden_states: Tensor, weight: Tensor, targets: Tensor, z_loss_weight: float):
        """The sum of all losses, differentiable once; cross-entropy and z-loss `(positions,)`, not differentiable.

        `hidden_states (positions, hidden_size)`, `weight (vocab_size, hidden_size)`, `targets (positions,)`. Products
        are in autocast's dtype, else the weight's; all else is in float32, also the sum of the weight's gradient.
        """
        device = hidden_states.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        wide = torch.promote_types(dtype, torch.float32)
        matrix, chunk_size = weight.to(dtype), max(1, LOGITS_PER_CHUNK // len(weight))
        hidden_grad = torch.empty_like(hidden_states) if ctx.needs_input_grad[0] else None
        weight_grad = torch.zeros_like(weight, dtype=wide) if ctx.needs_input_grad[1] else None
        cross_entropy, z_losses = hidden_states.new_empty(2, len(targets), dtype=wide)
        for start in range(0, len(targets), chunk_size):
            chunk = slice(start, start + chunk_size)
            hidden, target = hidden_states[chunk].to(dtype), targets[chunk, None]  # (rows, hidden_size), (rows, 1)

            # 1. The losses; what was logits becomes their exponentials, to hold one such tensor only
            logits = F.linear(hidden, matrix).to(wide)  # (rows, vocab_size)
            target_logits, largest = logits.gather(1, target), logits.amax(1, keepdim=True)
            exponentials = logits.sub_(largest).exp_()
            total = exponentials.sum(1, keepdim=True)
            log_partition = largest + total.log()
            cross_entropy[chunk] = (log_partition - target_logits)[:, 0]
            z_losses[chunk] = log_partition.square()[:, 0]

            # 2. Their gradients: softmax * (1 + 2 * z_loss_weight * log_partition) - one_hot(target)
            if not any(ctx.needs_input_grad):
                continue
            logits_grad = exponentials.mul_((1 + 2 * z_loss_weight * log_partition) / total)
            logits_grad = logits_grad.scatter_add_(1, target, -torch.ones_like(total)).to(dtype)
            if hidden_grad is not None:
                hidden_grad[chunk] = logits_grad @ matrix
            if weight_grad is not None and dtype == wide:
                weight_grad.addmm_(logits_grad.T, hidden)
            elif weight_grad is not None:
                weight_grad += logits_grad.T @ hidden
        ctx.gradients, ctx.weight_dtype = (hidden_grad, weight_grad), weight.dtype
        ctx.mark_non_differentiable(cross_entropy, z_losses)
        return (cross_entropy + z_loss_weight * z_losses).sum(), cross_entropy, z_losses

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: Tensor, *_):
        if ctx.gradients is None:
            raise RuntimeError("the loss was differentiated already, and its gradients are kept for one time only")
        (hidden_grad, weight_grad), ctx.gradients = ctx.gradients, None  # scaled in place: they are large
        if hidden_grad is not None:
            hidden_grad.mul_(grad_output)
        if weight_grad is not None:
            weight_grad = weight_grad.mul_(grad_output).to(ctx.weight_dtype)
        return hidden_grad, weight_grad, None, None


class LuminaMGPTHead(nn.Linear):
    """The language-model head: hidden states to logits, or, where targets are given, to the losses without them.

    The losses are computed in here, not beside it, so that they find the weight as every wrapper's hooks prepare it.
    """

    def forward(self, hidden_states: Tensor, targets: Tensor | None = None, z_loss_weight: float = 0.0) -> Any:
        """`(..., hidden_size)` to logits `(..., vocab_size)`; with `targets` as `LinearLosses.forward`."""
        if targets is None:
            return F.linear(hidden_states, self.weight)
        weight = self.weight if torch.is_grad_enabled() else self.weight.detach()
        return LinearLosses.apply(hidden_states, weight, targets, z_loss_weight)


class LuminaMGPTForConditionalGeneration(LuminaMGPTPreTrainedModel, LuminaMGPTGenerationMixin):
    """The decoder with its language-model head."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: LuminaMGPTConfig):
        super().__init__(config)
        self.model = LuminaMGPTModel(config)
        self.lm_head = LuminaMGPTHead(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """As in stock, but a plain layer, which `resize_token_embeddings` brings, becomes one that has losses."""
        if type(new_embeddings) is nn.Linear:
            new_embeddings.__class__ = LuminaMGPTHead
        super().set_output_embeddings(new_embeddings)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: int | Tensor | None = None,
        skip_logits: bool | None = None,
        **kwargs,
    ) -> LuminaMGPTOutputWithPast:
        """Next-token logits and, given labels, the loss.

        Args:
            input_ids: `LongTensor (batch, length)`; or `inputs_embeds (batch, length, hidden_size)`.
            attention_mask: `(batch, length)`, 1 on tokens and 0 on padding.
            position_ids: `LongTensor (batch, length)`, each token's place in its own sequence. Several sequences may
                share a row, one after another, each from place 0, where neither attention_mask nor a cache is given.
            labels: `LongTensor (batch, length)`, the ids themselves where they are predicted and -100 elsewhere;
                they are shifted here. With labels, a cache is made only if `use_cache` asks for it.
            logits_to_keep: only the last so many positions' logits (0: all), or the positions themselves.
            num_items_in_batch: labels predicted in the whole optimizer step; divides the losses in place of this
                batch's count, so that accumulated gradients equal those of one large batch.
            skip_logits: leave `logits` None; the losses are the same. None: when training with labels.
        Returns:
            `logits (batch, kept, vocab_size)`, `loss` (float32 scalar), its parts (see `LuminaMGPTOutputWithPast`),
            and stock's other fields.
        Raises:
            ValueError: an adapter such as LoRA sits on the head, and labels are given.
        """
        if use_cache is None and labels is not None:
            use_cache = False  # with a cache, stock would let packed sequences see each other
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states, logits, losses = outputs.last_hidden_state, None, {}
        if labels is not None:
            if position_ids is not None:
                labels = labels.masked_fill(position_ids.to(labels.device) == 0, IGNORED_LABEL)
            weight = self.config.z_loss_weight
            losses = language_losses(self.lm_head, hidden_states, labels, weight, num_items_in_batch)
        if not (self.training and labels is not None if skip_logits is None else skip_logits):
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden_states[:, kept])
        return LuminaMGPTOutputWithPast(
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **losses,
        )


@torch.compiler.disable  # the number of predicted positions differs from batch to batch
def language_losses(
    head: nn.Module,
    hidden_states: Tensor,
    labels: Tensor,
    z_loss_weight: float,
    num_items_in_batch: int | Tensor | None = None,
) -> dict[str, Tensor]:
    """Cross-entropy and z-loss (squared log-partition) of every position whose next token is labelled.

    `hidden_states (batch, length, hidden_size)`, `labels (batch, length)`; what `LuminaMGPTOutputWithPast` says of
    losses. Their sum is divided by `num_items_in_batch`, or by the labels' count; it is 0 where there are none.
    """
    if hasattr(head, "base_layer"):
        raise ValueError(
            "lm_head has an adapter, which training would pass over: take lm_head out of target_modules, or train it "
            "whole with modules_to_save=['lm_head']"
        )
    targets = F.pad(labels, (0, 1), value=IGNORED_LABEL)[:, 1:].to(hidden_states.device)  # (batch, length)
    predicted = targets != IGNORED_LABEL
    total, cross_entropy, z_losses = head(hidden_states[predicted], targets[predicted], z_loss_weight)
    predicted = predicted.to(total.device)  # the head may be on another one than what it is given
    count = predicted.sum() if num_items_in_batch is None else num_items_in_batch
    count = torch.as_tensor(count, device=total.device).clamp(min=1)
    nothing = total.new_zeros(predicted.shape)
    return {
        "loss": total / count,
        "z_loss": z_losses.sum() / count,
        "cross_entropy": nothing.masked_scatter(predicted, cross_entropy),
        "z_losses": nothing.masked_scatter(predicted, z_losses),
    }


class ExpandShards(ConversionOps):
    """`[shards, head_dim]` to `[heads, head_dim]`: every head of a model-parallel shard used that shard's row.

    Weights that are expanded already pass unchanged, so they are saved as they are.
    """

    def __init__(self, heads_attribute: str):
        self.heads_attribute = heads_attribute

    def convert(self, input_dict, source_patterns, target_patterns, config=None, **kwargs):
        num_heads = getattr(config, self.heads_attribute)
        (tensors,) = input_dict.values()
        weight = tensors[0] if isinstance(tensors, list) else tensors
        return {target_patterns[0]: weight.repeat_interleave(num_heads // weight.shape[0], 0)}

    @property
    def reverse_op(self) -> "ExpandShards":
        return self


LuminaMGPTModel.register_for_auto_class("AutoModel")
LuminaMGPTForConditionalGeneration.register_for_auto_class("AutoModelForMultimodalLM")
register_checkpoint_conversion_mapping(
    LuminaMGPTConfig.model_type,
    [
        WeightConverter(f"self_attn.{norm}.{part}", f"self_attn.{norm}.{part}", [ExpandShards(heads)])
        for norm, heads in (("q_norm", "num_attention_heads"), ("k_norm", "num_key_value_heads"))
        for part in ("weight", "bias")
    ],
    overwrite=True,
)
