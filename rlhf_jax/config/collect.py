"""`collect` and `judge`."""

from __future__ import annotations

from dataclasses import field
from typing import Literal

from rlhf_jax.config.checks import SEEDS, check
from rlhf_jax.config.feedback import SourcesArgs
from rlhf_jax.config.judge import JudgeConfig
from rlhf_jax.config.parts import MeshConfig
from rlhf_jax.config.settings import PathText, settings
from rlhf_jax.errors import UserError


@settings
class CollectArgs(SourcesArgs):
    """All of `rlhf-jax collect`: several responses to every prompt, and who is better among them.

    Args:
        label: nobody yet (none: rows for people to rank), the order of `sources` (Kim et al. 2023, ALMoST), the scores
            of `reward`, or `judge`.
        select: which responses to a prompt are kept and labelled: all, any (random), those whose order members of a
            reward ensemble doubt most (disagreement), or those that two random members like best (top_two; double
            Thompson sampling, Dwaracherla et al. 2024, arXiv 2402.00396). `reward` names the ensemble. Rows then stand
            in the order of information, the most first.
        selected: how many are kept.
        most: prompts that are kept, those of the most information or, at random, any; 0 keeps all.
        schema: a row per prompt with all responses (ranking), a row per pair (preference), or the best (sft).
        length_filter: pairs that are left out: almost, those whose chosen response is short (Kim et al. 2023);
            balance, so many that the longer response is as often chosen as not, and far longer or shorter ones first.
        output: the .jsonl file to write. Until it is whole, OUTPUT.part holds what there is; the same command goes on.
    """

    label: Literal["none", "sources", "reward", "judge"] = "none"
    select: Literal["all", "random", "disagreement", "top_two"] = "all"
    selected: int = 2
    most: int = 0
    schema: Literal["ranking", "preference", "sft"] = "ranking"
    length_filter: Literal["off", "almost", "balance"] = "off"
    output: PathText = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.label == "sources" and len(self.sources) < 2:
            raise UserError(f"label is sources, of which there are {len(self.sources)}; give two or more, best first")
        unused = {"judge": self.judge.named(), "reward": self.reward.named()}
        asks = self.select in ("disagreement", "top_two")
        for name, given in unused.items():
            if given and self.label != name and not (name == "reward" and asks):
                raise UserError(f"{name} does nothing with label {self.label}; set label {name}, or leave it out")
        check(self, "", {"at least 2": "selected", "at least 0": "most"})
        if self.select == "all" and (self.most or self.selected != 2):
            raise UserError("most and selected do nothing with select all; set select random, disagreement or top_two")
        each = [source.num_samples or self.num_samples for source in self.sources] or [self.num_samples]
        if self.select != "all" and sum(each) < self.selected:
            raise UserError(
                f"selected {self.selected} of {sum(each)} responses to a prompt cannot be; raise num_samples"
            )
        if asks and (self.label == "reward" or not self.reward.paths):
            cure = "set label none, judge or sources" if self.label == "reward" else "name it by reward.models"
            raise UserError(
                f"select {self.select} asks a reward ensemble what it doubts, so it labels nothing; {cure}"
            )
        if asks and (self.reward.functions or self.reward.judge.named()):
            raise UserError(f"select {self.select} asks reward models; leave out reward.functions and reward.judge")
        if self.label == "none" and self.schema != "ranking":
            raise UserError(f"label is none, so schema {self.schema} cannot be written; set schema ranking or a label")
        if self.length_filter != "off" and self.schema != "preference":
            raise UserError(f"length_filter {self.length_filter} leaves out pairs; set schema preference, or off")


@settings
class JudgeArgs:
    """All of `rlhf-jax judge ROWS`: a judge's verdicts on responses that are there, and how far it can be trusted.

    Args:
        path: ranking or preference rows, labelled or not, as data.path of a stage.
        fields: a field map, as data.fields of a stage.
        judge: who compares responses two by two.
        limit: rows to judge, the first so many; 0 takes all.
        batch_size: rows between two writes.
        seed: of the answers.
        output: a .jsonl file for the rankings. Until it is whole, OUTPUT.part holds what there is; the same command
            goes on. Empty prints the report alone.
        overwrite: replace `output`, and forget OUTPUT.part.
        progress: show a progress bar.
        mesh: the devices.
    """

    path: PathText = ""
    fields: list[str] = field(default_factory=list)
    judge: JudgeConfig = JudgeConfig()
    limit: int = 0
    batch_size: int = 16
    seed: int = 0
    output: PathText = ""
    overwrite: bool = False
    progress: bool = True
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self) -> None:
        check(self, "", {"at least 1": "batch_size", "at least 0": "limit", SEEDS: "seed"})
