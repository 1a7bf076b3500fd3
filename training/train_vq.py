"""Trains a VQ model from scratch on all kinds of Tabletop's pictures: scenes, maps, skeletons, boxes, degraded ones.

    lumina-mgpt train training/recipes/tabletop/vq.yaml

The model is a plain `diffusers.VQModel`, trained in three stages. First an autoencoder without a codebook; then, from
k-means centers of its latents, the quantized model, whose codebook follows a moving average (VQ-VAE, arXiv 1711.00937,
appendix A.1). Such a codebook spends most of its codes on shades of the table that nobody tells apart, and which of
them a picture gets is noise to whoever must predict it. So at last codes that lie close together are merged, encoder
and codebook stay as they are, and the decoder alone learns on. The run resumes from its last state.
"""

import json
import random
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import repeat
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import VQModel
from PIL import Image
from scipy.cluster.hierarchy import fcluster, linkage

from .degradation import degrade
from .drawing import draw_box
from .tabletop import MAPS, TabletopSource


@dataclass
class VQRecipe:
    """One run.

    Attributes:
        output_dir: where the model goes, as `vqvae/`, with its scores and training states.
        model: the configuration of a `diffusers.VQModel`; `num_vq_embeddings` is before merging.
        num_codes: after merging.
        pictures: `size` (width_px, height_px) and number of `scenes` of each pool that is rendered.
        crop_px: larger pictures are cropped to this, in steps of a patch, as codes see them.
        num_steps: with a learning encoder, of which the first `quantize_from_step` without a codebook.
        num_decoder_steps: after merging.
    """

    output_dir: str
    model: dict
    num_codes: int
    pictures: list[dict] = field(default_factory=lambda: [{"size": [64, 64], "scenes": 6000}])
    crop_px: int = 64
    batch_size: int = 32
    num_steps: int = 3000
    num_decoder_steps: int = 1000
    quantize_from_step: int = 300
    learning_rate: float = 1e-3
    gradient_loss_weight: float = 0.5
    commitment_weight: float = 0.5
    codebook_decay: float = 0.98
    save_steps: int = 250
    seed: int = 0


class Codebook:
    """Moving-average upkeep of `VQModel.quantize.embedding`; with a decay of 1 it stays as it is."""

    def __init__(self, embedding: torch.nn.Embedding, decay: float):
        self.vectors = embedding.weight.requires_grad_(False)  # (codes, dim)
        self.decay = decay
        self.counts = torch.ones(len(self.vectors), device=self.vectors.device)
        self.sums = self.vectors.clone()

    def state(self) -> dict[str, torch.Tensor]:
        return {"counts": self.counts, "sums": self.sums}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        self.counts, self.sums = state["counts"], state["sums"]

    def start(self, latents: torch.Tensor, iterations: int = 20) -> None:
        """k-means++ (Arthur and Vassilvitskii 2007) over `latents` (samples, dim)."""
        error = torch.full((len(latents),), torch.inf, device=latents.device)
        chosen = latents[0]
        for i in range(len(self.vectors)):
            self.vectors[i] = chosen
            error = torch.minimum(error, (latents - chosen).square().sum(1))
            chosen = latents[torch.multinomial(error + 1e-12, 1)[0]]
        for _ in range(iterations):
            nearest = torch.cdist(latents, self.vectors).argmin(1)
            counts = torch.bincount(nearest, minlength=len(self.vectors)).float()[:, None]
            sums = torch.zeros_like(self.vectors).index_add_(0, nearest, latents)
            self.vectors.copy_(torch.where(counts > 0, sums / counts.clamp(min=1), self.vectors))
        self.counts, self.sums = torch.ones_like(self.counts), self.vectors.clone()

    def quantize(self, latents: torch.Tensor) -> torch.Tensor:
        """Nearest vectors of `latents` (batch, dim, rows, cols), after moving the codebook toward them."""
        flat = latents.detach().movedim(1, -1).reshape(-1, latents.shape[1])
        error, nearest = torch.cdist(flat, self.vectors).min(1)
        quantized = self.vectors[nearest].view(*latents.movedim(1, -1).shape).movedim(-1, 1)
        if self.decay < 1:
            self._follow(flat, nearest, error)
        return quantized

    def _follow(self, flat: torch.Tensor, nearest: torch.Tensor, error: torch.Tensor) -> None:
        counts = torch.bincount(nearest, minlength=len(self.vectors)).float()
        sums = torch.zeros_like(self.sums).index_add_(0, nearest, flat)
        self.counts.lerp_(counts, 1 - self.decay)
        self.sums.lerp_(sums, 1 - self.decay)
        dead = (self.counts < 0.02).nonzero()[:, 0]
        if len(dead):  # they start again at latents that are far from every code
            self.sums[dead] = flat[torch.multinomial(error.square() + 1e-12, len(dead))]
            self.counts[dead] = 1.0
        self.vectors.copy_(self.sums / self.counts[:, None])


KINDS = {"image": 0.55, **dict.fromkeys(MAPS, 0.1), "other": 0.15}  # shares of a batch


def render_pictures(recipe: VQRecipe) -> list[np.ndarray]:
    """uint8 `(scenes, kinds, height, width, 3)` for each size. Rendered once, then kept on disk."""
    pools = []
    for entry in recipe.pictures:
        (width_px, height_px), num_scenes = entry["size"], entry["scenes"]
        path = Path(recipe.output_dir) / f"pictures-{width_px}x{height_px}px-{num_scenes}.npy"
        if not path.exists():
            chunks = [range(i, min(i + 32, num_scenes)) for i in range(0, num_scenes, 32)]
            with ProcessPoolExecutor(initializer=torch.set_num_threads, initargs=(1,)) as workers:
                drawn = workers.map(_render, chunks, repeat((width_px, height_px)), repeat(recipe.seed))
                pool = np.concatenate([*drawn])
            np.save(path.with_suffix(".part.npy"), pool)
            path.with_suffix(".part.npy").rename(path)
        pools.append(np.load(path, mmap_mode="r"))
    return pools


def _render(indices: range, size: tuple[int, int], seed: int) -> np.ndarray:
    records = TabletopSource("control", [size], seed, "train", indices.stop).fetch(indices)
    boxes = TabletopSource("detection", [size], seed, "train", indices.stop).fetch(indices)
    for index, record, marked in zip(indices, records, boxes, strict=True):
        record["other"] = record.get("pose") or _other(index, record["image"], marked)
    return np.stack([[np.asarray(record[kind]) for kind in KINDS] for record in records])


def _other(index: int, picture: Image.Image, marked: dict) -> Image.Image:
    """A frame around an object, or a degraded picture, in turn."""
    if index % 2:
        return draw_box(marked["image"], marked["box"])
    degraded, _ = degrade(picture, 4, random.Random(index))
    return degraded.resize(picture.size, Image.Resampling.BICUBIC)


def sample_batch(pools: list[np.ndarray], recipe: VQRecipe, rng: np.random.Generator) -> torch.Tensor:
    """Crops of one pool in [-1, 1], `(batch, 3, height, width)`; a pool is as likely as it has scenes."""
    num_scenes = np.array([len(pool) for pool in pools])
    pool = pools[rng.choice(len(pools), p=num_scenes / num_scenes.sum())]
    height, width = (min(side, recipe.crop_px) for side in pool.shape[2:4])
    patch = 2 ** (len(recipe.model["block_out_channels"]) - 1)
    crops = []
    for kind in rng.choice(len(KINDS), recipe.batch_size, p=[*KINDS.values()]):
        top = patch * rng.integers(0, (pool.shape[2] - height) // patch + 1)
        left = patch * rng.integers(0, (pool.shape[3] - width) // patch + 1)
        crops.append(pool[rng.integers(len(pool)), kind, top : top + height, left : left + width])
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float() / 127.5 - 1


def reconstruction_loss(output: torch.Tensor, target: torch.Tensor, gradient_weight: float) -> torch.Tensor:
    """L1 + 4 x mean square + L1 of the picture's gradients (edges, which L1 alone blurs)."""
    loss = F.l1_loss(output, target) + 4 * F.mse_loss(output, target)
    for dim in (2, 3):
        loss = loss + gradient_weight * F.l1_loss(output.diff(dim=dim), target.diff(dim=dim))
    return loss


def learning_rate_at(step: int, num_steps: int, peak: float) -> float:
    """Linear warm-up over 100 steps, then linear decay to 2% over the last two thirds."""
    left = min(1.0, 1.5 * (1 - step / num_steps))
    return peak * min((step + 1) / 100, max(left, 0.02))


def train(recipe: VQRecipe, device: str | None = None) -> VQModel:
    """Runs (or resumes) the recipe, saves the model in `output_dir`, and returns it."""
    torch.manual_seed(recipe.seed)
    torch.set_flush_denormal(True)  # Adam's fading moments become denormal, which slows a CPU several times over
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    output_dir = Path(recipe.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    pools = render_pictures(recipe)

    model = VQModel(**recipe.model).to(device, memory_format=torch.channels_last)
    codebook = Codebook(model.quantize.embedding, recipe.codebook_decay)
    _fit(model, codebook, pools, recipe, "codes", recipe.num_steps)
    model = merge_codes(model, _latents(model, pools, recipe), recipe.num_codes)
    model.to(memory_format=torch.channels_last)
    for part in (model.encoder, model.quant_conv, model.quantize):
        part.requires_grad_(False)
    _fit(model, Codebook(model.quantize.embedding, decay=1), pools, recipe, "decoder", recipe.num_decoder_steps)

    model.bfloat16().save_pretrained(output_dir / "vqvae")
    scores = evaluate(model.float().eval(), recipe)  # of the weights as saved
    print(json.dumps(scores))
    (output_dir / "scores.json").write_text(json.dumps({"scores": scores, "recipe": asdict(recipe)}, indent=2) + "\n")
    return model


def _fit(
    model: VQModel, codebook: Codebook, pools: list[np.ndarray], recipe: VQRecipe, stage: str, num_steps: int
) -> None:
    """Trains what learns, in "codes" all of it and in "decoder" that; state in `output_dir/<stage>.pt`."""
    weights = [p for p in model.train().parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=recipe.learning_rate, betas=(0.9, 0.99), weight_decay=1e-4)
    path = Path(recipe.output_dir) / f"{stage}.pt"
    first_step = _resume(path, model, codebook, optimizer)
    started = time.time()
    for step in range(first_step, num_steps):
        pixels = sample_batch(pools, recipe, np.random.default_rng((recipe.seed, step)))
        pixels = pixels.to(model.device, memory_format=torch.channels_last)
        optimizer.param_groups[0]["lr"] = learning_rate_at(step, num_steps, recipe.learning_rate)
        if stage == "codes" and step == recipe.quantize_from_step:
            codebook.start(_latents(model, pools, recipe))
        quantized = stage == "decoder" or step >= recipe.quantize_from_step
        loss = _loss(model, codebook if quantized else None, pixels, recipe)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        if (step + 1) % 50 == 0:
            seconds = time.time() - started
            print(f"{stage}: step {step + 1}/{num_steps} loss {loss.item():.4f} {seconds:.0f} s", flush=True)
        if (step + 1) % recipe.save_steps == 0 or step + 1 == num_steps:
            _save(path, step + 1, model, codebook, optimizer)


def _loss(model: VQModel, codebook: Codebook | None, pixels: torch.Tensor, recipe: VQRecipe) -> torch.Tensor:
    latents = model.quant_conv(model.encoder(pixels))
    used, commitment = latents, latents.new_zeros(())
    if codebook is not None:
        nearest = codebook.quantize(latents)
        commitment = F.mse_loss(latents, nearest)
        used = latents + (nearest - latents).detach()
    output = model.decoder(model.post_quant_conv(used))
    return reconstruction_loss(output, pixels, recipe.gradient_loss_weight) + recipe.commitment_weight * commitment


@torch.no_grad()
def _latents(model: VQModel, pools: list[np.ndarray], recipe: VQRecipe, num_batches: int = 30) -> torch.Tensor:
    """(samples, dim)"""
    rng = np.random.default_rng(recipe.seed)
    found = [model.encode(sample_batch(pools, recipe, rng).to(model.device)).latents for _ in range(num_batches)]
    return torch.cat([z.movedim(1, -1).reshape(-1, z.shape[1]) for z in found])


@torch.no_grad()
def merge_codes(model: VQModel, latents: torch.Tensor, num_codes: int) -> VQModel:
    """A model of `num_codes`: average linkage joins the closest, at the mean of how often `latents` use each."""
    vectors = model.quantize.embedding.weight
    groups = torch.from_numpy(fcluster(linkage(vectors.cpu().numpy(), "average"), num_codes, "maxclust") - 1).long()
    groups = groups.to(vectors.device)
    uses = torch.bincount(torch.cdist(latents, vectors).argmin(1), minlength=len(vectors))[:, None] + 0.5
    sums = torch.zeros(int(groups.max()) + 1, vectors.shape[1], device=vectors.device)
    means = sums.index_add(0, groups, vectors * uses) / torch.zeros_like(sums[:, :1]).index_add(0, groups, uses)
    merged = VQModel.from_config({**model.config, "num_vq_embeddings": len(means)}).to(vectors.device)
    merged.load_state_dict({**model.state_dict(), "quantize.embedding.weight": means})
    return merged


def _save(path: Path, step: int, model: VQModel, codebook: Codebook, optimizer) -> None:
    """One file, replaced atomically, so that a killed run resumes from a whole state."""
    state = {
        "step": step,
        "model": model.state_dict(),
        "codebook": codebook.state(),
        "optimizer": optimizer.state_dict(),
    }
    part = path.with_suffix(".part")
    torch.save(state, part)
    part.rename(path)


def _resume(path: Path, model: VQModel, codebook: Codebook, optimizer) -> int:
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True, map_location=model.device)
    model.load_state_dict(state["model"])
    codebook.load_state(state["codebook"])
    optimizer.load_state_dict(state["optimizer"])
    print(f"{path.stem}: resumed at step {state['step']}", flush=True)
    return state["step"]


@torch.no_grad()
def evaluate(model: VQModel, recipe: VQRecipe, num_scenes: int = 200, size_px: int = 64) -> dict[str, float]:
    """PSNR (dB) and SSIM of each kind of picture of test scenes, and how many codes are in use."""
    device = model.device
    source = TabletopSource("control", [(size_px, size_px)], recipe.seed, "test", num_scenes)
    records = source.fetch(range(num_scenes))
    scores: dict[str, float] = {}
    counts = torch.zeros(model.config["num_vq_embeddings"])
    for kind in ("image", *MAPS):
        pixels = torch.stack([torch.from_numpy(np.array(r[kind])) for r in records]).permute(0, 3, 1, 2) / 127.5 - 1
        latents = torch.cat([model.encode(chunk).latents for chunk in pixels.to(device).split(32)])
        _, _, (_, _, codes) = model.quantize(latents)
        counts += torch.bincount(codes.flatten().cpu(), minlength=len(counts))
        output = torch.cat([model.decode(chunk).sample for chunk in latents.split(32)]).clamp(-1, 1).cpu()
        scores[f"psnr_{kind}"] = psnr(output, pixels)
        scores[f"ssim_{kind}"] = ssim(output, pixels)
    share = counts / counts.sum()
    scores["codes_used"] = (counts > 0).float().mean().item()
    scores["code_perplexity"] = torch.exp(-(share * share.clamp(min=1e-12).log()).sum()).item()
    return {key: round(value, 4) for key, value in scores.items()}


def psnr(output: torch.Tensor, target: torch.Tensor) -> float:
    """Mean over pictures of the peak signal-to-noise ratio in dB, for values in [-1, 1]."""
    mse = ((output - target) / 2).square().flatten(1).mean(1).clamp(min=1e-10)
    return (-10 * torch.log10(mse)).mean().item()


def ssim(output: torch.Tensor, target: torch.Tensor, window: int = 7) -> float:
    """Structural similarity (Wang et al. 2004) with a uniform window, for values in [-1, 1]."""

    def mean(x: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(x, window, 1)

    mu_x, mu_y = mean(output), mean(target)
    var_x, var_y = mean(output**2) - mu_x**2, mean(target**2) - mu_y**2
    covariance = mean(output * target) - mu_x * mu_y
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    score = (2 * mu_x * mu_y + c1) * (2 * covariance + c2) / ((mu_x**2 + mu_y**2 + c1) * (var_x + var_y + c2))
    return score.mean().item()
