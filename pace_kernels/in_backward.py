"""Gradient release: parameters are stepped within the backward pass, and their gradients are freed."""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor

from .checks import check_number, shortened
from .pace import PACE
from .sharding import Axes, axes, is_sharded, local, reduce_

Kind = TypeVar("Kind", bound=PACE)
_SKIPS = "skip_nonfinite must be False: it has to know all gradients before the first is used"

_LAMBDA = "Pass a function, as step_in_backward(model, lambda params: PACE(params, lr=1e-3))"


def step_in_backward(
    model: torch.nn.Module,
    factory: Callable[[Iterable[Tensor]], Kind],
    *,
    bucket_bytes: int = 25 * 2**20,
    max_norm: float | None = None,
    **options: Any,
) -> Kind:
    """An optimizer that steps parameters while ``backward()`` runs, as soon as the gradients of a bucket are there, and
    frees these: gradients take the memory of a bucket or two, not of the model.

    Call ``optimizer.step()`` after each ``backward()`` as usual: it steps the remaining parameters, such as those of a
    partly filled bucket, and ends the iteration. Schedulers, ``averaged()``, ``memory()`` and ``state_dict()``, which
    has the keys of ``factory(model.parameters())``, work as with that optimizer. ``backward()`` uses the learning rate
    that is set when it begins. Accumulation of gradients, several backward passes before ``step()``, is refused: the
    first pass has stepped already. So is ``torch.amp.GradScaler``, but by ``step()`` alone: a
    ``scaler.scale(loss).backward()`` before it has stepped, by scaled gradients, before anything could tell. Load the
    last checkpoint then, and train in bfloat16, which needs no scaler. ``torch.nn.utils.clip_grad_norm_`` after
    ``backward()`` clips nothing, without an error: the gradients are used and gone. ``max_norm`` clips here.

    Arguments:
        model: its parameters are stepped. On several ranks they have to be sharded by ``fully_shard`` first:
            DistributedDataParallel averages gradients after they were used here.
        factory: makes the optimizer of parameters, as ``lambda params: PACE(params, lr=1e-3, state_bits=8)``; a PACE
            without ``skip_nonfinite``, which would have to know all gradients before the first is used. It need not use
            its argument: with groups, ``lambda _: PACE([{"params": model.head.parameters(), "lr": 1e-4}, ...])``.
        bucket_bytes: bytes of gradients that are stepped together, ≥ 1: one launch on a GPU.
        max_norm: clips gradients by ``min(1, max_norm / norm)``, where norm is that of the *previous* iteration, since
            that of this one is known too late. The first iteration is not clipped, nor the first after a checkpoint was
            loaded, nor one that follows a norm which is not finite: a NaN or an infinity in one gradient would
            otherwise reach all weights, or stop them. None: no clipping.

    Raises:
        TypeError: ``factory`` is no function, or returns something else than a PACE; options of the optimizer are
            given here.
        ValueError: an argument is out of its range; the model is a DistributedDataParallel.
        RuntimeError: from ``backward()``, where gradients are accumulated; on several ranks, of parameters that are not
            sharded.

    >>> import torch, pace_kernels
    >>> model = torch.nn.Linear(4, 1)
    >>> optimizer = pace_kernels.step_in_backward(model, lambda params: pace_kernels.PACE(params, lr=3e-3))
    >>> model(torch.ones(8, 4)).square().mean().backward()  # steps
    >>> model.weight.grad is None
    True
    >>> optimizer.step()  # ends the iteration
    """
    if options:
        raise TypeError(f"step_in_backward() got {', '.join(options)}, which factory gives to the optimizer. {_LAMBDA}")
    if isinstance(model, torch.nn.parallel.DistributedDataParallel):
        raise ValueError(
            "model must not be a DistributedDataParallel, which averages gradients after they were used: shard it with "
            "fully_shard, or pass a model of one process"
        )
    check_number("bucket_bytes", bucket_bytes, ">= 1", lambda a: a >= 1)
    if max_norm is not None:
        check_number("max_norm", max_norm, "finite and > 0", lambda a: 0 < a < float("inf"))
    if isinstance(factory, torch.optim.Optimizer):
        raise TypeError(f"factory must be a function that makes the optimizer, got one that is made already. {_LAMBDA}")
    if not callable(factory):
        raise TypeError(f"factory must be a function that makes the optimizer, got {shortened(factory)}. {_LAMBDA}")
    optimizer = factory(model.parameters())
    if not isinstance(optimizer, PACE):
        raise TypeError(f"factory must return a PACE, got {type(optimizer).__name__}")
    if any(group["skip_nonfinite"] for group in optimizer.param_groups):
        raise ValueError(_SKIPS)
    optimizer.__class__ = _class_of(type(optimizer))  # type: ignore[assignment, arg-type]
    optimizer._begin(bucket_bytes, max_norm)  # type: ignore[attr-defined]
    return optimizer


@functools.cache
def _class_of(kind: type[PACE]) -> type[PACE]:
    return type(kind.__name__, (_InBackward, kind), {"__module__": kind.__module__, "__doc__": kind.__doc__})


def _ranks() -> int:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if distributed else 1


class _InBackward(PACE):
    """What step_in_backward() adds to an optimizer's class."""

    def _begin(self, bucket_bytes: int, max_norm: float | None) -> None:
        # As with fused=True: a GradScaler then calls step(), which says what is wrong. It would otherwise look for
        # gradients, which are gone, and raise "No inf checks were recorded for this optimizer".
        self._step_supports_amp_scaling = True
        self._max_norm = max_norm
        self._norm: Tensor | None = None  # of the gradients of the last iteration
        self._squares: list[tuple[Tensor, Axes]] = []
        self._bucket: dict[Tensor, int] = {}
        self._sizes: list[int] = []
        held = bucket_bytes
        # Gradients come in about the reverse order of registration.
        for param in [p for group in self.param_groups for p in group["params"]][::-1]:
            if held >= bucket_bytes:
                self._sizes.append(0)
                held = 0
            self._bucket[param] = len(self._sizes) - 1
            self._sizes[-1] += param.requires_grad
            held += param.numel() * param.element_size()
        self._MOST_PLANS = len(self._sizes) + 2
        self._lock = threading.RLock()  # hooks run in the threads of the devices
        self._end()
        me = weakref.ref(self)

        def arrived(param: Tensor) -> None:
            optimizer = me()
            if optimizer is not None:
                optimizer._arrived(param)

        self._hooks = [
            param.register_post_accumulate_grad_hook(arrived) for param in self._bucket if param.requires_grad
        ]

    def _check_options(self, group: dict[str, Any]) -> None:
        super()._check_options(group)
        if group["skip_nonfinite"]:  # that of a checkpoint, or set by hand: buckets would be left undone one by one
            raise ValueError(_SKIPS)

    def _end(self) -> None:
        self._missing = list(self._sizes)
        self._waiting: dict[Tensor, None] = {}
        self._stepped: set[int] = set()
        self._refused = False
        self._left_stats: list[Any] = []

    def _arrived(self, param: Tensor) -> None:
        with self._lock:
            if id(param) in self._stepped or param in self._waiting:
                self._refused = True  # its gradient is one that was used, or the sum with one
                raise RuntimeError(
                    "a second gradient of a parameter before optimizer.step(): step_in_backward() can't accumulate "
                    "gradients, since the first was used and freed. Call step() after each backward()"
                )
            if not is_sharded(param) and _ranks() > 1:
                raise RuntimeError(
                    "step_in_backward() on several ranks needs parameters that fully_shard has sharded: the gradients "
                    "of others are averaged after they were used"
                )
            if param.grad is None:
                raise RuntimeError(
                    "another hook, as that of another optimizer of step_in_backward() over this model, has freed a "
                    "gradient before it was used: drop that optimizer"
                )
            self._waiting[param] = None
            bucket = self._bucket[param]
            self._missing[bucket] -= 1
            if self._missing[bucket] == 0:
                self._take([p for p in self._waiting if self._bucket[p] == bucket])

    def _take(self, params: list[Tensor]) -> None:
        """Steps these of the waiting parameters, and frees their gradients."""
        here = set(map(id, params))
        # Others of their buckets, those that wait for step(), and gradients that were there before backward().
        apart = [(p, grad) for p in self._bucket if id(p) not in here and (grad := p.grad) is not None]
        for param, _ in apart:
            param.grad = None
        self._waits = {id(param) for param, _ in apart}
        try:
            super().step(clip_coef=self._coefficient())
        finally:
            self._waits = ()
            for param, grad in apart:
                param.grad = grad
        self._note_norm(params)
        self._left_stats += self._step_stats
        for param in params:
            param.grad = None
            del self._waiting[param]
            self._stepped.add(id(param))

    def _note_norm(self, params: list[Tensor]) -> None:
        if self._max_norm is None:
            return
        for param in params:
            grad = param.grad
            assert grad is not None
            square = torch.linalg.vector_norm(local(grad).detach(), dtype=torch.float32).square()
            self._squares.append((square, axes(param)))

    def _coefficient(self) -> Tensor | None:
        if self._max_norm is None or self._norm is None:
            return None
        coefficient = (self._max_norm / (self._norm + 1e-6)).clamp(max=1.0)
        return torch.where(self._norm.isfinite(), coefficient, 1.0)

    @torch.optim.Optimizer.profile_hook_step  # the class was exchanged after torch had looked at its step
    def step(self, closure: Callable[[], Any] | None = None, *, clip_coef: Tensor | float | None = None) -> Any:
        """Steps what ``backward()`` has left, and ends the iteration. See :func:`step_in_backward`."""
        if closure is not None or clip_coef is not None:
            what = "a closure" if closure is not None else "clip_coef"
            raise RuntimeError(f"step() with {what}: parameters were stepped in backward(). max_norm clips there")
        if hasattr(self, "found_inf") or hasattr(self, "grad_scale"):
            for name in ("found_inf", "grad_scale"):  # which the scaler leaves there if this raises
                self.__dict__.pop(name, None)
            raise RuntimeError(
                "step() by a GradScaler: backward() has stepped parameters already, by scaled gradients. Call "
                "optimizer.zero_grad(), load the last checkpoint of the model and of the optimizer, and train in "
                "bfloat16, which needs no scaler"
            )
        if self._refused:
            raise RuntimeError("step() after a refused accumulation: drop its gradients by zero_grad() first")
        with self._lock:
            rest = [p for p in self._bucket if p.grad is not None]
            if rest:
                super().step(clip_coef=self._coefficient())
                self._note_norm(rest)
                self._left_stats += self._step_stats
                for param in rest:
                    param.grad = None
            self._step_stats = self._left_stats
            if self._squares:
                reduce_(self._squares)
                home = self._squares[0][0].device
                self._norm = torch.stack([square.to(home) for square, _ in self._squares]).sum().sqrt()
                self._squares = []
            self._end()

    step.hooked = True  # type: ignore[attr-defined]  # or torch would put hooks around it once more after a load

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops gradients that wait for others of their bucket, too: ends an iteration whose ``backward()`` failed."""
        super().zero_grad(set_to_none)
        self._squares = []
        self._end()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if "_bucket" in self.__dict__:
            raise RuntimeError("add_param_group() of an optimizer of step_in_backward(): make a new one")
        super().add_param_group(param_group)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "an optimizer of step_in_backward() can't be copied or pickled: its hooks are on parameters. Load its "
            "state_dict() into another one"
        )
