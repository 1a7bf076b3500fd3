"""Recipes: what a YAML file may say, runs that resume, folders that draw, and adapters that stay small."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image
from safetensors.torch import load_file

from modeling_lumina_mgpt.checkpoints import default_checkpoint
from modeling_lumina_mgpt.pipelines import LuminaMGPTPipeline
from modeling_lumina_mgpt.training import chain, sft, train_vq
from modeling_lumina_mgpt.training.folders import new_pipeline
from modeling_lumina_mgpt.training.mixture import Mixture, MixtureReader
from modeling_lumina_mgpt.training.recipe import ChainRecipe, SFTRecipe, load_recipe, lora_config, sft_config
from modeling_lumina_mgpt.training.sft import train
from modeling_lumina_mgpt.training.tasks import ADAPTERS
from modeling_lumina_mgpt.training.train_tokenizer import build_tokenizer

RECIPES = Path(__file__).parents[1] / "training" / "recipes"
SFT_VALUES = {
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "logging_steps": 1,
    "save_steps": 1,
    "lr_scheduler_type": "constant",
    "disable_tqdm": True,
}


def tabletop(num_records, *tasks):
    """A mixture of scenes, as many for each task."""
    sources = [{"path": "tabletop", "task": task, "num_records": num_records} for task in tasks]
    return {"target_px": 64, "sources": sources}


@pytest.fixture
def recipe(tiny_folder, tmp_path):
    """Makes recipes: `recipe("name", max_steps=3, lora={"r": 4})`."""

    def make(name, mixture=None, **values):
        sft = SFT_VALUES | {name: values.pop(name) for name in [*values] if name not in SFTRecipe.__dataclass_fields__}
        mixture = mixture or tabletop(4, "text-to-image", "caption")
        return SFTRecipe(
            **{"output_dir": str(tmp_path / name), "mixture": mixture, "sft": sft, "model": str(tiny_folder), **values}
        )

    return make


def losses(made, name="loss"):
    """What the last checkpoint of a recipe's run has logged."""
    last = max((Path(made.output_dir) / "trainer").glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
    history = json.loads((last / "trainer_state.json").read_text())["log_history"]
    return [entry[name] for entry in history if name in entry]


def test_a_run_resumes_bit_for_bit_and_its_folder_draws(recipe, tmp_path):
    values = {"tokenized": str(tmp_path / "data"), "train_sampling_strategy": "group_by_length"}
    values["generation"] = {"guidance_scale": 2.0, "image_top_k": 7}
    train(recipe("whole", max_steps=6, **values))
    train(recipe("halves", max_steps=5, **values))  # the second epoch's first step
    train(recipe("halves", max_steps=6, **values))
    whole, halves = (LuminaMGPTPipeline.from_pretrained(tmp_path / name) for name in ("whole", "halves"))
    for name, weight in whole.transformer.state_dict().items():
        assert torch.equal(weight, halves.transformer.state_dict()[name]), name
    assert whole.transformer.generation_config.guidance_scale == 2.0
    assert whole.transformer.generation_config.image_top_k == 7
    assert whole.transformer.generation_config.eos_token_id == whole.processor.uni_rep.end_of_turn_id
    assert whole.transformer.config.use_cache and whole.processor.target_px == 64
    assert whole("a red sphere").images[0].size == (64, 64)


def test_a_run_that_has_ended_takes_no_more_steps(recipe, tmp_path):
    made = recipe("run", max_steps=3)  # in the midst of an epoch
    train(made)
    before = load_file(tmp_path / "run" / "model.safetensors")
    train(made)
    after = load_file(tmp_path / "run" / "model.safetensors")
    assert len(losses(made)) == 3 and all(torch.equal(weight, after[name]) for name, weight in before.items())


def test_images_and_what_was_tokenized_ahead_train_alike(recipe, tmp_path):
    mixture = tabletop(3, *ADAPTERS)
    straight = recipe("straight", mixture, max_steps=3, per_device_train_batch_size=15)
    ahead = recipe("ahead", mixture, max_steps=3, per_device_train_batch_size=15, tokenized=str(tmp_path / "data"))
    train(straight)
    train(ahead)
    assert losses(straight) == losses(ahead)
    assert all(losses(straight, f"loss_{task}") == losses(ahead, f"loss_{task}") for task in ADAPTERS)


def test_a_stream_resumes_bit_for_bit(recipe, tmp_path):
    pictures = [Image.new("RGB", (64, 64), (20 * i, 90, 255 - 20 * i)) for i in range(12)]
    records = Dataset.from_dict({"image": pictures, "caption": [f"picture {i}" for i in range(12)]})
    records.cast_column("image", ImageFeature()).to_parquet(tmp_path / "records.parquet")
    source = {"path": str(tmp_path / "records.parquet"), "task": "text-to-image", "streaming": True}
    mixture = {"target_px": 64, "sources": [source]}
    values = {"max_steps": 9, "context_drop": 0.5}
    train(recipe("whole", mixture, **values))
    shutil.copytree(tmp_path / "whole" / "trainer", tmp_path / "halves" / "trainer")
    for step in (8, 9):  # in the second pass
        shutil.rmtree(tmp_path / "halves" / "trainer" / f"checkpoint-{step}")
    train(recipe("halves", mixture, **values))
    assert losses(recipe("whole")) == losses(recipe("halves"))
    whole, halves = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "halves"))
    assert all(torch.equal(weight, halves[name]) for name, weight in whole.items())


def test_an_adapter_is_small_resumes_and_changes_pictures_once_loaded(recipe, tiny_folder, tmp_path):
    values = {"lora": {"r": 4, "lora_alpha": 8}, "max_steps": 4}
    train(recipe("whole", **values))
    train(recipe("halves", **{**values, "max_steps": 2}))
    train(recipe("halves", **values))
    found = load_file(tmp_path / "whole" / "adapter_model.safetensors")
    assert all(
        torch.equal(tensor, found[name])
        for name, tensor in load_file(tmp_path / "halves" / "adapter_model.safetensors").items()
    )
    # q, k, v, o of 32 x 32; gate, up, down of 32 x 48; in two layers
    assert sum(tensor.numel() for tensor in found.values()) == 2 * 4 * (4 * (32 + 32) + 3 * (32 + 48))
    assert not [*(tmp_path / "whole").glob("*.bin")]
    pipe = LuminaMGPTPipeline.from_pretrained(tiny_folder)
    pipe.set_progress_bar_config(disable=True)

    def draw():
        return pipe("a cube", generator=torch.Generator().manual_seed(0), output_type="latent").images[0]

    before = draw()
    pipe.load_lora_weights(tmp_path / "whole")
    adapted = draw()
    pipe.unload_lora_weights()
    assert not torch.equal(before, adapted) and torch.equal(before, draw())


def test_a_recipes_settings_reach_the_steps_all_together(recipe, tmp_path, monkeypatch):
    made = []

    class Watched(sft.LuminaMGPTTrainer):
        def __init__(self, **values):
            super().__init__(**values)
            made.append(self)

        def _minutes_so_far(self):
            return self.state.global_step + 1.0

    monkeypatch.setattr(sft, "LuminaMGPTTrainer", Watched)
    shares = {"context_drop": 0.2, "history_noise": 0.3, "code_renaming": {"edit": 0.5}}
    values = {"tokenized": str(tmp_path / "data"), "pack_tokens": 500, "muon": True, "max_minutes": 2, "cooldown": 1.0}
    run = recipe("run", tabletop(6, "text-to-image", "edit"), max_steps=9, **shares, **values)
    train(run)
    (trainer,) = made
    assert trainer.state.global_step == 2 and losses(run, "learning_rate") == pytest.approx([1e-2, 5e-3])
    assert {name: getattr(trainer.data_collator, name) for name in shares} == shares
    assert not any(getattr(trainer.eval_collator, name) for name in shares)
    rows = list(trainer.train_dataset)
    assert max(len(row["records"]) for row in rows) > 1 and max(row["length"] for row in rows) <= 500
    assert sum(len(row["records"]) for row in rows) == 12
    assert trainer.optimizer.optimizer.parts.keys() == {"muon", "adamw"}
    assert LuminaMGPTPipeline.from_pretrained(tmp_path / "run")("a cube").images[0].size == (64, 64)


@pytest.mark.parametrize("name", ["muon", "share_code_rows"])
def test_what_needs_whole_matrices_is_refused_where_they_are_sharded(recipe, monkeypatch, name):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match=f"{name}: true needs whole matrices"):
        train(recipe("sharded", **{name: True}))


def test_a_folder_holds_one_run(recipe):
    train(recipe("run", lora={"r": 4}, max_steps=1))
    with pytest.raises(ValueError, match=r"lora {'r': 2}: the run in .* has {'r': 4}; set it back"):
        train(recipe("run", lora={"r": 2}, max_steps=1))
    with pytest.raises(ValueError, match="model 'nowhere': neither a folder nor a repo"):
        train(recipe("other", model="nowhere"))


def test_a_folder_of_pictures(recipe, tmp_path):
    (tmp_path / "pictures").mkdir()
    lines = ["file_name,text"]
    for i in range(3):
        Image.new("RGB", (70, 50), (80 * i, 9, 9)).save(tmp_path / "pictures" / f"{i}.png")
        lines.append(f"{i}.png,picture {i}")
    (tmp_path / "pictures" / "metadata.csv").write_text("\n".join(lines))
    source = {"task": "text-to-image", "path": str(tmp_path / "pictures"), "columns": {"caption": "text"}}
    train(recipe("run", {"target_px": 64, "sources": [source]}, max_steps=2))
    assert (tmp_path / "run" / "model_index.json").exists()


def test_evaluation_is_of_held_out_scenes_by_task(recipe, tmp_path):
    held_out = {"target_px": 64, "sources": [{**tabletop(3, "depth")["sources"][0], "split": "validation"}]}
    made = recipe("run", max_steps=2, evaluation=held_out, eval_strategy="steps", eval_steps=1)
    train(made)
    assert losses(made, "eval_loss") == pytest.approx(losses(made, "eval_loss_depth"), rel=1e-2)
    assert len(losses(made, "eval_loss")) == 2


def test_samples_are_drawn_while_training(recipe, tiny_folder, tmp_path):
    processor = json.loads((path := tiny_folder / "processor_config.json").read_text())
    path.write_text(json.dumps({**processor, "trained_tasks": ["caption"]}))
    samples = {"steps": 1, "prompts": ["a cube", "a red cone"]}
    with pytest.raises(ValueError, match="text-to-image': this checkpoint was trained for caption"):
        train(recipe("blind", tabletop(4, "caption"), samples=samples))
    made = recipe("run", max_steps=2, samples=samples)
    undisturbed = recipe("undisturbed", max_steps=2)
    train(made)
    train(undisturbed)
    assert len([*(tmp_path / "run" / "samples").glob("*.png")]) == 2
    assert losses(made) == losses(undisturbed)


def test_a_shape_like_anothers_with_new_weights(recipe, tiny_folder, tmp_path):
    shape = {"like": str(tiny_folder), "config": {"num_hidden_layers": 1}}
    made = recipe("new", model=None, from_scratch=shape, share_code_rows=True, max_steps=1)
    train(made)
    pipe = LuminaMGPTPipeline.from_pretrained(tmp_path / "new")
    assert len(pipe.transformer.model.layers) == 1
    assert (
        pipe.processor.tokenizer.get_vocab()
        == LuminaMGPTPipeline.from_pretrained(tiny_folder).processor.tokenizer.get_vocab()
    )


def test_a_new_models_codes_begin_alike_in_embeddings_and_head(tmp_path, tiny_vqvae):
    tiny_vqvae.save_pretrained(tmp_path)
    pipe = new_pipeline(
        {
            "vqvae": str(tmp_path),
            "tokenizer": {"num_sizes": 4, "vocab_size": 600},
            "processor": {"size_unit_px": 16, "codes_per_size_unit": 2, "target_px": 64},
            "config": {"hidden_size": 128, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
        }
    )
    model, code_ids = pipe.transformer, pipe.processor.uni_rep.code_ids
    embeddings, head = model.get_input_embeddings().weight[code_ids], model.get_output_embeddings().weight[code_ids]
    assert torch.cosine_similarity(embeddings, head).mean() > 0.3  # 0 if each began by itself


def test_numbers_are_read_digit_by_digit_and_said_as_they_are():
    tokenizer = build_tokenizer(["What is 11 + 11? 1111"] * 50, num_codes=4, num_sizes=1, vocab_size=400)
    ids = tokenizer("What is 1137 + 11?").input_ids
    digits = [word.strip("Ġ") for word in tokenizer.convert_ids_to_tokens(ids) if word.strip("Ġ").isdigit()]
    assert digits == [*"113711"] and tokenizer.decode(ids) == "What is 1137 + 11?"


@pytest.mark.slow
@pytest.mark.parametrize(("lora", "rate"), [(None, 2e-3), ({"r": 16, "lora_alpha": 32}, 4e-3)], ids=["full", "LoRA"])
def test_one_picture_is_learned_by_heart(recipe, tmp_path, lora, rate):
    mixture = tabletop(1, "text-to-image")
    values = {"max_steps": 60, "save_steps": 60, "learning_rate": rate, "context_drop": 0.0, "warmup_steps": 4}
    made = recipe("run", mixture, model=str(default_checkpoint()), lora=lora, **values)
    train(made)
    assert losses(made)[-1] < 0.1
    pipe = LuminaMGPTPipeline.from_pretrained(made.model if lora else made.output_dir, dtype=torch.float32)
    if lora:
        pipe.load_lora_weights(made.output_dir)
    reader = MixtureReader(Mixture(**mixture), pipe.processor, 512)
    (record,) = reader.encode(list(reader.dataset))
    question, learned = pipe.processor.split_ids(record["input_ids"])
    size = {"height": 8 * learned.shape[0], "width": 8 * learned.shape[1]}
    greedy = {"guidance_scale": 1.0, "image_top_k": 1, "output_type": "latent"}
    assert torch.equal(pipe(question.split("prompt:\n")[1], **size, **greedy).images[0], learned)


@pytest.mark.parametrize("path", sorted(RECIPES.rglob("*.yaml")), ids=lambda path: str(path.relative_to(RECIPES)))
def test_recipes_can_be_read(path):
    loaded = load_recipe(path)
    if isinstance(loaded, SFTRecipe):
        for mixture in filter(None, (loaded.mixture, loaded.evaluation)):
            assert {source.task for source in Mixture(**mixture).sources} <= ADAPTERS.keys()
        sft_config(loaded)
        lora_config(loaded)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"model": None}, "model None and from_scratch None: give one of them"),
        ({"tokenized": "x", "random_crop": True}, "random_crop True"),
        ({"pack_tokens": 512}, "name a folder in `tokenized`"),
        ({"sft": {"train_sampling_strategy": "group_by_length"}}, "name a folder in `tokenized`"),
        ({"quantization": {"load_in_4bit": True}}, "give `lora`"),
        ({"samples": {"steps": 3}}, "accepted are `steps` from 1 on and a list of `prompts`"),
        ({"samples": {"steps": 0, "prompts": ["a cube"]}}, "accepted are `steps` from 1 on"),
        ({"samples": {"steps": 3, "prompts": "a cube"}}, "a list of `prompts`"),
        ({"context_drop": 2}, "context_drop 2: accepted are 0 to 1"),
        (
            {"code_renaming": {"edits": 0.5}},
            "code_renaming .'edits'.*: accepted are `task: 0 to 1` lines, of chat",
        ),
        ({"code_renaming": {"chat": 2}}, "code_renaming .*2.: accepted are `task: 0 to 1` lines"),
        ({"code_renaming": {"chat": "1"}}, "code_renaming .*'1'.: accepted are `task: 0 to 1` lines"),
        ({"sft": 5}, "sft 5: accepted are `name: value` lines"),
        ({"code_renaming": None}, "code_renaming None: accepted are `task: 0 to 1` lines"),
        ({"pack_tokens": -1, "tokenized": "x"}, "pack_tokens -1"),
        ({"sft": {"resume_from_checkpoint": "x"}}, "last whole checkpoint"),
        ({"generation": {"image_top": 3}}, "generation .'image_top'."),
        ({"mixture": {"target_px": 64}}, "mixture: .*'sources'; accepted are target_px, sources"),
        ({"mixture": {"target_px": 64, "sources": [{"task": "chat", "pth": "x"}]}}, "'pth'; accepted are task, path"),
        ({"sft": "x"}, "sft 'x': accepted are"),
        ({"config": {"nonsense": 1}}, "config .'nonsense'."),
        ({"model": None, "from_scratch": {"lik": "x"}}, "from_scratch .'lik'.: accepted are config, processor"),
        ({"evaluation": {"px": 64}}, "evaluation: .*'px'"),
        ({"nonsense": 1}, "nonsense.*accepted are output_dir, mixture"),
        ({"trainer": "rl"}, "trainer 'rl'; accepted are vq, sft, chain"),
        ({"max_minutes": 0}, "max_minutes 0: accepted are numbers above 0"),
        ({"cooldown": 2}, "cooldown 2: accepted are 0 to 1"),
        ({"muon": True, "lora": {"r": 4}}, "with `lora`, accepted is false"),
        ({"share_code_rows": True, "lora": {"r": 4}}, "with `lora`, accepted is false"),
        ({"muon": True, "sft": {"optim": "adafactor"}}, "optim 'adafactor'.*accepted is adamw_torch"),
    ],
)
def test_what_a_recipe_cannot_say_is_named_with_its_file(tmp_path, values, says):
    path = tmp_path / "recipe.yaml"
    right = {"output_dir": "x", "mixture": tabletop(1, "chat"), "sft": {}, "model": "y"}
    path.write_text(yaml.safe_dump({**right, **values}))
    with pytest.raises(ValueError, match=f"recipe.yaml: .*{says}"):
        load_recipe(path)


def test_a_recipe_says_what_differs_from_its_base(tmp_path):
    values = {"output_dir": "a", "model": "m", "mixture": tabletop(1, "chat"), "sft": {"seed": 1, "max_steps": 2}}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(values))
    (tmp_path / "own.yaml").write_text("base: base.yaml\noutput_dir: b\nsft: {seed: 3}")
    loaded = load_recipe(tmp_path / "own.yaml")
    assert (loaded.output_dir, loaded.model, loaded.sft) == ("b", "m", {"seed": 3, "max_steps": 2})
    (tmp_path / "base.yaml").write_text("base: own.yaml")
    with pytest.raises(ValueError, match="leads back"):
        load_recipe(tmp_path / "own.yaml")


@pytest.mark.parametrize(("part", "says"), [("sft", "sft: .*nonsense"), ("lora", "lora: .*nonsense")])
def test_values_that_are_none_of_a_librarys_are_an_error(recipe, part, says):
    made = recipe("run")
    setattr(made, part, {"nonsense": 1} | (SFT_VALUES if part == "sft" else {}))
    with pytest.raises(ValueError, match=says):
        train(made)


def vq_recipe(folder, tiny_vqvae, **values):
    model = {k: v for k, v in tiny_vqvae.config.items() if k in ("down_block_types", "up_block_types")}
    model |= {"block_out_channels": (4, 8, 16, 16), "norm_num_groups": 2, "num_vq_embeddings": 32}
    model |= {"latent_channels": 6, "vq_embed_dim": 6, "mid_block_add_attention": False, "lookup_from_codebook": True}
    pictures = [{"size": [64, 64], "scenes": 4}, {"size": [80, 48], "scenes": 2}]
    values = {"batch_size": 2, "num_steps": 4, "save_steps": 2, "num_patches": 500, **values}
    return train_vq.VQRecipe(str(folder), model, pictures, **values)


def test_vq_training_resumes_and_reports_what_it_saved(tmp_path, tiny_vqvae, monkeypatch):
    loss, steps = train_vq.reconstruction_loss, []

    def interrupted(*pictures):
        steps.append("step")
        if steps == ["step"] * 3:
            raise KeyboardInterrupt
        return loss(*pictures)

    def trained(name):
        train_vq.train(vq_recipe(tmp_path / name, tiny_vqvae))
        (saved,) = (tmp_path / name / "vqvae").glob("*.safetensors")
        return torch.load(tmp_path / name / "state.pt")["model"], load_file(saved)

    whole = trained("whole")
    monkeypatch.setattr(train_vq, "reconstruction_loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trained("halves")
    for num_steps in (2, 0):  # the other half, and nothing left to do
        steps[:] = ["resumed"]
        again = trained("halves")
        assert steps == ["resumed"] + ["step"] * num_steps
        for ours, theirs in zip(again, whole, strict=True):
            assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    scores = [json.loads((tmp_path / name / "scores.json").read_text())["scores"] for name in ("whole", "halves")]
    assert scores[0] == scores[1] and scores[0]["codes_used"] > 0


def test_a_patch_has_one_code_wherever_it_is(tmp_path, tiny_vqvae):
    model = train_vq.train(vq_recipe(tmp_path, tiny_vqvae, num_steps=1))
    picture = torch.from_numpy(np.load(next(tmp_path.glob("*64x64*.npy")))[0, 0]).permute(2, 0, 1) / 127.5 - 1
    patches = picture.view(3, 8, 8, 8, 8).permute(1, 3, 0, 2, 4).flatten(0, 1)  # (64, 3, 8, 8)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    moved = patches[order].view(4, 16, 3, 8, 8).permute(2, 0, 3, 1, 4).reshape(3, 32, 128)

    def encode(pixels):
        return model.quantize(model.encode(pixels[None]).latents)[2][2]

    with torch.no_grad():
        assert torch.equal(encode(moved), encode(picture)[order])


@pytest.fixture
def chained(recipe, tiny_folder, tmp_path, monkeypatch):
    """Runs a chain of two stages, each with half of the minutes; gives what was trained and scored."""
    for name, model in (("first", str(tiny_folder)), ("second", str(tmp_path / "first"))):
        stage = recipe(name, model=model, max_steps=1)
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(asdict(stage)))
    done = []

    def noted(stage):
        done.append((Path(stage.output_dir).name, stage.max_minutes))
        train(stage)

    monkeypatch.setattr(chain.sft, "train", noted)
    monkeypatch.setattr(chain, "run_scoreboard", lambda pipe, folder, num_cases: done.append(("scores", num_cases)))
    monkeypatch.setattr(chain, "write_card", lambda pipe, scores, minutes, folder: done.append((folder, [*minutes])))

    def run(minutes):
        stages = [{"recipe": "first.yaml", "share": 0.5}, {"recipe": "second.yaml", "share": 0.5}]
        chain.train(ChainRecipe(str(tmp_path / "chain"), stages, minutes, num_cases=3), tmp_path)
        return [done.pop(0) for _ in [*done]]

    return run


def test_a_chain_trains_what_is_left_and_scores_the_last(chained, tmp_path):
    last = [("scores", 3), (str(tmp_path / "second"), ["first", "second"])]
    assert chained(8) == [("first", 4), ("second", 4), *last]
    assert chained(8) == last
    (tmp_path / "chain" / "finished.json").write_text('["first.yaml"]')
    assert chained(2) == [("second", 1), *last]


def test_a_chain_ends_with_a_model_to_score(recipe, tmp_path, tiny_vqvae):
    values = asdict(vq_recipe(tmp_path / "vq", tiny_vqvae))
    (tmp_path / "vq.yaml").write_text(yaml.safe_dump(json.loads(json.dumps({"trainer": "vq", **values}))))
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(asdict(recipe("sft"))))
    (tmp_path / "lora.yaml").write_text(yaml.safe_dump(asdict(recipe("lora", lora={"r": 4}))))
    no_model, no_minutes = "the last one is trainer 'sft' without lora", "its own num_steps say"
    for names, says in ((("sft", "vq"), no_model), (("sft", "lora"), no_model), (("vq", "sft"), no_minutes)):
        stages = [{"recipe": f"{name}.yaml", "share": 1} for name in names[:1]]
        stages += [{"recipe": f"{name}.yaml"} for name in names[1:]]
        with pytest.raises(ValueError, match=says):
            chain.train(ChainRecipe(str(tmp_path), stages, 1), tmp_path)
    assert not (tmp_path / "vq").exists() and not (tmp_path / "sft").exists()


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"stages": []}, r"stages \[\]"),
        ({"stages": [{"recipe": "a.yaml", "share": 0.5}]}, "that are 1 together"),
        ({"stages": [{"recipe": "a.yaml", "part": 1}]}, "a `recipe` and perhaps a `share`"),
        ({"stages": ["a.yaml"]}, "a `recipe` and perhaps a `share`"),
        ({"stages": [{"recipe": "a.yaml", "share": s} for s in (2, -1)]}, "numbers above 0 that are 1 together"),
        ({"minutes": 0}, "minutes 0: accepted are numbers above 0"),
        ({"num_cases": 0}, "num_cases 0: accepted are 2 and more"),
    ],
)
def test_what_a_chain_cannot_be_is_an_error(tmp_path, values, says):
    right = {"trainer": "chain", "output_dir": "x", "minutes": 1, "stages": [{"recipe": "a.yaml", "share": 1}]}
    (tmp_path / "chain.yaml").write_text(yaml.safe_dump({**right, **values}))
    with pytest.raises(ValueError, match=f"chain.yaml: .*{says}"):
        load_recipe(tmp_path / "chain.yaml")
