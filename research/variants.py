"""The variants of the protocol's section of that name: Muon and SOAP, and what each row is.

Both optimizers are written plainly here, in float32, for the matrices of the blocks; embeddings, biases and norms get
AdamW. Muon: Jordan et al., 2024, with Nesterov's momentum and updates of AdamW's size, 0.2 √(max side) (Liu et al.,
arXiv 2502.16982). SOAP: Vyas et al., arXiv 2409.11321; its eigenbases are renewed every 10 steps by a QR iteration that
begins at the first gradient's, without sorting.
"""

from __future__ import annotations

from typing import Any

import lm
import torch
from torch import Tensor

from pace_kernels import Pullback

RENEWED = 10  # steps between two bases of SOAP
WEAK = 0.02  # of the drawn c, so that weak pulls and constant gains lie between 0.001 and 1
EMBEDDINGS = 2  # of lm's model; they come first among its matrices


def orthogonal(z: Tensor) -> Tensor:
    """Muon's five steps of a quintic Newton-Schulz iteration: singular values to about 1."""
    wide = z if z.shape[0] <= z.shape[1] else z.mT
    wide = wide / (wide.norm() + 1e-7)
    for _ in range(5):
        square = wide @ wide.mT
        wide = 3.4445 * wide + (2.0315 * square @ square - 4.7750 * square) @ wide
    return wide if z.shape[0] <= z.shape[1] else wide.mT


class Matrices(torch.optim.Optimizer):
    """``rule`` of a group: "Muon", "SOAP" or "AdamW". With ``strength`` SOAP and AdamW pull toward the average that a
    Pullback keeps in their states, by the gain min(α c w_t / D, 1) in the basis in which D is."""

    def __init__(self, groups: Any, lr: float, **options: Any) -> None:
        super().__init__(groups, {"lr": lr, "eps": 1e-8, "rule": "AdamW", "strength": 0.0, "kappa": 0.2, **options})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for x in group["params"]:
                self.move(group, x, x.grad, self.state[x])

    def move(self, group: dict[str, Any], x: Tensor, g: Tensor, state: dict[str, Any]) -> None:
        (beta1, beta2), lr = group["betas"], group["lr"]
        t = state["step"] = state.get("step", 0) + 1
        m = state.setdefault("exp_avg", torch.zeros_like(x)).lerp_(g, 1 - beta1)
        kept = 1 - lr * group["weight_decay"]
        if group["rule"] == "Muon":
            size = 0.2 * max(x.shape) ** 0.5
            x.mul_(kept).sub_(orthogonal(g.lerp(m, beta1)), alpha=lr * size)
            return
        if group["rule"] == "SOAP":
            renew(state, g, beta2, t)
        v = state.setdefault("exp_avg_sq", torch.zeros_like(x)).lerp_(turned(state, g).square(), 1 - beta2)
        d = (v / (1 - beta2**t)).sqrt().add_(group["eps"])
        change = -lr * turned(state, m) / (1 - beta1**t) / d
        if group["strength"] and "ema" in state:
            gain = (lr * group["strength"] * max((1 + t) ** -group["kappa"], 1e-4) / d).clamp_(max=1)
            change += gain * turned(state, state["ema"] - x)
        x.mul_(kept).add_(turned(state, change, back=True))


def renew(state: dict[str, Any], g: Tensor, beta2: float, t: int) -> None:
    for side, square in (("left", g @ g.mT), ("right", g.mT @ g)):
        sum_ = state.setdefault(f"{side}_sum", torch.zeros_like(square)).lerp_(square, 1 - beta2)
        if t == 1:
            state[side] = torch.linalg.eigh(sum_).eigenvectors.flip(1)
        elif t % RENEWED == 0:
            state[side] = torch.linalg.qr(sum_ @ state[side]).Q


def turned(state: dict[str, Any], z: Tensor, back: bool = False) -> Tensor:
    """Into SOAP's basis, or back; as it is without one."""
    if "left" not in state:
        return z
    left, right = state["left"], state["right"]
    return left @ z @ right.mT if back else left.mT @ z @ right


def build(groups: Any, lr: float, rule: str, kappa: float, gain: float | None = None, **options: Any) -> Pullback:
    """With PACE's average, which is alone without a gain."""
    first, *others = groups
    inner = {**first, "params": first["params"][EMBEDDINGS:], "rule": rule}
    outer = {**first, "params": first["params"][:EMBEDDINGS]}
    base = Matrices([inner, outer, *others], lr, kappa=kappa, **options)
    return Pullback(base, lambda_pullback=0.0, gain=gain, ema_kappa=kappa)


lm.OPTIMIZERS |= {rule: lambda groups, lr, rule=rule, **o: build(groups, lr, rule, **o) for rule in ("Muon", "SOAP")}


def trajectory(name: str, cell: dict[str, float], mada: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Optimizer and options; ``mada``: those of the protocol's MADA."""
    kappa, c, weak = cell["kappa"], cell["strength"], cell["weak"]
    betas = [cell["beta1"], cell["beta2"]]
    average = {"betas": betas, "ema_kappa": kappa}
    beside = {"betas": betas, "kappa": kappa}
    return {
        "PACE, no momentum": ("PACE", {**average, "betas": [0.0, cell["beta2"]], "lambda_pullback": c}),
        "PACE, weak": ("PACE", {**average, "lambda_pullback": weak}),
        "PACE, weak, every 5th": ("PACE", {**average, "lambda_pullback": weak, "ema_update_freq": 5}),
        "PACE, weak, from the step": ("PACE", {**average, "lambda_pullback": weak, "pullback_from": "step"}),
        "MADA, average": ("MADA", {**mada, "ema_kappa": kappa, "use_ema_eval": True}),
        "MADA, pulled": ("MADA", {**mada, "ema_kappa": kappa, "use_ema_eval": True, "lambda_pullback": c}),
        "Muon, average": ("Muon", beside),
        "Muon, pulled": ("Muon", {**beside, "gain": weak}),
        "SOAP, average": ("SOAP", beside),
        "SOAP, pulled": ("SOAP", {**beside, "gain": weak}),
        "SOAP, pulled in its basis": ("SOAP", {**beside, "strength": c}),
    }[name]  # fmt: skip


# As METHODS of protocol.py. The average of each is judged.
_MADA = ("hyper", "hyper_momentum", "kappa")
METHODS: dict[str, tuple[str, int, tuple[str, ...]]] = {
    name: (name, 0, options)
    for name, options in {
        "PACE, no momentum": ("kappa", "strength"),
        "PACE, weak": ("kappa", "weak"),
        "PACE, weak, every 5th": ("kappa", "weak"),
        "PACE, weak, from the step": ("kappa", "weak"),
        "MADA, average": _MADA,
        "MADA, pulled": (*_MADA, "strength"),
        "Muon, average": ("kappa",),
        "Muon, pulled": ("kappa", "weak"),
        "SOAP, average": ("kappa",),
        "SOAP, pulled": ("kappa", "weak"),
        "SOAP, pulled in its basis": ("kappa", "strength"),
    }.items()
}
# By variant: the same without its pull or its peculiarity.
BESIDE = {
    "PACE, weak, every 5th": "PACE, weak",
    "PACE, weak, from the step": "PACE, weak",
    "MADA, pulled": "MADA, average",
    "Muon, pulled": "Muon, average",
    "SOAP, pulled": "SOAP, average",
    "SOAP, pulled in its basis": "SOAP, average",
}
