"""Rows of image codes that learn together: what a model learns about one code holds for those that look like it.

An embedding and a head have one row for each code. Learned one by one, a code that is rare in the training data is
known badly, and one that is in no answer at all is learned never to be given. So, while a model is trained, a code's
row is what it was, plus a function of the code's vector in the VQ model's codebook, plus an offset of its own, which
the weight itself holds in the row's place. Afterwards rows are what they came to, in an ordinary embedding and head.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from modeling_lumina_mgpt import LuminaMGPTForConditionalGeneration

MIN_ANSWERS = 200  # before a code has an offset of its own
HIDDEN = 128  # units of the function: few, so that it cannot tell codes apart that look alike


class CodeRows(nn.Module):
    """The parametrization of one weight, `(vocab_size, hidden_size)`: its rows of image codes, as said above.

    A code has an offset only once it has often been an answer in this run. Before, most that training could teach it
    is not to be given; its row goes with those that look like it.
    """

    code_ids: Tensor  # (codes,)
    codes: Tensor  # (codes, components)
    start: Tensor  # (codes, hidden_size), the rows as they were
    num_answers: Tensor  # (vocab_size,), how often a token has been one

    def __init__(self, weight: Tensor, codes: Tensor, code_ids: Tensor):
        super().__init__()
        self.register_buffer("code_ids", code_ids, persistent=False)
        self.register_buffer("codes", codes, persistent=False)
        self.register_buffer("start", weight[code_ids].detach().clone(), persistent=False)
        self.register_buffer("num_answers", torch.zeros(len(weight), dtype=torch.long))
        self.first, self.second, self.last = (
            nn.Linear(size, width)
            for size, width in ((codes.shape[1], HIDDEN), (HIDDEN, HIDDEN), (HIDDEN, weight.shape[1]))
        )
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, weight: Tensor) -> Tensor:
        hidden = F.gelu(self.first(self.codes))
        shared = self.last(hidden + F.gelu(self.second(hidden)))  # (codes, hidden_size)
        own = weight[self.code_ids] * (self.num_answers[self.code_ids, None] >= MIN_ANSWERS)
        return weight.index_copy(0, self.code_ids, (self.start + shared + own).to(weight.dtype))

    def right_inverse(self, weight: Tensor) -> Tensor:
        """What `forward` makes the weight of: offsets of 0, which weight decay leaves alone until they are used."""
        return weight.index_fill(0, self.code_ids, 0.0)


@torch.no_grad()
def start_codes_alike(model: LuminaMGPTForConditionalGeneration, codebook: Tensor, code_ids: Tensor) -> None:
    """Adds one random projection of the codebook to the codes' rows of embeddings and head.

    Codes that look alike begin alike, and what attention brings from an embedding is near the head's row of that code:
    most answers copy most of a given picture.

    Args:
        codebook, code_ids: as in `share_code_rows`.
    """
    codes = _normalized(codebook)
    projection = model.config.initializer_range * torch.randn(codes.shape[1], model.config.hidden_size)
    for module in _embedding_and_head(model):
        module.weight[code_ids] += codes @ projection


def share_code_rows(model: LuminaMGPTForConditionalGeneration, codebook: Tensor, code_ids: Tensor) -> list[CodeRows]:
    """Lets embeddings and head learn their codes' rows together, until `fold_code_rows`.

    Args:
        codebook: `(codes, components)`, the vectors of the VQ model.
        code_ids: `(codes,)`, the tokens that stand for them.

    Returns:
        The parametrizations, whose `num_answers` training has to keep.

    Raises:
        ValueError: if embeddings and head are one matrix.
    """
    if model.config.tie_word_embeddings:
        raise ValueError("share_code_rows with tie_word_embeddings true: accepted are two matrices (false)")
    codes = codebook.shape[1] ** 0.5 * _normalized(codebook)
    found, device = [], model.device
    for module in _embedding_and_head(model):
        found.append(CodeRows(module.weight, codes.to(device), code_ids.to(device)).to(device))
        parametrize.register_parametrization(module, "weight", found[-1])
    return found


@torch.no_grad()
def fold_code_rows(model: LuminaMGPTForConditionalGeneration) -> None:
    """Makes embeddings and head ordinary again, with the rows as they are now."""
    for module in _embedding_and_head(model):
        parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)


def _normalized(codebook: Tensor) -> Tensor:
    """The codes' vectors around 0 and of length 1 in the mean, large components less large."""
    codes = codebook.detach().float()  # (codes, components)
    codes = (codes - codes.mean(0)) / codes.std(0).clamp(min=1e-6).sqrt()
    return codes / codes.norm(dim=1).mean()


def _embedding_and_head(model: LuminaMGPTForConditionalGeneration) -> Sequence[Any]:
    return model.get_input_embeddings(), model.get_output_embeddings()
