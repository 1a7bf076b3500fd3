"""Muon for the matrices of a model's layers and AdamW for all other weights, as one optimizer.

torch's Muon is for hidden layers' matrices; embeddings, the head and norms stay with AdamW. The Trainer takes one.
"""

from typing import Any

from torch import Tensor, nn
from torch.optim import Muon, Optimizer


class MuonWithAdamW(Optimizer):
    """Takes the layers' matrices from an AdamW that has taken no step yet, with the learning rate and decay they had.

    Its groups are those of both parts, whose own state is in `parts`; no group can be added later.

    Muon's steps are scaled to be as large as AdamW's would be ("match_rms_adamw", arXiv 2502.16982), so that one
    learning rate and one weight decay suit both.

    Args:
        adamw: of all weights that are trained.
        matrices: those of them that Muon is to have, as `layer_matrices` finds them.
    """

    def __init__(self, adamw: Optimizer, matrices: list[Tensor]):
        taken = {id(matrix) for matrix in matrices}
        for group in adamw.param_groups:
            group["params"] = [weight for weight in group["params"] if id(weight) not in taken]
        decayed = adamw.param_groups[0]
        muon = Muon(matrices, decayed["lr"], decayed["weight_decay"], adjust_lr_fn="match_rms_adamw")
        self.parts = {"muon": muon, "adamw": adamw}
        # the same groups: a learning rate that is set here holds there
        super().__init__([*muon.param_groups, *adamw.param_groups], {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for part in self.parts.values():
            part.step()

    def state_dict(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, part in self.parts.items():
            part.load_state_dict(state_dict[name])
        self.param_groups = [group for part in self.parts.values() for group in part.param_groups]


def layer_matrices(model: nn.Module) -> list[Tensor]:
    """Weights of the decoder layers' linear parts that are trained."""
    linear = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return [m.weight for name, m in linear if ".layers." in name and m.weight.requires_grad]
