"""The table of what PyTorch cannot differentiate twice, with the cures; seen with torch 2.13."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from .isolation import isolated

__all__ = ["BY_STEM", "FAULTS", "MESSAGES", "REVERSE", "Fault", "stem_of"]


@dataclass(frozen=True)
class Fault:
    """One row of the table.

    Args:
        operation: its public name.
        stems: names of its graph nodes, as `stem_of` gives them.
        cure: what to do.
        reverse: whether reverse-over-reverse works.
        forward: whether forward-over-reverse works.
        linear: whether the backward pass can be differentiated in its cotangent, which a Jacobian needs.
        when: which nodes of these names are meant.
    """

    operation: str
    stems: tuple[str, ...]
    cure: str
    reverse: bool = False
    forward: bool = False
    linear: bool = False
    when: Callable[[Any], bool] = lambda node: True

    def sentence(self, owner: str, place: str) -> str:
        """The message, for a place such as ", called in module `head`,"."""
        mode = " in reverse mode" if self.forward else " in forward mode" if self.reverse else ""
        return f"{owner}: {self.operation}{place} has no usable second derivative{mode} in PyTorch; {self.cure}."


@cache
def stem_of(name: str) -> str:
    """The name under which an operation, its backward and its graph node are the same.

    Args:
        name: such as "_ctc_loss_backward" or "CtcLossBackward0".

    Returns:
        Such as "ctcloss".
    """
    return re.sub(r"(backward\d*)+$", "", name.replace("_", "").lower())


REVERSE = "use product=KeptGraph() or FreshGraph(), which work in reverse mode"
_ATTENTION = (
    "scaleddotproductflashattention",
    "scaleddotproductflashattentionforcpu",
    "scaleddotproductefficientattention",
    "scaleddotproductcudnnattention",
    "scaleddotproductfusedattentionoverrideable",
)
_CHECKPOINT = "call torch.utils.checkpoint.checkpoint with use_reentrant=False"
_COMPILED = "compile the product, not the module: pass the module that torch.compile was given"
_RECURRENT = "call it under torch.backends.cudnn.flags(enabled=False)"


def _bias_alone(node: Any) -> bool:
    _, (weight, _), (bias, _) = node.next_functions[:3]
    if weight is not None or bias is None:
        return False
    with isolated():  # under activation checkpointing, looking at a saved tensor evaluates the function
        return getattr(node, "_saved_weight", node) is None


def _by_product(node: Any) -> bool:
    return getattr(node, "_saved_reduce", None) == "prod"


FAULTS: tuple[Fault, ...] = (
    Fault(
        "the fused F.scaled_dot_product_attention",
        _ATTENTION,
        "the evaluation already asks for the mathematical kernel, so drop the sdpa_kernel(...) inside the function",
    ),
    Fault(
        "torch.cdist",
        ("cdist",),
        "write the distances by hand, ((a[:, None] - b[None])**2).sum(-1), or for p=2 in reverse mode pass "
        "compute_mode='use_mm_for_euclid_dist'",
    ),
    Fault("F.pdist", ("pdist",), "write the distances by hand, ((a[:, None] - a[None])**2).sum(-1) above the diagonal"),
    Fault("F.embedding_bag", ("embeddingbag",), "use F.embedding and sum or average over the bag"),
    Fault("F.ctc_loss", ("ctcloss", "cudnnctcloss"), "write its forward recursion with torch.logsumexp"),
    Fault("F.multi_margin_loss", ("multimarginloss",), "write it by hand, with torch.relu(margin - x[target] + x)"),
    Fault("F.multilabel_margin_loss", ("multilabelmarginloss",), "write it by hand, with torch.relu"),
    Fault("F.hardsigmoid", ("hardsigmoid",), "write (x / 6 + 0.5).clamp(0, 1)"),
    Fault("torch.segment_reduce", ("segmentreduce",), "use index_add or scatter_add"),
    Fault("torch.special.zeta", ("zeta", "specialzeta"), "use torch.polygamma where the order is an integer"),
    Fault("cuDNN's recurrent layer", ("cudnnrnn",), _RECURRENT),
    Fault("reentrant activation checkpointing", ("checkpointfunction",), _CHECKPOINT),
    Fault("a function compiled by torch.compile", ("compiledfunction",), _COMPILED),
    Fault(
        "F.linear_cross_entropy in chunks",
        ("generatedbackwardfortorchnnlinearcrossentropybatchchunkeddefault",),
        "leave its options out",
    ),
    # torch takes the saved norms for constants: the product is wrong by tens of per cent
    Fault(
        "weight_norm",
        ("weightnorminterface",),
        "write the weight by hand, g * v / v.norm(dim=1, keepdim=True)",
        linear=True,
    ),
    # a silent zero for layer_norm, an error for the others
    Fault(
        "a normalisation with a bias and without a weight",
        ("nativelayernorm", "nativebatchnorm", "cudnnbatchnorm", "miopenbatchnorm"),
        "pass a weight of ones, or use product=ForwardOverReverse()",
        forward=True,
        when=_bias_alone,
    ),
    Fault("F.mse_loss", ("mseloss",), f"write ((a - b)**2).mean(), or {REVERSE}", reverse=True),
    Fault("F.huber_loss", ("huberloss",), f"use F.smooth_l1_loss, or {REVERSE}", reverse=True),
    Fault("F.soft_margin_loss", ("softmarginloss",), f"write F.softplus(-y * x).mean(), or {REVERSE}", reverse=True),
    Fault("F.grid_sample", ("gridsampler2d", "gridsampler3d", "cudnngridsampler"), REVERSE, reverse=True),
    Fault("torch.sparse.mm", ("sparseaddmm", "sparsemm", "sparsesparsematmul"), REVERSE, reverse=True),
    Fault("spectral_norm in train mode", ("divout",), f"call module.eval(), or {REVERSE}", reverse=True),
    Fault("torch.special.gammainc", ("igamma", "igammac"), REVERSE, reverse=True),
    Fault("torch.cdist by matrix products", ("euclideandist",), f"write it by hand, or {REVERSE}", reverse=True),
    Fault("torch.index_reduce", ("indexreduce",), REVERSE, reverse=True),
    # forward mode gives numbers here, and they are wrong
    Fault("torch.scatter_reduce(reduce='prod')", ("scatterreduce",), REVERSE, reverse=True, when=_by_product),
)

BY_STEM: dict[str, list[Fault]] = {}
for _row in FAULTS:
    for _name in _row.stems:
        BY_STEM.setdefault(_name, []).append(_row)

# errors that name no operation of the graph: pattern, fault
MESSAGES: tuple[tuple[str, Fault], ...] = (
    (r"aot_autograd does not .* support double backward", Fault("a function compiled by torch.compile", (), _COMPILED)),
    (r"When use_reentrant=True", Fault("reentrant activation checkpointing", (), _CHECKPOINT)),
    (r"support saved tensor hooks", Fault("activation checkpointing", (), REVERSE, reverse=True)),
    (
        r"torch\.utils\.checkpoint: .*(metadata|number of tensors)",
        Fault("activation checkpointing of fused attention", (), "checkpoint a module, not a bare function"),
    ),
    (r"cudnn RNN backward|_cudnn_rnn_backward", Fault("cuDNN's recurrent layer", (), _RECURRENT)),
    (
        r"in-place (operation|arithmetic)",
        Fault(
            "an update in place of a tensor from outside, such as running statistics given to F.batch_norm",
            (),
            f"pass clones, or {REVERSE}",
            reverse=True,
        ),
    ),
)
