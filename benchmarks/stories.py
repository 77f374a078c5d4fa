"""The chain on a real pretrained model: gold comparisons, reward model, PPO; stories before and after.

    python -m benchmarks.stories --model STORIES_MODEL --output_dir runs/stories

The reward model and PPO are those of configs/stories_reward.yaml and configs/stories_ppo.yaml.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import jax
import numpy as np

from rlhf_jax import ppo, reward
from rlhf_jax.cli.parsing import parse
from rlhf_jax.config import MeshConfig, ModelConfig, SamplingConfig
from rlhf_jax.inference.generate import Generator
from rlhf_jax.models.loading import load_model, load_tokenizer
from rlhf_jax.runs.curves import learning_curves, text_table
from rlhf_jax.sharding import make_mesh
from rlhf_jax.tasks import label_pairs, stories, write_rows

CONFIGS = Path(__file__).parents[1] / "configs"


def drawn_from(model: str, rows: list[dict[str, str]], seeds: list[int]) -> list[tuple[list[str], list[bool]]]:
    """Per seed a response to every row, and which of them ended by themselves."""
    settings, mesh = ModelConfig(path=model, eos_ids=[1]), make_mesh(MeshConfig())
    tokenizer = load_tokenizer(settings)
    longest = max(len(tokenizer.encode_prompt(row["prompt"])) for row in rows)
    with jax.set_mesh(mesh.grid):
        loaded = load_model(settings, mesh, jax.random.key(0))
        sampling = SamplingConfig(max_new_tokens=64)
        generator = Generator(loaded.model, tokenizer, sampling, mesh, max_prompt_length=longest)
        of_seeds = [generator.responses(loaded.params, rows, jax.random.key(s), batch_size=256) for s in seeds]
    return [([one.text for one in drawn], [one.finished for one in drawn]) for drawn in of_seeds]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a Hugging Face directory of a stories model")
    parser.add_argument("--output_dir", default="runs/stories")
    parser.add_argument("--prompts", type=int, default=1024)
    parser.add_argument("--samples", type=int, default=8, help="per prompt; compared two by two")
    parser.add_argument("--progress", default="true")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    path = Path(args.output_dir)
    path.mkdir(parents=True, exist_ok=True)
    rows = stories.prompts(args.prompts + 256, args.seed)
    train, held_out = rows[:-256], rows[-256:]
    texts = [row["prompt"] for row in train]
    drawn = [texts for texts, _ in drawn_from(args.model, train, [args.seed + i for i in range(args.samples)])]
    pairs = []
    for a, b in zip(drawn[::2], drawn[1::2], strict=True):
        golds = stories.sentiment(texts, a), stories.sentiment(texts, b)
        pairs += label_pairs(texts, a, b, *golds, args.seed, 0.1)
    for name, data in (("comparisons", pairs), ("prompts", train)):
        write_rows(path / f"{name}.jsonl", data)
    common = [
        "--model.path",
        args.model,
        "--run.progress",
        args.progress,
        "--run.seed",
        str(args.seed),
        "--run.overwrite",
        "true",
    ]

    def stage(name: str, *options: str) -> list[str]:
        return ["--config", str(CONFIGS / f"stories_{name}.yaml"), *common, *options]

    directory = ("--run.output_dir", str(path / "reward_model"), "--data.path", str(path / "comparisons.jsonl"))
    rm = reward.run(parse("reward", stage("reward", *directory)))
    directory = ("--run.output_dir", str(path / "ppo"), "--data.path", str(path / "prompts.jsonl"))
    tuned = ppo.run(parse("ppo", stage("ppo", *directory, "--reward.model", str(path / "reward_model" / "model"))))

    texts = [row["prompt"] for row in held_out]
    before, after = (drawn_from(m, held_out, [99])[0][0] for m in (args.model, str(path / "ppo" / "model")))
    gold = [np.asarray(stories.sentiment(texts, responses)) for responses in (before, after)]
    standard_errors = [scores.std(ddof=1) / len(scores) ** 0.5 for scores in gold]
    table = [
        ["gold reward before", f"{gold[0].mean():.3f} +- {standard_errors[0]:.3f}"],
        ["gold reward after", f"{gold[1].mean():.3f} +- {standard_errors[1]:.3f}"],
        ["reward model accuracy", f"{rm['accuracy']:.3f} (n = {rm['n']})"],
        ["KL, nats per story", f"{tuned['after']['eval/kl']:.2f}"],
    ]
    print("\n" + text_table(["256 held-out openings", "value"], table))
    for i in range(2):
        print(f"\n--- {texts[i]}\nbefore: {before[i].strip()}\nafter:  {after[i].strip()}")
    curves = [json.loads(line) for line in (path / "ppo" / "metrics.jsonl").read_text().splitlines()]
    learning_curves(path / "learning_curves.png", [c for c in curves if "rollout/gold" in c], "PPO on stories")
    kl, gain = tuned["after"]["eval/kl"], float(gold[1].mean() - gold[0].mean())
    print(
        json.dumps(
            {
                "gold_before": round(float(gold[0].mean()), 4),
                "gold_after": round(float(gold[1].mean()), 4),
                "standard_errors": [round(float(se), 4) for se in standard_errors],
                "reward_model_accuracy": round(rm["accuracy"], 4),
                "kl": round(kl, 3),
                "kl_target": 6.0,
                "passed": gain > 3 * float(np.hypot(*standard_errors)) and abs(kl / 6 - 1) <= 0.3,
            }
        )
    )


if __name__ == "__main__":
    main()
