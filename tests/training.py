"""Tiny networks, language models, data and settings for the trainer's tests."""

import numpy as np
import torch
from torch import nn
from transformers import TrainerCallback, TrainingArguments

from attar.tokens import TokenizedExample
from attar.train.objectives import LABELS, TEACHER
from attar.train.trainer import DistillationTrainer
from lm import make_model

VOCABULARY = 40


class Net(nn.Module):
    def __init__(self, width=6, seed=0, dropout=0.0, classes=5):
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Dropout(dropout))
        self.head = nn.Linear(width, classes)
        self.double()

    def forward(self, x):
        return self.head(self.body(x))


def rows(n, gold=None, teacher=None):
    """Inputs; gold labels where ``gold(i)``, and a teacher's logits."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for number in range(n):
        row = {"x": torch.randn(4, dtype=torch.float64, generator=generator)}
        if gold is not None:
            row[LABELS] = torch.tensor(number % 5 if gold(number) else -100)
        if teacher is not None:
            with torch.no_grad():
                row[TEACHER] = teacher.eval()(row["x"][None])[0]
        found.append(row)
    return found


def stacked(data):
    return {key: torch.stack([row[key] for row in data]) for key in data[0]}


def settings(folder, **changes):
    """Plain gradient descent on CPU, no checkpoints."""
    plain = {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.1,
        "optim": "sgd",
        "max_grad_norm": 0,
        "lr_scheduler_type": "constant",
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 1,
    }
    return TrainingArguments(**{**plain, **changes})


def make(folder, model, objectives, data=None, *, teacher=None, evaluated=None, collator=None, callbacks=(), **changes):
    from transformers.trainer_callback import PrinterCallback

    trainer = DistillationTrainer(
        model=model,
        objectives=objectives,
        teacher=teacher,
        train_dataset=data,
        eval_dataset=evaluated,
        data_collator=collator,
        callbacks=list(callbacks),
        args=settings(folder, **changes),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def causal(width=32, layers=2, seed=0, dtype=torch.float64, **changes):
    sizes = {"vocab_size": VOCABULARY, "hidden_size": width, "num_hidden_layers": layers, "head_dim": width // 4}
    return make_model(seed=seed, **{**sizes, **changes}).to(dtype)


def examples(n=5, vocabulary=VOCABULARY, seed=0):
    """Uneven lengths, about half of the tokens supervised."""
    rng = np.random.default_rng(seed)
    found = []
    for number in range(n):
        ids = rng.integers(2, vocabulary, 4 + 3 * number).astype(np.int32)
        supervised = rng.random(len(ids)) < 0.5
        supervised[0], supervised[-1] = False, True
        found.append(TokenizedExample(f"example-{number}", ids, supervised))
    return found


class Stop(TrainerCallback):
    """Ends a run after a step, as a kill would."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def weights(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def assert_same(one, other, tolerance=0.0):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")
