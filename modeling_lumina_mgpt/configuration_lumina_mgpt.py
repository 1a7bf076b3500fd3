"""One configuration for Lumina-mGPT, Lumina-mGPT 2.0 and PURE.

The fields are those of transformers' `ChameleonConfig`, without its VQ model and its vocabulary map, plus two training
knobs and the layout of an image in the token stream (`image_layout`), so that the three families differ by
configuration alone and generation needs neither tokenizer nor processor.
"""

from dataclasses import field
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

# Written whole at every save: transformers records one auto class per class, and prefixes the rest with a repo id.
AUTO_MAP = {
    "AutoConfig": "configuration_lumina_mgpt.LuminaMGPTConfig",
    "AutoModel": "modeling_lumina_mgpt.LuminaMGPTModel",
    "AutoModelForCausalLM": "modeling_lumina_mgpt.LuminaMGPTForConditionalGeneration",
    "AutoModelForImageTextToText": "modeling_lumina_mgpt.LuminaMGPTForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_lumina_mgpt.LuminaMGPTForConditionalGeneration",
}
CUSTOM_PIPELINES = {
    "text-to-image": {
        "impl": "text_to_image_lumina_mgpt.LuminaMGPTTextToImagePipeline",
        "pt": ["AutoModelForMultimodalLM"],
        "tf": [],
        "default": {},
        "type": "text",
    }
}
# What a published configuration says about the decoder. The rest is about a VQ model and a vocabulary map that are not
# here, or left over from training.
PUBLISHED_FIELDS = {
    "attention_bias",
    "attention_dropout",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "hidden_act",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "max_position_embeddings",
    "mlp_bias",
    "model_parallel_size",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "pad_token_id",
    "rms_norm_eps",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "swin_norm",
    "torch_dtype",
    "vocab_size",
    "z_loss_weight",
}
POSITIVE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "model_parallel_size",
    "default_height_px",
    "default_width_px",
)
IMAGE_LAYOUT_KEYS = {
    "start_id",
    "end_id",
    "end_of_line_id",
    "end_of_turn_id",
    "size_ids",
    "code_id_ranges",
    "size_unit_px",
    "codes_per_size_unit",
}


@strict
class LuminaMGPTConfig(PreTrainedConfig):
    r"""The decoder's shape, its training loss, and where images live in its vocabulary.

    Args:
        model_parallel_size (`int`): shards of the published `q_norm` and `k_norm` weights.
        swin_norm (`bool`): normalize after attention and MLP instead of before (Chameleon 30B).
        residual_dropout (`float`): dropout on each branch just before its residual sum, in training only.
        z_loss_weight (`float`): weight of the mean squared log-partition in the loss (Lumina-mGPT, section 2.2).
        image_layout (`dict`, *optional*): ids and units of the Uni-Rep of an image, as `UniRep.layout_dict()` gives
            them: `start_id`, `end_id`, `end_of_line_id`, `end_of_turn_id`, `size_ids` (entry n - 1 is the id of size
            n), `code_id_ranges` (`[first, last + 1]` each), `size_unit_px`, `codes_per_size_unit`.
        default_height_px, default_width_px (`int`): the size of a picture when text-to-image is given none.
        image_token_id (`int`, *optional*): the `<|image|>` placeholder. It stands for an image in text only and may
            lie outside the embedding: the model never sees it.

    Raises:
        ValueError: if `image_layout` has other keys than those above, a count is below 1, or heads cannot be shared
            out evenly.
    """

    model_type = "lumina_mgpt"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "z_loss", "cross_entropy", "z_losses"]

    vocab_size: int = 65536
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 4096
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = False
    rope_parameters: dict | None = None
    attention_bias: bool = False
    attention_dropout: float | int = 0.0
    mlp_bias: bool = False
    model_parallel_size: int = 1
    swin_norm: bool = False

    residual_dropout: float | int = 0.0
    z_loss_weight: float | int = 1e-5

    image_layout: dict | None = None
    image_token_id: int | None = None
    default_height_px: int = 768
    default_width_px: int = 768
    custom_pipelines: dict = field(default_factory=lambda: dict(CUSTOM_PIPELINES))

    def __post_init__(self, **kwargs):
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        for name in POSITIVE:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; accepted are 1, 2, 3, ...")
        shares = (
            ("hidden_size", "num_attention_heads"),
            ("num_attention_heads", "num_key_value_heads"),
            ("num_key_value_heads", "model_parallel_size"),
        )
        for whole, part in shares:
            if getattr(self, whole) % getattr(self, part):
                values = getattr(self, whole), getattr(self, part)
                raise ValueError(f"{whole} {values[0]} and {part} {values[1]}; accepted is a multiple of {part}")
        if self.image_layout is not None and set(self.image_layout) != IMAGE_LAYOUT_KEYS:
            raise ValueError(f"image_layout has keys {sorted(self.image_layout)}, not {sorted(IMAGE_LAYOUT_KEYS)}")
        super().__post_init__(**kwargs)

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        """As in transformers; a published checkpoint's configuration, which says "chameleon", is translated."""
        values, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        return (cls.translated(values) if values.get("model_type") == "chameleon" else values), kwargs

    @classmethod
    def translated(cls, published: dict[str, Any]) -> dict[str, Any]:
        """A published checkpoint's configuration in this class's words."""
        kept = {name: value for name, value in published.items() if name in PUBLISHED_FIELDS}
        return {**kept, "model_type": cls.model_type, "residual_dropout": published.get("dropout", 0.0)}

    def validate_token_ids(self):
        """Replaces a stock check, which would warn that `image_token_id` lies outside the embedding, as it should."""

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs: Any):
        """As in transformers, with an `auto_map` for every Auto class that can load the folder."""
        self.auto_map = dict(AUTO_MAP)
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)


LuminaMGPTConfig.register_for_auto_class()
