"""Promise: other trainers find the optimizers where they look for theirs: by a class and keyword arguments, a name in a
registry or a file, a plugin; statistics go to their loggers; methods are reached through their wrappers.

Each library is the real one where it is installed. Of axolotl (0.19), kohya's sd-scripts and a missing timm (1.0), the
lines of the plug point are written down here, with the file that they are in.
"""

from __future__ import annotations

import importlib
import sys
import types
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from trainer_cases import averages_of, same, weights_of

import pace_kernels
from pace_kernels import MADA, PACE, Pullback, ScheduleFreeAdamW, backend
from pace_kernels.integrations.around import PullbackAround

pytestmark = [pytest.mark.usefixtures("many_small_steps"), pytest.mark.filterwarnings("ignore:::lightning")]
ROWS = torch.randn(24, 6, generator=torch.Generator().manual_seed(1))


def tiny() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.LayerNorm(5), torch.nn.Linear(5, 1))


def train(model: torch.nn.Module, optimizer: Any, scale: float = 1.0, **options: Any) -> dict[str, torch.Tensor]:
    for row in ROWS.split(4)[:3]:
        optimizer.zero_grad()
        (model(row).square().mean() * scale).backward()
        optimizer.step(**options)
    return weights_of(model)


def is_averaged(model: torch.nn.Module, optimizer: Any, context: Any) -> bool:
    """Whether the model holds the averages within the context, and the live weights afterwards."""
    live, wanted = weights_of(model), averages_of(model, optimizer)
    with context:
        inside = weights_of(model)
    return same(inside, wanted) and not same(inside, live) and same(weights_of(model), live)


@pytest.fixture
def trainer_of(tmp_path: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from pace_kernels.integrations.transformers import AveragingMixin, optimizer_from

    class Tiny(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = tiny()

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": self.net(x).square().mean()}

    class Ours(AveragingMixin, transformers.Trainer):
        pass

    def make(optimizer: Any = PACE, callbacks: Any = (), own: Any = None, **options: Any) -> Any:
        args = transformers.TrainingArguments(
            str(tmp_path), max_steps=4, logging_steps=1, per_device_train_batch_size=4, disable_tqdm=True, use_cpu=True,
            report_to=[], learning_rate=0.02, weight_decay=0.3, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-7,
            **{"save_strategy": "no", **options},
        )  # fmt: skip
        handed = optimizer_from(args, optimizer, **(own or {}))
        return Ours(
            model_init=Tiny, args=args, train_dataset=[{"x": row} for row in ROWS], callbacks=list(callbacks),
            optimizer_cls_and_kwargs=handed,
        )  # fmt: skip

    return make


def test_trainer_makes_it_from_its_arguments(trainer_of: Any) -> None:
    """With ``model_init``, which a ready optimizer is refused with."""
    for cls, own in (
        (PACE, {"lambda_pullback": 0.5}),
        (MADA, {"learn": ("rho",), "use_ema_eval": True}),
        (ScheduleFreeAdamW, {"warmup_steps": 2}),
        (PullbackAround, {"base": "torch.optim.SGD", "gain": 0.1, "base_options": {"momentum": 0.9}}),
        (PullbackAround, {"base": "torch.optim.NAdam", "gain": 0.1}),
    ):
        trainer = trainer_of(cls, own=own)
        trainer.train()
        optimizer = trainer.optimizer.optimizer
        assert type(optimizer) is cls
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
        assert [len(group["params"]) for group in optimizer.param_groups] == [2, 4]  # biases and the norm do not decay
        group = optimizer.param_groups[0]
        for name, value in {"initial_lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-7, **own}.items():
            assert group.get(name, value) == value
        assert is_averaged(trainer.model, optimizer, optimizer.averaged(trainer.model))
    assert trainer_of(own={"lr": 0.5}).create_optimizer().defaults["lr"] == 0.5


def test_trainer_logs_the_statistics(trainer_of: Any) -> None:
    trainer, seen = trainer_of(own={"log_stats": True}), []
    board = importlib.import_module("transformers").TrainerCallback()
    board.on_log = lambda args, state, control, logs, **kwargs: seen.append(dict(logs))
    trainer.callback_handler.callbacks.insert(0, board)  # where those of TensorBoard and W&B are
    trainer.train()
    assert len(seen) == 5 and not any(key.startswith("optimizer/") for key in seen[-1])  # the summary
    for entry in seen[:4]:
        assert type(entry["optimizer/lambda_mean"]) is float and entry["optimizer/adam_step_norm"] > 0


def test_saving_live_weights_is_said_once(trainer_of: Any) -> None:
    from pace_kernels.integrations.transformers import UseAverage

    backend.say_once.cache_clear()
    with pytest.warns(RuntimeWarning, match=r"live weights, not their average.*UseAverage\(\)") as said:
        trainer_of(save_strategy="steps", save_steps=1).train()
    assert sum("live weights" in str(w.message) for w in said) == 1
    backend.say_once.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        for trainer in (trainer_of(callbacks=[UseAverage()]), trainer_of(MADA)):
            trainer.train()
            trainer.save_model()


def test_an_average_that_is_missing_is_said(trainer_of: Any) -> None:
    from pace_kernels.integrations.transformers import UseAverage

    backend.say_once.cache_clear()
    with pytest.warns(RuntimeWarning, match=r"no group of MADA has use_ema_eval=True"):
        trainer_of(MADA, callbacks=[UseAverage()]).train()
    backend.say_once.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        trainer_of(MADA, own={"use_ema_eval": True}, callbacks=[UseAverage()]).train()


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant", "constant_with_warmup"])
def test_a_falling_rate_of_schedule_free_is_said(trainer_of: Any, schedule: str) -> None:
    backend.say_once.cache_clear()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer_of(ScheduleFreeAdamW, lr_scheduler_type=schedule)
    found = [str(w.message) for w in said if "constant learning rate" in str(w.message)]
    assert len(found) == (not schedule.startswith("constant")) and all(repr(schedule) in text for text in found)


def test_lightnings_loggers_get_the_statistics(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning.pytorch")
    from lightning.pytorch.loggers import CSVLogger

    from pace_kernels.integrations.lightning import UseAverage

    class Model(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
            return self.net(batch).square().mean()

        def configure_optimizers(self) -> Any:
            return PACE(self.parameters(), log_stats=True)

    for accumulated, wanted in ((1, ["2", "4", "6"]), (3, ["2"])):
        model = Model()
        model.net = tiny()
        trainer = lightning.Trainer(
            accelerator="cpu", logger=CSVLogger(tmp_path, version=accumulated), log_every_n_steps=2, max_epochs=1,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            callbacks=[UseAverage(statistics=True)], accumulate_grad_batches=accumulated,
        )  # fmt: skip
        trainer.fit(model, torch.utils.data.DataLoader(ROWS, batch_size=4))  # type: ignore[arg-type]
        (file,) = tmp_path.rglob("metrics.csv")
        names, *rows = (line.split(",") for line in file.read_text().splitlines())
        file.unlink()
        assert [row[names.index("step")] for row in rows if row[names.index("optimizer/lambda_mean")]] == wanted
    with pytest.raises(ValueError, match="statistics must be True or False, got 1"):
        UseAverage(statistics=1)


def test_a_base_that_is_none_is_refused() -> None:
    for base in ("SGD", "torch.optim.NoSuch", "torch.nn.Linear", 3):
        with pytest.raises(ValueError, match=r"base must be .*, got "):
            PullbackAround([torch.zeros(1)], base)  # type: ignore[arg-type]


def test_clip_coef_is_an_attribute_too() -> None:
    for cls in (PACE, MADA, ScheduleFreeAdamW):
        models = [tiny() for _ in range(3)]
        first, second, third = (cls(model.parameters(), lr=0.1) for model in models)
        third.clip_coef = torch.tensor(0.5)
        ways = (first, 0.5, {}), (second, 1.0, {"clip_coef": 0.5}), (third, 1.0, {})
        by_hand, *others = (train(m, o, scale, **kw) for m, (o, scale, kw) in zip(models, ways, strict=True))
        assert same(others, [by_hand, by_hand])
        third.clip_coef = -1.0
        with pytest.raises(ValueError, match=r"clip_coef must be finite and >= 0, got -1\.0"):
            third.step()
        del third.clip_coef
        third.step()
    optimizer = Pullback(torch.optim.SGD(tiny().parameters()), gain=0.1)
    for call in (partial(optimizer.step, clip_coef=0.5), partial(setattr, optimizer, "clip_coef", 0.5)):
        with pytest.raises(TypeError, match=r"Pullback.step\(\) takes no clip_coef: .*clip_grad_norm_"):
            call()


def check_wrapper(wrap: Any, *options: dict[str, float]) -> Any:
    model = tiny()
    wrapped = wrap(model, PACE(model.parameters(), lr=0.1, log_stats=True))
    wrapped.clip_coef = 0.5
    by_hand = tiny()
    wanted = train(by_hand, PACE(by_hand.parameters(), lr=0.1), 0.5)
    assert same(train(model, wrapped), wanted)
    for given in options:
        other = tiny()
        assert same(train(other, wrap(other, PACE(other.parameters(), lr=0.1)), **given), wanted)
    assert wrapped.get_step_stats()["adam_step_norm"] > 0 and wrapped.skipped_steps == 0
    for context in (wrapped.averaged(model), pace_kernels.averaged(model, wrapped)):
        assert is_averaged(model, wrapped.optimizer, context)
    with pytest.raises(AttributeError, match="'PACE' object has no attribute 'nothing'"):
        _ = wrapped.nothing
    return wrapped


def test_through_the_wrapper_of_fabric() -> None:
    fabric = pytest.importorskip("lightning").Fabric(accelerator="cpu", devices=1)
    check_wrapper(lambda model, optimizer: fabric.setup(model, optimizer)[1])


def test_through_the_wrapper_of_accelerate() -> None:
    accelerate = pytest.importorskip("accelerate")
    from pace_kernels.integrations.accelerate import prepare

    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(cpu=True)
    wrapped = check_wrapper(lambda model, optimizer: prepare(accelerator, optimizer), {"clip_coef": 0.5})
    sgd, number = prepare(accelerator, torch.optim.SGD(tiny().parameters()), 3)
    assert wrapped in accelerator._optimizers and type(sgd) is accelerate.optimizer.AcceleratedOptimizer and number == 3
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def test_torchtitan_finds_them_by_name() -> None:
    titan = pytest.importorskip("torchtitan.components.optimizer", exc_type=ImportError)
    from pace_kernels.integrations.torchtitan import OptimizersContainer

    def build() -> tuple[Any, Any]:
        model, options = tiny(), {"lr": 0.01, "log_stats": True, "ema_kappa": 0.3}
        groups = [("bias", "AdamW", {"lr": 0.01}), (".*", "PACE", options)]
        named = [titan.ParamGroupConfig(pattern=p, optimizer_name=n, optimizer_kwargs=kw) for p, n, kw in groups]
        config = OptimizersContainer.Config(param_groups=named, implementation="foreach")
        return model, config.build(model_parts=[model])

    model, container = build()
    adamw, ours = container.optimizers
    assert type(adamw) is torch.optim.AdamW and type(ours) is PACE and ours.param_groups[0]["ema_kappa"] == 0.3
    train(model, container)
    assert container.get_step_stats()["1/adam_step_norm"] > 0
    assert is_averaged(model, ours, container.averaged())
    saved = {name: v.clone() if isinstance(v, torch.Tensor) else v for name, v in container.state_dict().items()}
    again, other = build()
    again.load_state_dict(model.state_dict())
    other.load_state_dict(saved)
    assert same(train(again, other), train(model, container))
    assert same(averages_of(again, other.optimizers[1]), averages_of(model, ours))


def test_torchtune_takes_their_dotted_names() -> None:
    try:
        from torchtune.config import instantiate
    except ImportError as error:
        pytest.skip(f"torchtune does not import: {error}")
    model, omegaconf = tiny(), importlib.import_module("omegaconf")
    config = omegaconf.OmegaConf.create({"_component_": "pace_kernels.PACE", "lr": 2e-5, "betas": [0.9, 0.95]})
    optimizer = instantiate(config, model.parameters())
    assert type(optimizer) is PACE and optimizer.param_groups[0]["betas"] == [0.9, 0.95]
    train(model, optimizer)
    whole = PACE(model.parameters())  # as the average is exported out of what its recipes save
    whole.load_state_dict(optimizer.state_dict())
    assert same(whole.ema_state_dict(model), optimizer.ema_state_dict(model))


def test_timm_has_them_in_its_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without timm, or where the torchvision that it needs does not load, as optim/_optim_factory.py has it."""
    try:
        from timm.optim import create_optimizer_v2 as create
    except (ImportError, RuntimeError):
        known: dict[str, Any] = {}
        factory: Any = types.ModuleType("timm.optim._optim_factory")
        factory.OptimInfo = lambda name, opt_class, description, has_betas: (name, opt_class)
        factory.default_registry = types.SimpleNamespace(
            list_optimizers=lambda: sorted(known), register=lambda info: known.update([info])
        )
        for name in ("timm", "timm.optim", factory.__name__):
            monkeypatch.setitem(sys.modules, name, factory)

        def create(model: Any, opt: str, layer_decay: float = 1.0, **options: Any) -> Any:
            groups = [{"params": [p], "weight_decay": 0.3 * (p.ndim > 1)} for p in model.parameters()]
            groups = [{**group, "lr_scale": layer_decay**i} for i, group in enumerate(groups)]
            return known[opt](groups, **{"weight_decay": 0.0, **options})

    ours = importlib.import_module("pace_kernels.integrations.timm")
    importlib.reload(ours)  # twice is harmless
    for name, cls in (("pace", PACE), ("mada", MADA), ("schedulefreeadamw", ScheduleFreeAdamW)):
        model = tiny()
        optimizer = create(model, name, lr=0.02, weight_decay=0.3, betas=(0.8, 0.9))
        assert type(optimizer) is cls and optimizer.defaults["betas"] == (0.8, 0.9)
        assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.3}
        train(model, optimizer)
        assert all("lr_scale" in group for group in create(model, name, lr=0.02, layer_decay=0.5).param_groups)


def test_axolotls_plugin(trainer_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """src/axolotl/train.py calls ``post_trainer_create(cfg, trainer)`` of each plugin, before ``create_optimizer`` of
    core/trainers/mixins/optimizer.py reads ``optimizer_cls_and_kwargs``."""
    pytest.importorskip("pydantic")
    base: Any = types.ModuleType("axolotl.integrations.base")
    base.BasePlugin = object
    for name in ("axolotl", "axolotl.integrations", base.__name__):
        monkeypatch.setitem(sys.modules, name, base)
    module = importlib.import_module("pace_kernels.integrations.axolotl")
    plugin = module.PacePlugin()
    where, _, name = plugin.get_input_args().rpartition(".")  # as integrations/config.py imports it
    given = {"optimizer": "Pullback", "base": "torch.optim.AdamW", "lambda_pullback": 0.2}
    trainer = trainer_of(save_strategy="steps", save_steps=3)
    plugin.post_trainer_create(getattr(importlib.import_module(where), name)(pace_kernels=given), trainer)
    trainer.train()
    inner = trainer.optimizer.optimizer
    assert type(inner) is PullbackAround and inner.base.defaults["lr"] == 0.02
    assert same(weights_of(trainer.model), averages_of(trainer.model, inner))
    with pytest.raises(ValueError, match=r"pace_kernels.optimizer must be one of PACE, .*, got 'Pase'"):
        plugin.post_trainer_create(types.SimpleNamespace(pace_kernels={"optimizer": "Pase"}), trainer)


@pytest.mark.parametrize("name", ["PACE", "MADA", "Pullback", "AdamW"])
def test_kohyas_hooks_call_eval_and_train(name: str) -> None:
    """library/train_util.py: ``get_optimizer`` imports what ``--optimizer_type`` names and passes parameters and lr,
    ``is_schedulefree_optimizer`` looks at how the name ends; sampling and saving are between ``eval()`` and
    ``train()``."""
    module, _, cls = f"pace_kernels.integrations.kohya.{name}ScheduleFree".rpartition(".")
    assert cls.lower().endswith("schedulefree")
    model, options = tiny(), {"base": "torch.optim.SGD", "gain": 0.1} if name == "Pullback" else {}
    optimizer = getattr(importlib.import_module(module), cls)([{"params": model.parameters()}], lr=0.01, **options)
    optimizer.train()
    live = train(model, optimizer)
    wanted = averages_of(model, optimizer)
    optimizer.eval()
    assert same(weights_of(model), wanted) and not same(wanted, live)
    optimizer.train()
    assert same(weights_of(model), live)
