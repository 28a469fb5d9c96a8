"""The picture of a pack: what it shows is what the model gets, and it can be asked for any part."""

import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dti_dist.attention import intervals, scheme
from dti_dist.cli import main
from dti_dist.config import load_config
from dti_dist.data.dataset import Dataset, iter_sequences
from dti_dist.errors import UserError
from dti_dist.inputs import Inputs
from dti_dist.model import sources
from dti_dist.model.tokenizer import pieces
from dti_dist.reporting import inspect as inspection
from dti_dist.reporting import picture
from dti_dist.reporting.inspect import text, view_pack
from tests.impressions import prepare_impressions
from tests.launching import write_config

N, K, LAYERS = 5, 8, 2
POLICIES = ("windowed", "reset", "budget", "isolated")
SUM_COLOUR = (240, 163, 34)


@pytest.fixture
def config(synthetic, tmp_path):
    return write_config(tmp_path / "config.yaml", synthetic)


@pytest.fixture
def view(config):
    def view(*overrides, **chosen):
        return view_pack(load_config(config, list(overrides)), **chosen)

    return view


@pytest.fixture
def rows(synthetic):
    """[(item ids, labels)] of the train split's rows, read without the program's packing."""
    columns = ["item_ids", "labels"]
    return [
        tuple(batch.rows[name][row].as_py() for name in columns)
        for batch in iter_sequences(Dataset.open(str(synthetic)), "train", columns)
        for row in range(batch.rows.num_rows)
    ]


def titles(synthetic):
    return Dataset.open(str(synthetic)).items_table()["title"].to_pylist()


@pytest.mark.parametrize("policy", POLICIES)
def test_a_png_is_written_for_each_policy(config, policy, tmp_path, capsys):
    out = tmp_path / "new" / "pack.png"
    arguments = ["inspect", str(config), f"attention.policy={policy}", "--out", str(out)]
    assert main(arguments) == 0
    first = out.read_bytes()
    assert main(arguments) == 0, "an older picture is written over"
    assert out.read_bytes() == first
    with Image.open(out) as image:
        assert image.format == "PNG"
        width, height = image.size
        assert 1000 < width < 2000
        assert 700 < height < 2500
        colours = Counter(image.convert("RGB").get_flattened_data())
    assert colours[SUM_COLOUR] > 1000
    assert (colours[163, 18, 42] > 600) == (policy in ("windowed", "reset")), "leaks are red"
    assert f"policy {policy}, n = {N}, k = {K}" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_tokens_and_labels_are_those_of_the_data_set(view, rows, synthetic):
    shown = view()
    items, labels = (column[shown.position - 1 :] for column in rows[shown.row])
    title = titles(synthetic)
    assert len(shown.lines) == N + 3
    for line in shown.lines:
        assert "".join(line.pieces) == title[items[line.first - 1]]
        assert line.label == (" No", " Yes")[labels[line.first - 1]]
        assert line.end - line.start == len(line.pieces) + 1


def test_a_token_of_an_item_is_shown_as_item(view, rows, synthetic):
    shown = view("model.item_embeddings=4")
    items, _ = (column[shown.position - 1 :] for column in rows[shown.row])
    title = titles(synthetic)
    for line in shown.lines:
        assert "".join(line.pieces) == title[items[line.first - 1]] + "[ITEM]"


@pytest.mark.parametrize("policy", POLICIES)
def test_a_sum_reads_n_interactions_and_its_own_text(view, policy):
    shown = view(f"attention.policy={policy}", target=4)
    assert [target.first for target in shown.targets] == [N + 4, N + 5, N + 6]
    for target, reads in zip(shown.targets, shown.reads, strict=True):
        expected = []
        for line in shown.lines:
            back = target.first - line.last
            own = len(target.pieces) / (len(target.pieces) + 1)
            expected.append(own if back == 0 else float(0 < back <= N))
        assert reads.tolist() == pytest.approx(expected)
    assert shown.outside == 0


@pytest.mark.parametrize("policy", POLICIES)
def test_leaks_are_what_lies_beyond_n_within_the_windows_of_all_layers(view, policy):
    shown = view(f"attention.policy={policy}", target=6, targets=2)
    leaking = policy in ("windowed", "reset")
    for target, leaks in zip(shown.targets, shown.leaks, strict=True):
        back = [target.first - line.last for line in shown.lines]
        assert leaks.tolist() == [leaking and N < b <= LAYERS * N for b in back]
    says = "older than n = 5 reach the prediction" if leaking else "Nothing older than n = 5"
    assert says in shown.verdict


@pytest.mark.parametrize(
    ("overrides", "windows"),
    [
        (["attention.policy=windowed"], {(1, 2): (5, 5)}),
        (["attention.policy=isolated"], {(1, 2): (0, 5)}),
        (["attention.budget=[2,0]"], {(1,): (2, 5), (2,): (0, 3)}),
        (["attention.budget=[0,0]"], {(1, 2): (0, 5)}),
    ],
)
def test_layers_with_the_same_windows_share_a_panel(view, overrides, windows):
    shown = view(*overrides, target=2)
    assert {g.layers: (g.body, g.readout) for g in shown.groups} == windows
    for group in shown.groups:
        for row, looks in enumerate(shown.cells):
            for column, seen in enumerate(shown.cells):
                apart = shown.lines[looks.line].first - shown.lines[seen.line].first
                window = group.readout if looks.kind == "sum" else group.body
                if seen.kind == "sum":
                    expected = row == column
                elif apart == 0:
                    own_label = looks.kind == "sum" and seen.kind == "label"
                    expected = not own_label and (looks.kind == "sum" or row >= column)
                else:
                    expected = 0 < apart <= window
                assert group.seen[row, column] == expected, (group.name, row, column)


def test_a_window_one_too_wide_would_be_seen_in_the_picture(view, monkeypatch):
    right = intervals._window_start
    monkeypatch.setattr(
        intervals, "_window_start", lambda layout, unit, window: right(layout, unit, window + 1)
    )
    shown = view(target=4)
    assert shown.leaks.any()
    assert "older than n = 5 reach" in shown.verdict


def test_samples_that_see_each_other_would_be_reported(view, monkeypatch):
    right = scheme.body_intervals

    def sees_all(*arguments):
        seen = right(*arguments)
        return intervals.VisibleIntervals(seen.start * 0, seen.end, seen.key_length)

    monkeypatch.setattr(scheme, "body_intervals", sees_all)
    shown = view(sample=2)
    assert shown.outside > 0
    assert "BROKEN" in shown.verdict


def test_a_shared_body_that_sees_other_texts_would_be_reported(view, monkeypatch):
    right = scheme.shared_body_intervals

    def sees_all(*arguments):
        seen = right(*arguments)
        return intervals.VisibleIntervals(seen.start * 0, seen.end, seen.key_length)

    monkeypatch.setattr(scheme, "shared_body_intervals", sees_all)
    assert "BROKEN" in view("attention.policy=isolated").verdict


@pytest.mark.parametrize("prefix", ["", "Predict the click:"])
def test_sharing_counts_are_those_of_the_pack(config, view, rows, tmp_path, prefix):
    overrides = ["attention.policy=isolated", f"template.prefix={prefix!r}"]
    shown = view(*overrides)
    each = load_config(config, [*overrides, "attention.share_interactions=false"])
    inputs = Inputs.open(each, tmp_path / "tokenizer")
    batch, packs = inspection._read_pack(inputs, 1)
    items = items_of_units(batch, rows)
    bounds = batch.layout.unit_start[0].tolist()
    size = {item: bounds[u + 1] - bounds[u] - 1 for u, (item, _) in items.items()}
    times = Counter(item for item, _ in items.values())
    prefix_tokens = len(inputs.tokens.prefix)
    assert shown.packs == packs
    assert shown.sharing.end_to_end == shown.used_tokens == batch.body_tokens
    assert shown.sharing.interactions == len(items)
    assert shown.sharing.texts == len(times)
    computed = sum(size.values()) + len(set(items.values())) + prefix_tokens
    assert shown.sharing.computed == computed < shown.sharing.end_to_end
    assert [count for _, count in shown.sharing.most] == [c for _, c in times.most_common(5)]
    unit_at = {bounds[u]: u for u in items}
    for line in shown.lines[bool(prefix) :]:
        assert line.stands == times[items[unit_at[line.start]][0]]
    assert f"{computed:,} computed" in text(shown)
    assert view("attention.policy=isolated", "attention.share_interactions=false").sharing is None


def items_of_units(batch, rows):
    """Unit of the pack → (item id, label), by the data set's row that its sample comes from."""
    found = {}
    first = batch.layout.unit_first[0].tolist()
    for slot in range(int(batch.used.sum())):
        target = int(batch.layout.unit[0, batch.length + slot])
        items, labels = rows[int(batch.target_row[0, slot])]
        for unit in range(first[target], target + 1):
            position = int(batch.target_position[0, slot]) - (target - unit)
            found[unit] = items[position], labels[position]
    return found


@pytest.mark.parametrize("policy", ["windowed", "isolated"])
def test_shared_or_not_the_masks_are_the_same(view, policy):
    shared, each = (
        view(f"attention.policy={policy}", f"attention.share_interactions={share}", target=3)
        for share in ("true", "false")
    )
    assert np.array_equal(shared.groups[0].seen, each.groups[0].seen)
    assert np.array_equal(shared.reached, each.reached)


def test_a_prefix_is_shown_and_read(view):
    shown = view("attention.policy=windowed", "template.prefix='Predict:'")
    assert shown.lines[0].role == "prefix"
    assert "".join(shown.lines[0].pieces) == "Predict:"
    assert (shown.reads[:, 0] == 1).all()
    assert not shown.leaks[:, 0].any()
    assert (view("attention.policy=isolated", "template.prefix='Predict:'").reads[:, 0] == 0).all()


def test_the_zoom_is_as_asked(view):
    shown = view(pack=2, sample=1, target=2, targets=1)
    assert (shown.pack, shown.sample, len(shown.targets)) == (2, 1, 1)
    before = shown.sample_interactions[0] - shown.sample_targets[0]
    assert shown.targets[0].first == before + 2
    assert [cell.kind for cell in shown.cells].count("sum") == 1
    last = view(target=K, targets=3)
    assert [target.first for target in last.targets] == [N + K - 2, N + K - 1, N + K]


def test_a_long_context_is_left_out_in_the_middle_but_still_seen(view):
    shown = view("sample.context=28", "sample.targets=2", "pack.length=512", targets=2)
    left_out = [line for line in shown.lines if not line.pieces]
    assert len(left_out) == 1
    assert left_out[0].role == "context"
    covered = [n for line in shown.lines for n in range(line.first, line.last + 1)]
    assert covered == list(range(1, shown.lines[-1].last + 1))
    assert len(shown.lines) < 18
    assert shown.reads[0, shown.lines.index(left_out[0])] == 1
    assert f"… {left_out[0].last - left_out[0].first + 1} interactions …" in text(shown)


def _byte_level(texts):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=270, initial_alphabet=alphabet, show_progress=False)
    )
    return tokenizer


def _like_sentencepiece(texts):
    """As of Llama 2: spaces are ▁, and what the vocabulary lacks is bytes."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1),
        ]
    )
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer.train_from_iterator(
        [text.encode("ascii", "ignore").decode() for text in texts],
        trainers.BpeTrainer(vocab_size=320, special_tokens=tokens, show_progress=False),
    )
    return tokenizer


def _unigram(texts):
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="never")
    tokenizer.train_from_iterator(
        texts, trainers.UnigramTrainer(vocab_size=40, unk_token="<unk>", special_tokens=["<unk>"])
    )
    return tokenizer


FOREIGN = " Zoë – naïve 日本"


@pytest.mark.parametrize("kind", [_byte_level, _like_sentencepiece, _unigram])
@pytest.mark.parametrize("written", [FOREIGN, FOREIGN[1:], "日本", "a 👩‍🚀 b", "plain"])
def test_pieces_of_a_text_are_its_characters_whatever_the_tokenizer(kind, written):
    texts = [f" No {FOREIGN}", "plain title one", "a 👩‍🚀 b"]
    fast = PreTrainedTokenizerFast(tokenizer_object=kind(texts * 10))
    ids = fast(written, add_special_tokens=False)["input_ids"]
    found = pieces(fast, ids, fast("o", add_special_tokens=False)["input_ids"][0])
    assert "".join(found) == written
    assert all(found)
    assert len(found) <= len(ids)
    assert len(ids) != len(written) or found == tuple(written)


def test_a_text_that_ends_within_a_character_says_so():
    fast = PreTrainedTokenizerFast(tokenizer_object=_byte_level([FOREIGN]))
    ids = fast("日", add_special_tokens=False)["input_ids"]
    (first,) = fast("o", add_special_tokens=False)["input_ids"]
    assert len(ids) > 1
    assert pieces(fast, ids, first) == ("日",)
    assert pieces(fast, ids[:-1], first) == ("\ufffd",)


def test_letters_of_several_tokens_are_shown_whole(tmp_path):
    items = {
        "item": [f"i{n}" for n in range(40)],
        "title": [f"{FOREIGN[1:]} {n}" for n in range(40)],
    }
    pq.write_table(pa.table(items), tmp_path / "items.parquet")
    events = [
        {
            "user": f"u{user}",
            "item": f"i{(user * 7 + n) % 40}",
            "time": 1_700_000_000 + n * 1000 + user,
            "y": n % 2,
        }
        for user in range(20)
        for n in range(12)
    ]
    pq.write_table(pa.Table.from_pylist(events), tmp_path / "events.parquet")
    columns = ["--user-col", "user", "--item-col", "item", "--time-col", "time", "--label", "y = 1"]
    command = ["prepare", "events", f"{tmp_path}/events.parquet", "--items"]
    command += [f"{tmp_path}/items.parquet", *columns, "--text-cols", "title"]
    assert main([*command, "--out", str(tmp_path / "data")]) == 0
    config = write_config(tmp_path / "c.yaml", tmp_path / "data", pack={"length": 1024})
    # A vocabulary of bytes, all but a few.
    overrides = ["model.scratch.vocab_size=262", "template.max_item_tokens=64"]
    shown = view_pack(load_config(config, overrides), targets=1)
    for line in shown.lines:
        assert "".join(line.pieces).startswith(FOREIGN[1:])
    (target,) = shown.targets
    cells = [cell for cell in shown.cells if shown.lines[cell.line] == target]
    of_text = [cell for cell in cells if cell.kind == "text"]
    assert len(of_text) == target.text_end - target.start > len(target.pieces)
    assert FOREIGN[1:].replace(" ", "·") in text(shown).replace("|", "")
    picture.draw(shown, tmp_path / "pack.png")


def test_long_texts_are_one_cell_each(view):
    longer = "template.item='{title}, {title}'"
    shown = view(longer, "sample.targets=12", "pack.length=512", targets=12)
    target_cells = [cell for cell in shown.cells if shown.lines[cell.line].role == "target"]
    assert Counter(cell.kind for cell in target_cells) == {"text": 12, "label": 12, "sum": 12}


def test_the_text_has_sizes_items_labels_and_token_boundaries(view, synthetic):
    shown = view()
    printed = text(shown)
    assert f"of {shown.length} tokens" in printed
    assert f"{len(shown.sample_targets)} samples, {shown.sample_targets.sum()} targets" in printed
    for line in shown.lines:
        words = [word.replace(" ", "·") for word in line.pieces]
        middle = "|[SUM]|" if line.role == "target" else "|"
        assert f"|{'|'.join(words)}{middle}{line.label.replace(' ', '·')}|" in printed
    assert sum(shown.sample_tokens) == shown.used_tokens == sum(shown.interaction_tokens)


def test_what_is_added_to_scores_is_said(view):
    assert view("attention.positions=rope").notes == ()
    shown = view("attention.policy=reset", "attention.positions=alibi")
    assert "falls by slope × (tokens between), with slopes from 0.0625 to 0.00391" in shown.notes[0]
    assert "alpha(5) = 1" in shown.notes[1]
    at = [line.first for line in shown.lines].index(N)
    assert shown.weights[0, at] == pytest.approx(1 - 1 / N)


@pytest.mark.parametrize(
    "overrides",
    [
        ["sample.paradigm=sliding_window"],
        ["template.time_gaps=true"],
        ["template.item='{weekday}: {title} at {hour}:'"],
    ],
)
def test_other_prompts_are_drawn_too(view, overrides, tmp_path):
    shown = view(*overrides)
    picture.draw(shown, tmp_path / "pack.png")
    assert (tmp_path / "pack.png").stat().st_size > 10_000


def test_a_title_that_looks_like_a_formula_is_drawn_as_it_is(view, tmp_path):
    shown = view()
    line = shown.lines[0]
    vars(line).update(pieces=("$x^", "_$", "\\frac", "電影"))
    picture.draw(shown, tmp_path / "pack.png")


def test_no_weights_are_loaded(view, monkeypatch):
    monkeypatch.setattr(sources, "load_causal_lm", None)
    monkeypatch.setattr(sources, "_from_scratch", None)
    assert view().layers == LAYERS


@pytest.mark.parametrize(
    ("chosen", "says"),
    [
        ({"pack": 10_000}, "--pack: expected a pack from 1 to"),
        ({"sample": 500}, "--sample: expected a sample from 1 to"),
        ({"target": K + 1}, f"--target: expected a target from 1 to {K}"),
        ({"targets": 13}, "--targets: expected at most 12, found 13"),
    ],
)
def test_what_does_not_exist_is_refused(view, chosen, says):
    with pytest.raises(UserError, match=says):
        view(**chosen)


def test_another_suffix_is_refused_before_any_work(config, tmp_path, capsys):
    out = tmp_path / "pictures" / "pack.jpg"
    assert main(["inspect", str(config), "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert "expected a file that ends in .png" in said
    assert "'pack.png'" in said
    assert not out.parent.exists()


def test_a_folder_that_cannot_be_made_is_refused(config, capsys):
    out = Path(config) / "pack.png"
    assert main(["inspect", str(config), "--out", str(out)]) == 2
    assert "can't be made" in capsys.readouterr().err


def test_without_matplotlib_the_extra_is_named(config, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["inspect", str(config), "--out", str(tmp_path / "pack.png")]) == 2
    assert "pip install 'dti-dist[plots]'" in capsys.readouterr().err


@pytest.mark.parametrize("policy", POLICIES)
def test_targets_that_were_shown_at_once_read_the_history_before_them_alone(
    tmp_path, policy, capsys
):
    data = prepare_impressions(tmp_path)
    path = write_config(tmp_path / "config.yaml", data, pack={"length": 4096})
    config = load_config(path, [f"attention.policy={policy}"])
    seen_candidates = 0
    for sample in range(1, 6):
        view = view_pack(config, sample=sample, target=1, targets=inspection.MOST_TARGETS)
        assert view.outside == 0
        assert len(view.targets) <= inspection.MOST_TARGETS
        for number, target in enumerate(view.targets):
            for line, share in zip(view.lines, view.reads[number], strict=True):
                if line is target:
                    assert share > 0
                elif share:  # history from before its request
                    assert line.label
                    assert line.last <= target.before
            seen_candidates += not target.label
        assert text(view)
    assert seen_candidates
    out = tmp_path / "pack.png"
    assert main(["inspect", str(path), "--out", str(out)]) == 0
    assert out.stat().st_size > 1000
