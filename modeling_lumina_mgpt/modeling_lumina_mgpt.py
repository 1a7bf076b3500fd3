"""The decoder: transformers' Chameleon as a plain language model over text tokens and image codes, and its loss.

What differs from stock: no VQ model inside (images arrive as token ids), no masking of image logits, dropout on each
residual branch, and a z-loss beside the cross-entropy. Published weights load as they are: their `q_norm` and `k_norm`
hold one row per model-parallel shard and are expanded to one per head on the way in.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
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


@dataclass
class LuminaMGPTOutputWithPast(CausalLMOutputWithPast):
    """Stock output and the unweighted z-loss (scalar, detached: for logging; `loss` already holds its share)."""

    z_loss: Tensor | None = None


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
        self.rotary_emb = ChameleonRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    def get_image_features(self, pixel_values: Tensor, **kwargs):
        """Not here: the model reads token ids."""
        raise ValueError("pixel_values are not accepted: LuminaMGPTProcessor turns images into input_ids")


class LuminaMGPTForConditionalGeneration(LuminaMGPTPreTrainedModel, LuminaMGPTGenerationMixin):
    """The decoder with its language-model head."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: LuminaMGPTConfig):
        super().__init__(config)
        self.model = LuminaMGPTModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

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
        **kwargs,
    ) -> LuminaMGPTOutputWithPast:
        """Next-token logits and, given labels, the loss.

        Args:
            input_ids: `LongTensor (batch, length)`; or `inputs_embeds (batch, length, hidden_size)`.
            attention_mask: `(batch, length)`, 1 on tokens and 0 on padding.
            position_ids: `LongTensor (batch, length)`, each token's place in its own sequence.
            labels: `LongTensor (batch, length)`, the ids themselves where they are predicted and -100 elsewhere;
                they are shifted here.
            logits_to_keep: only the last so many positions' logits (0: all), or the positions themselves.
            num_items_in_batch: labels predicted in the whole optimizer step; divides the losses in place of this
                batch's count, so that accumulated gradients equal those of one large batch.
        Returns:
            `logits (batch, kept, vocab_size)`, `loss` and `z_loss` (float32 scalars), and stock's other fields.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = z_loss = None
        if labels is not None:
            cross_entropy, z_loss = language_losses(logits, labels, num_items_in_batch)
            loss = cross_entropy + self.config.z_loss_weight * z_loss
            z_loss = z_loss.detach()
        return LuminaMGPTOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            z_loss=z_loss,
        )


def language_losses(
    logits: Tensor, labels: Tensor, num_items_in_batch: int | Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Cross-entropy and z-loss (mean squared log-partition), both over the same shifted, unmasked positions.

    `logits (batch, length, vocab_size)` of any float type, `labels (batch, length)`; float32 scalars.
    """
    logits = logits.float()
    targets = F.pad(labels, (0, 1), value=IGNORED_LABEL)[:, 1:].to(logits.device)  # (batch, length)
    counted = targets != IGNORED_LABEL
    count = counted.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    if isinstance(count, Tensor):
        count = count.to(logits.device)
    log_partition = logits.logsumexp(-1)  # (batch, length)
    target_logits = logits.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    cross_entropy = (log_partition - target_logits).masked_fill(~counted, 0).sum() / count
    z_loss = log_partition.square().masked_fill(~counted, 0).sum() / count
    return cross_entropy, z_loss


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
