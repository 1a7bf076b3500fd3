"""The trainer: losses exact however records are batched, work that is never lost, and steps that must not count."""

import os
import random
import shutil
import signal
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from PIL import Image
from torch.nn import functional as F
from trl import SFTConfig

from modeling_lumina_mgpt import LuminaMGPTForConditionalGeneration
from modeling_lumina_mgpt.training.code_rows import fold_code_rows, share_code_rows
from modeling_lumina_mgpt.training.collator import Collator, pack
from modeling_lumina_mgpt.training.trainer import (
    WHOLE,
    Diverged,
    LuminaMGPTTrainer,
    SampleCallback,
    Stopped,
    last_checkpoint,
)

TASKS = ["caption", "edit"]


@pytest.fixture
def records(tiny_processor):
    """Twelve records of two tasks and several lengths."""
    rng = random.Random(0)
    found = []
    for i in range(12):
        picture = torch.randint(64, (2, 2 * rng.randint(1, 3)), generator=torch.Generator().manual_seed(i))
        turns = ["what is it? <|image|>", "a sphere " * rng.randint(1, 4)]
        images = [picture]
        if i % 3:
            turns, images = ["change it <|image|>", "<|image|>"], [picture, picture.flip(0)]
        record = tiny_processor.encode_conversation(turns, images)
        found.append({**record, "task": TASKS[bool(i % 3)], "length": len(record["input_ids"])})
    return Dataset.from_list(found)


@pytest.fixture
def make_trainer(records, tiny_config, tiny_processor, tmp_path):
    """Makes trainers of one tiny model; what is not said is as in the first."""
    uni_rep = tiny_processor.uni_rep

    def make(name="run", dataset=records, context_drop=0.0, history_noise=0.0, model=None, options=None, **values):
        torch.manual_seed(0)
        defaults = {"learning_rate": 1e-2, "lr_scheduler_type": "constant", "per_device_train_batch_size": 4}
        defaults |= {"max_steps": 4, "logging_steps": 1, "save_steps": 1, "report_to": "none", "use_cpu": True}
        defaults |= {
            "bf16": False,
            "gradient_checkpointing": False,
            "disable_tqdm": True,
            "prediction_loss_only": True,
        }
        arguments = SFTConfig(
            output_dir=str(tmp_path / name),
            max_length=None,
            dataset_kwargs={"skip_prepare_dataset": True},
            remove_unused_columns=False,
            loss_type="nll",
            **{**defaults, **values},
        )
        common = (tiny_config().pad_token_id, uni_rep.start_id, uni_rep.end_id, uni_rep.code_ids, TASKS)
        model = model or LuminaMGPTForConditionalGeneration(tiny_config())
        codebook = tiny_processor.vqvae.quantize.embedding.weight
        options = {**(options or {})}
        if options.get("code_rows"):
            options["code_rows"] = share_code_rows(model, codebook, uni_rep.code_ids)
        return LuminaMGPTTrainer(
            model=model,
            args=arguments,
            train_dataset=dataset,
            data_collator=Collator(*common, context_drop=context_drop, history_noise=history_noise),
            eval_collator=Collator(*common),
            processing_class=tiny_processor.tokenizer,
            **options,
        )

    return make


def logged(trainer, name="loss"):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def weights(trainer):
    return {name: weight.detach().clone() for name, weight in trainer.model.state_dict().items()}


def same(left, right):
    return all(torch.equal(weight, right[name]) for name, weight in left.items())


def test_losses_are_those_of_full_logits(make_trainer, records):
    trainer = make_trainer(max_steps=1, per_device_train_batch_size=12)
    model, sums = trainer.model, {task: [0.0, 0] for task in TASKS}
    z_sum = 0.0
    for record in records:
        ids, labels = torch.tensor([record["input_ids"]]), torch.tensor([record["labels"]])
        with torch.no_grad():
            logits = model(ids, use_cache=False).logits[0, :-1]
        counted = labels[0, 1:] >= 0
        own = sums[record["task"]]
        own[0] += F.cross_entropy(logits[counted], labels[0, 1:][counted], reduction="sum").item()
        own[1] += int(counted.sum())
        z_sum += logits[counted].logsumexp(-1).square().sum().item()
    trainer.train()
    (log,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    total, count = (sum(own[i] for own in sums.values()) for i in (0, 1))
    assert log["predicted_tokens"] == count
    assert log["z_loss"] == pytest.approx(z_sum / count, rel=1e-5)
    assert log["loss"] == pytest.approx((total + 1e-5 * z_sum) / count, rel=1e-5)
    for task, (own, num) in sums.items():
        assert log[f"loss_{task}"] == pytest.approx(own / num, rel=1e-5)
    assert log["tokens_per_second"] > 0 and 0 < log["mfu"] < 1


def test_packed_accumulated_and_padded_steps_are_one(make_trainer, records):
    whole = make_trainer("whole", max_steps=2, per_device_train_batch_size=12)
    parts = make_trainer("parts", max_steps=2, per_device_train_batch_size=3, gradient_accumulation_steps=4)
    packed = pack(records, 128)
    assert len(packed) < 12 and sorted(len(r["input_ids"]) for row in packed for r in row["records"]) == sorted(
        records["length"]
    )
    rows = make_trainer("packed", dataset=packed, max_steps=2, per_device_train_batch_size=len(packed))
    for trainer in (whole, parts, rows):
        trainer.train()
    for other in (parts, rows):
        assert logged(other) == pytest.approx(logged(whole), rel=1e-5)
        assert logged(other, "loss_edit") == pytest.approx(logged(whole, "loss_edit"), rel=1e-5)
        assert logged(other, "grad_norm") == pytest.approx(logged(whole, "grad_norm"), rel=1e-4)


def test_packing_fills_rows_and_refuses_nothing_that_fits():
    dataset = Dataset.from_dict({"length": [5, 5, 3, 7, 2, 10], "input_ids": [[i] for i in range(6)]})
    rows = pack(dataset, 10)
    assert sorted(rows["length"]) == [2, 10, 10, 10]
    assert sorted(record["input_ids"][0] for row in rows for record in row["records"]) == [*range(6)]


def test_packed_rows_are_all_as_long_as_they_may_be(make_trainer, records):
    packed = pack(records, 128)
    values = {"dataset": packed, "max_steps": 2, "per_device_train_batch_size": len(packed)}
    tight, padded = make_trainer("tight", **values), make_trainer("padded", **values)
    padded.data_collator.row_length = 160
    assert padded.data_collator([*packed][-1:])["input_ids"].shape == (1, 160)
    assert padded.data_collator([records[0]])["input_ids"].shape == (1, records[0]["length"])  # which is not packed
    tight.train(), padded.train()
    assert logged(padded) == pytest.approx(logged(tight), rel=1e-5)


def test_context_drop_in_packed_rows_leaves_the_picture_alone(make_trainer, records, tiny_processor):
    trainer = make_trainer(dataset=pack(records, 128), context_drop=1.0)
    batch = trainer.data_collator(list(trainer.train_dataset))
    starts = (batch["position_ids"] == 0) & (batch["task_ids"] >= 0)
    edits = starts & (batch["task_ids"] == TASKS.index("edit"))
    assert int(starts.sum()) == 12 and int(edits.sum()) == 8
    assert (batch["input_ids"][edits] == tiny_processor.uni_rep.start_id).all()
    assert (batch["labels"][starts] == -100).all()  # what precedes is another record's


def test_a_disturbed_history_has_other_codes_in_the_answer_alone(make_trainer, records, tiny_processor):
    codes = tiny_processor.uni_rep.code_ids
    for history_noise in (0.0, 0.2, 1.0):
        trainer, num_changed, num_codes = make_trainer(history_noise=history_noise), 0, 0
        for record in records:
            batch = trainer.data_collator([record])
            ids, labels = torch.tensor(record["input_ids"]), torch.tensor(record["labels"])
            changed = batch["input_ids"][0] != ids
            predicted = torch.isin(labels, codes)
            assert torch.equal(batch["labels"][0, 1:], labels[1:])
            assert not (changed & ~predicted).any()
            assert torch.isin(batch["input_ids"][0][changed], labels[predicted]).all()
            num_changed, num_codes = num_changed + int(changed.sum()), num_codes + int(predicted.sum())
        assert bool(num_changed) == bool(history_noise) and num_changed <= history_noise * num_codes


def test_renamed_codes_leave_differences_and_what_is_around_as_they_are(tiny_processor):
    uni_rep = tiny_processor.uni_rep
    before = torch.randperm(64, generator=torch.Generator().manual_seed(0))[:48].view(6, 8)
    after = before.clone()
    after[1, 2] = 63 - before[1, 2]
    turns = ["change it <|image|>", "<|image|>", "and nothing more", "<|image|>"]
    record = tiny_processor.encode_conversation(turns, [before, after, after]) | {"task": "edit"}
    ids, labels = (torch.tensor(record[name]) for name in ("input_ids", "labels"))
    common = (0, uni_rep.start_id, uni_rep.end_id, uni_rep.code_ids, TASKS)
    are_codes = torch.isin(ids, uni_rep.code_ids)
    near = torch.zeros(6, 8, dtype=torch.bool)
    near[0:3, 1:4] = True
    num_renamed = 0
    for seed in range(8):
        batch = Collator(*common, code_renaming={"edit": 1.0}, seed=seed)([record])
        renamed, (first, second, third) = batch["input_ids"][0], batch["input_ids"][0][are_codes].view(3, 6, 8)
        assert torch.equal(first == second, before == after) and torch.equal(second, third)
        assert torch.equal(first[near], uni_rep.code_ids[before[near]])
        assert torch.equal(renamed[~are_codes], ids[~are_codes])
        assert torch.equal(batch["labels"][0, 1:], torch.where(labels >= 0, renamed, labels)[1:])
        is_new = first != uni_rep.code_ids[before]
        assert not torch.isin(first[is_new], uni_rep.code_ids[torch.cat([before, after])]).any()
        num_renamed += int(is_new.sum())
    assert 0.1 < num_renamed / (8 * 39) < 0.5  # any share of 48 places less 9, but 16 codes are left for them
    untouched = Collator(*common, code_renaming={"caption": 1.0})([record])
    assert torch.equal(untouched["input_ids"][0], ids)
    dropped = Collator(*common, context_drop=1.0, code_renaming={"edit": 1.0})([record])["input_ids"][0]
    assert torch.equal(dropped[torch.isin(dropped, uni_rep.code_ids)], uni_rep.code_ids[after].flatten())
    of_two_sizes = tiny_processor.encode_conversation(turns[:2], [before, after[:4]]) | {"task": "edit"}
    left = Collator(*common, code_renaming={"edit": 1.0})([of_two_sizes])
    assert left["input_ids"][0].tolist() == list(of_two_sizes["input_ids"])


def test_lengths_are_grouped_as_the_seed_and_the_epoch_say(make_trainer):
    first, again = (make_trainer(train_sampling_strategy="group_by_length") for _ in range(2))
    orders = []
    for first.state.epoch in (0, 1):
        again.state.epoch = first.state.epoch
        for trainer in (first, again):
            trainer.callback_handler.on_epoch_begin(trainer.args, trainer.state, trainer.control)
        orders.append(list(first._get_train_sampler()))
        torch.rand(3)
        assert orders[-1] == list(again._get_train_sampler())
    assert orders[0] != orders[1] and sorted(orders[0]) == [*range(12)]


def test_muon_has_the_layers_matrices_and_adamw_all_else(make_trainer):
    trainer = make_trainer(options={"muon": True}, weight_decay=0.1)
    optimizer = trainer.create_optimizer()
    names = {weight: name for name, weight in trainer.model.named_parameters()}
    found = {
        part: {names[weight] for group in own.param_groups for weight in group["params"]}
        for part, own in optimizer.parts.items()
    }
    assert found["muon"] == {name for name in names.values() if name.endswith("_proj.weight")}
    assert found["adamw"] == {*names.values()} - found["muon"]
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} < found["adamw"]
    optimizer.load_state_dict(optimizer.state_dict())  # as accelerate does, and a resumed run
    for rate in (0.0, 1e-2):
        before = weights(trainer)
        for weight in names:
            weight.grad = torch.ones_like(weight)
        for group in optimizer.param_groups:
            group["lr"] = rate  # as a scheduler sets it, in both
        optimizer.step()
        changed = {name for name, weight in weights(trainer).items() if not torch.equal(weight, before[name])}
        assert changed == ({*names.values()} if rate else set())


def test_codes_that_look_alike_learn_together(make_trainer, tiny_processor, monkeypatch):
    """The rows of a code that was hardly an answer yet move as the codebook says, others also by themselves."""
    monkeypatch.setattr("modeling_lumina_mgpt.training.code_rows.MIN_ANSWERS", 3)
    code_ids = tiny_processor.uni_rep.code_ids
    trainer = make_trainer(options={"code_rows": True, "muon": True}, max_steps=3, weight_decay=0.1)
    model = trainer.model
    head, start = model.lm_head, model.lm_head.weight.detach().clone()
    trainer.train()
    (rows,) = head.parametrizations.weight
    assert rows.num_answers.sum() == sum(logged(trainer, "predicted_tokens"))
    answered = rows.num_answers[code_ids] >= 3
    assert 0 < answered.sum() < len(answered)
    moved = (head.weight - start)[code_ids].detach()
    shared = (rows(rows.right_inverse(start)) - start)[code_ids].detach()  # the function's part
    assert torch.allclose(moved[~answered], shared[~answered]) and moved[~answered].abs().max() > 0
    assert not torch.allclose(moved[answered], shared[answered])
    monkeypatch.setattr("modeling_lumina_mgpt.training.code_rows.MIN_ANSWERS", 0)
    assert torch.allclose((head.weight - start)[code_ids], moved)  # what comes into use has not been decayed before
    ids = code_ids[None]
    before = model(input_ids=ids).logits
    fold_code_rows(model)
    assert {"lm_head.weight", "model.embed_tokens.weight"} < {*model.state_dict()}
    assert not any("parametrizations" in name for name in model.state_dict())
    assert torch.equal(model(input_ids=ids).logits, before)


def test_codes_of_one_vector_have_the_same_in_common(tiny_config, tiny_processor):
    model, code_ids = LuminaMGPTForConditionalGeneration(tiny_config()), tiny_processor.uni_rep.code_ids
    codebook = tiny_processor.vqvae.quantize.embedding.weight.detach().clone()
    codebook[1] = codebook[0]
    start = model.lm_head.weight.detach().clone()
    for rows in share_code_rows(model, codebook, code_ids):
        torch.nn.init.normal_(rows.last.weight)
    first, again, other = (model.lm_head.weight - start)[code_ids[:3]]
    assert torch.allclose(first, again, atol=1e-6) and not torch.allclose(first, other, atol=1e-2)
    with pytest.raises(ValueError, match="tie_word_embeddings true"):
        share_code_rows(LuminaMGPTForConditionalGeneration(tiny_config(tie_word_embeddings=True)), codebook, code_ids)


@pytest.mark.parametrize(
    ("stop_after", "options"), [(1, {}), (3, {"muon": True}), (3, {"muon": True, "code_rows": True}), (4, {})]
)
def test_a_run_resumes_bit_for_bit(make_trainer, monkeypatch, stop_after, options):
    monkeypatch.setattr("modeling_lumina_mgpt.training.code_rows.MIN_ANSWERS", 3)
    shares = {"context_drop": 0.5, "history_noise": 0.5, "options": options}
    shares |= {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 4}
    whole = make_trainer("whole", max_steps=5, **shares)
    whole.train()
    half = make_trainer("halves", max_steps=5, **shares)
    step = half.training_step

    def stopping(*args, **kwargs):
        if half.state.global_step == stop_after:
            raise KeyboardInterrupt
        return step(*args, **kwargs)

    half.training_step = stopping
    with pytest.raises(KeyboardInterrupt):
        half.train()
    rest = make_trainer("halves", max_steps=5, **shares)
    rest.train()
    assert same(weights(whole), weights(rest))
    assert logged(whole) == logged(rest)


def test_half_a_checkpoint_is_none(make_trainer, tmp_path):
    make_trainer(max_steps=2, save_total_limit=2).train()
    broken = tmp_path / "run" / "checkpoint-3"
    broken.mkdir()
    (broken / "model.safetensors").write_bytes(b"half")
    assert last_checkpoint(tmp_path / "run").endswith("checkpoint-2")
    shutil.copytree(tmp_path / "run" / "checkpoint-2", tmp_path / "run" / "checkpoint-2-copy")  # a user's own
    trainer = make_trainer(max_steps=3, save_total_limit=2)
    trainer.train()
    assert last_checkpoint(tmp_path / "run").endswith("checkpoint-3")
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == [
        "checkpoint-2",
        "checkpoint-2-copy",
        "checkpoint-3",
    ]


def test_a_full_disk_keeps_the_last_whole_checkpoint(make_trainer, tmp_path, monkeypatch):
    trainer = make_trainer(max_steps=3, save_total_limit=1)
    save = trainer._save_optimizer_and_scheduler

    def full(folder):
        if folder.endswith("checkpoint-2"):
            raise OSError(28, "No space left on device")
        save(folder)

    monkeypatch.setattr(trainer, "_save_optimizer_and_scheduler", full)
    with pytest.raises(OSError, match=r"checkpoint-2 could not be saved: .*No space left.*checkpoint-1"):
        trainer.train()
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-1"]
    make_trainer(max_steps=3, save_total_limit=1).train()
    assert (tmp_path / "run" / "checkpoint-3" / WHOLE).exists()


def test_sigterm_saves_the_step_and_stops(make_trainer, tmp_path):
    whole = make_trainer("whole", max_steps=4)
    whole.train()
    trainer = make_trainer(max_steps=4, save_steps=100)
    step = trainer.training_step

    def told(*args, **kwargs):
        if trainer.state.global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*args, **kwargs)

    trainer.training_step = told
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped) as stopped:
        trainer.train()
    assert stopped.value.code == 143 and signal.getsignal(signal.SIGTERM) == before
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]
    rest = make_trainer(max_steps=4, save_steps=100)
    rest.train()
    assert same(weights(whole), weights(rest))


class Poisoned:
    """Multiplies the loss at some steps."""

    def __init__(self, trainer, factors):
        self.trainer, self.factors, self.compute_loss = trainer, factors, trainer.compute_loss

    def __call__(self, model, inputs, *args, **kwargs):
        factor = self.factors.get(self.trainer.state.global_step, 1)
        before = self.trainer._sums.clone()
        loss = self.compute_loss(model, inputs, *args, **kwargs)
        self.trainer._sums[:-1, 0] = before[:-1, 0] + (self.trainer._sums - before)[:-1, 0] * factor
        return loss * factor


@pytest.mark.parametrize(("step", "factor", "says"), [(2, float("nan"), "nan"), (7, 100.0, "times the median")])
def test_a_broken_step_changes_nothing_and_says_so(make_trainer, capfd, step, factor, says):
    trainer = make_trainer(max_steps=9, context_drop=0.0)
    trainer.compute_loss = Poisoned(trainer, {step: factor})
    seen = {}
    original = trainer._get_grad_norm

    def watched(model, grad_norm=None):
        seen[trainer.state.global_step] = weights(trainer)
        return original(model, grad_norm)

    trainer._get_grad_norm = watched
    trainer.train()
    assert same(seen[step], seen[step + 1]) and not same(seen[step + 1], seen[step + 2 if step < 7 else step - 1])
    assert f"step {step + 1} changed nothing" in (said := capfd.readouterr().err) and says in said
    assert logged(trainer, "skipped_steps") == [1]
    assert len(logged(trainer)) == 8 and all(loss > 1 for loss in logged(trainer))  # of the others
    assert len(logged(trainer, "minutes")) == 9  # though it took its time


def test_losses_of_what_is_known_by_heart_may_jump(make_trainer):
    trainer = make_trainer(max_steps=1)
    trainer.state.log_history = [{"loss": 0.003}] * 5
    assert trainer._trouble(0.1, 1.0) is None and "0.05" in trainer._trouble(0.2, 1.0)


def test_a_run_that_stays_broken_ends_with_its_last_checkpoint(make_trainer):
    trainer = make_trainer(max_steps=9, options={"max_skipped_steps": 3})
    trainer.compute_loss = Poisoned(trainer, dict.fromkeys(range(2, 9), float("inf")))
    with pytest.raises(Diverged, match=r"3 steps in a row.*checkpoint-4"):
        trainer.train()


def test_a_run_ends_when_its_minutes_are_over_and_cools_down_before(make_trainer, monkeypatch, capsys):
    options = {"max_minutes": 8, "cooldown": 0.5}
    for logging_steps, steps in ((1, range(1, 9)), (3, (3, 6, 8))):
        values = {"max_steps": 100, "logging_steps": logging_steps, "save_steps": 6, "options": options}
        values["disable_tqdm"] = False
        trainer = make_trainer(f"every {logging_steps}", **values)
        monkeypatch.setattr(trainer, "_minutes_so_far", lambda run=trainer: run.state.global_step + 1.0)
        trainer.train()
        rates = dict(zip(range(1, 9), [1, 1, 1, 1, 1, 0.75, 0.5, 0.25], strict=True))
        assert trainer.state.global_step == 8 and logged(trainer, "minutes") == [step + 1 for step in steps]
        assert "100%|" in (bar := capsys.readouterr().err) and "8.0 of 8 minutes, step 8" in bar
        assert [r / 1e-2 for r in logged(trainer, "learning_rate")] == pytest.approx([rates[step] for step in steps])
        again = make_trainer(f"every {logging_steps}", **values)
        again.train()  # the log knows how long it was
        assert again.state.global_step == 8 and same(weights(trainer), weights(again))
        assert "100%|" in (bar := capsys.readouterr().err) and "of 8 minutes, step 8" in bar


def test_evaluation_counts_tokens_and_drops_no_context(make_trainer, records):
    options = {"eval_dataset": records, "extra_metrics": lambda: {"judge_overall": 0.5}}
    trainer = make_trainer(context_drop=1.0, options=options, per_device_eval_batch_size=5)
    metrics = trainer.evaluate()
    means, counts = [], []
    for record in records:
        output = trainer.model(torch.tensor([record["input_ids"]]), labels=torch.tensor([record["labels"]]))
        counts.append(sum(label >= 0 for label in record["labels"][1:]))
        means.append(output.loss.item())
    expected = sum(m * n for m, n in zip(means, counts, strict=True)) / sum(counts)
    assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert metrics["eval_judge_overall"] == 0.5 and metrics["eval_loss_caption"] > 0
    assert {"eval_judge_overall": 0.5}.items() <= trainer.state.log_history[-1].items()


def test_samples_become_files_and_reported_pictures(make_trainer, tmp_path):
    trainer = make_trainer(max_steps=4, report_to="tensorboard")
    sheet = Image.new("RGB", (32, 16), "red")
    trainer.add_callback(SampleCallback(trainer, lambda: sheet, 2, tmp_path / "samples"))
    trainer.train()
    assert [path.name for path in sorted((tmp_path / "samples").iterdir())] == ["step-000002.png", "step-000004.png"]
    events = b"".join(path.read_bytes() for path in Path(tmp_path).rglob("events.out.tfevents*"))
    assert events.count(b"samples") >= 2
