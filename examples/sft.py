"""Fine-tuning on answers with Transformers' Trainer: PACE from its arguments, statistics in its log, the average saved.
The model is a small untrained GPT-2; put a pretrained one in its place."""

import argparse

from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from pace_kernels import PACE
from pace_kernels.integrations.transformers import AveragingMixin, UseAverage, optimizer_from

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=400)
steps = parser.parse_args().steps


def sample(a, b):
    prompt, answer = f"{a:02}+{b:02}=", f"{a + b:03}"
    tokens = list((prompt + answer).encode())
    return {"input_ids": tokens, "labels": [-100] * len(prompt) + tokens[len(prompt) :]}


class PaceTrainer(AveragingMixin, Trainer):
    pass


args = TrainingArguments(
    "out/sft",
    max_steps=steps,
    per_device_train_batch_size=32,
    learning_rate=2e-3,
    weight_decay=0.1,
    eval_strategy="steps",
    eval_steps=max(steps // 4, 1),
    logging_steps=max(steps // 8, 1),
    save_strategy="no",
    report_to=[],
    use_cpu=True,
)
trainer = PaceTrainer(
    model_init=lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=128, n_positions=16, n_embd=64, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    ),
    args=args,
    train_dataset=[sample(a, b) for a in range(100) for b in range(100) if (a + b) % 10],
    eval_dataset=[sample(a, 100 - a) for a in range(1, 100)],
    optimizer_cls_and_kwargs=optimizer_from(args, PACE, log_stats=True),
    callbacks=[UseAverage()],
)
trainer.train()
trainer.save_model()  # the average
