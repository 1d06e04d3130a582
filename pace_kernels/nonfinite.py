"""``skip_nonfinite``: a step whose gradients are not all finite is left undone, and counted."""

from __future__ import annotations

import math
from functools import partial
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from .fitting import Fitting
from .memory import check_whole
from .sharding import all_reduce_, reduce_, unwrapped
from .states import Work, moved
from .whole import each


class SkippingNonfinite(Fitting):
    """An optimizer that looks at gradients before its step. Not for direct use."""

    def _find_nonfinite(self, works: list[Work]) -> None:
        """With ``skip_nonfinite``, skips the whole step if a gradient of such a group is not finite on any rank, as if
        a gradient scaler had found it, and counts it. Nothing waits for a device."""
        self._nonfinite, self._counting = None, []
        watched = [work for work in works if work.group["skip_nonfinite"]]
        ranks = self._ranks() if any(group["skip_nonfinite"] for group in self.param_groups) else None
        if not watched and ranks is None:
            return
        found = [self._largest(work) for work in watched] or [torch.zeros((), device="cpu")]
        reduce_(((value, work.axes) for value, work in zip(found, watched, strict=False)), "MAX")
        home = found[0].device
        bad = torch.stack([moved(value, home) for value in found]).max()
        if ranks is not None:
            all_reduce_([bad], ranks, "MAX")
        self._nonfinite = bad
        for scaling in {id(work.scaling): work.scaling for work in works}.values():
            if "found_inf" in scaling:
                bad = torch.maximum(bad, (moved(scaling["found_inf"], home) != 0).to(bad.dtype).reshape(()))
        count = next((g["skipped_steps"] for g in self.param_groups if g["skipped_steps"] is not None), None)
        count = torch.zeros((), dtype=torch.int64, device="cpu") if count is None else count
        check_whole((count,))
        count = moved(count, home)
        others = [group for group in self.param_groups if group["skipped_steps"] is not count]
        self._counting = [partial(count.add_, bad.to(torch.int64))]  # once the step is taken
        self._counting.append(each(dict.__setitem__, others, repeat("skipped_steps"), repeat(count)))
        for work in works:
            work.scaling["found_inf"] = moved(bad, work.device)

    def _ranks(self) -> Any:
        """A process group whose ranks hold other parameters than this one, as plain tensors, or None."""
        return None

    @staticmethod
    def _largest(work: Work) -> Tensor:
        """1 if a gradient of the work is not finite, otherwise 0; float32. It reads each gradient once."""
        check_whole(work.grads)
        grads = [grad for grad in work.grads if grad.numel() > 0]
        if not grads:
            return torch.zeros((), dtype=torch.float32, device=work.device)
        largest = torch.stack([part for norm in torch._foreach_norm(grads, math.inf) for part in unwrapped(norm)])
        return (~largest.isfinite()).any().to(torch.float32)

    @property
    def skipped_steps(self) -> int:
        """How many steps ``skip_nonfinite`` skipped. Reading waits for the device."""
        counts = [group["skipped_steps"] for group in self.param_groups if group["skipped_steps"] is not None]
        return int(counts[0]) if counts else 0
