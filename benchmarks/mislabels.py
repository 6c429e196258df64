"""How many planted wrong labels evaluate.py --split train --details finds: the share of them among the first of its list.

python -m benchmarks.mislabels FOLDER ARCHITECTURE [SEED ...]

5 % of the demo's training images get another class's label, and a network is trained on them by the demo's recipe. A line for
each seed goes to benchmarks/mislabels.jsonl.
"""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from engine.data.demo import make_demo_data
from engine.system.environment import environment

RESULTS = Path(__file__).with_name("mislabels.jsonl")
SHARE = 0.05


def mislabel(tree, share, seed=0):
    """Move a share of the training images of a tree to a folder of another class; return their new paths."""
    rng = np.random.default_rng(seed)
    classes = sorted(folder.name for folder in (tree / "train").iterdir())
    files = sorted((tree / "train").glob("*/*.jpg"))
    moved = []
    for number in rng.choice(len(files), int(share * len(files)), replace=False):
        path = files[number]
        others = [name for name in classes if name != path.parent.name]
        moved.append(path.rename(tree / "train" / others[rng.integers(len(others))] / f"wrong_{path.name}"))
    return moved


def main(folder, architecture, *seeds):
    """Plant, train, look for them, and write down how many were found."""
    for seed in map(int, seeds or ("0", "1", "2")):
        place = Path(folder) / f"{architecture}_{seed}"
        make_demo_data(place / "tree")
        planted = {f"{path.parent.name}/{path.name}" for path in mislabel(place / "tree", SHARE, seed)}
        run, details = place / "run", place / "run/train"
        flags = {"recipe": "demo", "data-dir": place / "tree", "make-demo-data": "false", "architecture": architecture}
        flags |= {"checkpoint-dir": run, "log-file": place / "run.log", "seed": seed}
        words = [word for key, value in flags.items() for word in (f"--{key}", str(value))]
        subprocess.run([sys.executable, "train.py", *words, "--overwrite"], check=True)
        wanted = ["--split", "train", "--weights", "raw", "--details", str(details)]
        subprocess.run([sys.executable, "evaluate.py", str(run / "last.pt"), *wanted], check=True)
        with open(f"{details}_images.csv", encoding="utf-8") as file:
            listed = [row["image"] for row in csv.DictReader(file)]
        found = {percent: len(planted & set(listed[: len(listed) * percent // 100])) for percent in (1, 2, 5, 10)}
        top1 = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["val_top1"]
        figures = {"architecture": architecture, "seed": seed, "images": len(listed), "planted": len(planted)}
        figures |= {"found_among_first_percent": found, "val_top1": top1}
        with open(RESULTS, "a", encoding="utf-8") as file:
            file.write(json.dumps(environment() | figures) + "\n")
        print(figures)


if __name__ == "__main__":
    main(*sys.argv[1:])
