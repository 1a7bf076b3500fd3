"""Recipes: the loss is the model's, the context drop is drawn anew, and what comes out loads and draws."""

import random
from dataclasses import replace

import pytest
import torch
from transformers import Trainer

from modeling_lumina_mgpt import LuminaMGPTForConditionalGeneration
from modeling_lumina_mgpt.pipelines import LuminaMGPTPipeline
from modeling_lumina_mgpt.training import train_vq
from modeling_lumina_mgpt.training.mixture import Mixture, load_mixture
from modeling_lumina_mgpt.training.sft import Collator, SFTRecipe, train
from modeling_lumina_mgpt.training.tabletop import tabletop_records
from modeling_lumina_mgpt.training.tasks import tabletop_conversation

TASKS = ("text-to-image", "caption", "vqa", "edit", "control", "depth", "normal", "segmentation")
SFT_VALUES = {
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "bf16": False,
    "report_to": "none",
    "logging_steps": 1,
    "save_steps": 1,
    "lr_scheduler_type": "constant",
}


@pytest.fixture
def start(tmp_path, tiny_config, tiny_processor, tiny_vqvae):
    """A folder with an untrained model."""
    torch.manual_seed(0)
    model = LuminaMGPTForConditionalGeneration(tiny_config())
    LuminaMGPTPipeline(model, tiny_vqvae, tiny_processor).save_pretrained(tmp_path / "start")
    return str(tmp_path / "start")


@pytest.mark.parametrize("task", TASKS)
def test_every_task_is_a_question_and_an_answer(tiny_processor, task):
    (record,) = tabletop_records([3], [(64, 32)])
    turns, images = tabletop_conversation(task, record, tiny_processor, random.Random(0))
    encoded = tiny_processor.encode_conversation(turns, images, target_px=64)
    answer = [i for i in encoded["labels"] if i >= 0]
    expected = ["text", "image"][tiny_processor.uni_rep.start_id in answer]
    assert tiny_processor.tasks[task].answer == expected
    assert answer[-1] == tiny_processor.uni_rep.end_of_turn_id
    assert encoded["input_ids"][-len(answer) :] == answer


def test_mixture_is_made_once_and_holds_what_was_asked(tiny_processor, tmp_path):
    mixture = Mixture(target_px=64, num_scenes=70, tasks={"text-to-image": 1.0, "caption": 1.0})
    made = load_mixture(mixture, tiny_processor, tmp_path / "data")
    again = load_mixture(mixture, None, tmp_path / "data")
    with pytest.raises(ValueError, match="another mixture"):
        load_mixture(replace(mixture, num_scenes=71), None, tmp_path / "data")
    assert len(made) == 70 and set(made["task"]) == {"text-to-image", "caption"}
    assert made[69] == again[69]
    with pytest.raises(ValueError, match="nonsense"):
        tabletop_conversation("nonsense", {"image": None}, tiny_processor, random.Random(0))


def test_context_drop_leaves_the_last_image_alone(tiny_processor):
    uni_rep = tiny_processor.uni_rep
    collator = Collator(1, uni_rep.start_id, uni_rep.end_id, context_drop=0.5)
    image, other = torch.zeros(2, 2, dtype=torch.long), torch.ones(2, 2, dtype=torch.long)
    record = tiny_processor.encode_conversation(["do <|image|>", "<|image|>"], [other, image])
    caption = tiny_processor.encode_conversation(["say <|image|>", "a sphere"], [other])
    seen = []
    for collator.epoch in range(20):
        seen.append(tuple(collator([record])["input_ids"][0].tolist()))
        assert seen[-1] == tuple(collator([record])["input_ids"][0].tolist())
        assert collator([caption])["input_ids"].shape[1] == len(caption["input_ids"])
    assert set(seen) == {tuple(record["input_ids"]), tuple(uni_rep.encode(image).tolist())}


def test_a_run_resumes_bit_for_bit_and_its_folder_draws(start, tmp_path):
    def recipe(name, **values):
        return SFTRecipe(
            output_dir=str(tmp_path / name),
            model=start,
            mixture={"target_px": 64, "num_scenes": 8},
            sft={**SFT_VALUES, "learning_rate": 1e-2, "train_sampling_strategy": "group_by_length", **values},
            generation={"guidance_scale": 2.0, "image_top_k": 7},
        )

    train(recipe("whole", max_steps=6))
    train(recipe("halves", max_steps=5))  # the second epoch's first step
    train(recipe("halves", max_steps=6))
    whole, halves = (LuminaMGPTPipeline.from_pretrained(tmp_path / name) for name in ("whole", "halves"))
    for name, weight in whole.transformer.state_dict().items():
        assert torch.equal(weight, halves.transformer.state_dict()[name]), name
    assert whole.transformer.generation_config.guidance_scale == 2.0
    assert whole.transformer.generation_config.image_top_k == 7
    assert whole.transformer.generation_config.eos_token_id == whole.processor.uni_rep.end_of_turn_id
    assert whole.transformer.config.use_cache and whole.processor.target_px == 64
    assert whole("a red sphere").images[0].size == (64, 64)


def test_training_loss_is_the_models_with_its_z_loss(start, tmp_path, monkeypatch):
    losses = []

    def compute(self, model, inputs, *args, **kwargs):
        loss, outputs = original(self, model, inputs, *args, **kwargs)
        counted = inputs["labels"][:, 1:] != -100
        logits = outputs.logits[:, :-1][counted].float()
        cross_entropy = torch.nn.functional.cross_entropy(logits, inputs["labels"][:, 1:][counted])
        losses.append((loss.item(), (cross_entropy + 1e-5 * logits.logsumexp(-1).square().mean()).item()))
        return loss, outputs

    original = Trainer.compute_loss
    monkeypatch.setattr(Trainer, "compute_loss", compute)
    train(SFTRecipe(str(tmp_path / "run"), {"target_px": 64, "num_scenes": 4}, SFT_VALUES, model=start))
    assert len(losses) == 2
    assert all(ours == pytest.approx(expected, rel=1e-5) for ours, expected in losses)


def test_vq_training_resumes_and_reports_what_it_saved(tmp_path, tiny_vqvae):
    model = {k: v for k, v in tiny_vqvae.config.items() if k in ("down_block_types", "up_block_types")}
    model |= {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4, "num_vq_embeddings": 16}
    values = {"output_dir": str(tmp_path), "model": model, "pictures": [{"size_px": 64, "scenes": 4}]}
    values |= {"num_codes": 8, "num_decoder_steps": 2}
    recipe = train_vq.VQRecipe(**values, batch_size=2, num_steps=4, quantize_from_step=2, save_steps=2)
    model = train_vq.train(recipe)
    assert model.config["num_vq_embeddings"] == 8
    codes, decoder = (torch.load(tmp_path / f"{name}.pt", weights_only=True)["model"] for name in ("codes", "decoder"))
    for name, weight in decoder.items():  # merging leaves the encoder alone
        assert torch.equal(weight, codes[name]) or not name.startswith(("encoder", "quant_conv")), name
    again = train_vq.train(recipe)  # nothing left to do: the same weights again
    assert all(torch.equal(a, again.state_dict()[name]) for name, a in model.state_dict().items())
    assert (tmp_path / "scores.json").exists()


def test_psnr_and_ssim_of_known_pictures():
    picture = torch.rand(2, 3, 16, 16) * 2 - 1
    assert train_vq.psnr(picture + 0.2, picture) == pytest.approx(20.0, abs=1e-3)
    assert train_vq.ssim(picture, picture) == pytest.approx(1.0)
