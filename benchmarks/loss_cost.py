"""Time and memory of the loss alone: logits of the whole vocabulary at all positions, or projected in chunks.

    python benchmarks/loss_cost.py [--rounds 3] [--plot docs/loss_cost.png]

Both sides take the hidden states of a teacher and a student (width 576, 512 positions, float32) and give the mean
forward KL over supervised positions, and its gradients for the student's states and head. Dense is what is written
first: both models' logits at all positions, `F.kl_div`, then the mask. Projected is `attar.losses.projected_loss` on
the supervised positions. Vocabularies run from 8 k to 256 k entries with a fifth of the positions supervised, shares
from 5 to 100 % with 49,152 entries. Each point of each side runs in a process of its own, the sides in turn; a time is
the best of the rounds, memory the peak above what the process holds before the loss. The sides must agree on the value.
A table goes to stderr; the last line is JSON: dense over projected, at each point.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

WIDTH, POSITIONS = 576, 512
VOCABULARIES = (8192, 16384, 32768, 65536, 131072, 262144)
SHARES = (5, 10, 20, 50, 100)
SHARE, VOCABULARY = 20, 49152
SIDES = ("dense", "projected")


def resident(key):
    """Memory of this process in MiB: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def measure(side, vocabulary, share, rounds):
    import torch
    import torch.nn.functional as F

    from attar.losses import Divergence, DivergenceTerm, Head, projected_loss

    random = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.empty(shape).normal_(generator=random)

    states, weight = (
        normal(POSITIONS, WIDTH).requires_grad_(),
        (normal(vocabulary, WIDTH) / WIDTH**0.5).requires_grad_(),
    )
    teacher_states, teacher_weight = normal(POSITIONS, WIDTH), normal(vocabulary, WIDTH) / WIDTH**0.5
    supervised = torch.zeros(POSITIONS, dtype=torch.bool)
    supervised[POSITIONS - round(POSITIONS * share / 100) :] = True

    def dense():
        with torch.no_grad():
            teacher = F.linear(teacher_states, teacher_weight).log_softmax(-1)
        student = F.linear(states, weight).log_softmax(-1)
        values = F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
        return values[supervised].mean()

    def projected():
        head = Head(teacher_weight)
        term = DivergenceTerm(Divergence("forward_kl"), teacher_states[supervised], head)
        return projected_loss(states[supervised], Head(weight), [term]).total

    function = {"dense": dense, "projected": projected}[side]
    before = resident("VmRSS")
    times = []
    for _ in range(rounds):
        states.grad = weight.grad = None
        begin = time.perf_counter()
        loss = function()
        loss.backward()
        times.append(time.perf_counter() - begin)
    print(json.dumps({"s": min(times), "mb": resident("VmHWM") - before, "loss": float(loss)}))


def point(vocabulary, share, rounds):
    """Both sides at one point."""
    found = {}
    for side in SIDES:
        command = [sys.executable, __file__, "--one", side, str(vocabulary), str(share), "--rounds", str(rounds)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{side} at {vocabulary} entries and {share} % failed: {done.stderr[-2000:]}")
        found[side] = json.loads(done.stdout.splitlines()[-1])
    dense, projected = found["dense"], found["projected"]
    if abs(dense["loss"] - projected["loss"]) > 1e-4 * abs(dense["loss"]):
        sys.exit(f"the sides give {dense['loss']} and {projected['loss']}; they are not comparable")
    print(
        f"| {vocabulary:,} | {share} % | {dense['s']:.2f} | {projected['s']:.2f} | {dense['s'] / projected['s']:.1f} | "
        f"{dense['mb']:.0f} | {projected['mb']:.0f} | {dense['mb'] / projected['mb']:.1f} |",
        file=sys.stderr,
        flush=True,
    )
    return found


def ratios(points):
    return {
        str(at): {
            key: round(p["dense"][unit] / p["projected"][unit], 2) for key, unit in (("time", "s"), ("memory", "mb"))
        }
        for at, p in points.items()
    }


def plot(by_vocabulary, by_share, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = (
        ("entries in the vocabulary", by_vocabulary, f"{SHARE} % of positions supervised"),
        ("supervised positions, %", by_share, f"{VOCABULARY:,} entries"),
    )
    rows = (("s", 1, "time, s"), ("mb", 1024, "peak memory, GiB"))
    figure, axes = plt.subplots(2, 2, figsize=(8, 5.6), sharex="col", layout="constrained")
    for column, (label, points, title) in enumerate(columns):
        for row, (unit, divisor, name) in enumerate(rows):
            axis = axes[row][column]
            for side, marker, colour in zip(SIDES, "so", ("#b5532a", "#1f6f8b"), strict=True):
                values = [p[side][unit] / divisor for p in points.values()]
                axis.plot(list(points), values, marker=marker, markersize=4.5, color=colour, label=side)
            axis.set_ylim(bottom=0)
            axis.grid(alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
            if column == 0:
                axis.set_ylabel(name)
                axis.set_xscale("log", base=2)
                axis.set_xticks(list(points), [f"{v // 1024} k" for v in points])
                axis.minorticks_off()
            else:
                axis.set_xticks(list(points))
        axes[0][column].set_title(title, fontsize=10)
        axes[1][column].set_xlabel(label)
    axes[0][0].legend(frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--plot", type=Path, default=Path(__file__).parents[1] / "docs" / "loss_cost.png")
    parser.add_argument("--one", nargs=3, metavar=("SIDE", "VOCABULARY", "SHARE"), help="one point of one side")
    args = parser.parse_args()
    if args.one:
        side, vocabulary, share = args.one
        measure(side, int(vocabulary), float(share), args.rounds)
        return
    print(
        "| entries | supervised | dense s | projected s | ratio | dense MiB | projected MiB | ratio |\n"
        + "|---" * 8
        + "|",
        file=sys.stderr,
        flush=True,
    )
    by_vocabulary = {vocabulary: point(vocabulary, SHARE, args.rounds) for vocabulary in VOCABULARIES}
    by_share = {share: point(VOCABULARY, share, args.rounds) for share in SHARES}
    plot(by_vocabulary, by_share, args.plot)
    print(
        json.dumps(
            {
                "dense_over_projected_by_vocabulary": ratios(by_vocabulary),
                "dense_over_projected_by_share": ratios(by_share),
            }
        )
    )


if __name__ == "__main__":
    main()
