"""Which layers a model has and where it may be cut, from its keys alone."""

import pytest

from meshnode.errors import ModelError
from meshnode.io.llama.architectures import TABLE
from meshnode.io.llama.traits import all_kinds_wanted, traits_of
from tests.io.llama.test_slicing import keys_of


@pytest.mark.parametrize(
    ("pattern", "windowed"),
    [
        ({}, [True, True, True, True, True, False, True]),
        ({"attention__sliding_window_pattern": 3}, [True, True, False, True, True, False, True]),
        ({"attention__sliding_window_pattern": [0, 1, 0, 1, 0, 1, 1]}, [False, True, False, True, False, True, True]),
        ({"attention__sliding_window": 0}, []),
    ],
)
def test_window_patterns_are_read_as_array_as_number_and_from_the_builder(pattern, windowed):
    keys = keys_of("gemma3", **{"attention__sliding_window": 512, **pattern})
    assert list(traits_of(keys, 7).windowed) == windowed


def test_a_pattern_that_the_file_must_give_and_does_not_is_an_error():
    with pytest.raises(ModelError):
        traits_of(keys_of("mimo2", attention__sliding_window=128), 4)


def test_recurrent_layers_come_from_an_interval_from_an_array_or_from_missing_heads():
    interval = traits_of(keys_of("qwen35", full_attention_interval=4), 8)
    assert interval.recurrent == (True, True, True, False) * 2
    given = traits_of(keys_of("qwen35", attention__recurrent_layers=[1, 0, 0, 1]), 4)
    assert given.recurrent == (True, False, False, True)
    heads = traits_of(keys_of("jamba", attention__head_count_kv=[0, 0, 8, 0]), 4)
    assert heads.attentive == (False, False, True, False)
    assert heads.one_lane_batches


def test_a_layer_may_be_a_feed_forward_block_and_nothing_else():
    keys = keys_of("nemotron_h", attention__head_count_kv=[0, 0, 8], feed_forward_length=[0, 64, 0])
    traits = traits_of(keys, 3)
    assert (traits.recurrent, traits.attentive) == ((True, False, False), (False, False, True))
    assert len({traits.kind(layer) for layer in range(3)}) == 3


def test_plain_layers_may_be_cut_anywhere():
    assert traits_of(keys_of("llama"), 4).boundaries == (1, 2, 3)


def test_what_layer_numbers_choose_limits_the_cuts():
    assert traits_of(keys_of("smollm3"), 10).boundaries == (4, 8, 9)
    assert traits_of(keys_of("llama4"), 12).boundaries == (4, 8)


def test_a_layer_without_an_indexer_of_its_own_begins_no_slice():
    keys = keys_of("glm-dsa", attention__indexer__types=[1, 0, 0, 1, 0])
    assert traits_of(keys, 5).boundaries == (3,)


@pytest.mark.parametrize(
    ("architecture", "layers", "values", "word"),
    [
        ("gemma2", 46, {}, "46"),
        ("gemma3", 62, {}, "62"),
        ("baichuan", 40, {}, "40"),
        ("exaone4", 64, {}, "64"),
        ("deepseek2", 27, {}, "27"),
        ("minicpm3", 8, {}, "constant"),
        ("dream", 8, {}, "diffusion"),
        ("nanbeige", 8, {"num_loops": 2}, "loop"),
        ("glm-dsa", 8, {"context_length": 1 << 20}, "indexer"),
        ("llama4", 8, {"attention__sliding_window": 0}, "rotary"),
        ("never-heard-of", 8, {}, "not in the table"),
        ("llama", 1, {}, "one layer"),
    ],
)
def test_what_cannot_be_split_says_why(architecture, layers, values, word):
    traits = traits_of(keys_of(architecture, **values), layers)
    assert word in traits.whole
    assert traits.boundaries == ()


def test_every_kind_in_each_slice_is_wanted_where_the_model_has_enough_of_each():
    def wanted(layers):
        return all_kinds_wanted(traits_of(keys_of("gemma3", attention__sliding_window=512), layers))

    assert [wanted(layers) for layers in (12, 23, 24, 48)] == [False, False, True, True]
    assert not all_kinds_wanted(traits_of(keys_of("llama"), 32))


def test_keys_of_the_wrong_type_are_model_errors():
    with pytest.raises(ModelError):
        traits_of(keys_of("deepseek", leading_dense_block_count=1.5), 4)
    with pytest.raises(ModelError):
        traits_of(keys_of("jamba", attention__head_count_kv=[1, 2]), 4)
    with pytest.raises(ModelError):
        traits_of(keys_of("qwen35", full_attention_interval=0), 4)


def test_every_row_is_either_splittable_or_says_why_not():
    assert len(TABLE) > 120
    for name, row in TABLE.items():
        assert not (row.whole and row.steps), name
        assert row.way_in.value in ("rows", "overwrite")
