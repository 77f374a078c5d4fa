"""Chat templates: what is trained is what the template writes, and begins where the model would begin to sample."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from chats import (  # fmt: skip
    CHATML,
    CONVERSATIONS,
    DEAF,
    DEEPSEEK,
    EMPTY_THOUGHT,
    MISTRAL,
    OPENED_THOUGHT,
    PHI,
    TALK,
    TEMPLATES,
    answer,
    chat_tokenizer,
    user,
)
from tiny import byte_tokenizer

from rlhf_jax.data import lint
from rlhf_jax.data.comparisons import preference_examples
from rlhf_jax.data.encoding import Limits
from rlhf_jax.data.examples import prompt_examples, sft_examples
from rlhf_jax.data.sources import rows_from
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.errors import UserError

GOLDEN = json.loads((Path(__file__).parent / "golden" / "chat.json").read_text())
LIMITS = Limits(400, 800, "error")
each_template = pytest.mark.parametrize("name", TEMPLATES)
FOLLOWS = "answers to a prompt that the chat template writes otherwise once they are there"
MERGED = "answers whose start and the prompt's end would be one token, had they been one text"
CHANGED = "turns whose text the chat template changes or leaves out"


def tokenizer_of(template, **options):
    named = TEMPLATES.get(template, template) if isinstance(template, str) else template
    return Tokenizer(chat_tokenizer(named), **options)


def tokens_of(tokenizer, row, loss_on="response"):
    """(prompt ids that are sampled from, tokens, targets, remarks) of a row."""
    [example], report = sft_examples(rows_from([row]), tokenizer, LIMITS, loss_on=loss_on)
    prompts = row.get("prompt") or row["messages"][:-1]
    [asked], _ = prompt_examples(rows_from([{"prompt": prompts}]), tokenizer, Limits(400, too_long="error"))
    tokens = example["tokens"].tolist()
    return asked["tokens"].tolist(), tokens, example["tokens"][example["loss_mask"]].tolist(), report.remarks


@each_template
@pytest.mark.parametrize("case", CONVERSATIONS)
def test_prompt_and_answer_are_those_that_trl_makes_of_the_conversation(name, case):
    """TRL's ids of the whole, up to the token that stops; where its prompt is no beginning, see the rules below."""
    tokenizer, (prompt, said) = tokenizer_of(name), CONVERSATIONS[case]
    row, golden = {"prompt": prompt, "response": [said]}, GOLDEN[name][case]
    if golden is None:
        with pytest.raises(UserError, match=r"row 0: the chat template refuses these messages \(no system turn\)"):
            tokens_of(tokenizer, row)
        return
    if case == "thought apart" and "thought" not in name:
        with pytest.raises(UserError, match='row 0: the chat template does not write "reasoning_content"'):
            tokens_of(tokenizer, row)
        return
    given, tokens, targets, remarks = tokens_of(tokenizer, row)
    assert tokens == given + targets and targets.count(tokenizer.end_id) == 1 and targets[-1] == tokenizer.end_id
    size = golden["prompt"]
    if {FOLLOWS, MERGED} & set(remarks):
        assert golden["ids"][: len(given)] != given
        return
    assert golden["ids"][: len(tokens)] == tokens
    assert not tokenizer.hf.decode(golden["ids"][len(tokens) :], skip_special_tokens=True).strip()
    assert given == golden["ids"][:size] or name in ("deaf",)


@each_template
def test_without_a_remark_both_are_what_transformers_renders(name):
    """Where the sampled prompt is a beginning of the conversation, in many forms of white space and words."""
    tokenizer, seen = tokenizer_of(name), 0
    for before in ("", " ", "\n", "\n\n"):
        for after in ("", " ", "\n\n"):
            said = answer(f"{before}yes 7{after}")
            remarks = Counter()
            given = tokenizer.encode_prompt(TALK)
            ids = tokenizer.encode_response([said], TALK, remarks=remarks)
            whole = tokenizer.hf.apply_chat_template([*TALK, said], return_dict=False)
            if whole[: len(given)] == given:
                assert (given + ids) == whole[: len(given) + len(ids)]
                assert ids[-1] == tokenizer.end_id
                seen += 1
            else:
                assert {FOLLOWS, MERGED} & set(remarks)
    assert seen > 5 or name in ("deepseek", "opened thought")


def test_a_template_that_knows_no_generation_prompt_keeps_the_header_before_the_answer():
    for template, header in ((DEAF, "<|im_start|>assistant\n"), ("{% for m in messages %}{{ m.role + ': ' + m.content "
                             "+ '\n' }}{% endfor %}", "assistant:")):  # fmt: skip
        tokenizer = tokenizer_of(template)
        assert tokenizer.prompt_text([user("hi")]).endswith(header)
        given, tokens, targets, _ = tokens_of(tokenizer, {"prompt": [user("hi")], "response": "yes"})
        assert tokenizer.hf.decode(given).endswith(header)
        whole = tokenizer.hf.apply_chat_template([user("hi"), answer("yes")], return_dict=False)
        assert tokens[:-1] == whole[: len(tokens) - 1]
        assert tokenizer.response_text(targets, [user("hi")]) == "yes"


OPENED = [
    ("yes", "\n</think>\n\nyes"),
    ("<think>\nhm\n</think>\n\nyes", "hm\n</think>\n\nyes"),
    ("<think>hm</think>yes", "hm</think>yes"),
    ("hm\n</think>\n\nyes", "hm\n</think>\n\nyes"),
    ("  <think>\nhm\n</think>\n\nyes", "hm\n</think>\n\nyes"),
]


@pytest.mark.parametrize(("content", "wanted"), OPENED)
def test_an_answer_goes_on_in_the_thought_that_its_prompt_opens(content, wanted):
    tokenizer = tokenizer_of(DEEPSEEK)
    given, tokens, targets, remarks = tokens_of(tokenizer, {"prompt": [user("hi")], "response": content})
    assert tokenizer.hf.decode(given).endswith("<|A|><think>\n")
    assert tokenizer.hf.decode(targets) == wanted + "<eos>"
    assert tokenizer.hf.decode(tokens).count("<think>") == tokenizer.hf.decode(tokens).count("</think>") == 1
    assert remarks[FOLLOWS] == 1


@pytest.mark.parametrize("opening", ["[THINK]", "<reason>\n", "◁think▷", "<seed:think>\n\n"])
def test_thoughts_by_other_names(opening):
    tag = opening.strip()
    tokenizer = tokenizer_of(DEEPSEEK.replace("<think>\n", opening).replace("</think>", f"{tag[0]}/{tag[1:]}"))
    _, tokens, _, _ = tokens_of(tokenizer, {"prompt": [user("hi")], "response": "yes"})
    text = tokenizer.hf.decode(tokens)
    assert text.count(tag) == text.count(f"{tag[0]}/{tag[1:]}") == 1 and text.endswith("yes<eos>")


def test_a_thought_in_the_conversation_that_is_written_without_a_line_break_is_gone_on_in():
    """The prompt opens <think> and a line break, the conversation has <think></think>."""
    template = CHATML.replace("m.content", "('<think></think>' if m.role == 'assistant' else '') + m.content")
    template = template.replace("assistant\n' }}{% endif", "assistant\n<think>\n' }}{% endif")
    tokenizer = tokenizer_of(template)
    _, _, targets, _ = tokens_of(tokenizer, {"prompt": [user("hi")], "response": "yes"})
    assert tokenizer.hf.decode(targets) == "</think>yes<|im_end|>"


def test_where_nothing_shows_the_answers_place_the_row_is_named():
    jumbled = (
        "{% for m in messages %}{{ m.content | reverse }}{% endfor %}{{ messages | length }}"
        "{% if add_generation_prompt %}{{ '<|A|>' }}{% endif %}"
    )
    with pytest.raises(UserError, match=r"row 0: the chat template .*; use .*"):
        tokens_of(tokenizer_of(jumbled), {"prompt": [user("hi")], "response": "yes"})


def test_a_prompt_that_changes_once_it_is_answered_is_still_the_one_that_is_sampled_from():
    """As Mistral's, which writes the system turn into the last turn, if that is the user's."""
    template = MISTRAL.replace("'[INST] ' +", "'[INST] ' + ('Be brief. ' if loop.last else '') +")
    tokenizer = tokenizer_of(template)
    given, _, targets, remarks = tokens_of(tokenizer, {"prompt": [user("hi")], "response": "yes"})
    assert "Be brief." in tokenizer.hf.decode(given) and tokenizer.hf.decode(targets) == " yes<eos>"
    assert tokenizer.response_text(targets, [user("hi")]) == "yes"
    assert remarks[FOLLOWS] == 1


# ---- stop tokens


@pytest.mark.parametrize("name", ["chatml", "mistral", "phi", "two close", "llama", None])
def test_a_text_that_ends_in_a_stop_tokens_text_gets_one_stop_id(name):
    tokenizer = tokenizer_of(name)
    stops = tokenizer.hf.convert_ids_to_tokens(list(tokenizer.eos_ids))
    plain = {"prompt": [user("hi")], "response": "yes"}
    for prompt in ([user("hi")], "hi"):
        wanted = tokens_of(tokenizer, {**plain, "prompt": prompt})[2]
        for stop in stops:
            for end in (stop, stop + stop, f"{stop}\n", f"{stop} {stops[0]} "):
                row = {"prompt": prompt, "response": "yes" + end}
                _, _, targets, remarks = tokens_of(tokenizer, row)
                assert targets == wanted and sum(i in tokenizer.eos_ids for i in targets) == 1
                assert remarks["responses or documents that already ended in a stop token's text"] == 1
                pair = {"prompt": prompt, "chosen": "yes" + end, "rejected": "no"}
                [found], _ = preference_examples(rows_from([pair]), tokenizer, LIMITS)
                for side in ("chosen", "rejected"):
                    ids = found[side][found["prompt_length"] :].tolist()
                    assert [i in tokenizer.eos_ids for i in ids] == [False] * (len(ids) - 1) + [True]
    for loss_on in ("response", "all"):
        [document], report = sft_examples(rows_from([{"text": "yes<eos>\n"}]), tokenizer, LIMITS, loss_on=loss_on)
        assert document["tokens"].tolist().count(tokenizer.eos_ids[0]) == 1 and report.remarks
    assert tokens_of(tokenizer, {"prompt": "hi", "response": "yes" + stops[0], "finished": False})[2] == wanted[:-1]


def test_an_earlier_answer_with_its_stop_token_written_out_is_closed_once():
    tokenizer, talk = tokenizer_of(CHATML), [user("a"), answer("b<|im_end|>"), user("c")]
    remarks = Counter()
    assert tokenizer.encode_prompt(talk, remarks) == tokenizer.encode_prompt(TALK)
    assert +remarks == {"responses or documents that already ended in a stop token's text": 1}


@pytest.mark.parametrize("prompt", ["a<|im_end|>", "a<eos>\n", [user("a<|im_end|>")], [*TALK[:2], user("<eos>")]])
def test_a_stop_token_that_ends_a_question_stays_and_is_marked(prompt):
    tokenizer = tokenizer_of(CHATML)
    rows = rows_from([{"prompt": prompt, "response": "b"}])
    said = lint.lines(lint.inspect(rows, [], tokenizer, 100, 100))
    text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    name = "<eos>" if "<eos>" in text else "<|im_end|>"
    assert f"! 1 prompts in which {name} is written out and read as the token: row 0" in said
    assert tokenizer.hf.convert_tokens_to_ids(name) in tokenizer.encode_prompt(prompt)


# ---- all answers of a conversation


@pytest.mark.parametrize("template", ["chatml", "trims", "llama", "gemma", "mistral", "two close", "deaf", "phi"])
@pytest.mark.parametrize("word", [False, True])
def test_every_answer_is_learned_with_what_closes_it(template, word):
    """The word generation in a text, a comment or a variable of the template is no tag."""
    source = TEMPLATES[template]
    if word:
        source += "{# {% generation %} #}{% set generation = 'generation' %}"
    tokenizer = tokenizer_of(source)
    said = "a generation ago" if word else "b"
    talk = [user("a " + said), answer(f" {said}\n"), user("c"), answer("d")]
    _, tokens, targets, _ = tokens_of(tokenizer, {"messages": talk}, "assistant")
    wanted = [*tokenizer.encode_response(talk[1:2], talk[:1]), *tokenizer.encode_response(talk[3:], talk[:3])]
    assert targets == wanted and targets.count(tokenizer.end_id) == 2
    assert tokens_of(tokenizer, {"messages": talk}, "response")[1] == tokens


@pytest.mark.parametrize("end", ["{{ eos_token }}", "{{ '<over>' + eos_token }}", "[DONE]", "{{ bos_token }}"])
@pytest.mark.parametrize("close", ["<|end|>\n", "\n\n", " <|end|> ", "<"])
def test_what_ends_the_whole_conversation_closes_the_last_answer_alone(end, close):
    """As in Phi-3's template, for a tokenizer in which none of its tags is a token."""
    source = PHI.replace("<|end|>\n", close.replace("\n", "\\n")).replace("{{ eos_token }}", end)
    tokenizer = Tokenizer(byte_tokenizer(bos=True, chat_template=source))
    talk = [user("a"), answer("b"), user("c"), answer("d"), user("e")]
    prompt, learned = np.array(tokenizer.encode_prompt(talk)), tokenizer.answers_in(talk)
    assert tokenizer.decode(prompt[learned]) == f"b{close.rstrip()}d{close.rstrip()}"
    response = tokenizer.encode_response([answer("f")], talk)
    assert tokenizer.decode(response).startswith("f") and response[-1] in tokenizer.eos_ids


@pytest.mark.parametrize("tag", ["{% generation %}", "{%- generation -%}", "{%generation%}"])
def test_the_tag_marks_answers_in_whatever_form(tag):
    source = CHATML.replace(
        "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}",
        "{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}" + tag + "{{ m.content + '<|im_end|>' }}"
        "{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}",
    )
    tokenizer, plain = tokenizer_of(source), tokenizer_of(CHATML)
    row = {"messages": [*TALK, answer("d")]}
    assert tokens_of(tokenizer, row, "assistant") == tokens_of(plain, row, "assistant")
    silent = tokenizer_of(source.replace("m.role == 'assistant'", "m.role == 'model'"))
    with pytest.raises(UserError, match="row 0: the chat template marks none of these answers"):
        tokens_of(silent, row, "assistant")


BLANK = (  # the prompt ends in a blank, which is one token with the word that follows
    "{% for m in messages %}{{ m.role + ': ' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|done|>' }}{% endgeneration %}{% else %}{{ m.content + '\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize("said", ["y", "yes", " yes", "\nyes", "no", "茶"])
def test_the_token_that_an_earlier_answer_shares_with_its_header_is_learned(marked, said):
    """Else an answer of one word is not learned at all; transformers' mask of {% generation %} is the oracle."""
    source = BLANK if marked else BLANK.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    tokenizer, talk = tokenizer_of(source), [user("a"), answer(said), user("b")]
    whole = chat_tokenizer(BLANK).apply_chat_template(
        talk, add_generation_prompt=True, return_dict=True, return_assistant_tokens_mask=True
    )
    assert tokenizer.encode_prompt(talk) == whole["input_ids"]
    assert tokenizer.answers_in(talk).tolist() == [bool(mask) for mask in whole["assistant_masks"]]


@pytest.mark.parametrize("template", ["chatml", "default system", "llama", "two close", "deaf", "mistral"])
def test_an_answer_that_starts_the_conversation_is_learned(template):
    source = TEMPLATES[template] + "{% if not messages[0] %}{{ raise_exception('no messages') }}{% endif %}"
    tokenizer, talk = tokenizer_of(source), [answer("hello"), user("c"), answer("d")]
    _, _, targets, _ = tokens_of(tokenizer, {"messages": talk}, "assistant")
    wanted = [tokenizer.encode_response([turn]) for turn in talk[::2]]
    assert targets == wanted[0] + wanted[1]


def test_weights_say_which_answers_are_learned():
    tokenizer = tokenizer_of(CHATML)
    talk = [user("a"), answer("b"), user("c"), answer("d")]

    def learned(loss_on, *weights):
        turns = [{**turn, **({"weight": w} if w is not None else {})} for turn, w in zip(talk, weights, strict=True)]
        return tokenizer.decode(tokens_of(tokenizer, {"messages": turns}, loss_on)[2])

    assert learned("assistant", None, 1, None, 1) == "bd" and learned("assistant", None, 0, None, 1) == "d"
    assert learned("assistant", None, 1, None, 0) == "b" and learned("response", None, 0, None, 1) == "d"
    with pytest.raises(UserError, match=r"no token of it is learned with sft\.loss_on assistant"):
        learned("assistant", None, 0, None, 0)
    with pytest.raises(UserError, match="1 with an answer of weight 0"):
        learned("response", None, 1, None, 0)
    with pytest.raises(UserError, match=r'"weight", which sft\.loss_on all does not know'):
        learned("all", None, 0, None, 1)
    with pytest.raises(UserError, match=r"has weight 0.5; give 1, or 0 for an answer not to learn"):
        learned("assistant", None, 0.5, None, 1)


@pytest.mark.parametrize("template", [EMPTY_THOUGHT, OPENED_THOUGHT, DEEPSEEK])
def test_answers_that_change_once_they_are_earlier_ones_are_refused(template):
    with pytest.raises(UserError, match="row 0: the chat template changes earlier turns when later ones follow"):
        tokens_of(tokenizer_of(template), {"messages": [*TALK, answer("d")]}, "assistant")


# ---- named templates


def test_of_several_templates_the_default_is_taken():
    named = tokenizer_of({"default": CHATML, "rag": "{{ nothing }}"})
    plain = tokenizer_of(CHATML)
    row = {"messages": [*TALK, answer("d")]}
    for loss_on in ("response", "assistant"):
        assert tokens_of(named, row, loss_on) == tokens_of(plain, row, loss_on)
    for names in (["rag"], ["rag", "tool_use"]):
        said = (
            f"several chat templates and none named default: {', '.join(names)}; save the one to use as chat_template"
        )
        with pytest.raises(UserError, match=said):
            tokenizer_of(dict.fromkeys(names, CHATML))


# ---- what a message says besides its content

TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
CALL = {"tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]}
WITH_TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\n' + tools | tojson + '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{% for c in m.tool_calls %}{{ '<tool_call>' + c.function | tojson + '</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
USED = [user("1 + 1?"), answer("", **CALL), {"role": "tool", "content": "2"}]


def test_tools_calls_and_results_are_what_the_template_writes():
    tokenizer = tokenizer_of(WITH_TOOLS)
    for talk in ([*USED, answer("It is 2.")], [user("1 + 1?"), answer(None, **CALL)]):
        _, tokens, targets, remarks = tokens_of(tokenizer, {"messages": talk, "tools": TOOLS})
        plain = [{"content": "", **{k: v for k, v in turn.items() if v is not None}} for turn in talk]
        whole = tokenizer.hf.apply_chat_template(plain, tools=TOOLS, return_dict=False)
        assert whole[: len(tokens)] == tokens and not remarks
        assert "add" in tokenizer.hf.decode(tokens)
    assert "<tool_call>" in tokenizer.hf.decode(targets)
    pair = {"prompt": USED[:1], "tools": TOOLS, "chosen": [USED[1]], "rejected": "no"}
    [found], _ = preference_examples(rows_from([pair]), tokenizer, LIMITS)
    assert "<tool_call>" in tokenizer.hf.decode(found["chosen"]) and '"add"' in tokenizer.hf.decode(found["rejected"])


def test_what_is_written_with_tools_is_read_again():
    """Prompts carry their tools wherever they go: as a first turn of role template."""
    tokenizer = tokenizer_of(WITH_TOOLS)
    [asked], _ = prompt_examples(
        rows_from([{"prompt": USED[:1], "tools": TOOLS}]), tokenizer, Limits(400, too_long="error")
    )
    stored = [{"role": "template", "tools": TOOLS}, *USED[:1]]
    given, *_ = tokens_of(tokenizer, {"prompt": stored, "response": "2"})
    assert given == asked["tokens"].tolist() and '"add"' in tokenizer.hf.decode(given)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": [user("a"), answer("b", **CALL)]}, '"tool_calls"'),
        ({"messages": [user("a"), answer("b", reasoning_content="c")]}, '"reasoning_content"'),
        ({"messages": [user("a"), answer("b", thinking="c")]}, '"thinking"'),
        ({"messages": [user("a"), answer("b", function_call={"name": "c"})]}, '"function_call"'),
        (
            {"messages": [user("a"), answer("b", **CALL), {"role": "tool", "content": "c"}, answer("d")]},
            '"tool_calls"',
        ),
        ({"messages": [user("a"), answer("b")], "tools": TOOLS}, '"tools"'),
        ({"messages": [user("a"), answer("b")], "documents": [{"title": "c", "text": "d"}]}, '"documents"'),
        ({"messages": [user("a"), answer("b")], "chat_template_kwargs": {"thinking": False}}, '"thinking"'),
        (
            {"messages": [user("a"), answer("b")], "chat_template_kwargs": {"add_generation_prompt": True}},
            'row 0: "chat_template_kwargs" is',
        ),
        ({"prompt": "a", "response": "b", "tools": TOOLS}, '"tools" needs a prompt of messages'),
        ({"prompt": "a", "response": [answer("b", **CALL)]}, '"tool_calls", which needs a prompt of messages'),
        ({"messages": [user([{"type": "image"}]), answer("b")]}, "part of type 'image'"),
    ],
)
def test_what_nobody_writes_is_refused_by_name(row, said):
    for template in (CHATML, None):
        tokenizer = tokenizer_of(template)
        with pytest.raises(UserError, match=r"^row 0: ") as caught:
            sft_examples(rows_from([row]), tokenizer, LIMITS, loss_on="response")
        assert said in str(caught.value) or (template is None and "need" in str(caught.value))


def test_names_and_the_like_are_counted_and_changed_turns_too():
    tokenizer = tokenizer_of(CHATML)
    row = {"messages": [{**user("a"), "name": "Ann", "id": 3}, answer("b", id=4)]}
    _, _, _, remarks = tokens_of(tokenizer, row)
    assert remarks == {
        'prompts or answers whose "id" is not written': 2,
        'prompts or answers whose "name" is not written': 1,
    }
    deaf = tokenizer_of(
        "{% for m in messages if m.role != 'system' %}{{ '<|' + m.role + '|>' + m.content }}{% endfor %}"
    )
    rows = [{"messages": [{"role": "system", "content": "Be brief."}, user("a"), answer("b")]}]
    _, report = sft_examples(rows_from(rows), deaf, LIMITS, loss_on="response")
    assert report.remarks[CHANGED] == 1 and f"1 {CHANGED}" in str(report)


def test_fields_that_nothing_reads_are_counted_by_name():
    tokenizer = tokenizer_of(CHATML)
    rows = [{"prompt": "a", "response": "b", "system": "Be brief.", "lang": 1}]
    rows += [{"prompt": "a", "response": "c", "lang": 2}]
    _, report = sft_examples(rows_from(rows), tokenizer, LIMITS, loss_on="response")
    assert report.unread == {"system": 1, "lang": 2} and "fields not read: 'system' of 1, 'lang' of 2" in str(report)
    assert "fields not read: 'system' of 1" in "\n".join(lint.lines(lint.inspect(rows_from(rows), [], None, 9, 9)))
    _, report = prompt_examples(rows_from(rows), tokenizer, Limits(9, too_long="error"))
    assert not report.unread  # they are columns for reward functions
    pair = {"prompt": [user("a")], "chosen": [answer("b", weight=0)], "rejected": "c"}
    with pytest.raises(UserError, match='row 0: a response has a "weight", which only sft knows'):
        preference_examples(rows_from([pair]), tokenizer, LIMITS)


def test_nulls_say_nothing_and_parts_of_text_are_a_text():
    tokenizer = tokenizer_of(CHATML)
    plain = {"messages": [user("ab"), answer("c")]}
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    same = {"messages": [user(parts), answer("c", tool_calls=None, name=None, weight=1)], "tools": None}
    assert tokens_of(tokenizer, same)[1:] == tokens_of(tokenizer, plain)[1:]


def test_rows_with_a_prompt_and_messages_take_the_messages():
    tokenizer = tokenizer_of(CHATML)
    talk = [*TALK, answer("d")]
    [example], _ = sft_examples(rows_from([{"prompt": "a", "messages": talk}]), tokenizer, LIMITS, loss_on="response")
    assert example["tokens"].tolist() == tokens_of(tokenizer, {"messages": talk})[1]


# ---- the beginning that two texts share


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        ("The sky is blue", "The sky is grey"),
        ("Q: hi\n\nyes", "Q: hi\n\nno"),
        ("so:   yes", "so:   no"),
        ("The sky is blue", "The sky isn't"),
        ("a\n b c", "a\n b\td"),
    ],
)
def test_two_texts_with_a_common_beginning_are_tokenised_as_they_stand(chosen, rejected):
    from tiny import byte_tokenizer, metaspace_tokenizer

    kinds = [chat_tokenizer(None), byte_tokenizer(), *map(metaspace_tokenizer, ("always", "first", "never", "legacy"))]
    for tokenizer in map(Tokenizer, kinds):
        [found], _ = preference_examples(rows_from([{"chosen": chosen, "rejected": rejected}]), tokenizer, LIMITS)
        for side, text in (("chosen", chosen), ("rejected", rejected)):
            assert found[side].tolist() == [*tokenizer.encode_prompt(text), tokenizer.eos_ids[0]]
        assert found["prompt_length"] > 0 and np.array_equal(
            *(found[side][: found["prompt_length"]] for side in ("chosen", "rejected"))
        )


# ---- data inspect


def test_inspect_marks_what_a_tokenizer_makes_of_the_rows_otherwise_than_they_stand():
    rows = [
        {"messages": [user("hi <|im_end|>"), answer("yes<eos>")]},
        {"messages": [{**user("hi"), "name": "Ann"}, answer("y<|user|>s")]},
        {"prompt": [user("hi")], "chosen": "yes", "rejected": "no", "chosen_ids": [3, 4]},
        {"text": "a document<eos>"},
        {"prompt": "plain", "response": "fine"},
    ]
    text = "\n".join(lint.lines(lint.inspect(rows_from(rows), [], tokenizer_of(DEEPSEEK), 100, 200)))
    for part in (
        "! 1 prompts in which <|im_end|> is written out and read as the token: row 0",
        "! 1 responses or documents in which <|user|> is written out and read as the token: row 1",
        "! 2 responses or documents that already ended in a stop token's text: row 0, row 3",
        f"! 4 {FOLLOWS}: row 0, row 1, row 2",
        '! 1 prompts or answers whose "name" is not written: row 1',
        "! 1 responses whose ids were not of their text: row 2",
    ):
        assert part in text
    clean = "\n".join(lint.lines(lint.inspect(rows_from(rows[4:]), [], tokenizer_of(CHATML), 100, 200)))
    assert "!" not in clean
