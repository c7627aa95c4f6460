"""Answers under a grammar, drawn at random: what ends is an instance, as an independent validator sees it."""

import json
import random

import jsonschema
import msgspec
import numpy as np
import pytest

from meshnode.core.serving.calls import Format
from meshnode.core.serving.grammar import Callable, Schema, Wording, frame_of
from meshnode.core.serving.text import Vocabulary
from meshnode.core.serving.thoughts import TAGS, Thinking
from meshnode.errors import InvalidRequest, StageError
from meshnode.io.llama import grammar as module
from meshnode.io.llama.grammar import Grammars, GrammarThread, translated
from meshnode.io.llama.sampler import LaneSampler
from meshnode.wire.sampling import GRAMMAR_BYTES, Sampling

# Tokens that spell more than one byte, as those of real vocabularies do: over quotes, braces and parts of characters.
LONG = ('": ', '", "', '{"', '{"a": ', "true", "00", '"}', "], [", "é", "\\n", "0.", "e+", "</think>", "<tool_call>")
END, SECOND_END, CALLS = 256 + len(LONG), 257 + len(LONG), 258 + len(LONG)
VOCABULARY = Vocabulary(
    pieces=(*(bytes([value]) for value in range(256)), *(text.encode() for text in LONG), b"", b"", b""),
    markers={END: b"<|end|>", SECOND_END: b"<|eot|>", CALLS: b"[TOOL_CALLS]"},
    end=frozenset({END, SECOND_END}),
)
LETTERS = {"type": "string", "pattern": "^[a-c]+$", "maxLength": 5}
CASES = {
    # name: (schema, what must be accepted, what must not)
    "types": ({"type": ["integer", "null"]}, ["5", "-3", "null"], ["1.5", '"5"', "true"]),
    "any value": ({}, ['{"a": [1]}', '"x"', "1e5"], ["nul", "{'a': 1}"]),
    "enum": ({"enum": [1, "x", {"a": [2]}]}, ["1", '"x"', '{"a": [2]}'], ["2", '"y"', "{}"]),
    "const": ({"const": {"b": None}}, ['{"b":null}'], ['{"b": 1}', "null"]),
    "length": ({"type": "string", "minLength": 2, "maxLength": 3}, ['"ab"', '"é✓b"'], ['"a"', '"abcd"', '"✓"']),
    "pattern": ({"type": "string", "pattern": "^a+b?$"}, ['"aab"'], ['"ba"', '""']),
    "date": ({"type": "string", "format": "date"}, ['"2024-02-29"'], ['"2024-13-01"', '"today"']),
    "range": ({"type": "number", "minimum": 3, "exclusiveMaximum": 4.5}, ["3", "4.4"], ["2.9", "4.5", "5"]),
    "multiples": ({"type": "integer", "multipleOf": 7}, ["14", "-21"], ["15"]),
    "items": ({"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 2}, ["[true]"], ["[]", "[1]"]),
    "prefix": ({"prefixItems": [{"type": "integer"}, LETTERS], "items": False}, ['[1, "a"]'], ["[1, 2]", '[1,"a",3]']),
    "strict object": (
        {
            "type": "object",
            "properties": {"name": LETTERS, "size": {"type": "integer", "minimum": 0, "maximum": 20}},
            "required": ["name", "size"],
            "additionalProperties": False,
        },
        ['{"name":"abc","size": 3}'],
        ["{}", '{"name": "abc"}', '{"name":"abc","size":3,"more":1}', '{"name":"abc","size":21}'],
    ),
    "optional": ({"type": "object", "properties": {"a": {"type": "null"}}}, ["{}", '{"a": null}'], ['{"a": 1}']),
    "map": ({"type": "object", "additionalProperties": {"type": "integer"}}, ['{"x": 1}'], ['{"x": "1"}']),
    "patterns": (
        {"type": "object", "patternProperties": {"^n_": {"type": "integer"}}, "additionalProperties": False},
        ['{"n_a": 1}'],
        ['{"n_a": "x"}', '{"b": 1}'],
    ),
    "at least one": ({"type": "object", "minProperties": 1}, ['{"a": 1}'], ["{}"]),
    "either": ({"anyOf": [{"type": "integer"}, LETTERS]}, ["7", '"ab"'], ['"z"', "1.5"]),
    "both": ({"allOf": [{"type": "integer", "minimum": 5}, {"maximum": 6}]}, ["5", "6"], ["4", "7"]),
    "one of two kinds": (
        {
            "oneOf": [{"$ref": "#/$defs/cat"}, {"$ref": "#/$defs/dog"}],
            "$defs": {
                "cat": {
                    "type": "object",
                    "properties": {"kind": {"const": "cat"}, "age": {"type": "integer", "maximum": 9}},
                    "required": ["kind", "age"],
                    "additionalProperties": False,
                },
                "dog": {
                    "type": "object",
                    "properties": {"kind": {"enum": ["dog", "wolf"]}, "age": {"type": "number", "maximum": 9}},
                    "required": ["kind", "age"],
                    "additionalProperties": False,
                },
            },
        },
        ['{"kind": "cat", "age": 3}', '{"kind": "wolf", "age": 2.5}'],
        ['{"kind": "cat", "age": 3.5}', '{"kind": "cow", "age": 3}'],
    ),
    "one of": ({"oneOf": [{"type": "integer"}, {"type": "string", "maxLength": 1}]}, ["1", '"a"'], ['"ab"']),
    "tree": (
        {
            "$ref": "#/$defs/node",
            "$defs": {
                "node": {
                    "type": "object",
                    "properties": {"kids": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 2}},
                    "required": ["kids"],
                    "additionalProperties": False,
                }
            },
        },
        ['{"kids": [{"kids": []}]}'],
        ['{"kids": [1]}', "{}"],
    ),
}
UNENFORCED = [
    {"not": {"type": "string"}},
    {"type": "array", "uniqueItems": True},
    {"type": "array", "contains": {"type": "integer"}},
    {"if": {"type": "string"}, "then": {"minLength": 2}},
    {"dependentRequired": {"a": ["b"]}},
    {"dependentSchemas": {"a": {"required": ["b"]}}},
    {"dependencies": {"a": ["b"]}},
    {"propertyNames": {"pattern": "^a"}},
    {"unevaluatedProperties": False},
    {"unevaluatedItems": False},
    {"oneOf": [{"type": "integer"}, {"minimum": 3}]},
    {"type": "string", "pattern": "(?=a)b"},
    {"type": "string", "format": "a format of ours"},
    {"$ref": "https://example.org/other.json"},
    {"$ref": "#"},
    {"$dynamicRef": "#meta"},
    {"type": "object", "minProperties": 2},
    {"type": "object", "properties": {"deep": {"items": {"minProperties": 3, "required": ["a", "b"]}}}},
    False,
    5,
    "object",
    [],
]


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(VOCABULARY)


def grammar_of(schema, *, strict=True, lenient=False):
    return Wording(VOCABULARY, None, lenient=lenient).answer(Schema(schema, strict))


def fits(grammars, grammar, text) -> bool:
    """Whether the whole of `text`, byte by byte, is an answer."""
    constraint = grammars.constrain(grammar)
    for byte in text.encode():
        if byte not in constraint.allowed():
            return False
        constraint.accept(byte)
    return END in constraint.allowed()


def drawn(grammars, grammar, seed, most=300) -> str | None:
    """An answer drawn at random; None when it did not end in time. Long ones are led to their end."""
    chance, constraint, ids = random.Random(seed), grammars.constrain(grammar), []
    while len(ids) < most:
        allowed = constraint.allowed().tolist()
        closing = [token for token in allowed if token in (END, SECOND_END, *b'"]}')]
        token = chance.choice(closing if closing and (len(ids) > 20 and chance.random() < 0.6) else allowed)
        if token in VOCABULARY.end:
            return b"".join(VOCABULARY.pieces[token] for token in ids).decode()
        constraint.accept(token)
        ids.append(token)
    return None


@pytest.mark.parametrize("name", CASES)
def test_what_a_schema_describes_is_allowed_and_nothing_else(grammars, name):
    schema, valid, invalid = CASES[name]
    grammar = grammar_of(schema)
    grammars.check(grammar)
    assert [text for text in valid if not fits(grammars, grammar, text)] == []
    assert [text for text in invalid if fits(grammars, grammar, text)] == []


@pytest.mark.parametrize("name", CASES)
def test_whatever_ends_is_an_instance(grammars, name):
    schema, grammar = CASES[name][0], grammar_of(CASES[name][0])
    answers = [answer for seed in range(40) if (answer := drawn(grammars, grammar, seed)) is not None]
    assert len(answers) > 20
    for answer in answers:
        jsonschema.validate(json.loads(answer), schema, cls=jsonschema.Draft202012Validator)


def composed(chance, depth):
    """A schema of several keywords at once, as the two implementations might understand them differently."""
    if depth == 0 or chance.random() < 0.15:
        return chance.choice([{"type": "integer"}, LETTERS, {"enum": [1, "x", None]}, True, {"const": [1]}])
    some = {
        "type": chance.choice(["object", "object", "array", ["string", "integer"]]),
        "properties": {name: composed(chance, depth - 1) for name in chance.sample("abcd", 2)},
        "required": chance.sample("abcd", 2),
        "additionalProperties": chance.choice([False, composed(chance, depth - 1)]),
        "patternProperties": {chance.choice(["^a", "c", "^.$"]): composed(chance, depth - 1)},
        "items": composed(chance, depth - 1),
        "maxItems": 2,
        "maxProperties": chance.randint(1, 3),
        "minLength": chance.randint(0, 2),
        "pattern": chance.choice(["a", "^b", "[^x]{2}"]),
        "minimum": chance.choice([-2, 1.5]),
        "anyOf": [composed(chance, depth - 1), composed(chance, depth - 1)],
        "allOf": [composed(chance, depth - 1)],
    }
    kept = ["type", *(name for name in some if name != "type" and chance.random() < 0.35)]
    chance.shuffle(kept)
    return {name: some[name] for name in kept}


def test_numbers_and_texts_are_written_to_the_digit_and_character(grammars):
    chance = random.Random(5)
    numbers = [round(chance.uniform(-1, 1) * 10 ** chance.randint(-6, 12), chance.randint(0, 9)) for _ in range(300)]
    values = [number for number in numbers if len(f"{abs(number):.15g}") < 15] + [2**53, -(2**53), 0.1, 1e-7, 1e15]
    assert len(values) > 100
    texts = ["é", "✓ 😀", "\n\t\b\f\r", '"\\/', "{}[]:,", "\u2028", "<tool_call>"]
    for value in [*values, *texts, {text: text for text in texts}]:
        answer = drawn(grammars, grammar_of({"const": value}), 1)
        assert json.loads(answer) == value


def test_a_key_has_one_spelling(grammars):
    grammar = grammar_of({"type": "object", "properties": {"é": {"type": "integer"}, "a/": {"type": "integer"}}})
    for key in ("\\u00e9", "a\\/", "a\\u002f"):
        assert not fits(grammars, grammar, f'{{"{key}": "x"}}')


def test_keywords_together_mean_what_they_mean_to_an_independent_validator(grammars):
    chance, judged = random.Random(20), 0
    for _ in range(100):
        schema = composed(chance, 2)
        try:
            grammar = grammar_of(schema)
            grammars.check(grammar)
        except (InvalidRequest, StageError):
            continue
        for seed in range(4):
            answer = drawn(grammars, grammar, seed, most=120)
            if answer is not None:
                judged += 1
                jsonschema.validate(json.loads(answer), schema, cls=jsonschema.Draft202012Validator)
    assert judged > 120


@pytest.mark.parametrize("schema", UNENFORCED, ids=json.dumps)
def test_what_cannot_be_enforced_is_refused_and_never_left_out(grammars, schema):
    with pytest.raises((InvalidRequest, StageError)) as refused:
        grammars.check(grammar_of(schema))
    assert str(refused.value)


@pytest.mark.parametrize("schema", [each for each in UNENFORCED[:10] if isinstance(each, dict)], ids=json.dumps)
def test_a_schema_that_is_not_strict_is_relaxed_where_it_is_asked_for(grammars, schema):
    grammars.check(grammar_of(schema, strict=False, lenient=True))
    with pytest.raises(StageError):
        grammars.check(grammar_of(schema, strict=True, lenient=True))


def nested(levels):
    schema = {"type": "integer"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


BOMBS = {
    "deep": nested(400),
    "groups": {"type": "string", "pattern": "(" * 2000 + "a" + ")" * 2000},
    "multiple": {"type": "integer", "multipleOf": 982451653},
    "many choices": {"type": "object", "properties": {f"p{number}": {"type": "string"} for number in range(1500)}},
    "choices of choices": {
        "allOf": [{"anyOf": [{"properties": {f"p{a}_{b}": {"type": "null"}}} for b in range(4)]} for a in range(12)]
    },
    "circle": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
    "large numbers": {"type": "number", "minimum": 1e-300, "maximum": 1e300},
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_hostile_schema_is_refused_for_its_cost(grammars, name):
    with pytest.raises((StageError, InvalidRequest)):
        grammars.check(grammar_of(BOMBS[name]))


def rule_chain(count):
    return "start: r0\n" + "\n".join(f"r{number}: r{number + 1}" for number in range(count)) + f'\nr{count}: "1"'


def schema_chain(count):
    def link(number):
        return {"type": "object", "properties": {"x": {"$ref": f"#/$defs/a{number + 1}"}}, "required": ["x"]}

    links = {f"a{number}": link(number) for number in range(count)}
    return grammar_of({"$ref": "#/$defs/a0", "$defs": {**links, f"a{count}": {"const": 1}}})


@pytest.mark.parametrize("grammar", [rule_chain(3500), schema_chain(650)], ids=["rules", "schemas"])
def test_a_grammar_as_deep_as_its_bytes_allow_ends_no_process(grammars, grammar):
    assert len(grammar) < GRAMMAR_BYTES
    grammars.check(grammar)
    thread = GrammarThread(lambda: VOCABULARY)
    assert len(thread.constrain(grammar, ()).allowed()) > 0


def test_a_bomb_behind_a_harmless_beginning_ends_the_answer_with_an_error_of_its_own(grammars):
    grammar = grammar_of({"prefixItems": [{"const": "x" * 40}, BOMBS["many choices"]], "minItems": 2, "type": "array"})
    grammars.check(grammar)
    constraint = grammars.constrain(grammar, list(b'["' + b"x" * 40 + b'", '))
    with pytest.raises(StageError) as failed:
        constraint.accept(ord("{"))
    assert failed.value.reason == "grammar_refused"


def test_an_answer_ends_where_it_is_whole_and_by_any_end_token(grammars):
    constraint = grammars.constrain(grammar_of({"type": "integer"}))
    assert not VOCABULARY.end & set(constraint.allowed().tolist())
    constraint.accept(ord("7"))
    assert set(constraint.allowed().tolist()) >= VOCABULARY.end
    constraint.accept(END)
    whole = grammars.constrain(grammar_of({"const": "x"}), list(b'"x"'))
    assert set(whole.allowed().tolist()) == VOCABULARY.end


def test_a_model_without_an_end_token_keeps_to_no_grammar():
    with pytest.raises(StageError):
        Grammars(msgspec.structs.replace(VOCABULARY, end=frozenset()))


def test_an_answer_is_gone_on_with_where_it_stood(grammars):
    grammar = grammar_of(CASES["strict object"][0])
    ids = list(b'{"name":"abc","size": 1')
    beginning = grammars.constrain(grammar)
    for token in ids:
        beginning.accept(token)
    assert grammars.constrain(grammar, ids).allowed().tolist() == beginning.allowed().tolist()
    with pytest.raises(StageError):
        grammars.constrain(grammar, list(b'{"size"'))


def test_the_sampler_draws_only_what_is_allowed_whatever_the_logits_and_biases_say(grammars):
    grammar = grammar_of({"enum": ["abc", "abd"]})
    forbidden = tuple((token, -1e9) for token in b'abcd"')
    loud = np.random.default_rng(3).standard_normal(len(VOCABULARY.pieces)).astype(np.float32)
    loud[ord("z")] = 1000.0
    for sampling in (
        Sampling(temperature=0.0),
        Sampling(temperature=5.0, top_k=2, min_p=0.5),
        Sampling(top_p=0.01, typical_p=0.5, logit_bias=forbidden, repeat_penalty=2.0),
    ):
        sampler = LaneSampler(sampling, len(VOCABULARY.pieces), constraint=grammars.constrain(grammar))
        ids = []
        while not ids or ids[-1] not in VOCABULARY.end:
            ids.append(sampler.draw(0, len(ids), loud).token)
        assert b"".join(VOCABULARY.pieces[token] for token in ids) in (b'"abc"', b'"abd"')


def test_a_stage_compiles_beside_its_computing_and_tells_what_is_wrong_with_the_first_mask():
    thread = GrammarThread(lambda: VOCABULARY)
    good, bad = thread.constrain(grammar_of({"const": 1}), ()), thread.constrain("start: (", ())
    assert good.allowed().tolist() == [ord("1")]
    good.accept(ord("1"))
    assert set(good.allowed().tolist()) == VOCABULARY.end
    with pytest.raises(StageError):
        bad.allowed()


def test_grammars_are_kept_by_the_last_that_were_asked_for(grammars, monkeypatch):
    monkeypatch.setattr(module, "KEPT", 2)
    for number in range(4):
        grammars.constrain(grammar_of({"const": number}))
    assert list(grammars._kept) == [grammar_of({"const": 2}), grammar_of({"const": 3})]


TOOLS = [
    Callable("add", Schema({"properties": {"a": {"type": "integer"}}, "required": ["a"]}, strict=True)),
    Callable("note", Schema({"type": "object", "properties": {"text": LETTERS}, "additionalProperties": False}, True)),
]
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 5}}\n</tool_call>'
TAGGED = frame_of(Format.TAGGED, "")
BARE = frame_of(Format.BARE, "")


def test_forced_calls_are_nothing_but_calls(grammars):
    one = Wording(VOCABULARY, None).forced(TAGGED, TOOLS, several=False)
    several = Wording(VOCABULARY, None).forced(TAGGED, TOOLS, several=True)
    for grammar in (one, several):
        grammars.check(grammar)
        assert fits(grammars, grammar, CALL)
        for other in ("", "Hello", CALL[:-1], CALL.replace("add", "sub"), CALL.replace("5", '"5"'), CALL + "x"):
            assert not fits(grammars, grammar, other)
    assert not fits(grammars, one, f"{CALL}\n{CALL}")
    assert fits(grammars, several, f"{CALL}\n{CALL}")
    assert fits(
        grammars, Wording(VOCABULARY, None).forced(BARE, TOOLS, several=True), '{"name": "note", "arguments": {}}'
    )


def test_offered_calls_are_strict_and_everything_else_is_free(grammars):
    tagged = Wording(VOCABULARY, None).offered(TAGGED, TOOLS, several=True)
    bare = Wording(VOCABULARY, None).offered(BARE, TOOLS, several=True)
    for grammar in (tagged, bare):
        grammars.check(grammar)
        assert fits(grammars, grammar, "Hello,\n <b>wörld</b>")
        assert fits(grammars, grammar, "")
    assert fits(grammars, tagged, f"Let me see.\n{CALL}\n{CALL}\nDone.")
    assert not fits(grammars, tagged, f"Let me see. {CALL.replace('5', 'null')}")
    assert not fits(grammars, tagged, "Let me see. <tool_call>")
    assert fits(grammars, bare, '{"name": "add", "arguments": {"a":5}}')
    assert not fits(grammars, bare, ' {"name": "add", "arguments": {"a":""}}')


def test_an_answer_of_a_schema_may_be_a_call_instead(grammars):
    schema = Schema({"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}, strict=True)
    grammar = Wording(VOCABULARY, None).offered(TAGGED, TOOLS, several=False, schema=schema)
    grammars.check(grammar)
    assert fits(grammars, grammar, '{"ok": true}')
    assert fits(grammars, grammar, CALL)
    assert not fits(grammars, grammar, "text")
    with pytest.raises(InvalidRequest):
        Wording(VOCABULARY, None).offered(BARE, TOOLS, several=False, schema=schema)


def test_control_tokens_begin_calls_as_themselves_and_not_as_text(grammars):
    frame = frame_of(Format.LISTED, "")
    forced = Wording(VOCABULARY, None).forced(frame, TOOLS, several=True)
    offered = Wording(VOCABULARY, None).offered(frame, TOOLS, several=True)
    body = b'[{"name": "add", "arguments": {"a": 1}}, {"name": "note", "arguments": {}}]'
    for grammar in (forced, offered):
        grammars.check(grammar)
        whole = grammars.constrain(grammar, [CALLS, *body])
        assert END in whole.allowed()
    assert grammars.constrain(forced).allowed().tolist() == [CALLS]
    assert END in grammars.constrain(offered, list(b"[TOOL_CALLS] is text")).allowed()


@pytest.mark.parametrize("control", [False, True])
def test_a_thought_that_the_prompt_began_is_ended_first(grammars, control):
    thinking = Thinking("<think>", "[TOOL_CALLS]" if control else "</think>", begun=True)
    grammar = Wording(VOCABULARY, thinking).answer(Schema({"const": 1}, strict=True))
    grammars.check(grammar)
    end = [CALLS] if control else list(b"</think>")
    assert END in grammars.constrain(grammar, [*b"Hm, <b>\n\n 2?", *end, *b"\n\n1"]).allowed()
    assert END not in grammars.constrain(grammar, list(b"1")).allowed()
    assert ord("2") not in grammars.constrain(grammar, [*b"Hm", *end]).allowed()


def test_a_model_that_thinks_may_think_first_and_need_not(grammars):
    thinking = Thinking("<think>", "</think>", begun=False)
    for wording in (
        Wording(VOCABULARY, thinking),
        Wording(VOCABULARY, Thinking("[TOOL_CALLS]", "</think>", begun=False)),
    ):
        grammar = wording.forced(TAGGED, TOOLS, several=False)
        grammars.check(grammar)
        assert fits(grammars, grammar, CALL)
        assert not fits(grammars, grammar, f"Hm.</think>{CALL}")
    grammar = Wording(VOCABULARY, thinking).forced(TAGGED, TOOLS, several=False)
    assert fits(grammars, grammar, f"<think>\nHm. <tool_call>? {{}}</think>\n\n{CALL}")
    assert not fits(grammars, grammar, "<think>Hm.</think>\n\nHello")


@pytest.mark.parametrize("frame", [TAGGED, BARE], ids=["tagged", "bare"])
def test_a_call_behind_a_thought_is_strict_too(grammars, frame):
    for begin, end in TAGS:
        grammar = Wording(VOCABULARY, Thinking(begin, end, begun=False)).offered(frame, TOOLS, several=True)
        grammars.check(grammar)
        for lead in ("", f"{begin}Hm.\n{end}", f"{begin}Hm.{end}\n\n"):
            call = f"{frame.before}add{frame.between}{{}}{frame.after}"
            assert fits(grammars, grammar, lead + call.replace("{}", '{"a": 1}'))
            assert not fits(grammars, grammar, lead + call)
            assert fits(grammars, grammar, f"{lead}Hello")


def test_llama_cpps_grammars_are_translated(grammars):
    grammar = translated('root ::= answer "!"\nanswer ::= "yes" | "no" [0-9]{2}')
    grammars.check(grammar)
    assert fits(grammars, grammar, "yes!")
    assert fits(grammars, grammar, "no42!")
    assert not fits(grammars, grammar, "no4!")


@pytest.mark.parametrize(
    "text", ["", "root ::= (", "root ::= other", "answer ::= 1", "start: x", "root ::= " + "(" * 5000]
)
def test_what_is_no_grammar_is_refused(grammars, text):
    with pytest.raises(StageError) as refused:
        grammars.check(translated(text))
    assert refused.value.reason == "grammar_refused"


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"type": "strin"}, "Invalid type: strin"),
        ({"not": {}}, 'Unimplemented keys: ["not"]'),
        ({"$ref": "#"}, "it describes no text that ever ends"),
        ({"type": "string", "pattern": "a("}, "regex parse error: unclosed group"),
        (
            {"type": "string", "pattern": "(?=a)b"},
            "regex parse error: look-around, including look-ahead and look-behind, is not supported",
        ),
    ],
)
def test_a_refusal_says_what_is_wrong_and_no_place_in_a_text_that_the_client_never_saw(grammars, schema, said):
    with pytest.raises(StageError) as refused:
        grammars.check(grammar_of(schema))
    assert str(refused.value).endswith(said)
