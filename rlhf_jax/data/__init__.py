"""From rows to step-indexed numpy batches. Imports no jax. The files, in the order in which data goes through:

rows               what a row is, its kind by its fields, and what is said of a bad one
sources fields     rows of files, frames and lists, by a field map, votes on one item joined; tfds_rows tfds_builder
messages schemas   one row in, one normalised row out, prompts and answers as texts or messages; numbers: of rows
tokenizer chat     prompts and answers to token ids and back; rendering runs a chat template; backend padding
encoding           rows to ids within the limits of a load, and the report of what became of each
examples           demonstrations, documents, prompts as examples; comparisons: pairs, rankings, judged answers
collate batches    examples to arrays of one shape, and the batch of a step; loading: all of that for a config
ballots gathering  what raters say of responses, joined by prompt; rankings consensus agreement: what they say together
pairs lint         labelled responses to rows that train; what may be wrong with rows
"""
