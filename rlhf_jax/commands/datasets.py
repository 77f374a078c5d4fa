"""`rlhf-jax data inspect`, `prepare`, `aggregate` and `make`."""

from __future__ import annotations

import os
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from rlhf_jax.commands.sample import print_rows
from rlhf_jax.config import (
    DataAggregateArgs,
    DataInspectArgs,
    DataMakeArgs,
    DataPrepareArgs,
    ModelConfig,
    SFTArgs,
    StageArgs,
    resolve,
)
from rlhf_jax.data import lint, tfds_rows
from rlhf_jax.data.agreement import elo
from rlhf_jax.data.ballots import Ranking
from rlhf_jax.data.consensus import bootstrap_intervals
from rlhf_jax.data.encoding import collect, mark_of
from rlhf_jax.data.examples import prompt_key
from rlhf_jax.data.gathering import describe, describe_parts, fit, join, linked_parts, numbered, same_text
from rlhf_jax.data.messages import as_key, text_of
from rlhf_jax.data.rows import Row, counts_of
from rlhf_jax.data.schemas import Answer
from rlhf_jax.data.sources import rows_from
from rlhf_jax.errors import UserError, printable, reason, shown, tell
from rlhf_jax.feedback.sources import rankings_given
from rlhf_jax.hosts.buckets import in_bucket
from rlhf_jax.hosts.files import check_writable, replacing, scratch, sync, sync_tree, written
from rlhf_jax.hosts.outputs import check_output, keeping, there, writable_directory
from rlhf_jax.models.loading import load_tokenizer


def run_inspect(config: DataInspectArgs, stage: StageArgs | None = None) -> lint.Findings:
    """Print what `lint.inspect` finds, and some rows as a model would see them; returns the findings.

    Of a stage's config come what rows (with those of data.mixture), tokenizer and limits are, unless `config` names
    its own.
    """
    mixture: list[str] = []
    model = ModelConfig() if stage is None else stage.model
    model = replace(model, tokenizer=config.tokenizer or model.tokenizer)
    if stage is not None:
        data = stage.data
        mixture = [] if config.path else data.mixture
        config = replace(
            config,
            path=config.path or data.path,
            eval_path=config.eval_path or data.eval_path,
            fields=config.fields or data.fields,
            loss_on=stage.sft.loss_on if isinstance(stage, SFTArgs) else config.loss_on,
            max_prompt_length=data.max_prompt_length,
            max_length=data.max_length,
        )
    train = [row for path in (config.path, *mixture) for row in rows_from(path, config.fields)]
    held_out = rows_from(config.eval_path, config.fields) if config.eval_path else []
    tokenizer = load_tokenizer(model) if model.tokenizer or model.path else None
    findings = lint.inspect(train, held_out, tokenizer, config.max_prompt_length, config.max_length)
    tell("\n".join(lint.lines(findings)))
    color = sys.stdout.isatty() if config.color == "auto" else config.color == "always"
    if tokenizer is not None and config.examples:
        chosen = np.random.default_rng(config.seed).permutation(len(train))[: config.examples]
        print("\n".join(lint.render(train[i], tokenizer, loss_on=config.loss_on, color=color) for i in sorted(chosen)))
    return findings


def run_prepare(config: DataPrepareArgs) -> Path:
    """Write the rows as a TFDS dataset; says what was dropped, and returns its directory."""
    if not config.out:
        raise UserError("no directory to write to; give --out DIR")
    below = f"{tfds_rows.NAME}/{config.schema}/1.0.0"
    directory = f"{config.out.rstrip('/') or '/'}/{below}"
    if there(directory) and not config.overwrite:
        raise UserError(f"{directory} exists; choose another --out or pass --overwrite true")
    if not in_bucket(config.out):
        check_writable(Path(config.out), f"out {config.out}")
    splits = {}
    for split, path in (("train", config.path), *([("test", config.eval_path)] if config.eval_path else [])):
        rows, remarks = rows_from(path, config.fields), Counter[str]()
        build = lambda row: ([tfds_rows.stored(row, config.schema, remarks)], False)  # noqa: B023, E731
        kept, report = collect(rows, build, strict=config.strict, columns=config.schema == "prompts", remarks=remarks)
        if config.schema != "prompts":
            names = tfds_rows.UNSTORED[config.schema]
            lost = Counter(name for row in rows for name in names if row.get(name) is not None)
            report = replace(report, unread=lost | Counter(report.unread))
        splits[split] = [{name: value for name, value in row.items() if name != "where"} for row in kept]
        tell(f"{report.mark}{split}: {report}")
    what = f"out {config.out}"
    with (
        writable_directory(config.out, what) as out, written(what), scratch(out) as place,
        replacing(out / below) as new,
    ):  # fmt: skip
        os.rename(tfds_rows.prepare(splits, config.schema, str(place)), new)
    tell(f"{directory}: data.path of a stage, or tfds.builder_from_directory({directory!r})")
    return Path(directory)


def run_make(config: DataMakeArgs) -> list[str]:
    """Have the function write its files, move them to config.out when it is done, and return their names."""
    function = resolve(config.function)
    if not config.out:
        raise UserError("no directory to write to; give --out DIR")
    what = f"out {config.out}"
    with writable_directory(config.out, what) as out, written(what), scratch(out) as place:
        try:
            function(place, num=config.num, seed=config.seed)
        except (UserError, OSError):
            raise
        except Exception as error:
            why = f"{type(error).__name__}: {reason(error)}"
            raise UserError(f"{config.function} failed ({why}); it is called as fn(folder, num=, seed=)") from error
        if not (made := sorted(place.iterdir())):
            raise UserError(f"{config.function} wrote nothing into the folder that it was given; correct it")
        with keeping(place, Path(config.out) if not in_bucket(config.out) else out.parent, what):
            places = [f"{config.out.rstrip('/')}/{path.name}" for path in made]
            if (old := [each for each in places if there(each)]) and not config.overwrite:
                raise UserError(f"{old[0]} exists; choose another --out or pass --overwrite true")
            for path in made:
                (sync_tree if path.is_dir() else sync)(path)
            for path in made:
                if path.is_dir():
                    with replacing(out / path.name) as new:
                        os.rename(path, new)
                else:
                    os.replace(path, out / path.name)
    names = [path.name for path in made]
    tell(f"data make: {', '.join(names)} in {config.out}")
    return names


def run_aggregate(config: DataAggregateArgs) -> list[Row]:
    """One ranking per prompt from all raters; prints a summary, raters and what is compared, and writes the rows."""
    check_output(config.output, overwrite=config.overwrite)
    together, dropped = rankings_given(config.path, config.fields, unlabelled=False)
    if all(len(one.answers) < 2 for one in join(together, prompt_key)):
        raise UserError(f"{config.path}: no prompt has two responses to compare ({dropped} rows dropped); give more")
    joined = [_by_field(together, config.by)] if config.by else join(together, prompt_key)
    parts = [linked_parts(ranking) for ranking in joined]
    fitted, raters, facts = fit([part for each in parts for part in each], method=config.method, prior=config.prior)
    mark = mark_of(dropped, len(together) + dropped)
    counted = f"{mark}{len(together)} rows, {dropped} dropped, {len(joined)} groups"
    equal = sum(len(ranking.answers) for ranking in together) - sum(len(ranking.answers) for ranking in joined)
    notes = [f"{equal} responses are equal to another of their prompt"] if equal and not config.by else []
    notes += _apart(together, joined)
    tell("; ".join([counted, *describe(raters, facts), *describe_parts(joined, parts), *notes]))
    bounds = _intervals(fitted, config) if config.intervals else [None] * len(fitted)
    if config.method == "crowd_bt" and len(raters) > 1:
        names = sorted(raters, key=raters.__getitem__)
        tell("rater  reliability")
        tell("\n".join(f"{printable(name) or 'unnamed'}  {raters[name]:.3f}" for name in names))
    if config.by:
        for ranking, bound in zip(fitted, bounds, strict=True):
            _show(ranking, bound)
    out = [_row(ranking, bound) for ranking, bound in zip(fitted, bounds, strict=True)]
    if config.output:
        print_rows(out, config.output)
    return out


def _apart(together: Sequence[Ranking], joined: Sequence[Ranking]) -> list[str]:
    """What to say of fields that rankings of one prompt had, but not alike."""
    had: dict[str, set[str]] = defaultdict(set)
    key = lambda one: prompt_key({"prompt": one.prompt})  # noqa: E731
    for one in together:
        had[key(one)] |= one.fields.keys() - {"prompt"}
    lost = Counter(name for one in joined for name in sorted(had[key(one)] - one.fields.keys()))
    return [f"fields in which rows of a prompt differ are left out: {counts_of(lost)}"] if lost else []


def _by_field(together: Sequence[Ranking], name: str) -> Ranking:
    """All rankings as one whose items are the values of a field of the responses, such as the model.

    Each verdict on two responses counts for their values, also where responses to one prompt have one text or one
    value; two responses of one value are not compared. All that is said of one prompt is a unit of the bootstrap.
    """
    for ranking in together:
        if not all(name in answer.extra for answer in ranking.answers):
            raise UserError(f'{ranking.where}: a response has no field "{name}"; correct --by')
    value = lambda answer: as_key(answer.extra[name])  # noqa: E731
    of_prompts = join(list(together), prompt_key, lambda answer: (same_text(answer), value(answer)))
    compared = [each for each in of_prompts if len(each.answers) > 1]
    whole = [replace(each, ballots=[ballot._replace(unit=0) for ballot in each.ballots]) for each in compared]
    [joined] = join(whole, lambda row: "", value)
    names = [value(answer) for answer in joined.answers]
    if len(names) < 2:
        cure = "correct --by, or give responses of others"
        raise UserError(f'all responses have one "{name}", {shown(names[0])}; {cure}')
    order = sorted(range(len(names)), key=names.__getitem__)
    ballots = [ballot._replace(ranks=[ballot.ranks[i] for i in order]) for ballot in joined.ballots]
    return replace(joined, prompt=name, fields={}, answers=[Answer(names[i]) for i in order], ballots=ballots)


def _intervals(fitted: list[Ranking], config: DataAggregateArgs) -> list[np.ndarray]:
    """[2, K] lower and upper ends of the 95% intervals of each group's strengths."""
    ballots, names, times, units = numbered(fitted)
    ends = bootstrap_intervals(
        ballots,
        num_raters=len(names),
        method=config.method,
        prior=config.prior,
        num_samples=config.intervals,
        level=0.95,
        seed=config.seed,
        times=times,
        units=units,
        whole=bool(config.by),
        sizes=[len(ranking.answers) for ranking in fitted],
    )
    return [np.stack(ends)[:, g, : len(ranking.answers)] for g, ranking in enumerate(fitted)]


def _show(ranking: Ranking, bound: np.ndarray | None) -> None:
    """Print the table of strengths, the best first."""
    tell("Elo  95% interval  " + str(ranking.prompt))
    strengths = ranking.strengths if ranking.strengths is not None else np.zeros(0)
    for i in np.argsort(-strengths):
        ends = "" if bound is None else "{:.0f} to {:.0f}".format(*elo(bound[:, i]))
        tell(f"{elo(strengths[i]):.0f}  {ends}  {printable(text_of(ranking.responses[i]))}")


def _row(ranking: Ranking, bound: np.ndarray | None) -> Row:
    """A ranking row {prompt, responses: [{text, rank, strength, interval?, ...}]}."""
    ranks, _ = ranking.consensus()
    items = []
    for i, fields in enumerate(ranking.items()):
        item = {**fields, "rank": None if np.isnan(ranks[i]) else int(ranks[i])}
        if ranking.strengths is not None:
            item["strength"] = round(float(ranking.strengths[i]), 4)
        if bound is not None:
            item["interval"] = [round(float(end), 4) for end in bound[:, i]]
        items.append(item)
    return {**ranking.fields, "prompt": ranking.prompt, "responses": items}
