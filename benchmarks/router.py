"""The router demo with five seeds of the student: the table of the README.

    python benchmarks/router.py [FOLDER]

Runs the demo's recipe with train.seeds 0 to 4 (what is done already is not done again) and prints the arms' figures
as a Markdown table on stderr and, last on stdout, one JSON line.
"""

import json
import sys
from pathlib import Path

from attar import pipeline
from attar.demo import demo_recipe


class _Lines:
    def note(self, message):
        print(message, file=sys.stderr, flush=True)

    def step(self, name, total):
        print(f"  {name} ({total})", file=sys.stderr, flush=True)
        yield self

    def advance(self, n=1):
        del n


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/router-five-seeds")
    recipe = demo_recipe(folder, ["train.seeds=[0, 1, 2, 3, 4]"], _Lines())
    pipeline.run(recipe, progress=_Lines())
    evaluation = json.loads((folder / "evaluate" / "evaluation.json").read_text("utf-8"))
    print("\n| arm | accuracy (95 %) | p50 ms | requests/s | memory MB | size MB | $ per 1,000 |", file=sys.stderr)
    print("|---|---|---|---|---|---|---|", file=sys.stderr)
    for name in ("teacher", "baseline", "control", "student"):
        arm = evaluation["arms"][name]
        low, high = arm["quality"]["ci"]
        print(
            f"| {name} | {arm['quality']['value']:.3f} ({low:.3f}-{high:.3f}) | {arm['latency_ms']['p50']:.2f} "
            f"| {arm['throughput_per_s']:,.0f} | {arm['memory_mb']:,.0f} | {arm['size_mb']:.1f} "
            f"| {arm['cost_usd_per_1k']:.6f} |",
            file=sys.stderr,
        )
    result = {
        key: evaluation[key]
        for key in ("verdict", "retention", "gain_over_control", "gain_over_baseline", "speedup_p50", "cost_ratio")
    }
    result |= {
        "accuracy": {name: arm["quality"] for name, arm in evaluation["arms"].items() if arm},
        "student_seeds": evaluation["arms"]["student"]["seeds"],
        "size_mb": evaluation["arms"]["student"]["size_mb"],
        "machine": evaluation["provenance"]["machine"],
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
