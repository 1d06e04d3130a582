"""Promise: the package works under torch 2.9, without native kernels, and steps parameters on an XLA device."""

from __future__ import annotations

import pytest
import torch
import torch_xla

import pace_kernels


def test_the_native_kernels_say_which_torch_they_need() -> None:
    rows = pace_kernels.backends()
    said = f"the native kernels need torch >= 2.10, and this is torch {torch.__version__}"
    assert [(rows[name].available, rows[name].reason) for name in ("cpu", "torch")] == [(False, said), (True, None)]


def test_one_step_on_xla_is_the_step_on_the_cpu() -> None:
    weights, gradient = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0.5, 0.25, -1.0])

    def stepped(device: torch.device) -> torch.Tensor:
        p = torch.nn.Parameter(weights.to(device, copy=True))
        p.grad = gradient.to(device)
        pace_kernels.PACE([p], lr=0.125).step()
        return p.detach().cpu()

    assert torch_xla.device().type == "xla"
    with pytest.warns(RuntimeWarning, match="computes through torch"):
        expected = stepped(torch.device("cpu"))
    assert not torch.equal(expected, weights)
    torch.testing.assert_close(stepped(torch_xla.device()), expected)
