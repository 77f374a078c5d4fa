"""What is in some rows and what may be wrong with them, before anything is trained."""

from __future__ import annotations

from collections import Counter, defaultdict
from itertools import combinations, pairwise
from typing import Any

import numpy as np

from rlhf_jax.data import rankings, schemas
from rlhf_jax.data.agreement import agreement, length_bias
from rlhf_jax.data.ballots import Ranking, ranking_row, remarks_of
from rlhf_jax.data.comparisons import EQUAL_RATINGS, rating_of
from rlhf_jax.data.encoding import Limits, naming, unread_in
from rlhf_jax.data.examples import prompt_key, row_key, sft_examples
from rlhf_jax.data.gathering import numbered
from rlhf_jax.data.messages import Text, as_key, text_of
from rlhf_jax.data.numbers import equal_in_float32, number_of
from rlhf_jax.data.rows import ANSWERS, PREFERENCES, DroppedRow, Row, counts_of, layout_of
from rlhf_jax.data.schemas import Answer
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.errors import printable

Findings = dict[str, Any]
"""Name -> a count, (count, first places), a share or a table: what `lines` says in words."""

PERCENTILES = (5, 25, 50, 75, 95, 99, 100)
GREEN, RED, DIM, PLAIN = "\033[32m", "\033[31m", "\033[2m", "\033[0m"


def inspect(
    train: list[Row], held_out: list[Row], tokenizer: Tokenizer | None, max_prompt_length: int, max_length: int
) -> Findings:
    """What is in the rows and may be wrong with them. Lengths are in tokens, without a tokenizer in characters."""
    rows = train + held_out
    dropped: dict[str, list[str]] = defaultdict(list)
    lengths: dict[str, list[int]] = {"prompt": [], "response": [], "whole": []}
    compared: list[Ranking] = []
    remarks: Counter[str] = Counter()
    places: dict[str, list[str]] = defaultdict(list)
    ratings: list[tuple[float, str]] = []
    for row in rows:
        try:
            prompt, answers, ranking = _parts(row)
        except DroppedRow as drop:
            dropped[drop.reason].append(row["_where"])
            continue
        compared += [ranking] if ranking is not None else []
        ratings += [(number_of(row["rating"]), row["_where"])] if layout_of(row) == "rating" else []
        of_row = remarks_of([row]) + schemas.margins_lost([row])
        size = _prompt_length(row, prompt, tokenizer, of_row)
        sizes = [_answer_length(row, prompt, answer, tokenizer, of_row) for answer in answers]
        remarks += of_row
        for remark in +of_row:
            places[remark].append(row["_where"])
        lengths["prompt"].append(size)
        lengths["response"] += sizes
        lengths["whole"].append(size + max(sizes, default=0))
    if lost := equal_in_float32(rating for rating, _ in ratings):
        remarks[EQUAL_RATINGS], where = len(lost), dict(ratings)
        places[EQUAL_RATINGS] = [where[rating] for rating in lost]
    findings: Findings = {
        "rows": len(train),
        "held_out": len(held_out),
        "kinds": dict(Counter(map(schemas.kind_of, rows))),
        "dropped": {reason: (len(where), where[:3]) for reason, where in dropped.items()},
        "remarks": {remark: (count, places[remark][:3]) for remark, count in remarks.items()},
        "unread": unread_in([row for row in rows if not schemas.kind_of(row).endswith("prompt-only")]),
        "unit": "characters" if tokenizer is None else "tokens",
        "lengths": {k: np.percentile(v, PERCENTILES).round().astype(int).tolist() for k, v in lengths.items() if v},
        "cut_prompts": float(np.mean(np.array(lengths["prompt"] or [0]) > max_prompt_length)),
        "cut_rows": float(np.mean(np.array(lengths["whole"] or [0]) > max_length)),
        "limits": (max_prompt_length, max_length),
        **duplicates(train, held_out),
    }
    return {**findings, **_comparisons(compared, tokenizer)} if compared else findings


def duplicates(train: list[Row], held_out: list[Row]) -> Findings:
    """Rows that are there twice, others with the id of one, and held-out rows whose prompt is trained on, each with
    its first places."""
    seen: dict[str, str] = {}
    ids: dict[str, str] = {}
    twice, one_id = [], []
    for row in train + held_out:
        where, named = row["_where"], "" if row.get("id") is None else as_key(row["id"])
        if (first := seen.setdefault(row_key(row), where)) != where:
            twice.append(f"{where} = {first}")
        elif named and (first := ids.setdefault(named, where)) != where:
            one_id.append(f"{where} = {first}")
    known = {prompt_key(row): row["_where"] for row in train}
    leaked = [f"{row['_where']} = {known[key]}" for row in held_out if (key := prompt_key(row)) in known]
    found = {"repeated": twice, "ids": one_id, "leaked": leaked}
    return {name: (len(places), places[:3]) for name, places in found.items()}


def _comparisons(compared: list[Ranking], tokenizer: Tokenizer | None) -> Findings:
    """How much length alone says about who is preferred, and how often raters agree."""
    differences, preferred = [], []
    for ranking in compared:
        sizes = [_answer_length({}, ranking.prompt, answer, tokenizer, Counter()) for answer in ranking.answers]
        _, labels = ranking.consensus()
        for i, j in combinations(range(len(sizes)), 2):
            if not np.isnan(labels[i, j]):
                differences.append(sizes[i] - sizes[j])
                preferred.append(labels[i, j] - 0.5)
    if not preferred:
        return {"gaps": sum(len(ranking.answers) * (len(ranking.answers) - 1) // 2 for ranking in compared)}
    p = np.array(preferred)
    correlation, longer_wins = length_bias(np.array(differences, float), p)
    ballots, names, times, _ = numbered(compared)
    verdicts = rankings.comparisons(ballots, num_raters=len(names))
    share, pairs = agreement(verdicts, np.array(times)[verdicts.ballots])
    return {
        "pairs": len(p),
        "gaps": sum(len(ranking.answers) * (len(ranking.answers) - 1) // 2 for ranking in compared) - len(p),
        "ties": int((p == 0).sum()),
        "length_correlation": correlation or 0.0,
        "longer_wins": float("nan") if longer_wins is None else longer_wins,
        "agreement": share if pairs else None,
        "raters": len(set(names) - {""}),
    }


def _parts(row: Row) -> tuple[Text, list[Answer], Ranking | None]:
    """(prompt, answers, what raters said, if they did) of any kind of row; the prompt of a document is empty."""
    kind = layout_of(row)
    if kind in ("ranking", "stepwise supervision", *PREFERENCES):
        ranking = ranking_row(row, unlabelled=True)
        return ranking.prompt, ranking.answers, ranking
    if kind in ANSWERS:
        if kind == "rating":
            rating_of(row)
        elif kind == "unpaired preference":
            schemas.flag_of(row, "label")
        row = schemas.answer_of(row)
        return row["prompt"], [schemas.single_answer(row)], None
    if kind == "text":
        return "", [Answer(schemas.text_row(row)["text"])], None
    return schemas.prompt_row(row)["prompt"], [], None


def _prompt_length(row: Row, prompt: Text, tokenizer: Tokenizer | None, remarks: Counter[str]) -> int:
    """The tokens of a prompt, or its characters; `remarks` counts what tokenising it has to say."""
    if tokenizer is None:
        return len(prompt) if isinstance(prompt, str) else sum(len(turn["content"]) for turn in prompt)
    with naming(row):
        return len(tokenizer.encode_prompt(prompt, remarks)) if prompt else 0


def _answer_length(row: Row, prompt: Text, answer: Answer, tokenizer: Tokenizer | None, remarks: Counter[str]) -> int:
    """The tokens of an answer, or its characters; `remarks` counts what tokenising it has to say."""
    response, finished, ids, _ = answer
    text = text_of(response)
    if tokenizer is None:
        return len(text)
    with naming(row):
        if not prompt:
            return len(tokenizer.encode_document(text, remarks))
        return len(tokenizer.encode_response(response, prompt, finished=finished, ids=ids, remarks=remarks))


def lines(findings: Findings) -> list[str]:
    """The findings as text; a line that starts with ! says that something is likely to be wrong."""
    kinds = ", ".join(f"{count} {kind}" for kind, count in findings["kinds"].items())
    held_out = f", {findings['held_out']} held out" if findings["held_out"] else ""
    text = [f"  {findings['rows']} rows{held_out}: {kinds}"]
    places = lambda count, where: f"{', '.join(where)}{', ...' if count > len(where) else ''}"  # noqa: E731
    text += [f"! {each[0]} {reason}, dropped: {places(*each)}" for reason, each in findings["dropped"].items()]
    if findings["unread"]:
        text.append(f"  fields not read: {counts_of(findings['unread'])}")
    text += [f"! {each[0]} {remark}: {places(*each)}" for remark, each in findings["remarks"].items()]
    text.append(f"  {findings['unit']:<12}" + "".join(f"{f'{p}%':>8}" for p in PERCENTILES[:-1]) + "     max")
    text += [f"  {name:<12}" + "".join(f"{v:>8}" for v in values) for name, values in findings["lengths"].items()]
    for name, limit in zip(("prompts", "rows"), findings["limits"], strict=True):
        value = findings[f"cut_{name}"]
        text.append(f"{'!' if value > 0.05 else ' '} {value:.1%} of {name} over {limit} {findings['unit']}")
    abouts = ("rows are there twice", "rows have the id of another", "held-out rows have a prompt of training")
    for name, about in zip(("repeated", "ids", "leaked"), abouts, strict=True):
        count, where = findings[name]
        if (name == "leaked" and not findings["held_out"]) or (name == "ids" and not count):
            continue
        text.append(f"{'!' if count else ' '} {count} {about}" + (f": {', '.join(where)}" if count else ""))
    if "gaps" in findings and "pairs" not in findings:
        text.append(f"  {findings['gaps']} pairs of responses, which nobody has compared: label, judge or score them")
    if "pairs" in findings:
        r, wins, gaps = findings["length_correlation"], findings["longer_wins"], findings["gaps"]
        raters = f"{findings['raters']} named raters"
        text.append(f"  {findings['pairs']} compared pairs, {findings['ties']} tied, {raters}")
        text += [f"  {gaps} pairs of one row that nobody compared have no label"] if gaps else []
        length = f"the longer response wins {wins:.1%} of pairs, correlation with the label {r:+.3f}"
        length = "no two responses differ in it that are not tied" if wins != wins else length
        text.append(f"{'!' if abs(r) > 0.2 else ' '} length: {length}")
        if findings["agreement"] is not None:
            text.append(f"  raters agree on {findings['agreement']:.1%} of the pairs that two of them judged")
    return text


def render(row: Row, tokenizer: Tokenizer, *, loss_on: str, color: bool) -> str:
    """A row as the model sees it; what is trained on is green (red if it is worse), or in [[ ]] without colour."""
    head = printable(f"--- {row['_where']}: {schemas.kind_of(row)}")
    try:
        prompt, answers, ranking = _parts(row)
        if ranking is None and answers:
            wide = Limits(10**9, 10**9 + 1, "error")
            bad = layout_of(row) == "unpaired preference" and not schemas.flag_of(row, "label")
            row = {**row, "label": True} if bad else row  # sft drops it, but it is there to be looked at
            examples, _ = sft_examples([row], tokenizer, wide, loss_on=loss_on)
            tone = RED if bad else GREEN
            return "\n".join([head, *[_marked(e["tokens"], e["loss_mask"], tokenizer, tone, color) for e in examples]])
        text = printable(tokenizer.prompt_text(prompt), lines=True)
        shown = [head, f"{DIM}{text}{PLAIN}" if color else text]
        ranks = ranking.consensus()[0] if ranking is not None else np.zeros(0)
        for (response, finished, sampled, _), rank in zip(answers, ranks, strict=True):
            ids = np.array(tokenizer.encode_response(response, prompt, finished=finished, ids=sampled))
            tone = RED if rank > min(ranks) else GREEN  # all are equal where nobody compared them
            name = "response" if np.isnan(rank) else f"rank {rank:g}"
            shown.append(f"{name}: " + _marked(ids, np.ones(len(ids), bool), tokenizer, tone, color))
        return "\n".join(shown)
    except DroppedRow as drop:
        return f"{head}\ndropped {drop.reason}"


def _marked(ids: np.ndarray, mask: np.ndarray, tokenizer: Tokenizer, tone: str, color: bool) -> str:
    """The text of some ids, those in `mask` set off."""
    starts = [0, *(np.flatnonzero(np.diff(mask)) + 1).tolist(), len(ids)]
    spans = []
    for start, end in pairwise(starts):
        text = printable(tokenizer.seen(ids[start:end].tolist()), lines=True)
        if color:
            spans.append(f"{tone if mask[start] else DIM}{text}{PLAIN}")
        else:
            spans.append(f"[[{text}]]" if mask[start] else text)
    return "".join(spans)
