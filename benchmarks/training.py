"""Memory and speed of training: the loss in chunks against all logits, and our trainer against plain `Trainer`.

    python -m benchmarks.training
    python -m benchmarks.training --shape 7b --dtype bf16 --device cuda --batch-size 2 --length 4096

Prints tables in Markdown. Weights and data are random; every row of a batch is as long as every other, and a quarter
of it is a prompt, of which nothing is predicted. Memory is measured in fresh processes: on a GPU what torch allocated,
on the CPU all resident pages. "All logits" is what a model does whose loss is a function of its output: the head once,
then both terms of the same loss by torch's operations. Steps of both trainers take turns in one process.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoTokenizer, PrinterCallback, Trainer, TrainerCallback
from trl import SFTConfig

from modeling_lumina_mgpt import LuminaMGPTConfig, LuminaMGPTForConditionalGeneration
from modeling_lumina_mgpt.modeling_lumina_mgpt import IGNORED_LABEL, LuminaMGPTHead, language_losses
from modeling_lumina_mgpt.training.collator import Collator
from modeling_lumina_mgpt.training.trainer import LuminaMGPTTrainer

CHECKPOINT = Path(__file__).parents[1] / "checkpoints" / "lumina-mgpt-tabletop"
DEFAULT = {
    name: getattr(LuminaMGPTConfig.from_pretrained(CHECKPOINT), name)
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
}
LARGE = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
SHAPES = {"default": DEFAULT, "wide": {**DEFAULT, "vocab_size": 16384}, "7b": {**LARGE, "vocab_size": 65536}}
LORA = {"r": 32, "lora_alpha": 32, "target_modules": "all-linear"}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Z_LOSS_WEIGHT = 1e-5
MB = 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["default", "7b"], default="default")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the weights")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--num-steps", type=int, default=6, help="in a turn; the first is not timed")
    parser.add_argument("--num-turns", type=int, default=4)
    names = "VOCABULARY", "TOKENS", "HIDDEN"
    parser.add_argument("--loss-sizes", type=int, nargs=3, metavar=names, default=(65536, 4096, 1024))
    args = parser.parse_args()
    print_losses(args)
    with tempfile.TemporaryDirectory() as args.output_dir:
        print_trainers(args)
        print_ways(args)


# The loss alone


def print_losses(args: argparse.Namespace) -> None:
    vocab_size, num_tokens, hidden_size = args.loss_sizes
    print(
        f"Loss, forward and backward: vocabulary {vocab_size:,}, {num_tokens:,} tokens, hidden size {hidden_size:,}\n"
    )
    print("| head | loss | peak, MB | without the gradients that stay, MB | of all logits' |\n|---|---|---|---|---|")
    for is_trained in (True, False):
        own = {}
        for name in ("all logits", "chunks"):
            peak, stays = in_fresh_process(loss_memory, name, is_trained, args)
            own[name] = peak - stays
            share = own[name] / own["all logits"]
            head = "trained" if is_trained else "frozen"
            print(f"| {head} | {name} | {peak / MB:,.0f} | {own[name] / MB:,.0f} | {share:.2f} |", flush=True)


def loss_memory(name: str, is_trained: bool, args: argparse.Namespace) -> tuple[int, int]:
    """Peak bytes beyond the head and the hidden states; and the bytes of their gradients."""
    (vocab_size, num_tokens, hidden_size), dtype = args.loss_sizes, DTYPES[args.dtype]

    def run(vocab_size: int, num_tokens: int) -> tuple[int, int]:
        with torch.device(args.device):
            head = LuminaMGPTHead(hidden_size, vocab_size, bias=False, dtype=dtype).requires_grad_(is_trained)
            hidden_states = torch.randn(1, num_tokens, hidden_size, dtype=dtype, requires_grad=True)
            labels = torch.randint(vocab_size, (1, num_tokens))
        peak = start_peak(args.device)
        if name == "chunks":
            language_losses(head, hidden_states, labels, Z_LOSS_WEIGHT)["loss"].backward()
        else:
            loss_of_logits(head(hidden_states), labels).backward()
        gradients = [x.grad for x in (head.weight, hidden_states) if x.grad is not None]
        return peak(), sum(gradient.nbytes for gradient in gradients)

    run(64, 8)  # what libraries take once
    return run(vocab_size, num_tokens)


def loss_of_logits(logits: Tensor, labels: Tensor, num_items_in_batch: Tensor | None = None) -> Tensor:
    """The same loss from `logits (batch, length, vocab_size)`."""
    logits, targets = logits.float(), F.pad(labels, (0, 1), value=IGNORED_LABEL)[:, 1:]
    log_partition = logits.logsumexp(-1)  # (batch, length)
    cross_entropy = log_partition - logits.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    losses = cross_entropy + Z_LOSS_WEIGHT * log_partition.square()
    predicted = targets != IGNORED_LABEL
    return losses[predicted].sum() / (predicted.sum() if num_items_in_batch is None else num_items_in_batch)


# Whole steps


def print_trainers(args: argparse.Namespace) -> None:
    print(f"\nSteps of {args.batch_size} x {args.length} tokens, {args.dtype}: our trainer against plain `Trainer`\n")
    print(
        "| shape | vocabulary | trainer | tokens/s | FLOPs utilization | of plain's speed |\n|---|---|---|---|---|---|"
    )
    for shape in ("default", "wide") if args.shape == "default" else (args.shape,):
        speeds, utilization = in_fresh_process(compare_trainers, shape, args)
        for trainer, speed in speeds.items():
            share = f"{100 * utilization * speed:.1f}% | {speed / speeds['plain, all logits']:.2f}"
            print(f"| {shape} | {SHAPES[shape]['vocab_size']:,} | {trainer} | {speed:,.0f} | {share} |", flush=True)


def compare_trainers(shape: str, args: argparse.Namespace) -> tuple[dict[str, float], float]:
    """Tokens a second, medians over all steps; and the utilization that one token a second is."""
    model = new_model(shape, args)
    makers: dict[str, Callable] = {"plain, all logits": plain_trainer, "ours": our_trainer}
    seconds: dict[str, list[float]] = {name: [] for name in makers}
    for _ in range(args.num_turns):
        for name, maker in makers.items():
            trainer = maker(model, args)
            seconds[name] += step_seconds(trainer, args.device)
            log = trainer.state.log_history[0]  # the last turn's last is ours, which logs its utilization
    speeds = {name: args.batch_size * args.length / statistics.median(times) for name, times in seconds.items()}
    return speeds, log["mfu"] / log["tokens_per_second"]


def print_ways(args: argparse.Namespace) -> None:
    print(f"\nWays to train ({args.shape}; peak memory with weights and optimizer)\n")
    print("| trained | checkpointing | tokens/s | FLOPs utilization | peak, MB |\n|---|---|---|---|---|")
    for lora in (False, True):
        for checkpointing in (False, True):
            speed, utilization, peak = in_fresh_process(train_one_way, lora, checkpointing, args)
            way = f"{'LoRA' if lora else 'all weights'} | {'yes' if checkpointing else 'no'}"
            print(f"| {way} | {speed:,.0f} | {100 * utilization:.1f}% | {peak / MB:,.0f} |", flush=True)


def train_one_way(lora: bool, checkpointing: bool, args: argparse.Namespace) -> tuple[float, float, int]:
    """Tokens a second, FLOPs utilization, and peak bytes from before the model was made."""
    torch.ones(8, device=args.device)
    peak = start_peak(args.device)
    values = {"gradient_checkpointing": checkpointing}
    trainer = our_trainer(new_model(args.shape, args), args, LoraConfig(**LORA) if lora else None, **values)
    speed = args.batch_size * args.length / statistics.median(step_seconds(trainer, args.device))
    log = trainer.state.log_history[0]
    return speed, log["mfu"] / log["tokens_per_second"] * speed, peak()


def new_model(shape: str, args: argparse.Namespace) -> LuminaMGPTForConditionalGeneration:
    torch.manual_seed(0)
    with torch.device(args.device):
        config = LuminaMGPTConfig(**SHAPES[shape], z_loss_weight=Z_LOSS_WEIGHT, use_cache=False)
        return LuminaMGPTForConditionalGeneration(config).to(DTYPES[args.dtype])


def our_trainer(model, args: argparse.Namespace, lora: LoraConfig | None = None, **values) -> LuminaMGPTTrainer:
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    common = common_arguments(model, args, **values)
    return LuminaMGPTTrainer(**common, peft_config=lora, processing_class=tokenizer)


def plain_trainer(model, args: argparse.Namespace) -> Trainer:
    common = common_arguments(model, args)
    collate = common["data_collator"]

    def without_tasks(rows: list[dict]) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in collate(rows).items() if name in ("input_ids", "labels")}

    def loss(outputs, labels: Tensor, num_items_in_batch=None) -> Tensor:
        return loss_of_logits(outputs.logits, labels, num_items_in_batch)

    return Trainer(**{**common, "data_collator": without_tasks}, compute_loss_func=loss)


def common_arguments(model, args: argparse.Namespace, **values) -> dict:
    """Of both trainers: the model, the values, the data and the collator."""
    size = (args.num_steps * args.batch_size, args.length)
    ids = torch.randint(8, model.config.vocab_size, size, generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, : args.length // 4] = IGNORED_LABEL
    rows = {"input_ids": ids.tolist(), "labels": labels.tolist(), "task": ["text-to-image"] * len(ids)}
    arguments = SFTConfig(
        output_dir=args.output_dir,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        loss_type="nll",
        max_steps=args.num_steps,
        per_device_train_batch_size=args.batch_size,
        logging_steps=args.num_steps,
        remove_unused_columns=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        bf16=False,
        use_cpu=args.device == "cpu",
        **{"gradient_checkpointing": False, **values},
    )
    collator = Collator(pad_id=1, image_start_id=2, image_end_id=3, code_ids=torch.tensor([]), tasks=["text-to-image"])
    return {
        "model": model,
        "args": arguments,
        "train_dataset": Dataset.from_dict(rows),
        "data_collator": collator,
    }


# Clocks and gauges


class Clock(TrainerCallback):
    """When each step ended."""

    def __init__(self, device: str):
        self.device = device
        self.ends: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        if self.device != "cpu":
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())


def step_seconds(trainer: Trainer, device: str) -> list[float]:
    clock = Clock(device)
    trainer.add_callback(clock)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return [end - start for start, end in zip(clock.ends, clock.ends[1:], strict=False)]


def start_peak(device: str) -> Callable[[], int]:
    """Begins to watch; what it returns tells the largest number of bytes in use since then, beyond those at first."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        return lambda: torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    return partial(lambda before: resident("VmHWM") - before, resident("VmRSS"))


def resident(name: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(lines[name].split()[0])


def in_fresh_process(function: Callable, *args):
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


if __name__ == "__main__":
    main()
