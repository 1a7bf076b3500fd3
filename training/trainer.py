"""TRL's trainer for conversations of text and pictures.

What differs from stock: the model's own loss (cross-entropy and z-loss, without the logits) in place of TRL's fused
head; losses logged for each task; contexts dropped anew at each epoch; a checkpoint that counts only when it is whole;
and steps with a broken or spiking loss that leave the weights alone.
"""

import math
import shutil
import signal
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from tqdm.auto import tqdm
from transformers import ProgressCallback, Trainer, TrainerCallback
from transformers.trainer_pt_utils import LengthGroupedSampler
from trl import SFTTrainer

from modeling_lumina_mgpt.modeling_lumina_mgpt import IGNORED_LABEL

from .code_rows import CodeRows
from .collator import Collator
from .optimizer import MuonWithAdamW, layer_matrices

WHOLE = "whole"  # the file that a checkpoint gets last
KNOWN_BY_HEART = 0.05  # nats a token: of losses below, three times as much is no spike
LOGGED = 40  # log entries whose median loss a spike is measured by; with fewer than five losses there are no spikes
# Dense bfloat16 FLOPs a second, from the makers' data sheets.
PEAK_FLOPS = {"B200": 2250e12, "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}


class Diverged(RuntimeError):
    """Too many steps in a row had a loss that could not be used."""


class Stopped(SystemExit):
    """The run was told to stop, and has saved a checkpoint; exit code as after SIGTERM."""


class LuminaMGPTTrainer(SFTTrainer):
    """TRL's trainer with the model's own loss and this package's rules.

    Args:
        eval_collator: of the evaluation's data; the training's would drop contexts.
        muon: the layers' matrices get torch's Muon, all else AdamW; not for shards of matrices, nor for adapters.
        code_rows: those of the model, whose answers are counted.
        spike_factor: a step whose loss is above so many times the median of those logged before (and of 0.05, as
            losses of what is known by heart jump) is left out.
        max_skipped_steps: after so many steps in a row that were left out, the run ends.
        max_minutes: of training, after which the run ends; all of its sessions together, without evaluations.
        cooldown: the last share of the run, of its steps or its minutes, in which the learning rate falls to zero,
            evenly, after a warm-up and a constant middle; 0: as the arguments' scheduler has it.
        extra_metrics: called after each evaluation; its numbers are logged with it.

    Logged besides stock's, over all processes and exact to the token: `loss` and `loss_<task>` (nats a predicted
    token, the z-loss's share included in `loss` only), `z_loss`, `predicted_tokens` a step, `tokens_per_second`,
    `mfu` (FLOPs that the model needs, of those that the device can do), `minutes` so far and `skipped_steps`.

    Raises:
        Diverged: after `max_skipped_steps`.
        Stopped: after SIGTERM, once a checkpoint is saved.
    """

    data_collator: Collator
    optimizer: Any  # None until it is made

    def __init__(
        self,
        *args,
        eval_collator: Collator | None = None,
        muon: bool = False,
        code_rows: Sequence[CodeRows] = (),
        spike_factor: float = 3.0,
        max_skipped_steps: int = 10,
        max_minutes: float | None = None,
        cooldown: float = 0.0,
        extra_metrics: Callable[[], dict[str, float]] = dict,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        if self.is_fsdp_enabled and self.args.bf16:  # accelerate's own would also add up gradients in bfloat16
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = policy
        self.eval_collator = eval_collator or self.data_collator
        self.muon, self.code_rows = muon, code_rows
        self.spike_factor, self.max_skipped_steps = spike_factor, max_skipped_steps
        self.max_minutes, self.cooldown, self._minutes = max_minutes, cooldown, 0.0
        self.extra_metrics = extra_metrics
        self.tasks = self.data_collator.tasks
        if max_minutes is not None and self.pop_callback(ProgressCallback):
            self.add_callback(MinutesBar(self))
        self._order = torch.Generator()  # of grouped lengths
        self.add_callback(EpochOfData(self.data_collator, self._order))
        self._sums = self._zeros()  # of the step so far, on this process
        self._window: dict[str, float] = defaultdict(float)  # since the last log, of all processes
        self._window_start, self._num_skipped = time.perf_counter(), 0
        self._told_to_stop, self._saved_step = False, -1
        # stock would remove the old before the new is whole
        self._num_kept, self.args.save_total_limit = self.args.save_total_limit, None
        self._peak_flops = peak_flops(self.args.device, self._dtype()) * self.args.world_size

    # The loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        given = {name: value for name, value in inputs.items() if name not in ("task_ids", "attended")}
        given |= {"use_cache": False, "skip_logits": True}
        if self.code_rows and model.training:
            answers = inputs["labels"][inputs["labels"] != IGNORED_LABEL]
            counts = torch.bincount(answers, minlength=self.model.config.vocab_size)
            counts = self.accelerator.reduce(counts, "sum")  # all processes have the same rows
            for rows in self.code_rows:
                rows.num_answers += counts
        loss, outputs = Trainer.compute_loss(self, model, given, True, num_items_in_batch)
        self._add(inputs, outputs)
        return (loss, outputs) if return_outputs else loss

    def _zeros(self) -> Tensor:
        """(tasks + 2, 3): of each task cross-entropy, z-loss and predicted tokens; then all tokens, and pairs of them;
        then processes, those that were told to stop, and their minutes."""
        return torch.zeros(len(self.tasks) + 2, 3, device=self.args.device)

    def _add(self, inputs: dict[str, Tensor], outputs) -> None:
        tasks = inputs["task_ids"]  # (batch, length)
        predicted = F.pad(inputs["labels"], (0, 1), value=IGNORED_LABEL)[:, 1:] != IGNORED_LABEL
        values = torch.stack([outputs.cross_entropy, outputs.z_losses, predicted.float()], -1)  # (batch, length, 3)
        self._sums.index_add_(0, tasks.clamp(min=0).flatten(), values.flatten(0, 1))
        self._sums[-2, 0] += (tasks >= 0).sum()
        self._sums[-2, 1] += inputs["attended"].sum()

    # The step: what counts, and whether it may change the weights

    def _get_grad_norm(self, model, grad_norm=None):
        """As in stock, which calls it once a step, just before the optimizer's."""
        norm = super()._get_grad_norm(model, grad_norm)
        self._sums[-1] = torch.tensor([1.0, self._told_to_stop, self._minutes_so_far()])
        totals = self.accelerator.reduce(self._sums, "sum").cpu()
        self._sums = self._zeros()
        num_processes, num_told, minutes = totals[-1].tolist()
        self._minutes = minutes / num_processes  # the same in all processes, which stop after the same step
        if num_told:
            self._told_to_stop = True
        if num_told or self._is_time_up():
            self.control.should_log = self.control.should_save = self.control.should_training_stop = True
        step = self._named(totals)
        trouble = self._trouble(step["loss"] / max(step["predicted_tokens"], 1), float(norm))
        if trouble is None:
            self._num_skipped = 0
            for name, value in step.items():
                self._window[name] += value
        else:
            self._skip(model, trouble)
        return norm

    def _named(self, totals: Tensor) -> dict[str, float]:
        """Sums by the names they are logged under."""
        cross_entropy, z_loss, predicted = totals[:-2].sum(0).tolist()
        loss = cross_entropy + self.model.config.z_loss_weight * z_loss
        tokens, pairs, _ = totals[-2].tolist()
        named = {"steps": 1, "loss": loss, "z_loss": z_loss}
        named |= {"predicted_tokens": predicted, "tokens": tokens, "pairs": pairs}
        for task, (own, _, count) in zip(self.tasks, totals[:-2].tolist(), strict=True):
            if count:
                named |= {f"loss_{task}": own, f"count_{task}": count}
        return named

    def _trouble(self, loss: float, norm: float) -> str | None:
        """What is wrong with a step, or None."""
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return f"its loss is {loss:g}, its gradient's norm {norm:g}"
        last = self.state.log_history[-LOGGED:]
        losses = [entry["loss"] for entry in last if math.isfinite(entry.get("loss", math.nan))]
        median = statistics.median(losses) if len(losses) >= 5 else math.inf
        if loss > self.spike_factor * max(median, KNOWN_BY_HEART):
            floor = f", and {KNOWN_BY_HEART:g}" if median < KNOWN_BY_HEART else ""
            return f"its loss {loss:.3g} is over {self.spike_factor:g} times the median, {median:.3g}{floor}"
        return None

    def _skip(self, model: nn.Module, trouble: str) -> None:
        model.zero_grad(set_to_none=True)  # what has no gradient is passed over by the optimizer
        self._num_skipped += 1
        self._window["skipped_steps"] += 1
        if self.is_world_process_zero():
            print(f"step {self.state.global_step + 1} changed nothing: {trouble}", file=sys.stderr, flush=True)
        if self._num_skipped >= self.max_skipped_steps:
            last = last_checkpoint(self.args.output_dir) or "none"
            raise Diverged(
                f"{self._num_skipped} steps in a row were left out, the last because {trouble}; look at the data or "
                f"lower the learning rate; the last whole checkpoint: {last}"
            )

    def create_optimizer(self, model=None):
        """As in stock, or with Muon for the layers' matrices."""
        if self.muon and self.optimizer is None:
            adamw = super().create_optimizer(model)
            self.optimizer = MuonWithAdamW(adamw, layer_matrices(model or self.model))
        return super().create_optimizer(model)

    # The time

    def _minutes_so_far(self) -> float:
        """Of training, in this session and those before, which are in the log that a checkpoint has."""
        return logged_minutes(self.state.log_history) + (time.perf_counter() - self._window_start) / 60

    def _is_time_up(self) -> bool:
        return self.max_minutes is not None and self._minutes >= self.max_minutes

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        """As in stock, or with a cooldown, which knows the clock."""
        if not self.cooldown:
            return super().create_scheduler(num_training_steps, optimizer)

        def factor(step: int) -> float:
            done = max(step / num_training_steps, self._minutes / (self.max_minutes or math.inf))
            warm_up = (step + 1) / max(self.args.get_warmup_steps(num_training_steps), 1)
            return max(0.0, min(1.0, warm_up, (1 - done) / self.cooldown))

        self.lr_scheduler = LambdaLR(optimizer or self.optimizer, factor)
        return self.lr_scheduler

    # The log

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if logs.pop("loss", None) is not None:  # stock's, which a step that was left out makes smaller
            logs.update(self._take_window())
        super().log(logs, start_time)

    def _take_window(self) -> dict[str, float]:
        seconds, minutes = time.perf_counter() - self._window_start, self._minutes_so_far()
        window, self._window, self._window_start = self._window, defaultdict(float), time.perf_counter()
        found = {**_means(window), "minutes": minutes}
        if window["steps"]:
            found["predicted_tokens"] = window["predicted_tokens"] / window["steps"]
            found["tokens_per_second"] = window["tokens"] / seconds
            found["mfu"] = self._flops(window) / seconds / self._peak_flops
        return found | ({"skipped_steps": window["skipped_steps"]} if window["skipped_steps"] else {})

    def _dtype(self) -> torch.dtype:
        """That products are computed in."""
        return torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else torch.float32

    def _flops(self, window: dict[str, float]) -> float:
        """Of forward and backward passes, without what checkpointing computes twice."""
        config = self.model.config
        total = 3 * 4 * config.hidden_size * config.num_hidden_layers * window["pairs"]
        for name, module in self.model.named_modules():
            if isinstance(module, nn.Linear) and "parametrizations" not in name:  # those are run once a step
                num_tokens = window["predicted_tokens" if "lm_head" in name else "tokens"]
                per_weight = 6 if module.weight.requires_grad else 4
                total += per_weight * module.in_features * module.out_features * num_tokens
        return total

    @contextmanager
    def drawable(self):
        """Within, the model may be called by itself, not through FSDP's root, whose weights its own call gathers.

        Steps are not compiled: it takes longer than some samples do, and FSDP moves what graphs are recorded with.
        """
        sharded, config = isinstance(self.model, FSDPModule), self.model.generation_config
        disable_compile, config.disable_compile = config.disable_compile, True
        self.model.eval()
        try:
            if sharded:
                self.model.unshard()
            yield
        finally:
            config.disable_compile = disable_compile
            self.model.free_cache()  # training needs the room
            if sharded:
                self.model.reshard()

    @contextmanager
    def off_the_clock(self):
        """What happens within is no training, and does not count in the speed."""
        start = time.perf_counter()
        yield
        self._window_start += time.perf_counter() - start

    # Evaluation

    def get_eval_dataloader(self, eval_dataset=None):
        train_collator, self.data_collator = self.data_collator, self.eval_collator
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = train_collator

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        with self.off_the_clock():
            metrics = super().evaluate(*args, **kwargs)
            with self.drawable():
                extra = {f"eval_{name}": value for name, value in self.extra_metrics().items()}
            if extra:
                self.log(dict(extra))
        return metrics | extra

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        """As in stock, with losses that are means over tokens, also for each task."""
        in_training, self._sums = self._sums, self._zeros()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        totals = self._named(self.accelerator.reduce(self._sums, "sum").cpu())
        self._sums = in_training
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in _means(totals).items()})
        return output

    # The order of the data

    def _run_epoch(self, *args, **kwargs):
        """As in stock, which would take one more step of a run that had ended within an epoch."""
        self._minutes = self._minutes or logged_minutes(self.state.log_history)  # the same in all processes
        if self.state.global_step < self.state.max_steps and not self._is_time_up():
            super()._run_epoch(*args, **kwargs)
        else:
            self.control.should_training_stop = True

    def _get_train_sampler(self, train_dataset=None):
        """As in stock; lengths are grouped by the seed and the epoch alone, since a resumed run has no other state."""
        sampler = super()._get_train_sampler(train_dataset)
        if isinstance(sampler, LengthGroupedSampler):
            sampler.generator = self._order
        return sampler

    # Checkpoints

    def train(self, *args, **kwargs):
        """As in stock, from the last whole checkpoint if there is one; SIGTERM ends it with a checkpoint."""
        resume = kwargs.pop("resume_from_checkpoint", None) or last_checkpoint(self.args.output_dir)
        before = signal.signal(signal.SIGTERM, self._on_sigterm)
        self._window_start = time.perf_counter()
        try:
            output = super().train(*args, resume_from_checkpoint=resume, **kwargs)
        finally:
            signal.signal(signal.SIGTERM, before)
        is_over = self._is_time_up() or self.state.global_step >= self.state.max_steps
        if self._told_to_stop and not is_over:
            raise Stopped(128 + signal.SIGTERM)
        return output

    def _on_sigterm(self, signum, frame) -> None:
        print("SIGTERM: saving a checkpoint after this step; the same command goes on from it", file=sys.stderr)
        self._told_to_stop = True

    def _save_checkpoint(self, model, trial) -> None:
        """Saves; marks as whole; and only then removes old ones. What fails leaves nothing behind."""
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if self._saved_step == self.state.global_step:
            return  # at the end of an epoch it may be asked for twice
        with self.off_the_clock():
            try:
                (folder / WHOLE).unlink(missing_ok=True)
                Trainer._save_checkpoint(self, model, trial)  # not TRL's, which also writes a model card
            except Exception as error:
                shutil.rmtree(folder, ignore_errors=True)
                last = last_checkpoint(self.args.output_dir) or "none"
                raise OSError(f"{folder} could not be saved: {error}; the last whole checkpoint: {last}") from error
            self.accelerator.wait_for_everyone()
            self._saved_step = self.state.global_step
            if self.is_world_process_zero():
                (folder / WHOLE).touch()
                self._remove_old(folder.parent)

    def _remove_old(self, folder: Path) -> None:
        for old in whole_checkpoints(folder)[: -self._num_kept if self._num_kept else 0]:
            if str(old) != str(self.state.best_model_checkpoint):
                (old / WHOLE).unlink()
                shutil.rmtree(old)


def _means(sums: dict[str, float]) -> dict[str, float]:
    """Losses a predicted token, of sums by name; nothing where nothing was predicted."""
    means = {name: sums[name] / sums["predicted_tokens"] for name in ("loss", "z_loss") if sums["predicted_tokens"]}
    tasks = [name.removeprefix("count_") for name in sums if name.startswith("count_")]
    return means | {f"loss_{task}": sums[f"loss_{task}"] / sums[f"count_{task}"] for task in tasks}


def logged_minutes(log: Sequence[dict[str, float]]) -> float:
    """Of training, as a run's log has them last."""
    return next((entry["minutes"] for entry in reversed(log) if "minutes" in entry), 0.0)


def whole_checkpoints(folder: str | Path) -> list[Path]:
    """By step."""
    found = [path.parent for path in Path(folder).glob(f"checkpoint-*/{WHOLE}")]
    steps = {path: path.name.removeprefix("checkpoint-") for path in found}
    return sorted((path for path in found if steps[path].isdecimal()), key=lambda path: int(steps[path]))


def last_checkpoint(folder: str | Path) -> str | None:
    """The last checkpoint that is whole."""
    found = whole_checkpoints(folder)
    return str(found[-1]) if found else None


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs a second that a device can do: as its maker says, of bfloat16, or as the best of a few products shows."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    known = [flops for gpu, flops in PEAK_FLOPS.items() if gpu in name]
    if known:
        return known[0]
    size = 8192 if device.type == "cuda" else 1024
    a = torch.zeros(size, size, device=device, dtype=dtype)
    seconds: list[float] = []
    while sum(seconds) < 0.3:  # the first are slower
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


class MinutesBar(ProgressCallback):
    """Stock's bar for a run that ends by its steps or by its minutes, whichever come first."""

    def __init__(self, trainer: LuminaMGPTTrainer):
        super().__init__()
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            form = "{percentage:3.0f}%|{bar}|{postfix}"
            self.training_bar = tqdm(total=1.0, bar_format=form, miniters=0, dynamic_ncols=True)
            self.show(state, logged_minutes(state.log_history))

    def on_step_end(self, args, state, control, **kwargs):
        if self.training_bar is not None:
            self.show(state, self.trainer._minutes)

    def show(self, state, minutes: float) -> None:
        limit = self.trainer.max_minutes or math.inf
        words = f"{minutes:.1f} of {limit:g} minutes, step {state.global_step}"
        self.training_bar.set_postfix_str(words, refresh=False)
        self.training_bar.update(
            min(max(state.global_step / state.max_steps, minutes / limit), 1) - self.training_bar.n
        )


class EpochOfData(TrainerCallback):
    """Tells the epoch to the collator, and to the order of grouped lengths: a resumed run has no other state."""

    def __init__(self, collator: Collator, order: torch.Generator):
        self.collator, self.order = collator, order

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.collator.epoch = int(state.epoch or 0)
        self.order.manual_seed(args.seed + self.collator.epoch)


class SampleCallback(TrainerCallback):
    """Every so many steps a contact sheet: a file in `folder`, and a picture for what the run reports to.

    Args:
        trainer: whose reports the picture goes to.
        draw: called without arguments; gives a PIL image.
    """

    def __init__(self, trainer: LuminaMGPTTrainer, draw: Callable[[], Image.Image], steps: int, folder: Path):
        self.trainer, self.draw, self.steps, self.folder = trainer, draw, steps, folder

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.steps:
            return
        with self.trainer.off_the_clock():
            with self.trainer.drawable():
                sheet = self.draw()  # on all processes, since a sharded model needs all of them
            if state.is_world_process_zero:
                self.folder.mkdir(parents=True, exist_ok=True)
                sheet.save(self.folder / f"step-{state.global_step:06d}.png")
                for callback in self.trainer.callback_handler.callbacks:
                    report_picture(callback, sheet, state.global_step)


def report_picture(callback: TrainerCallback, picture: Image.Image, step: int) -> None:
    """Shows a picture where a reporting callback shows its numbers; the Trainer's own interface has numbers only."""
    name = type(callback).__name__
    if name == "TensorBoardCallback" and callback.tb_writer is not None:
        callback.tb_writer.add_image("samples", np.asarray(picture), step, dataformats="HWC")
    elif name == "WandbCallback":
        callback._wandb.log({"samples": callback._wandb.Image(picture), "train/global_step": step})
    elif name == "TrackioCallback":
        callback._trackio.log({"samples": callback._trackio.Image(picture), "train/global_step": step})
