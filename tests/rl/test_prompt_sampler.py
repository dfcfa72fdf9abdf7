"""Prompt lists and the sampler: what is read, who is drawn how often, and that a step's prompts never change."""

from __future__ import annotations

import json
import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepgen_jax.errors import DeepGenError
from deepgen_jax.rewards.ocr import target_text
from deepgen_jax.rl.prompt_files import Prompt, PromptDataset, read_prompt_config, read_prompt_list
from deepgen_jax.rl.prompts import PromptSampler, check_prompts, load_prompts
from deepgen_jax.user_warnings import DeepGenWarning


def dataset(name, size, weight=1.0, rewards=None):
    return PromptDataset(name, [Prompt(f"{name} {i}", {"i": i}) for i in range(size)], rewards or {"clip": 1.0}, weight)


datasets = st.lists(st.tuples(st.integers(1, 60), st.floats(0.1, 5)), min_size=1, max_size=4).map(
    lambda sets: [dataset(f"set {k}", size, weight) for k, (size, weight) in enumerate(sets)]
)


@settings(max_examples=30)
@given(datasets, st.sampled_from(["sample_proportional", "weight_only"]), st.integers(1, 8), st.integers(0, 3))
def test_proportions_hold_over_any_number_of_steps(sets, mode, per_step, seed):
    sampler = PromptSampler(sets, per_step, seed=seed, mode=mode)
    total = sum(s.weight * (len(s.prompts) if mode == "sample_proportional" else 1) for s in sets)
    counts = Counter()
    for step in range(40):
        counts.update(sample.dataset for sample in sampler[step])
        for s, share in zip(sets, sampler.shares, strict=True):
            assert share == pytest.approx(s.weight * (len(s.prompts) if mode == "sample_proportional" else 1) / total)
            ahead = counts[s.name] - share * (step + 1) * per_step
            assert -2 <= ahead <= 2 + len(sets) * share


@settings(max_examples=30)
@given(datasets, st.integers(0, 2**32 - 1), st.integers(0, 500))
def test_a_step_is_a_function_of_seed_and_step(sets, seed, step):
    one, other = PromptSampler(sets, 5, seed=seed), PromptSampler(sets, 5, seed=seed)
    list(map(other.draw, range(7)))
    assert one[step] == other[step]
    assert [sample.index for sample in one[step]] == list(range(5 * step, 5 * step + 5))
    # However the draws are cut into steps, they are the same.
    assert one[step] == tuple(PromptSampler(sets, 1, seed=seed)[i][0] for i in range(5 * step, 5 * step + 5))


@settings(max_examples=20)
@given(st.integers(1, 40), st.integers(1, 40), st.floats(0.2, 4))
def test_each_data_set_is_gone_through_without_repeats(first, second, weight):
    sets = [dataset("first", first), dataset("second", second, weight)]
    sampler = PromptSampler(sets, 10)
    drawn = {"first": [], "second": []}
    for step in range(20):
        for sample in sampler[step]:
            drawn[sample.dataset].append(sample.metadata["i"])
    for s in sets:
        size, rows = len(s.prompts), drawn[s.name]
        for start in range(0, len(rows) - size + 1, size):
            assert sorted(rows[start : start + size]) == list(range(size))


def test_orders_differ_by_seed_and_epoch_and_not_by_the_other_data_sets():
    sampler = PromptSampler([dataset("a", 50)], 50)
    texts = [sample.text for sample in sampler[0]]
    assert texts != sorted(texts)
    assert texts != [sample.text for sample in sampler[1]]
    assert texts != [sample.text for sample in PromptSampler([dataset("a", 50)], 50, seed=1)[0]]
    both = PromptSampler([dataset("b", 50), dataset("a", 50)], 100)
    assert [sample.text for sample in both[0] if sample.dataset == "a"] == texts


def test_large_data_sets_are_permuted_without_a_table():
    sampler = PromptSampler([dataset("a", 2000)], 2000)
    assert len({sample.text for sample in sampler[0]}) == 2000


def test_released_configuration_loads_as_it_is(data_dir):
    path = data_dir / "rl_prompts" / "deepgen_train.yaml"
    with pytest.raises(DeepGenError) as error:
        load_prompts(path, 8)
    for name in ("qwenimage_textrender.txt", "text_render_less.txt", "blip3o_60k.txt", "share_4o_img.txt"):
        assert name in str(error.value)
    with pytest.warns(DeepGenWarning, match="4 of 7 prompt lists are not there"):
        sampler = load_prompts(path, 8, absent="skip")
    text, general, bench = sampler.datasets
    assert [len(s.prompts) for s in sampler.datasets] == [40, 60, 12]
    assert text.rewards == {"preference": 0.2, "clip": 0.1, "ocr": 0.7}
    assert general.rewards == bench.rewards == {"preference": 0.7, "clip": 0.3}
    assert sampler.rewards == ("preference", "clip", "ocr")
    assert sampler.shares.tolist() == pytest.approx([120 / 192, 60 / 192, 12 / 192])
    assert all(target_text(prompt.text) for prompt in text.prompts[:3])
    with pytest.warns(DeepGenWarning):
        alone = load_prompts(path, 8, absent="skip", mode="weight_only")
    assert alone.shares.tolist() == pytest.approx([0.6, 0.2, 0.2])


def test_prompt_lists(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    (tmp_path / "a.txt").write_bytes("\ufeffa fox\r\n\n  née \u2028 \"x\" \nlast".encode())
    assert read_prompt_list(tmp_path / "a.txt") == [Prompt("a fox"), Prompt('née \u2028 "x"'), Prompt("last")]
    records = [{"prompt": "a", "caption": "b", "n": 1}, {"caption": " c ", "tags": ["x", None]}]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, records)))
    wanted = [Prompt("a", {"caption": "b", "n": 1}), Prompt("c", {"tags": ["x", None]})]
    assert read_prompt_list(tmp_path / "b.jsonl") == wanted
    table = pyarrow.table({"caption": ["a", "b"], "n": [1, 2]})
    parquet.write_table(table, tmp_path / "c.parquet")
    assert read_prompt_list(tmp_path / "c.parquet") == [Prompt("a", {"n": 1}), Prompt("b", {"n": 2})]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv", b"prompt\nfox", "use one of .txt, .jsonl, .json, .csv, .parquet"),
        ("a.txt", b" \n\n", "holds no prompts"),
        ("a.txt", b"\xff\xfe", "not UTF-8"),
        ("a.jsonl", b"\n{", "a.jsonl:2: not JSON"),
        ("a.jsonl", b'\n{"text": "a"}', "a.jsonl:2: there is no prompt"),
        ("a.jsonl", b'{"prompt": " "}', "a.jsonl:1: the prompt is empty"),
        ("a.jsonl", b'["a"]', r'a.jsonl:1: \["a"\] is not an object'),
        ("a.parquet", b"PAR", "cannot be read"),
    ],
)
def test_bad_prompt_list_is_an_error(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DeepGenError, match=message):
        read_prompt_list(tmp_path / name)


def test_a_bad_row_of_a_prompt_list_is_counted(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"prompt": "a"}\n{\n{"prompt": "\\ud800"}')
    with pytest.warns(DeepGenWarning, match=r"2 of 3 rows cannot be used and are left out; .*a.jsonl:2: not"):
        assert read_prompt_list(tmp_path / "a.jsonl") == [Prompt("a")]


@pytest.mark.parametrize("name", ["gone.txt", "gone.jsonl", "gone.parquet"])
def test_missing_prompt_list_is_an_error(tmp_path, name):
    with pytest.raises(DeepGenError, match="does not exist"):
        read_prompt_list(tmp_path / name)


ENTRY = {"name": "a", "path": "a.txt", "rewards": [{"clip": 1}]}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ([], "is no mapping"),
        ({"datasets": []}, "at least one data set"),
        ({"datasets": [ENTRY], "sampling": "x"}, "unknown field 'sampling'; did you mean sampling_mode"),
        ({"datasets": [ENTRY], "sampling_mode": "weights_only"}, "did you mean weight_only"),
        ({"datasets": [ENTRY | {"weight": 2}]}, "unknown field 'weight'; did you mean sample_weight"),
        ({"datasets": [ENTRY | {"sample_weight": "3x"}]}, "must be a number"),
        ({"datasets": [ENTRY | {"sample_weight": 0}]}, "must be above 0"),
        ({"datasets": [ENTRY | {"rewards": []}]}, "at least one reward"),
        ({"datasets": [ENTRY | {"rewards": None}]}, "must be a mapping of rewards"),
        ({"datasets": [ENTRY | {"rewards": [{"clip": "x"}]}]}, "weight of reward clip is 'x'"),
        ({"datasets": [ENTRY | {"rewards": [{"clip": 1}, {"clip_sim": 1}]}]}, "clip_sim is listed twice"),
        ({"datasets": [ENTRY | {"path": 3}]}, "'path' must be a text"),
        ({"datasets": [ENTRY, ENTRY]}, "two data sets are called 'a'"),
    ],
)
def test_bad_configuration_is_an_error(tmp_path, config, message):
    (tmp_path / "a.txt").write_text("a fox\n")
    # JSON is YAML.
    (tmp_path / "sets.yaml").write_text(json.dumps(config))
    with pytest.raises(DeepGenError, match=message):
        read_prompt_config(tmp_path / "sets.yaml")


def test_paths_are_found_beside_the_yaml_in_the_working_folder_or_by_name(tmp_path, monkeypatch):
    (tmp_path / "lists").mkdir()
    (tmp_path / "here").mkdir()
    (tmp_path / "lists" / "beside.txt").write_text("beside\n")
    (tmp_path / "lists" / "moved.txt").write_text("moved\n")
    (tmp_path / "here" / "local.txt").write_text("local\n")
    monkeypatch.chdir(tmp_path / "here")
    paths = ["beside.txt", "local.txt", "/home/someone/data/moved.txt", str(tmp_path / "here" / "local.txt")]
    entries = [{"name": f"{k}", "path": path, "rewards": {"clip": 1}} for k, path in enumerate(paths)]
    (tmp_path / "lists" / "sets.yaml").write_text(json.dumps({"datasets": entries}))
    found, mode = read_prompt_config(tmp_path / "lists" / "sets.yaml")
    assert [s.prompts[0].text for s in found] == ["beside", "local", "moved", "local"]
    assert mode == "sample_proportional"
    assert {s.weight for s in found} == {1.0}


def test_skipping_leaves_at_least_one(tmp_path):
    (tmp_path / "sets.yaml").write_text(json.dumps({"datasets": [ENTRY]}))
    with pytest.raises(DeepGenError, match="1 of 1 prompt lists are not there"):
        read_prompt_config(tmp_path / "sets.yaml", absent="skip")


def test_one_list_takes_the_rewards_given(tmp_path):
    (tmp_path / "a.txt").write_text("a fox\na cat\n")
    sampler = load_prompts(tmp_path / "a.txt", 2, rewards={"jpeg": 1.0})
    assert {(s.text, s.dataset, *s.rewards) for s in sampler[0]} == {("a fox", "a", "jpeg"), ("a cat", "a", "jpeg")}
    with pytest.raises(DeepGenError, match="give the weights of its rewards"):
        load_prompts(tmp_path / "a.txt", 2)


@pytest.mark.parametrize("weight", [0.0, -1.0, math.nan, math.inf])
def test_weight_is_positive(weight):
    with pytest.raises(DeepGenError, match="above 0"):
        dataset("a", 1, weight)


def test_steps_count_from_zero():
    with pytest.raises(IndexError):
        PromptSampler([dataset("a", 1)], 1)[-1]
    with pytest.raises(DeepGenError, match="at least one"):
        PromptSampler([], 1)


def test_a_prompt_that_cannot_be_used_is_named_before_it_is_drawn():
    def tokenize(text):
        if text == "b 1":
            raise DeepGenError("too long")

    check_prompts([dataset("a", 3)], tokenize)
    with pytest.raises(DeepGenError, match=r"prompt 2 of b, 'b 1': too long"):
        check_prompts([dataset("a", 3), dataset("b", 3)], tokenize)


def test_dependencies_of_the_draw_order():
    order = PromptSampler([dataset("a", 4), dataset("b", 6)], 2, seed=1).order
    assert json.loads(json.dumps(order)) == order == PromptSampler([dataset("a", 4), dataset("b", 6)], 2).order
    others = [([dataset("a", 4), dataset("b", 6)], 4), ([dataset("a", 5), dataset("b", 6)], 2), ([dataset("a", 4)], 2)]
    assert all(PromptSampler(sets, per_step).order != order for sets, per_step in others)
    weighted = [dataset("a", 4, 3.0), dataset("b", 6)]
    assert PromptSampler(weighted, 2).order != order
