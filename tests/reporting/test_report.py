"""The report of a run: what it says is what the run's folder says, and it is safe to open."""

import fcntl
import json
import math
import re
import time
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from dti_dist.cli import main
from dti_dist.reporting import charts
from dti_dist.reporting.history import History
from dti_dist.reporting.report import page, report
from tests import browser
from tests.launching import job, job_with, metrics, run, run_dir, train, write_config
from tests.reporting.run_folders import (
    HOSTILE,
    RunFolder,
    beside_floors,
    logged,
    realistic,
    troubled,
)


class Parsed(HTMLParser):
    """Elements with their attributes, and text by what it stands in."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.texts, self._open = [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._open.append(tag)

    def handle_endtag(self, tag):
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data):
        if data.strip() and not {"style", "script"} & set(self._open):
            self.texts.append(" ".join(data.split()))

    @property
    def text(self):
        return " | ".join(self.texts)


def read(*runs):
    return Parsed(page([History.read(run.path, run.path.name) for run in runs]))


# -- what it says


def test_figures_of_a_run_are_those_of_its_folder(tmp_path):
    text = read(realistic(tmp_path / "shop")).text
    for said in (
        "shop | finished, 1,000 steps",
        "DTI, n = 5, k = 8; policy budget, positions alibi, head yes_no",
        "best valid AUC | 0.7397 | at step 1,000",
        "test AUC | 0.7312 | 95 %: 0.7201 to 0.7425",
        "of the way to the ceiling | 62.7% | from 0.5 to 0.8687",
        "targets seen | 100k | in 2 epochs",
        "F1 at the best threshold of valid | 0.6600",
        "By activity: test, sliding-window prompts",
        "8 × NVIDIA H100",
        "torch 2.13.0",
        "training.learning_rate | 0.003 | 0.0001",
        "torchrun --standalone --nproc-per-node 8 -m dti_dist.training",
    ):
        assert said in text


def test_the_way_is_measured_to_the_lowest_ceiling(tmp_path):
    run = realistic(tmp_path / "slates")
    run.evaluated(history_ceiling=0.8)
    text = read(run).text
    assert "of the way to the ceiling | 77.1% | from 0.5 to 0.8000" in text
    assert "AUC's ceiling | 0.8000 | 0.8687" in text


def test_a_model_stands_beside_floors_and_one_that_counts_beat_is_warned_of(tmp_path):
    run = realistic(tmp_path / "shop")
    assert "regression" not in read(run).text
    run.evaluated(**beside_floors(-0.02, [-0.03, -0.01]))
    text = read(run).text
    assert "test, sliding-window prompts: the model is worse than the regression on five" in text
    assert "regression on five counts | 0.7000 | 0.5000 | 0.9000" in text
    assert "model − regression | -0.0200 | -0.0300 to -0.0100 | +0.0200" in text
    better = realistic(tmp_path / "better")
    better.evaluated(**beside_floors(0.02, None))
    assert "is worse than" not in read(better).text
    assert "AUC, model − regression | -0.0200 | -0.0300 to -0.0100 | +0.0200 |" in (
        read(run, better).text
    )


def test_auc_by_place_in_the_request_is_drawn_with_its_intervals(tmp_path):
    parsed = read(realistic(tmp_path / "shop"))
    assert "AUC by place in the request | all targets: 0.7312 | AUC | " in parsed.text
    assert "| 1 | 300 | 20 | 0.4000 | 0.4100 | 0.7200 | 0.7000 to 0.7500 | 2 |" in parsed.text
    assert "AUC by size" not in parsed.text


def test_parts_stand_side_by_side_at_their_auc():
    def part(value, auc, interval=(math.nan, math.nan)):
        return {"value": value, "auc": auc, "interval": interval}

    parts = [part("1", 0.6, (0.5, 0.7)), part("2 to 5", math.nan), part("6 or more", 0.8)]
    chart = charts.draw_parts("size of the request", parts, 0.7)
    assert [(tick.percent, tick.label) for tick in chart.x_ticks] == [
        *((21.43, "1"), (50.0, "2–5"), (78.57, "6+")),
    ]
    assert chart.y_range == pytest.approx((0.5 - 0.06 * 0.3, 0.8 + 0.06 * 0.3))
    reference, bars, dots = (one.path for one in chart.drawn)
    assert reference.count("L") == 1
    assert bars.count("M") == 1
    assert [float(x) for x in re.findall(r"M([\d.]+)", dots)] == [214.3, 785.7]
    assert chart.description == "1: 0.6, 2–5: –, 6+: 0.8"
    assert charts.draw_parts("", parts[:2], 0.7) is None, "one dot is no chart"
    many = [part(f"{n} to {n + 9}", 0.7) for n in range(1, 170, 10)]
    assert len(charts.draw_parts("", many, 0.7).x_ticks) <= 6


def write_ended(run, how, why=None):
    run.line(40, ended={"how": how, **({"why": why} if why else {})})


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (lambda run: write_ended(run, "done"), "finished, 40 steps"),
        (lambda run: write_ended(run, "patience"), "finished early at step 40 of 1,000"),
        (lambda run: write_ended(run, "signal"), "stopped by a signal at step 40 of 1,000"),
        (lambda run: write_ended(run, "failed", "disk full"), "failed at step 40 of 1,000"),
        (lambda run: None, "ended without a message after step 40 of 1,000"),
        (lambda run: write_ended(run, "unheard of"), "failed at step 40"),
    ],
    ids=["done", "patience", "signal", "failed", "killed", "of a newer program"],
)
def test_how_a_run_stands_is_said(tmp_path, write, said):
    folder = RunFolder(tmp_path / "run")
    folder.started()
    folder.logged(40)
    write(folder)
    assert said in read(folder).text


def test_a_run_whose_folder_a_job_holds_is_running(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.started()
    folder.logged(40)
    with (folder.path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "running, step 40 of 1,000" in read(folder).text
    assert "running" not in read(folder).text


def test_lines_of_an_older_program_do_without_time_starts_and_ends(tmp_path):
    folder = RunFolder(tmp_path / "run")
    lines = [{"step": step, **logged(step)} for step in range(10, 101, 10)]
    (folder.path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    history = History.read(folder.path)
    assert history.state.words == "100 steps logged"
    assert history.training_seconds == pytest.approx(100)
    assert "100 steps logged" in read(folder).text


def test_the_time_between_jobs_is_no_training_time(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.started()
    folder.logged(10, after=10)
    folder.logged(20, after=10)
    folder.started(20, after=50_000)
    folder.logged(30, after=15)
    history = History.read(folder.path)
    assert history.seconds.tolist() == [10, 20, 35]
    assert history.training_seconds == 35


def test_targets_of_steps_whose_line_a_resume_dropped_are_counted(tmp_path):
    """Logged every 10 steps, saved at 25: the line of step 30 covers 5 steps, those before it 5."""
    folder = RunFolder(tmp_path / "run")
    folder.started()
    folder.logged(10)
    folder.logged(20)
    folder.started(25, last_step=38)
    half = logged(30, 5.0, targets=500) | {"step_s": 1.0}
    folder.line(30, 5.0, **half)
    assert History.read(folder.path).targets_seen.tolist() == [1000, 2000, 3000]


def test_a_restart_says_what_was_taken_again_and_why(tmp_path):
    text = read(troubled(tmp_path / "run")).text
    assert "went on from step 300 on 8 rank(s); steps up to 340 were taken again. The job before"
    assert "rank 3 failed: <img src=x" in text
    assert "went on from step 500 on 4 rank(s). The job before was stopped by a signal" in text
    for counted in ("2 restarts", "2 checkpoints could not be written", "1 step left out",
                    "2 parts of the data could not be read"):  # fmt: skip
        assert counted in text


def test_what_a_restart_skips_again_is_listed_once(tmp_path):
    folder = RunFolder(tmp_path / "run")
    for _ in range(2):
        folder.started()
        folder.line(0, skipped=["train/part-3.parquet"])
    kinds = [event.kind for event in History.read(folder.path).events]
    assert kinds == ["skipped", "restart"]


def test_a_comparison_shows_what_differs_and_evaluations_beside_each_other(tmp_path):
    runs = [
        realistic(tmp_path / "base"),
        realistic(tmp_path / "shop", better=0.02, attention={"policy": "isolated"}, seed=1),
    ]
    runs[1].evaluated(auc=0.75, targets=2300)
    parsed = read(*runs)
    assert "2 runs compared" in parsed.text
    assert "attention.policy | budget | isolated" in parsed.text
    assert "training.learning_rate" not in parsed.text
    assert "AUC | 0.7312 | 0.7201 to 0.7425 | 0.7500" in parsed.text
    assert "different numbers of targets" in parsed.text
    assert "dti-dist compare" in parsed.text
    names = {at.get("data-name") for tag, at in parsed.elements if tag == "path"}
    assert {"base", "shop"} <= names


def test_runs_of_the_same_name_are_told_apart(tmp_path):
    for place in ("a", "b"):
        realistic(tmp_path / place / "run")
    out = tmp_path / "both.html"
    report([str(tmp_path / "a" / "run"), str(tmp_path / "b" / "run")], str(out))
    assert "a/run" in out.read_text()
    assert "b/run" in out.read_text()


# -- what may be missing


@pytest.mark.parametrize("text", [None, "", "\n", '{"step": 1, "lo', "[]\nnull\n3\n"])
def test_without_a_logged_step_the_page_says_so(tmp_path, text):
    folder = RunFolder(tmp_path / "run")
    if text is not None:
        (folder.path / "metrics.jsonl").write_text(text)
    said = read(folder).text
    assert "No step was logged yet." in said
    assert "Not evaluated yet" in said


def test_half_a_line_at_the_end_is_no_loss_and_broken_ones_are_counted(tmp_path):
    folder = realistic(tmp_path / "run")
    path = folder.path / "metrics.jsonl"
    whole = path.read_text()
    path.write_text(whole + '{"step": 1001, "loss": 0.5')
    history = History.read(folder.path)
    assert (len(history.lines), history.broken) == (len(folder.lines), 0)
    path.write_text(whole.replace("\n", "\ngarbage\n", 2))
    assert "2 lines of metrics.jsonl could not be read" in read(folder).text


def test_values_that_are_missing_or_not_finite_are_gaps(tmp_path):
    folder = RunFolder(tmp_path / "run")
    for step, norm in ((10, 1.0), (20, math.nan), (30, None), (40, 2.0)):
        folder.logged(step, grad_norm=norm)
    folder.line(50, loss="no number", targets=None)
    parsed = read(folder)
    paths = [at["d"] for tag, at in parsed.elements if tag == "path" and "data-name" in at]
    assert any(d.count("M") == 2 and "L" not in d for d in paths)
    assert not any("nan" in d or "inf" in d for d in paths)
    assert "nan" not in parsed.text.lower()


def test_an_evaluation_of_an_older_program_has_fewer_figures(tmp_path):
    folder = RunFolder(tmp_path / "run")
    (folder.path / "eval").mkdir()
    few = {"split": "test", "prompt": "streaming", "auc": None, "log_loss": 0.5, "targets": 7}
    (folder.path / "eval" / "test.json").write_text(json.dumps(few))
    (folder.path / "eval" / "broken.json").write_text('{"split": ')
    text = read(folder).text
    assert "log loss | 0.5000" in text
    assert "GAUC" not in text


# -- what curves keep


def test_a_long_curve_keeps_its_spikes_and_gaps():
    x = np.arange(100_000.0)
    y = np.sin(x / 5000)
    y[41_234], y[77_777] = 50.0, -50.0
    y[20_000:21_000] = np.nan
    thin_x, thin_y = charts.thinned(x, y)
    assert len(thin_x) <= charts.MOST_POINTS
    assert {41_234.0, 77_777.0} <= set(thin_x)
    assert np.all(np.diff(thin_x) > 0)
    assert np.isnan(thin_y).any()
    assert not np.isnan(thin_y[(thin_x < 19_800) | (thin_x > 21_200)]).any()


def test_a_short_curve_is_left_alone():
    x = np.arange(900.0)
    assert charts.thinned(x, x)[0] is x


def test_a_running_mean_is_weighted_and_passes_over_gaps():
    values = np.array([1.0, np.nan, 3.0, 5.0])
    found = charts.running_mean(values, np.array([1.0, 1.0, 3.0, 1.0]), 3)
    assert found.tolist() == [1.0, 2.5, 3.5, 3.5]


def test_a_running_median_is_not_moved_by_a_spike():
    values = np.array([1.0, 1.0, 90.0, 1.0, 2.0])
    assert charts.running_median(values, 3).tolist() == [1.0, 1.0, 1.0, 2.0, 1.5]


def test_ticks_are_round_and_within_the_axis():
    axes = ((0, 1), (0.7213, 0.7719), (-3, 250_000), (0, 1e-4), (0.5, 0.5000001), (0, 7e9))
    for low, high in axes:
        ticks = charts._round_numbers(low, high)
        assert 2 <= len(ticks) <= 7
        assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in ticks)
        labels = charts.tick_labels(ticks)
        if high - low > 1e-6:
            assert len(set(labels)) == len(labels)
    assert charts.tick_labels([0.72, 0.74, 0.76]) == ["0.72", "0.74", "0.76"]
    assert charts.tick_labels([0, 50_000_000]) == ["0", "50M"]
    assert charts.tick_labels([0, 5e-5, 1e-4]) == ["0", "5e-5", "1e-4"]
    hours = [tick.label for tick in charts._ticks((0, 28_800), seconds=True)]
    assert hours == ["0 h", "2 h", "4 h", "6 h", "8 h"]


def test_one_spike_does_not_flatten_a_curve_and_is_noted():
    x = np.arange(1.0, 101.0)
    y = 0.5 + 0.1 / x
    y[50] = 900.0
    chart = charts.draw("Loss", "nats", [charts.Series("train", x, y)])
    assert chart.y_range[1] < 2
    assert chart.above == [51.0]
    assert chart.notes == ["▲ 1 value beyond the axis, greatest 900"]


def test_names_of_curves_that_end_together_lie_apart_and_inside():
    x = np.array([0.0, 1.0])
    ends = (0.0, 0.001, 0.5, 1.0, 1.0)
    series = [charts.Series(str(y), x, np.array([0.5, y])) for y in ends]
    places = sorted(one.name_at[1] for one in charts.draw("", "", series).drawn)
    assert all(3 <= place <= 97 for place in places)
    assert min(np.diff(places)) > 8.9


def test_small_probabilities_are_told_apart_in_the_reliability_diagram():
    def a_bin(predicted, rate, interval=None):
        return {"mean_prediction": predicted, "label_rate": rate, "interval": interval}

    bins = [a_bin(p, p * 1.1, [p, p * 1.3]) for p in (0.001, 0.002, 0.004, 0.009, 0.05, 0.3)]
    chart = charts.draw_calibration([a_bin(0.0005, 0.0, [0.0, math.nan]), *bins])
    assert "Logarithmic axes." in chart.notes
    assert [tick.label for tick in chart.x_ticks] == ["0.001", "0.01", "0.1"]
    even = charts.draw_calibration([a_bin(p, p) for p in (0.2, 0.4, 0.6)])
    assert even.notes == []


def test_a_hundred_thousand_lines_make_a_small_page_soon(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.line(0)
    text = json.dumps({"step": 0, "time": 0.0, **logged(50)}).replace('"step": 0', '"step": %d')
    lines = [text % step for step in range(1, 100_001)]
    (folder.path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    began = time.process_time()
    html = page([History.read(folder.path)])
    assert time.process_time() - began < 20  # 2 s of CPU time on an idle machine
    assert len(html) < 1_000_000


# -- what it must not do


def test_nothing_of_a_run_becomes_markup_or_code(tmp_path):
    folder = troubled(tmp_path / HOSTILE.replace("/", ""))
    for runs in ([folder], [folder, realistic(tmp_path / "other")]):
        parsed = read(*runs)
        scripts = [attributes for tag, attributes in parsed.elements if tag == "script"]
        assert scripts == [{}]
        assert not [tag for tag, _ in parsed.elements if tag == "img"]
        assert not [name for _, at in parsed.elements for name in at if name.startswith("on")]
        assert "<img src=x onerror=alert(1)>" in parsed.text


def test_the_page_names_nothing_outside_itself(tmp_path):
    html = page([History.read(realistic(tmp_path / "run").path)])
    for _, attributes in Parsed(html).elements:
        for name in ("src", "href", "action", "data", "poster", "srcset"):
            assert attributes.get(name, "#").startswith(("#", "data:"))
    assert not re.search(r"@import|url\(|https?://", html)
    assert "default-src 'none'" in html


def test_credentials_are_hidden(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.started()
    key = "AKIA" + "A" * 16
    folder.line(10, save_failed=f"s3 said no to {key}, https://me:hunter22@store/x")
    folder.line(10, ended={"how": "failed", "why": f"secret_access_key={'b' * 40}"})
    html = page([History.read(folder.path)])
    assert "a checkpoint could not be written" in html
    assert not re.search(rf"{key}|hunter22|bbbbbbb", html)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "expected the folder of a run, found nothing at nowhere"),
        (["file"], "found a file at file"),
        (["empty"], "it has no config.yaml"),
        (["run", "run", "--pack"], "--pack: expected one run, found 2"),
        (["run", "--out", "file/report.html"], "can't be written"),
    ],
)
def test_what_is_no_run_is_refused_with_what_to_do(tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    RunFolder(tmp_path / "run")
    assert main(["report", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_the_command_writes_into_the_runs_folder_and_says_where(tmp_path, capsys):
    folder = realistic(tmp_path / "run")
    assert main(["report", str(folder.path)]) == 0
    assert f"wrote {folder.path / 'report.html'}" in capsys.readouterr().err
    assert (folder.path / "report.html").stat().st_size < 200_000
    assert not list(folder.path.glob(".*.partial"))


def test_the_first_pack_is_drawn_on_demand(synthetic, tmp_path):
    folder = RunFolder(tmp_path / "run", data_path=synthetic)
    out = report([str(folder.path)], pack=True)
    pictures = [at for tag, at in Parsed(out.read_text()).elements if tag == "img"]
    assert len(pictures) == 1
    assert pictures[0]["src"].startswith("data:image/png;base64,")


# -- in real jobs


@pytest.mark.slow
def test_a_job_ends_with_a_report_and_a_restart_is_on_record(synthetic, tmp_path):
    config = write_config(tmp_path / "config.yaml", synthetic, checkpoints={"every_steps": 5})
    once = tmp_path / "failed"
    script = job_with(
        f"if step == 8 and not os.path.exists({str(once)!r}):\n"
        f"    open({str(once)!r}, 'w').close()\n"
        "    raise ValueError('a fault of the test')",
        tmp_path / "job.py",
    )
    run(job(1, config, script=script), tmp_path / "first.log", expect=1)
    folder = run_dir(config)
    failed = {"how": "failed", "why": "a fault of the test"}
    assert metrics(folder)[-1]["ended"] == failed
    assert not (folder / "report.html").exists()

    train(config)
    starts = [line for line in metrics(folder) if "started" in line]
    assert [line["step"] for line in starts] == [0, 5]
    assert starts[1]["started"]["last_step"] == 7
    assert starts[1]["started"]["ended"] == failed
    about = starts[0]["started"]
    assert (about["ranks"], about["machines"], about["total_steps"]) == (1, 1, 20)
    assert sum(about["devices"].values()) == 1
    assert {"dti-dist", "python", "torch", "deepspeed", "transformers"} <= set(about["versions"])
    assert metrics(folder)[-1]["ended"] == {"how": "done"}
    times = [line["time"] for line in metrics(folder)]
    assert times == sorted(times)
    text = Parsed((folder / "report.html").read_text()).text
    assert "finished, 20 steps" in text
    assert "steps up to 7 were taken again. The job before had failed: a fault of the test" in text


@pytest.mark.slow
def test_a_report_that_cannot_be_written_does_not_fail_the_run(synthetic, tmp_path):
    config = write_config(tmp_path / "config.yaml", synthetic, training={"max_steps": 2})
    in_its_place = f"os.makedirs({str(run_dir(config) / 'report.html')!r}, exist_ok=True)"
    script = job_with(in_its_place, tmp_path / "job.py")
    printed = run(job(1, config, script=script), tmp_path / "log")
    assert "The report was not written" in printed
    assert "dti-dist report" in printed


# -- in a real browser

SCREENS = {
    "light": (1280, "light", "screen"),
    "dark": (1280, "dark", "screen"),
    "phone": (360, "light", "screen"),
    "dark phone": (360, "dark", "screen"),
    "print": (720, "dark", "print"),
}
OVERFLOWING = """
[...document.querySelectorAll("body *")]
  .filter(e => !e.closest(".wide, .hidden, .symbols, .name") && e.getClientRects().length)
  .filter(e => {
    const box = e.getBoundingClientRect();
    return box.right > innerWidth + 1 || box.left < -1;
  })
  .map(e => e.outerHTML.slice(0, 120))
"""
LOW_CONTRAST = """
(() => {
  const parse = c => (c.match(/[\\d.]+/g) || []).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const paper = e => {
    for (; e; e = e.parentElement) {
      const colour = parse(getComputedStyle(e).backgroundColor);
      if (colour.length && colour[3] !== 0) return colour;
    }
    return [255, 255, 255];
  };
  const found = [];
  for (const e of document.querySelectorAll("body *")) {
    const own = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
    if (!own || e.closest("svg, script, .hidden, .cut") || !e.getClientRects().length) continue;
    const [a, b] = [light(parse(getComputedStyle(e).color)), light(paper(e))].sort((x, y) => y - x);
    if ((a + 0.05) / (b + 0.05) < 4.5) found.push(e.outerHTML.slice(0, 120));
  }
  return found;
})()
"""
UNDRAWN = """
[...document.querySelectorAll(".plot path[data-name]")]
  .filter(p => { const b = p.getBoundingClientRect(); return b.width + b.height < 1; })
  .map(p => p.dataset.name)
"""


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    executable = browser.find()
    if executable is None:
        pytest.skip(browser.MISSING)
    with browser.chromium(executable, tmp_path_factory.mktemp("profile")) as tab:
        yield tab


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Reports by name."""
    folder = tmp_path_factory.mktemp("pages")
    well, better = realistic(folder / "base"), realistic(folder / "shop", 1, 0.02)
    badly, empty = troubled(folder / "troubled <b>"), RunFolder(folder / "empty")
    made = {
        "well": [well],
        "troubled": [badly],
        "empty": [empty],
        "comparison": [well, better, badly, empty],
    }
    return {
        name: report([str(run.path) for run in runs], str(folder / f"{name}.html"))
        for name, runs in made.items()
    }


@pytest.mark.parametrize("screen", SCREENS)
@pytest.mark.parametrize("name", ["well", "troubled", "empty", "comparison"])
def test_a_browser_shows_it(tab, pages, tmp_path, name, screen):
    width, scheme, media = SCREENS[screen]
    tab.complaints.clear()
    tab.requests.clear()
    tab.show(pages[name], width, scheme, media)
    assert tab.run("document.documentElement.scrollWidth") <= width
    assert tab.run(OVERFLOWING) == []
    assert tab.run(LOW_CONTRAST) == []
    assert tab.run(UNDRAWN) == []
    drawn = tab.run("document.querySelectorAll('.plot path[data-name]').length")
    assert drawn == 0 if name == "empty" else drawn > 10
    picture = tmp_path / "page.png"
    tab.screenshot(picture)
    with Image.open(picture) as image:
        assert image.width == width
        light = sum(image.convert("L").resize((1, 1)).getdata()) > 128
        assert light == (scheme == "light" or media == "print")
    assert tab.complaints == []
    assert {url.split(":")[0] for url in tab.requests} == {"file"}
    assert len(tab.requests) == 1


def test_on_paper_everything_folded_is_open(tab, pages):
    all_visible = "[...document.querySelectorAll('details td')].every(e => e.checkVisibility())"
    tab.show(pages["well"], 1280)
    assert not tab.run(all_visible)
    tab.show(pages["well"], 720, media="print")
    assert tab.run(all_visible)


def test_the_pointer_reads_values(tab, pages):
    tab.show(pages["well"], 1280)
    place = "document.querySelector('.plot').getBoundingClientRect()"
    left, top, width = (tab.run(f"{place}.{side}") for side in ("left", "top", "width"))
    tab.move(left + width / 2, top + 20)
    where, logged, mean, valid = tab.run("document.querySelector('.read').textContent").split("\n")
    assert where == "50k targets seen"
    assert re.fullmatch(r"train, as logged: 0\.5\d+", logged)
    assert re.fullmatch(r"train, mean of \d+ lines: 0\.5\d+", mean)
    assert float(valid.removeprefix("valid: ")) == pytest.approx(0.56, abs=1e-4)


def test_it_can_be_read_without_scripts(tab, pages):
    tab.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        tab.show(pages["well"], 1280)
    finally:
        tab.call("Emulation.setScriptExecutionDisabled", value=False)
    assert tab.run("document.querySelector('h1').textContent") == "base"
    assert tab.run(UNDRAWN) == []


def test_faults_of_a_page_would_be_noticed(tab, pages, tmp_path):
    bad = tmp_path / "bad.html"
    outside = "https://elsewhere.invalid/x.png"
    bad.write_text(f"<img src='{outside}'><script>undefined.x</script>")
    tab.complaints.clear()
    tab.show(bad, 800)
    assert any("TypeError" in complaint for complaint in tab.complaints)
    assert len(tab.complaints) > 1
    assert outside in tab.requests
    tab.show(pages["well"], 800)
    tab.run("document.querySelector('h1').style = 'color: #ccc; width: 900px'")
    assert len(tab.run(LOW_CONTRAST)) == 1
    assert len(tab.run(OVERFLOWING)) == 1
