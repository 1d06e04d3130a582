"""python examples/lightning_cli.py fit --config examples/lightning.yaml --trainer.max_steps 1000"""

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LightningCLI


class Regression(LightningModule):
    def __init__(self, width: int = 32):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(4, width), torch.nn.Tanh(), torch.nn.Linear(width, 1))

    def training_step(self, x, index):
        return (self.net(x) - x.sin().sum(1, keepdim=True)).square().mean()

    def validation_step(self, x, index):
        self.log("val_loss", self.training_step(x, index), prog_bar=True)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.randn(4096, 4), batch_size=32)

    val_dataloader = train_dataloader


if __name__ == "__main__":
    LightningCLI(Regression)
