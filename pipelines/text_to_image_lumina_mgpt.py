"""The task behind transformers' `pipeline("text-to-image", model=..., trust_remote_code=True)`.

transformers has no such task of its own: `custom_pipelines` in the model's configuration names this file. A repo
carries it beside the model, so it imports no sibling.
"""

from typing import Any

from transformers import Pipeline


class LuminaMGPTTextToImagePipeline(Pipeline):
    """Prompts to pictures: `pipe("a red sphere")` gives a list of PIL images, a list of prompts a list of such lists.

    Further arguments of the call: `height`, `width` in pixels (the model's default size if neither is given),
    `num_images_per_prompt`, and those of the model's `generate`.
    """

    _load_processor = True
    _load_tokenizer = _load_image_processor = _load_feature_extractor = False

    def _sanitize_parameters(self, height=None, width=None, num_images_per_prompt=None, **generate_kwargs):
        size = {"height": height, "width": width} if height or width else {}
        if num_images_per_prompt is not None:
            generate_kwargs["num_return_sequences"] = num_images_per_prompt
        return size, generate_kwargs, {}

    def preprocess(self, prompt: str, height: int | None = None, width: int | None = None) -> dict[str, Any]:
        """The prompt's ids and the size of its picture."""
        config = self.model.config
        height, width = (height, width) if height or width else (config.default_height_px, config.default_width_px)
        turn = self.processor.task_prompt("text-to-image", prompt, height, width)
        return {**self.processor(turn), "height": height, "width": width}

    def _forward(self, inputs: dict[str, Any], **generate_kwargs) -> dict[str, Any]:
        ends = [self.processor.uni_rep.end_id, self.processor.uni_rep.end_of_turn_id]
        ids = self.model.generate(**inputs, **{"eos_token_id": ends, **generate_kwargs})
        return {"ids": ids[:, inputs["input_ids"].shape[1] :]}

    def postprocess(self, outputs: dict[str, Any]) -> list:
        """The pictures, one a row."""
        self.processor.vqvae.to(self.device)
        return [self.processor.decode_ids(row)[-1] for row in outputs["ids"]]
