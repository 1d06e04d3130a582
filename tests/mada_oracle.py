"""MADA as the paper has it: each step builds an autograd graph from the coefficients to the weights, and the next
backward pass goes through it. Float64, in the paper's order, and no code shared with the package.

It is slow, and keeps a graph alive from step to step; that is what makes it an oracle.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

NAMES = ("beta1", "beta2", "beta3", "rho", "c", "gamma")
HYPER_LR = {"beta1": 5e-4, "beta2": 5e-4, "beta3": 0.1, "rho": 0.1, "c": 0.1, "gamma": 0.1}
BOUNDS = {"beta1": (0.01, 0.99), "beta2": (0.501, 0.999), "beta3": (0.0, 0.99)}
DEFAULTS: dict[str, Any] = {
    "lr": 1e-3,
    "betas": (0.9, 0.95),
    "eps": 1e-8,
    "weight_decay": 0.1,
    "beta3": 0.9,
    "rho": 0.0,
    "c": 1.0,
    "gamma": 1.0,
    "lion_betas": (0.95, 0.98),
    "second_moment": "mean",
    "learn": NAMES,
    "hyper_lr": {},
    "hyper_momentum": 0.0,
    "hyper_clip": 10.0,
    "hyper_warmup": 50,
    "hyper_order": "algorithm",
    "bounds": {},
    "lambda_pullback": 0.0,
    "clamp_pullback": True,
    "use_ema_eval": False,
    "ema_kappa": 0.2,
    "beta_ema": 0.01,
    "ema_update_freq": 1,
    "pullback_from": "weights",
    "maximize": False,
}


class Coefficients:
    """A set of coefficients and how it learns."""

    def __init__(self, options: dict[str, Any]) -> None:
        o = options
        self.options = o
        self.q = dict(zip(NAMES, (*o["betas"], o["beta3"], o["rho"], o["c"], o["gamma"]), strict=True))
        self.b = dict.fromkeys(NAMES, 0.0)
        self.h = dict.fromkeys(NAMES, 0.0)
        self.steps = 0

    def learn(self, h: dict[str, float]) -> None:
        o = self.options
        self.h = h
        self.steps += 1
        if self.steps <= o["hyper_warmup"]:
            return
        for name in o["learn"]:
            mu = o["hyper_momentum"].get(name, 0.0) if isinstance(o["hyper_momentum"], dict) else o["hyper_momentum"]
            rate = o["hyper_lr"].get(name, HYPER_LR[name]) if isinstance(o["hyper_lr"], dict) else o["hyper_lr"]
            low, high = o["bounds"].get(name, BOUNDS.get(name, (0.0, 1.0)))
            self.b[name] = mu * self.b[name] + min(max(h[name], -o["hyper_clip"]), o["hyper_clip"])
            self.q[name] = min(max(self.q[name] - rate * self.b[name], low), high)


class Weights:
    """One parameter: its value hangs in the graph of its own last step, from the leaf `q`."""

    def __init__(self, x: Tensor, coefficients: Coefficients, options: dict[str, Any]) -> None:
        self.coefficients, self.options = coefficients, options
        self.x = x.detach().double().clone().requires_grad_()
        self.q: Tensor | None = None
        self.e = self.x.detach().clone()
        self.m = self.n = self.v = self.w = self.l = torch.zeros_like(self.e)
        self.last_g: Tensor | None = None
        self.t = 0

    def step(self, g: Tensor) -> None:
        o = self.options
        self.t += 1
        t, lr = self.t, o["lr"]
        g = -g if o["maximize"] else g
        self.q = torch.tensor([self.coefficients.q[n] for n in NAMES], dtype=torch.float64, requires_grad=True)
        beta1, beta2, beta3, rho, c, gamma = self.q
        d = torch.zeros_like(g) if self.last_g is None else g - self.last_g
        x = self.x.detach()

        m = beta1 * self.m + (1 - beta1) * g
        n = beta3 * self.n + (1 - beta3) * d
        g_hat = g + beta3 * d
        s = (g_hat**2 - self.v).sign().detach()
        g_tilde = c * g_hat**2 + (1 - c) * (self.v + g_hat**2 * s)
        v = beta2 * self.v + (1 - beta2) * g_tilde
        mean = (v.detach() + (t - 1) * self.w) / t
        w = mean if o["second_moment"] == "mean" else torch.maximum(self.w, v.detach())
        V = (rho * v + (1 - rho) * w) / (1 - beta2**t)
        N = m / (1 - beta1**t) + beta3 * n
        positive = V > 0
        D = torch.where(positive, torch.where(positive, V, 1.0).sqrt(), 0.0) + o["eps"]
        l1, l2 = o["lion_betas"]
        u = l1 * self.l + (1 - l1) * g
        U = gamma * N / D + (1 - gamma) * u.sign()
        x_new = x * (1 - lr * o["weight_decay"]) - lr * U

        weight = o["beta_ema"] if o["ema_kappa"] is None else max((1 + t) ** -o["ema_kappa"], 1e-4)
        if o["lambda_pullback"] > 0:
            gain = lr * o["lambda_pullback"] * (1.0 if o["ema_kappa"] is None else weight) / D.detach()
            gain = gain.clamp(max=1.0 if o["clamp_pullback"] else math.inf)
            x_new = x_new + gain * (self.e - (x_new if o["pullback_from"] == "step" else x))
        if t % o["ema_update_freq"] == 0:
            self.e = self.e + weight * (x_new.detach() - self.e)
        self.x = x_new
        self.m, self.n, self.v, self.w = m.detach(), n.detach(), v.detach(), w.detach()
        self.l = l2 * self.l + (1 - l2) * g
        self.last_g = g


class Oracle:
    """Groups of (weights, options), as MADA takes them; `step(losses)` is a whole training step."""

    def __init__(self, groups: list[list[Tensor]], options: list[dict[str, Any]], coefficients: str = "global") -> None:
        filled = [{**DEFAULTS, **o} for o in options]
        sets = [Coefficients(o) for o in filled]
        self.sets = sets if coefficients == "group" else sets[:1]
        self.groups = [
            [Weights(x, sets[k] if coefficients == "group" else sets[0], o) for x in group]
            for k, (group, o) in enumerate(zip(groups, filled, strict=True))
        ]
        self.weights = [w for group in self.groups for w in group]

    def step(self, loss: Callable[[list[Tensor]], Tensor], resting: tuple[int, ...] = ()) -> list[Tensor]:
        """One step; returns the gradients. Parameters in ``resting`` have none, and contribute nothing."""
        awake = [w for k, w in enumerate(self.weights) if k not in resting]
        value = loss([w.x for w in self.weights])
        leaves = [w.q for w in awake if w.q is not None]
        found = torch.autograd.grad(value, [w.x for w in awake] + leaves, allow_unused=True)
        grads, hypers = found[: len(awake)], list(found[len(awake) :])
        for s in self.sets:
            h = dict.fromkeys(NAMES, 0.0)
            behind = iter(hypers)
            for w in awake:
                h_q = next(behind) if w.q is not None else None
                if h_q is None or w.coefficients is not s:
                    continue
                sign = -1.0 if w.options["maximize"] else 1.0
                for name, a in zip(NAMES, h_q.tolist(), strict=True):
                    h[name] += sign * a
            s.pending = h
        moving = [s for s in self.sets if any(w.coefficients is s for w in awake)]
        first = [s for s in moving if s.options["hyper_order"] == "published"]
        for s in first:
            s.learn(s.pending)
        for w, g in zip(awake, grads, strict=True):
            w.step(g)
        for s in moving:
            if s not in first:
                s.learn(s.pending)
        return list(grads)
