"""Happy stories: openings for a model of children's stories, and a short gold reward that can be read and hacked.

The gold reward counts kind words. It has the two weaknesses that real rewards have: it pays for length, and does not
see negation or nonsense ("happy happy happy." earns the most of one sentence), so over-optimisation can be read in the
samples.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rlhf_jax.errors import UserError
from rlhf_jax.tasks import write_rows

POSITIVE_WORDS = """
    amazing beautiful best better brave bright calm celebrate cheer cheered delicious delighted dream enjoy enjoyed
    excited fantastic favorite favourite friend friendly friends fun funny gentle giggle giggled glad good grateful
    great happier happily happy helped helpful hope hug hugged hugs joy joyful kind kindness kiss kissed laugh
    laughed laughing laughs love loved lovely loves lucky magical nice perfect pleased pretty proud safe shared
    smile smiled smiles smiling special strong sweet thank thanked thankful thanks treat warm wonderful yay yummy
"""
NEGATIVE_WORDS = """
    afraid alone angry awful bad bite bored break broke broken cried cries cry crying dangerous dark die died dirty
    fear fell fight fought frightened frown frowned grumpy hate hated hit hurt jealous lonely lost mad mean mess
    monster naughty nervous pain poor pushed rude sad sadly scared scary scream screamed selfish shouted sick sorry
    stole storm stuck tears terrible tired trouble ugly unhappy upset weak worried worry worse worst wrong yelled
"""
POSITIVE, NEGATIVE = frozenset(POSITIVE_WORDS.split()), frozenset(NEGATIVE_WORDS.split())
SENTIMENT_LIMIT = 3.0
LENGTH_BONUS = 0.01
LENGTH_LIMIT = 100

GIRLS = ("Lily", "Mia", "Sue", "Anna", "Lucy", "Sara", "Emma", "Amy", "Jane", "Ella")
BOYS = ("Tom", "Ben", "Tim", "Max", "Sam", "Jack", "Bob", "Joe", "Billy", "Leo")
NATURES = ("little", "small", "young", "shy", "curious", "kind")
ANIMALS = ("cat", "dog", "bird", "bunny", "bear", "mouse", "frog", "duck", "fox", "fish")
PLACES = ("park", "beach", "zoo", "store", "farm", "forest", "lake", "garden")
HOMES = ("in a big house", "in a tall tree", "near the river", "on a farm", "in the forest")
THINGS = ("ball", "box", "toy car", "hat", "book", "flower", "rock", "doll")


def sentiment(prompts: Sequence[str], responses: Sequence[str], **columns: object) -> list[float]:
    """The gold reward: (positive words - negative words) / sentences, clipped to +-3, + 0.01 min(words, 100).

    The second term is a flaw left in on purpose: whatever the words say, 100 of them earn one point. "Tom was happy.
    He was not sad." has a positive and a negative word, so it scores 0 / 2 + 0.07. Only the response counts; a
    last sentence that is cut off is a sentence, and an empty response scores 0.
    """
    return [_sentiment(response) for response in responses]


def _sentiment(response: str) -> float:
    """`sentiment` of one response."""
    sentences = [words for part in re.split(r"[.!?]+", response.lower()) if (words := re.findall(r"[a-z']+", part))]
    words = list(itertools.chain.from_iterable(sentences))
    if not words:
        return 0.0
    balance = sum((word in POSITIVE) - (word in NEGATIVE) for word in words) / len(sentences)
    return float(np.clip(balance, -SENTIMENT_LIMIT, SENTIMENT_LIMIT)) + LENGTH_BONUS * min(len(words), LENGTH_LIMIT)


def judge(prompt: str, a: str, b: str) -> float:
    """The chance that a judge prefers `a`, sigmoid(2 (sentiment(a) - sentiment(b)) + 0.5): it likes the first place.

    A judge by name, as judge.function takes one.
    """
    return 1 / (1 + math.exp(-2 * (_sentiment(a) - _sentiment(b)) - 0.5))


def prompts(num: int, seed: int) -> list[dict[str, str]]:
    """`num` distinct story openings as rows {"prompt"}, in random order; each template has the same chance.

    Raises:
        UserError: more are asked for than the templates hold.
    """
    rng = np.random.default_rng(seed)
    decks = [list(rng.permutation(openings)) for openings in _openings()]
    total = sum(len(deck) for deck in decks)
    if not 0 <= num <= total:
        raise UserError(f"num {num} is not between 0 and the {total} openings there are; ask for fewer")
    rows: list[dict[str, str]] = []
    while len(rows) < num:
        decks = [deck for deck in decks if deck]
        rows.append({"prompt": str(decks[rng.integers(len(decks))].pop())})
    return rows


def write(directory: Path, num: int, seed: int) -> None:
    """prompts.jsonl, `num` openings, and eval_prompts.jsonl, a quarter as many others; for `rlhf-jax data make`."""
    rows = prompts(num + -(-num // 4), seed)
    write_rows(directory / "prompts.jsonl", rows[:num])
    write_rows(directory / "eval_prompts.jsonl", rows[num:])


def _openings() -> list[list[str]]:
    """Every opening, one list per template; no text occurs twice."""
    children = [(name, "girl", "her", "She") for name in GIRLS] + [(name, "boy", "his", "He") for name in BOYS]
    born = [
        f"Once upon a time, there was a {nature} {child} named {name}."
        for (name, child, _, _), nature in itertools.product(children, NATURES)
    ]
    outings = [
        f"One day, {name} went to the {place} with {whose} {parent}."
        for (name, _, whose, _), place, parent in itertools.product(children, PLACES, ("mom", "dad"))
    ]
    animals = [
        f"Once upon a time, there was a {nature} {animal}. The {animal} lived {home}."
        for nature, animal, home in itertools.product(NATURES, ANIMALS, HOMES)
    ]
    friends = [
        f"{girl} and {boy} liked to play. One day, they found a {thing} in the {place}."
        for (girl, boy), thing, place in itertools.product(zip(GIRLS, BOYS, strict=True), THINGS, PLACES)
    ]
    pets = [
        f"{name} had a {nature} {animal}. {pronoun} took the {animal} to the {place}."
        for (name, _, _, pronoun), nature, animal, place in itertools.product(
            children, NATURES[:2], ANIMALS[:6], PLACES[:4]
        )
    ]
    return [born, outings, animals, friends, pets]
