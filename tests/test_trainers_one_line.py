"""Promise: in a working script AdamW becomes PACE by one changed line: by hand, with Accelerate, with Lightning. (With
``transformers.Trainer``: tests/test_trainers_transformers.py.)"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from trainer_cases import same, weights_of

pytestmark = [
    pytest.mark.usefixtures("many_small_steps"),
    pytest.mark.filterwarnings("ignore:.*(does not have many workers|isinstance.treespec, LeafSpec).*"),
]

SHARED = """
import torch
from torch.optim import AdamW
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
x = torch.randn(64, 6)
data = TensorDataset(x, x.sum(1, keepdim=True))
loader = DataLoader(data, batch_size=16, shuffle=True)
net = torch.nn.Sequential(torch.nn.Linear(6, 12), torch.nn.Tanh(), torch.nn.Linear(12, 1))
criterion = torch.nn.functional.mse_loss
before = criterion(net(x), data[:][1]).item()
"""
SCRIPTS = {
    "by hand": """
optimizer = AdamW(net.parameters(), lr=0.03, betas=(0.9, 0.99), weight_decay=0.01)
scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.03, total_steps=60)
for _ in range(15):
    for inputs, targets in loader:
        optimizer.zero_grad()
        criterion(net(inputs), targets).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
""",
    "accelerate": """
from accelerate import Accelerator

accelerator = Accelerator(cpu=True)
optimizer = AdamW(net.parameters(), lr=0.03)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 60)
net, optimizer, loader, scheduler = accelerator.prepare(net, optimizer, loader, scheduler)
for _ in range(15):
    for inputs, targets in loader:
        accelerator.backward(criterion(net(inputs), targets))
        accelerator.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
optimizer = optimizer.optimizer
""",
    "lightning": """
import lightning.pytorch as pl

class Model(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = net

    def training_step(self, batch, index):
        return criterion(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return AdamW(self.parameters(), lr=0.03)

trainer = pl.Trainer(
    max_epochs=15, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
    enable_model_summary=False, gradient_clip_val=1.0, default_root_dir=directory,
)
trainer.fit(Model(), loader)
optimizer = trainer.optimizers[0]
""",
}
LINE = "from torch.optim import AdamW"
LINES = [LINE, "from pace_kernels import PACE as AdamW", "from pace_kernels import MADA as AdamW"]


@pytest.fixture(autouse=True)
def one_accelerator() -> Iterator[None]:
    """Accelerate keeps one state a process."""
    yield
    state = pytest.importorskip("accelerate.state")
    state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("line", LINES)
@pytest.mark.parametrize("script", SCRIPTS)
def test_one_line_changes(script: str, line: str, tmp_path: Path) -> None:
    pytest.importorskip("torch" if script == "by hand" else script)
    source = SHARED + SCRIPTS[script]
    assert source.count(LINE) == 1
    ran: dict[str, Any] = {"directory": str(tmp_path), "__name__": "script"}
    exec(source.replace(LINE, line), ran)
    net, optimizer, (x, y) = ran["net"], ran["optimizer"], ran["data"][:]
    assert ran["criterion"](net(x), y).item() < 0.3 * ran["before"]
    if "PACE" in line:
        live = weights_of(net)
        with optimizer.averaged():
            assert not same(weights_of(net), live)
            assert ran["criterion"](net(x), y).item() < 0.3 * ran["before"]
        assert same(weights_of(net), live)
