"""Text as it comes is the text as a whole, up to a stop string; messages become a prompt."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atlas_blocks.recipes.data import Tokenizer, train_tokenizer
from atlas_blocks.recipes.serving.chat import Chat
from atlas_blocks.recipes.serving.text import Writer

WORDS = ["the cat sat on the mat, ", "日本語 and é and 🎉 ", "\n\nmore of the cat"]
TOKENIZERS = {"bytes": Tokenizer(), "bpe": train_tokenizer([["".join(3 * WORDS)]], 300)}


def written(writer: Writer, tokens) -> str:
    shown = ""
    for token in tokens:
        shown += writer.write(token)
        if writer.stopped:
            break
    return shown + writer.end()


@given(st.data(), st.sampled_from(sorted(TOKENIZERS)))
def test_text_token_by_token_is_the_text(data, name):
    tokenizer = TOKENIZERS[name]
    text = data.draw(st.text(st.sampled_from("cat é日🎉\n")))
    tokens = tokenizer.encode([text])[0].tolist()
    assert written(Writer(tokenizer), tokens) == text


@given(st.lists(st.integers(0, 255)))
def test_bytes_that_are_no_text_are_shown_as_such(tokens):
    assert written(Writer(Tokenizer()), tokens) == bytes(tokens).decode(errors="replace")


@given(
    st.text(st.sampled_from("ab\né"), max_size=30),
    st.lists(st.text(st.sampled_from("ab\né"), min_size=1, max_size=4), max_size=3),
    st.sampled_from(sorted(TOKENIZERS)),
)
def test_nothing_of_a_stop_string_is_shown(text, stop, name):
    writer = Writer(TOKENIZERS[name], stop)
    found = written(writer, TOKENIZERS[name].encode([text])[0].tolist())
    ends = [text.find(s) for s in stop if s in text]
    if name == "bytes":  # a token of several characters may hold two
        first = [text.find(s) + len(s) for s in stop if s in text]
        text = text[: min(first)] if first else text
        ends = [text.find(s) for s in stop if s in text]
    assert found == (text[: min(ends)] if ends else text)
    assert writer.stopped == bool(ends)


def test_text_is_shown_as_soon_as_it_is_known():
    writer = Writer(Tokenizer(), ["END"])
    assert [writer.write(t) for t in b"aEN\xc3\xa9E"] == ["a", "", "", "", "ENé", ""]
    assert writer.end() == "E"


MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
CHATML = (
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
    "<|im_start|>assistant\n"
)


def test_messages_are_chatml_without_a_template():
    chat = Chat(Tokenizer())
    assert bytes(chat.encode(MESSAGES)).decode() == CHATML
    assert bytes(chat.encode(MESSAGES, begun=True)).decode() == "\n" + CHATML
    assert (chat.stop, chat.stop_ids) == (("<|im_end|>",), ())


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}\n[{{ m.role }}] {{ m.content }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.mark.parametrize("kind", ["jinja", "json"])
def test_a_template_takes_its_place(tmp_path, kind):
    file = tmp_path / f"template.{kind}"
    words = {"bos_token": {"content": "<s>"}, "eos_token": "<|endoftext|>"}
    file.write_text(
        json.dumps({"chat_template": TEMPLATE, **words}) if kind == "json" else TEMPLATE
    )
    tokenizer = TOKENIZERS["bpe"]
    chat = Chat(tokenizer, file)
    begin, end = ("<s>", "<|endoftext|>") if kind == "json" else ("", "")
    text = f"{begin}[system] Be brief.{end}[user] Hello{end}[assistant]"
    assert chat.render(MESSAGES) == text
    tokens = chat.encode(MESSAGES)
    assert tokens.count(tokenizer.end) == text.count("<|endoftext|>")
    assert chat.stop == ()
    assert chat.stop_ids == ((tokenizer.end,) if kind == "json" else ())


@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        ("absent.jinja", None, "chat-template"),
        ("a.jinja", "{% for %}", "chat-template"),
        ("a.json", "{}", "chat-template"),
        ("a.jinja", " ", "chat-template: expected a string"),
        ("a.json", '{"chat_template": 3}', "chat-template"),
        ("a.jinja", "{{ raise_exception('no system') }}", "messages: .*no system"),
        ("a.jinja", "{{ messages.__class__.__mro__ }}", "messages: "),
    ],
)
def test_bad_templates_are_named(tmp_path, name, content, word):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=word):
        Chat(Tokenizer(), tmp_path / name).render(MESSAGES)
