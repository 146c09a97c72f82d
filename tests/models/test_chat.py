"""Texts and conversations as tokens: as transformers renders them, and BOS never doubled, wherever it may come from."""

import dataclasses

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

import jaxmech as jm
from jaxmech.models.chat import encode_chat
from jaxmech.models.text import encode_prompts, token_ids

BOS = 2
TURNS = (
    "{% for m in messages %}<turn>{{ m.role }}\n{{ m.content | trim }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<turn>model\n{% endif %}"
)
# As Gemma 2's: no system role, and turns must alternate.
STRICT = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{{ '<turn>' + m['role'] + '\n' + m['content'] | trim + '<end>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<turn>model\n' }}{% endif %}"
)
TALK = [
    [{"role": "user", "content": "give me 5"}],
    [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello there"},
        {"role": "user", "content": "how much?"},
    ],
]


def make(adds_bos, template):
    names = ["<pad>", "<eos>", "<bos>", "<turn>", "<end>"]
    letters = "0123456789 abcdefghijklmnopqrstuvwxyz$.:?\n"
    backend = Tokenizer(models.WordLevel({t: i for i, t in enumerate([*names, *letters])}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.add_special_tokens(names)
    if adds_bos:
        backend.post_processor = TemplateProcessing(single=["<bos>", "$A"], special_tokens=[("<bos>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", chat_template=template
    )


@pytest.fixture(params=[True, False], ids=["tokenizer-adds-bos", "tokenizer-adds-none"])
def chatty(lm, request):
    def with_template(template, bos_id=BOS):
        config = dataclasses.replace(lm.config, bos_id=bos_id, vocab_size=64)
        return dataclasses.replace(lm, config=config, tokenizer=make(request.param, template))

    return with_template


def rows(encoded):
    tokens, mask = map(np.asarray, encoded)
    assert tokens.shape == mask.shape and tokens.shape[1] % 16 == 0
    assert (np.diff(mask.astype(int), axis=1) >= 0).all() and mask[:, -1].all()  # the padding is on the left
    return [tokens[i, mask[i]].tolist() for i in range(len(tokens))]


@pytest.mark.parametrize("template", ["{{ bos_token }}" + TURNS, TURNS, STRICT], ids=["bos", "no-bos", "gemma"])
@pytest.mark.parametrize("prompt", [True, False])
def test_chat_is_what_transformers_renders(chatty, template, prompt):
    lm = chatty(template)
    got = rows(encode_chat(lm, TALK, add_generation_prompt=prompt))
    for ids, talk in zip(got, TALK, strict=True):
        options = dict(tokenize=True, return_dict=False, add_generation_prompt=prompt)
        assert ids == lm.tokenizer.apply_chat_template(talk, **options)
        assert ids.count(BOS) == (template is not TURNS)
    header = token_ids(lm.tokenizer, "<turn>model\n")
    assert (got[0][-len(header) :] == header) == prompt


def test_bos_is_there_once(chatty):
    template = "{{ bos_token }}{{ messages[0].content }}"
    lm = chatty(template)
    said = [[{"role": "user", "content": text}] for text in ("hi", "<bos>hi", "a<bos>")]
    a, hi = token_ids(lm.tokenizer, "a"), token_ids(lm.tokenizer, "hi")
    for model in (lm, chatty(template, bos_id=None)):
        assert rows(encode_chat(model, said)) == [[BOS, *hi], [BOS, *hi], [BOS, *a, BOS]]
    texts = ["hi", "<bos>hi", "<bos><bos>hi", "a<bos>", ""]
    assert rows(encode_prompts(lm, texts)) == [[BOS, *hi]] * 3 + [[BOS, *a, BOS], [BOS]]
    assert rows(encode_prompts(lm, texts[:2], bos=False)) == [hi, [BOS, *hi]]


def test_models_without_bos_get_none(chatty):
    lm = chatty(TURNS, bos_id=None)
    assert rows(encode_prompts(lm, ["hi"])) == [token_ids(lm.tokenizer, "hi")]
    assert BOS not in rows(encode_chat(lm, TALK))[0]
    with pytest.raises(ValueError, match="prompt 1 has no tokens"):
        encode_prompts(lm, ["hi", ""])


def test_length_is_a_bucket_or_what_was_asked_for(chatty):
    lm = chatty(TURNS)
    assert encode_prompts(lm, ["a" * 15])[0].shape == (1, 16) and encode_prompts(lm, ["a" * 16])[0].shape == (1, 32)
    assert encode_prompts(lm, ["a"], length=20)[0].shape == encode_chat(lm, TALK[:1], length=40)[0].shape[:1] + (20,)
    short = dataclasses.replace(lm, config=dataclasses.replace(lm.config, max_positions=20))
    assert encode_prompts(short, ["a" * 18])[0].shape == (1, 20)  # no bucket is longer than the model takes
    with pytest.raises(ValueError, match="prompt 1 has 21 tokens, at most 20 fit"):
        encode_prompts(short, ["a", "a" * 20])
    with pytest.raises(ValueError, match="conversation 1 has .* tokens, at most 20 fit"):
        encode_chat(short, [TALK[0][:1], [{"role": "user", "content": "a" * 30}]], add_generation_prompt=False)
    assert jm.encode_prompts is encode_prompts


def test_what_cannot_be_said_is_named(chatty):
    lm, system = chatty(STRICT), [{"role": "system", "content": "be kind"}, *TALK[0]]
    with pytest.raises(ValueError, match=r"conversation 1 \(roles system, user\).*'tiny'.*System role not supported"):
        encode_chat(lm, [TALK[0], system])
    with pytest.raises(ValueError, match="conversation 0 .*must alternate"):
        encode_chat(lm, [TALK[0] * 2])
    with pytest.raises(ValueError, match="'tiny' has no chat template.*encode"):
        encode_chat(chatty(None), TALK)
    with pytest.raises(ValueError, match="conversation 0 .*refuses it.*or fix it") as error:
        encode_chat(chatty("{{ messages[0].content + 1 }}"), TALK)
    assert "roles in the order" not in str(error.value)
    with pytest.raises(ValueError, match="conversation 0 .*refuses it.*the template is damaged in line 2") as error:
        encode_chat(chatty("{{ messages[0].content }}\n{% for %}"), TALK)
    assert "roles in the order" not in str(error.value)


THINKING = "{{ messages[0].content }}{% if enable_thinking is defined and not enable_thinking %}none{% endif %}"


def test_variables_of_the_template(chatty):
    lm = chatty(THINKING)
    for options in ({}, {"enable_thinking": True}, {"enable_thinking": False}):
        expected = lm.tokenizer.apply_chat_template(TALK[0], tokenize=True, return_dict=False, **options)
        assert rows(encode_chat(lm, TALK[:1], **options)) == [expected]
    assert rows(encode_chat(lm, TALK[:1], enable_thinking=False)) != rows(encode_chat(lm, TALK[:1]))
    with pytest.raises(ValueError, match="enable_thinking: the chat template of 'tiny' does not ask for it"):
        encode_chat(chatty(TURNS), TALK, enable_thinking=False)


def test_several_templates(chatty):
    lm = chatty({"default": TURNS, "rag": THINKING})
    assert rows(encode_chat(lm, TALK)) == rows(encode_chat(chatty(TURNS), TALK))
    with pytest.raises(ValueError, match="has the chat templates rag and none called default; choose one"):
        encode_chat(chatty({"rag": THINKING}), TALK)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ([], "conversations: expected at least one"),
        (TALK[0], "conversations: .*put a single one into a list"),
        ([[]], "conversation 0 has no messages"),
        ([TALK[0], [{"role": "user"}]], "conversation 1: expected messages .*got {'role': 'user'}"),
        ([["hi"]], "conversation 0: expected messages .*got 'hi'"),
    ],
)
def test_misshapen_conversations(chatty, wrong, message):
    with pytest.raises(ValueError, match=message):
        encode_chat(chatty(TURNS), wrong)


@pytest.mark.parametrize("wrong", [[], "hi", [1]])
def test_misshapen_texts(chatty, wrong):
    with pytest.raises(ValueError, match="texts: expected at least one, as a list of strings"):
        encode_prompts(chatty(TURNS), wrong)
