"""The reference optimizers that the benchmarks compare against, written as a competent PyTorch user would write them.

`EagerPACE` is PACE one tensor at a time with in-place torch calls: about fifteen passes over memory and three
temporaries of a tensor's size. `CompiledPACE` is the plain formula handed to `torch.compile`, which fuses those passes.
Both keep float32 states and compute in float32 whatever the parameters' format, as the fused kernels do, so that every
contender computes the same thing. Neither swaps averages.

`AutogradMADA` is MADA differentiated by autograd: what `pace_kernels.MADA` computes, in some fifty operations, each a
pass over memory, and as many backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

# Tensors in one compiled graph, about one transformer block. Compile time grows by 0.3 s a tensor (148 tensors in one
# graph: 70 s; 2,000: more than ten minutes), and runs of equal shapes share one graph.
TENSORS_PER_GRAPH = 12


class EagerPACE(torch.optim.Optimizer):
    """AdamW, an average of the weights, and a clipped pull toward it::

        m  = β1 m + (1 − β1) g
        v  = β2 v + (1 − β2) g²
        D  = sqrt(v / (1 − β2^t)) + ε
        w  = max((1 + γ max(0, t − ρ))^(−κ), 1e−4)
        Λ  = min(α c w / D, 1)
        x₊ = x (1 − α λ_wd) − α (m / (1 − β1^t)) / D + Λ (e − x)
        e₊ = (1 − w) e + w x₊

    Source: Au and Block, *Training for the Model You Return*, Algorithm 1.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        lambda_pullback: float = 0.15,
        ema_kappa: float = 0.2,
        ema_rho: float = 0.0,
        ema_gamma: float = 1.0,
    ) -> None:
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, lambda_pullback=lambda_pullback)
        super().__init__(params, defaults | dict(ema_kappa=ema_kappa, ema_rho=ema_rho, ema_gamma=ema_gamma))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            live = [p for p in group["params"] if p.grad is not None]
            for p in live:
                state = self.state[p]
                if not state:
                    state["step"] = 0
                    state["exp_avg"] = torch.zeros_like(p, dtype=torch.float32)
                    state["exp_avg_sq"] = torch.zeros_like(p, dtype=torch.float32)
                    state["ema"] = p.detach().to(torch.float32, copy=True)
                state["step"] += 1
            self.update(live, group)
        return loss

    def update(self, params: list[nn.Parameter], group: dict[str, Any]) -> None:
        lr, (beta1, beta2) = group["lr"], group["betas"]
        for p in params:
            state = self.state[p]
            m, v, e, t = state["exp_avg"], state["exp_avg_sq"], state["ema"], state["step"]
            w = averaging_weight(t, group)
            x, g = p.float(), p.grad.float()  # of float32 parameters these are the tensors themselves, no copies
            m.lerp_(g, 1 - beta1)
            v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
            denom = (v / (1 - beta2**t)).sqrt_().add_(group["eps"])
            gain = (lr * group["lambda_pullback"] * w / denom).clamp_(max=1.0)
            pull = (e - x).mul_(gain)
            x.mul_(1 - lr * group["weight_decay"]).addcdiv_(m, denom, value=-lr / (1 - beta1**t)).add_(pull)
            e.lerp_(x, w)
            if x is not p:
                p.copy_(x)


class CompiledPACE(EagerPACE):
    """The same rule, its update of a list of tensors compiled by `torch.compile`."""

    def __init__(self, params: Iterable[nn.Parameter], **options: Any) -> None:
        super().__init__(params, **options)
        # Static shapes: with dynamic ones the compiler decides by the first tensor it sees whether a loop is threaded.
        self.compiled = torch.compile(pace_, dynamic=False)

    def update(self, params: list[nn.Parameter], group: dict[str, Any]) -> None:
        lr, (beta1, beta2) = group["lr"], group["betas"]
        for t, same_age in groupby(params, key=lambda p: self.state[p]["step"]):
            # What changes from step to step goes in as tensors: a new Python number would mean a new compilation.
            changing = (lr, 1 - beta1**t, 1 - beta2**t, averaging_weight(t, group))
            same_age = list(same_age)
            scalars = torch.tensor(changing, dtype=torch.float32).to(same_age[0].device, non_blocking=True).unbind()
            for start in range(0, len(same_age), TENSORS_PER_GRAPH):
                some = same_age[start : start + TENSORS_PER_GRAPH]
                states = [self.state[p] for p in some]
                self.compiled(
                    some,
                    [p.grad for p in some],
                    [s["exp_avg"] for s in states],
                    [s["exp_avg_sq"] for s in states],
                    [s["ema"] for s in states],
                    *scalars,
                    beta1=beta1,
                    beta2=beta2,
                    eps=group["eps"],
                    weight_decay=group["weight_decay"],
                    c=group["lambda_pullback"],
                )


def averaging_weight(t: int, group: dict[str, Any]) -> float:
    """w_t = max((1 + γ max(0, t − ρ))^(−κ), 1e−4)."""
    return max((1 + group["ema_gamma"] * max(0.0, t - group["ema_rho"])) ** -group["ema_kappa"], 1e-4)


def pace_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    emas: list[Tensor],
    lr: Tensor,
    bias1: Tensor,
    bias2: Tensor,
    w: Tensor,
    *,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    c: float,
) -> None:
    """One step of PACE on each tensor, to be compiled. `bias1`, `bias2`: 1 − β^t."""
    for p, g, m, v, e in zip(params, grads, exp_avgs, exp_avg_sqs, emas, strict=True):
        x, g = p.float(), g.float()
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        denom = (v / bias2).sqrt() + eps
        gain = (lr * c * w / denom).clamp(max=1.0)
        x = x * (1 - lr * weight_decay) - lr * (m / bias1) / denom + gain * (e - x)
        e.lerp_(x, w)
        p.copy_(x)


class AutogradMADA(torch.optim.Optimizer):
    """MADA as its paper has it: the step is a graph from the coefficients to the weights, and the next gradient goes
    backward through it. The graph is one step deep; the moments before the step are constants in it.

    Without warm-up the coefficients move from the second step on, as they do in `pace_kernels.MADA` with
    `hyper_warmup=0`. Float32, dense gradients for all parameters.

    Source: Ozkara et al., *MADA: Meta-Adaptive Optimizers through Hyper-Gradient Descent*, Algorithm 1.
    """

    # beta1, beta2, beta3, rho, c, gamma
    HYPER_LR = (5e-4, 5e-4, 0.1, 0.1, 0.1, 0.1)
    LOWER = (0.01, 0.501, 0.0, 0.0, 0.0, 0.0)
    UPPER = (0.99, 0.999, 0.99, 1.0, 1.0, 1.0)

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        *,
        beta3: float = 0.9,
        rho: float = 0.0,
        c: float = 1.0,
        gamma: float = 1.0,
        lion_betas: tuple[float, float] = (0.95, 0.98),
        hyper_clip: float = 10.0,
        hyper_warmup: int = 50,
    ) -> None:
        defaults = dict(lr=lr, eps=eps, weight_decay=weight_decay, lion_betas=lion_betas)
        super().__init__(params, defaults | dict(hyper_clip=hyper_clip, hyper_warmup=hyper_warmup))
        # Scalars in float64: they do not make float32 tensors any wider, and 1 − β^t keeps its digits.
        self.q = torch.tensor([*betas, beta3, rho, c, gamma], dtype=torch.float64)
        self.hypergradients = torch.zeros_like(self.q)
        self.steps = 0
        self.leaf: Tensor | None = None
        self.moved: list[Tensor] = []  # the weights, hanging in the graph that starts at `leaf`

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None if closure is None else closure()
        pairs = [(p, group) for group in self.param_groups for p in group["params"]]
        if self.leaf is not None:
            grads = [p.grad for p, _ in pairs]
            (self.hypergradients,) = torch.autograd.grad(self.moved, self.leaf, grads)
        self.moved = []  # frees the old graph before a new one is built
        self.leaf = self.q.clone().requires_grad_()
        self.steps += 1
        for p, group in pairs:
            self.moved.append(self.move(p, p.grad, group))
            p.data.copy_(self.moved[-1].detach())
        group = self.param_groups[0]
        if self.steps > group["hyper_warmup"]:
            clipped = self.hypergradients.clamp(-group["hyper_clip"], group["hyper_clip"])
            lower, upper = self.q.new_tensor(self.LOWER), self.q.new_tensor(self.UPPER)
            self.q = (self.q - self.q.new_tensor(self.HYPER_LR) * clipped).clamp(lower, upper)
        return loss

    def held(self) -> list[Tensor]:
        """What stays in memory between two steps, states and graph, each storage once."""
        found = {t.data_ptr(): t for state in self.state.values() for t in state.values()}
        nodes, seen = [x.grad_fn for x in self.moved], set()
        while nodes:
            node = nodes.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            saved = (getattr(node, name) for name in dir(node) if name.startswith("_saved_"))
            found |= {t.data_ptr(): t for t in saved if isinstance(t, Tensor)}
            nodes += [following for following, _ in node.next_functions]
        for p in self.state:
            found.pop(p.data_ptr(), None)
            found.pop(p.grad.data_ptr(), None)
        return list(found.values())

    @torch.enable_grad()
    def move(self, p: nn.Parameter, g: Tensor, group: dict[str, Any]) -> Tensor:
        state, t, lr = self.state[p], self.steps, group["lr"]
        if not state:
            for name in ("m", "n", "v", "mean", "lion"):
                state[name] = torch.zeros_like(p, requires_grad=False)
            state["last_grad"] = g.clone()
        beta1, beta2, beta3, rho, c, gamma = self.leaf.unbind()
        v_before, difference = state["v"], g - state["last_grad"]

        m = beta1 * state["m"] + (1 - beta1) * g
        n = beta3 * state["n"] + (1 - beta3) * difference
        square = (g + beta3 * difference).square()
        with torch.no_grad():
            s = (square - v_before).sign()
        v = beta2 * v_before + (1 - beta2) * (c * square + (1 - c) * (v_before + square * s))
        with torch.no_grad():  # no derivative goes through the running mean, nor through Lion's sign
            mean = state["mean"].lerp(v, 1 / t)
            lion_beta1, lion_beta2 = group["lion_betas"]
            direction = state["lion"].lerp(g, 1 - lion_beta1).sign()
            lion = state["lion"].lerp(g, 1 - lion_beta2)
        second = (rho * v + (1 - rho) * mean) / (1 - beta2**t)
        # The clamp keeps the square root's derivative finite, and makes it 0, where the second moment is 0.
        denom = second.clamp(min=torch.finfo(torch.float32).tiny).sqrt() + group["eps"]
        update = gamma * (m / (1 - beta1**t) + beta3 * n) / denom + (1 - gamma) * direction
        state["m"], state["n"], state["v"] = m.detach(), n.detach(), v.detach()
        state["mean"], state["lion"] = mean, lion
        state["last_grad"].copy_(g)
        return p.detach() * (1 - lr * group["weight_decay"]) - lr * update
