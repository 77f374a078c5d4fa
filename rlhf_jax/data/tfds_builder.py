"""The TFDS builder of the schemas, one config each. Imports TFDS, so import it where it is used only."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import tensorflow_datasets as tfds

from rlhf_jax.data.rows import Row

TEXT, FLAGS, NUMBERS = tfds.features.Text(), tfds.features.Sequence(np.bool_), tfds.features.Sequence(np.float64)
IDS = {"ids": tfds.features.Sequence(np.int64), "num_ids": tfds.features.Sequence(np.int64)}
MESSAGES = tfds.features.Sequence({"role": TEXT, "content": TEXT})

LAYOUTS: dict[str, dict[str, object]] = {
    "sft": {"prompt": MESSAGES, "response": TEXT, "finished": np.bool_, **IDS},
    "preference": {
        "prompt": MESSAGES, "chosen": TEXT, "rejected": TEXT, "finished": FLAGS, "votes": NUMBERS,
        "margin": np.float64, "rater": TEXT, **IDS,
    },
    "ranking": {
        "prompt": MESSAGES, "responses": tfds.features.Sequence(TEXT), "finished": FLAGS,
        "raters": tfds.features.Sequence(TEXT), "ranks": NUMBERS, **IDS,
    },
    "prompts": {"prompt": MESSAGES, "columns": TEXT},
}  # fmt: skip
"""Schema -> features. A prompt that is a string is one message of no role; ranks are those of all raters in a row.
`ids` are those of all responses in a row, `num_ids` how many each has, -1 where none are known."""


class Feedback(tfds.core.GeneratorBasedBuilder):
    """Human feedback as `rlhf_jax.data.tfds_rows.stored` makes it.

    Attributes:
        rows: split -> rows, to be set before `download_and_prepare`.
    """

    code_path = None  # no checksums beside this file; looking for them needs importlib_resources
    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=each, description=f"{each} rows") for each in LAYOUTS]  # noqa: RUF012
    rows: dict[str, list[Row]] = {}  # noqa: RUF012

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(LAYOUTS[self.builder_config.name])
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, manager: object) -> dict[str, Iterator[tuple[int, Row]]]:
        return {split: self._generate_examples(rows) for split, rows in self.rows.items()}

    def _generate_examples(self, rows: list[Row]) -> Iterator[tuple[int, Row]]:
        yield from enumerate(rows)
