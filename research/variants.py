"""The rows of the protocol's variants, and plain Muon and SOAP for them, in float32.

Muon: Jordan et al., 2024, with Nesterov's momentum and updates of AdamW's size, 0.2 √(max side) (arXiv 2502.16982).
SOAP: Vyas et al., arXiv 2409.11321, whose eigenbases move every 10 steps by a QR iteration, without sorting. Both take
the matrices of the blocks; embeddings, biases and norms get AdamW.
"""

from __future__ import annotations

from typing import Any

import lm
import torch
from torch import Tensor

from pace_kernels import Pullback

State = dict[str, Any]
RENEWED = 10  # steps between two bases of SOAP
WEAK = 0.02  # of the drawn c: weak pulls and constant gains lie between 0.001 and 1
EMBEDDINGS = 2  # of lm's model; they come first among its matrices


def orthogonal(z: Tensor) -> Tensor:
    """Muon's five steps of a quintic Newton-Schulz iteration: singular values to about 1."""
    if z.shape[0] > z.shape[1]:
        return orthogonal(z.mT).mT
    z = z / (z.norm() + 1e-7)
    for _ in range(5):
        square = z @ z.mT
        z = 3.4445 * z + (2.0315 * square @ square - 4.7750 * square) @ z
    return z


class Matrices(torch.optim.Optimizer):
    """``rule`` of a group: "Muon", "SOAP" or "AdamW". With ``strength`` SOAP and AdamW pull toward the average that a
    Pullback keeps in their states, by min(α c w_t / D, 1) in the basis in which D is."""

    def __init__(self, groups: Any, lr: float, **options: Any) -> None:
        super().__init__(groups, {"lr": lr, "eps": 1e-8, "rule": "AdamW", "strength": 0.0, **options})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for x in group["params"]:
                move(group, x, x.grad, self.state[x])


def move(group: State, x: Tensor, g: Tensor, state: State) -> None:
    (beta1, beta2), lr = group["betas"], group["lr"]
    t = state["step"] = state.get("step", 0) + 1
    m = state.setdefault("exp_avg", torch.zeros_like(x)).lerp_(g, 1 - beta1)
    kept = 1 - lr * group["weight_decay"]
    if group["rule"] == "Muon":
        x.mul_(kept).sub_(orthogonal(g.lerp(m, beta1)), alpha=lr * 0.2 * max(x.shape) ** 0.5)
        return
    if group["rule"] == "SOAP":
        for side, square in (("left", g @ g.mT), ("right", g.mT @ g)):
            sums = state.setdefault(f"{side}_sum", torch.zeros_like(square)).lerp_(square, 1 - beta2)
            if t == 1:
                state[side] = torch.linalg.eigh(sums).eigenvectors.flip(1)
            elif t % RENEWED == 0:
                state[side] = torch.linalg.qr(sums @ state[side]).Q
    v = state.setdefault("exp_avg_sq", torch.zeros_like(x)).lerp_(turned(state, g).square(), 1 - beta2)
    d = (v / (1 - beta2**t)).sqrt().add_(group["eps"])
    change = -lr * turned(state, m) / (1 - beta1**t) / d
    if group["strength"] and "ema" in state:
        gain = (lr * group["strength"] * max((1 + t) ** -group["kappa"], 1e-4) / d).clamp_(max=1)
        change += gain * turned(state, state["ema"] - x)
    x.mul_(kept).add_(turned(state, change, back=True))


def turned(state: State, z: Tensor, back: bool = False) -> Tensor:
    """Into SOAP's basis, or back."""
    if "left" not in state:
        return z
    left, right = state["left"], state["right"]
    return left @ z @ right.mT if back else left.mT @ z @ right


def build(groups: Any, lr: float, rule: str, ema_kappa: float, gain: float | None = None, **options: Any) -> Pullback:
    """With PACE's average, which is alone without a gain."""
    first, *others = groups
    inner = {**first, "params": first["params"][EMBEDDINGS:], "rule": rule}
    outer = {**first, "params": first["params"][:EMBEDDINGS]}
    base = Matrices([inner, outer, *others], lr, kappa=ema_kappa, **options)
    return Pullback(base, lambda_pullback=0.0, gain=gain, ema_kappa=ema_kappa)


lm.OPTIMIZERS |= {rule: lambda groups, lr, rule=rule, **o: build(groups, lr, rule, **o) for rule in ("Muon", "SOAP")}

# By name: its counterpart, which is the same without the last words, and options beside betas and κ, some by the cell's
# names. The first word is the optimizer, and the average is judged.
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "PACE, no momentum": ("", {"lambda_pullback": "strength"}),
    "PACE, weak": ("", {"lambda_pullback": "weak"}),
    "PACE, weak, every 5th": ("PACE, weak", {"lambda_pullback": "weak", "ema_update_freq": 5}),
    "PACE, weak, from the step": ("PACE, weak", {"lambda_pullback": "weak", "pullback_from": "step"}),
    "MADA, average": ("", {"use_ema_eval": True}),
    "MADA, pulled": ("MADA, average", {"use_ema_eval": True, "lambda_pullback": "strength"}),
    "Muon, average": ("", {}),
    "Muon, pulled": ("Muon, average", {"gain": "weak"}),
    "SOAP, average": ("", {}),
    "SOAP, pulled": ("SOAP, average", {"gain": "weak"}),
    "SOAP, pulled in its basis": ("SOAP, average", {"strength": "strength"}),
}
METHODS: dict[str, tuple[str, int, tuple[str, ...]]] = {
    name: (name, 0, ("kappa", *(value for value in options.values() if value in ("weak", "strength"))))
    for name, (_, options) in ROWS.items()
}  # as in protocol.py


def trajectory(name: str, cell: dict[str, float], mada: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Optimizer and options; ``mada``: those of the protocol's MADA."""
    optimizer = name.partition(",")[0]
    options = {option: cell.get(value, value) for option, value in ROWS[name][1].items()}
    betas = [0.0 if name.endswith("no momentum") else cell["beta1"], cell["beta2"]]
    return optimizer, (mada if optimizer == "MADA" else {"betas": betas}) | {"ema_kappa": cell["kappa"]} | options
