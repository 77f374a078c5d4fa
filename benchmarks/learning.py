"""The quickstart's outcome, seed by seed; one JSON line each, then the worst. Exits with 1 unless PPO reaches 0.9 gold
reward, 0.25 above SFT, on every seed.

python -m benchmarks.learning --seeds 5
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    args = parser.parse_args()
    outcomes = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(args.seeds):
            path = Path(folder) / str(seed)
            command = [sys.executable, "-m", "rlhf_jax", "quickstart", "--seed", str(seed), "--output_dir", str(path)]
            done = subprocess.run([*command, "--progress", "false"], capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"seed {seed} failed: {done.stderr.strip().splitlines()[-1]}")
            outcomes.append({"seed": seed, **json.loads((path / "summary.json").read_text())})
            print(json.dumps(outcomes[-1]), flush=True)
    ppo = [outcome["gold"]["ppo"] for outcome in outcomes]
    gain = [outcome["gold"]["ppo"] - outcome["gold"]["sft"] for outcome in outcomes]
    passed = min(ppo) >= 0.9 and min(gain) >= 0.25
    print(json.dumps({"seeds": len(ppo), "ppo_min": min(ppo), "gain_min": min(gain), "passed": passed}))
    sys.exit(not passed)


if __name__ == "__main__":
    main()
