"""Promise: in Lightning also manual optimization, several optimizers, its wrapper around an optimizer and its other
import name are safe: no step starts from the average unnoticed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from trainer_cases import averages_of, same, weights_of

lightning = pytest.importorskip("lightning.pytorch")

from lightning.pytorch.callbacks import OnExceptionCheckpoint  # noqa: E402

from pace_kernels import PACE  # noqa: E402
from pace_kernels.integrations.lightning import UseAverage  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("many_small_steps"),
    pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*fit\\(ckpt_path=.*:UserWarning"),
]
BATCHES = torch.utils.data.DataLoader(torch.randn(24, 6, generator=torch.Generator().manual_seed(1)), batch_size=4)  # type: ignore[arg-type, var-annotated]


class ByHand(lightning.LightningModule):
    """Two networks with an optimizer each, stepped by hand; only the first has an average. Notes what is seen."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = False
        self.first, self.second = torch.nn.Linear(6, 5), torch.nn.Linear(5, 1)
        self.trained: list[Any] = []
        self.left: list[Any] = []
        self.validated: list[Any] = []
        self.averages: list[Any] = []
        self.fails = False

    def loss(self, batch: torch.Tensor) -> torch.Tensor:
        return (self.second(self.first(batch).tanh()) - batch.sum(1, keepdim=True)).square().mean()

    def training_step(self, batch: torch.Tensor, index: int) -> None:
        self.trained.append(weights_of(self))
        for optimizer in self.optimizers():  # Lightning's wrappers
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()
        self.left.append(weights_of(self))
        self.averages.append(averages_of(self, self.trainer.optimizers[0]))

    def validation_step(self, batch: torch.Tensor, index: int) -> None:
        if self.fails:
            raise ZeroDivisionError("in validation")
        self.validated.append(weights_of(self))

    def configure_optimizers(self) -> Any:
        return [PACE(self.first.parameters(), lr=0.02), torch.optim.SGD(self.second.parameters(), lr=0.02)]


def trainer_of(directory: Path, *callbacks: Any) -> Any:
    return lightning.Trainer(
        accelerator="cpu", default_root_dir=str(directory), logger=False, enable_progress_bar=False, max_epochs=1,
        enable_model_summary=False, enable_checkpointing=False, num_sanity_val_steps=0, val_check_interval=2,
        limit_val_batches=1, callbacks=list(callbacks),
    )  # fmt: skip


def test_two_optimizers_stepped_by_hand(tmp_path: Path) -> None:
    module = ByHand()
    trainer_of(tmp_path, UseAverage()).fit(module, BATCHES, BATCHES)
    assert len(module.trained) == 6
    assert same(module.validated, module.averages[1::2])
    assert not same(module.averages[1], module.left[1])
    assert same(module.trained[1:], module.left[:-1])
    assert same(weights_of(module), module.averages[-1])


class ThroughTheWrapper(ByHand):
    """Swaps as is often done for optimizers with eval() and train(), by what ``self.optimizers()`` returns: an object
    of a class that Lightning derives from ours, with attributes of its own."""

    def on_validation_epoch_start(self) -> None:
        self.optimizers()[0].eval()


def test_a_swap_through_the_wrapper_is_one_of_the_optimizer(tmp_path: Path) -> None:
    class Back(ThroughTheWrapper):
        def on_validation_epoch_end(self) -> None:
            self.trainer.optimizers[0].train()  # the optimizer itself

    module = Back()
    trainer_of(tmp_path).fit(module, BATCHES, BATCHES)
    assert same(module.validated, module.averages[1::2])
    assert same(module.trained[1:], module.left[:-1])


def test_swapped_through_the_wrapper_it_does_not_step(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"call optimizer.train\(\) first"):
        trainer_of(tmp_path).fit(ThroughTheWrapper(), BATCHES, BATCHES)


def test_a_checkpoint_of_an_exception_in_validation(tmp_path: Path) -> None:
    """It holds the average; live weights are back; what is validated then is the average again."""
    module = ByHand()
    module.fails = True
    trainer = trainer_of(tmp_path, UseAverage())
    trainer.callbacks.append(OnExceptionCheckpoint(tmp_path))  # the trainer is told that it has no ModelCheckpoint
    with pytest.raises(ZeroDivisionError):
        trainer.fit(module, BATCHES, BATCHES)
    assert same(weights_of(module), module.left[1])
    (saved,) = (torch.load(file, weights_only=True) for file in tmp_path.glob("*.ckpt"))
    assert same(dict(saved["state_dict"]), module.averages[1])
    module.fails = False
    trainer.validate(module, BATCHES, verbose=False)
    assert same(module.validated[-1], module.averages[1])
    assert same(weights_of(module), module.left[1])


OTHER_NAME = """
import sys, warnings, torch
warnings.simplefilter("ignore")
{imports}
class Model(pytorch_lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(6, 1)
    def training_step(self, batch, index):
        self.live = self.net.weight.detach().clone()
        return self.net(batch).square().mean()
    def validation_step(self, batch, index):
        average = self.trainer.optimizers[0].ema_state_dict(self)["net.weight"]
        assert torch.equal(self.net.weight, average)
        self.swapped = True
    def configure_optimizers(self):
        return PACE(self.parameters(), lr=0.1)
loader = torch.utils.data.DataLoader(torch.randn(8, 6), batch_size=4)
model = Model()
pytorch_lightning.Trainer(
    accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, max_epochs=2,
    enable_checkpointing=False, num_sanity_val_steps=0, callbacks=[UseAverage()],
).fit(model, loader, loader)
assert model.swapped
print([base.__module__.split(".")[0] for base in UseAverage.__bases__])
"""
OURS = "from pace_kernels import PACE\nfrom pace_kernels.integrations.lightning import UseAverage\n"


@pytest.mark.parametrize(
    ("imports", "base"),
    [("import pytorch_lightning\n" + OURS, "pytorch_lightning"), (OURS + "import pytorch_lightning", "lightning")],
    ids=["pytorch_lightning first", "pace_kernels first"],
)
def test_the_other_name_of_lightning(imports: str, base: str) -> None:
    """In a process of its own, since what is imported first decides."""
    pytest.importorskip("pytorch_lightning")
    command = [sys.executable, "-c", OTHER_NAME.format(imports=imports)]
    ran = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines()[-1] == f"['{base}']"


def test_import_pace_kernels_imports_no_trainer() -> None:
    code = (
        "import sys, pace_kernels; print([n for n in ('lightning', 'transformers', 'accelerate') if n in sys.modules])"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=True
    )
    assert ran.stdout == "[]\n"
