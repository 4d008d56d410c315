"""The page shows what the files hold, loads nothing, and says what it lacks."""

import html.parser
import json

import matplotlib.image
import numpy as np
import pytest

from stca_jax import config as config_lib
from stca_jax.errors import UserError
from stca_jax.evaluation.report.charts import (
    Line,
    lines_by_length,
    lines_by_step,
    quality_charts,
    training_charts,
)
from stca_jax.evaluation.report.page import write_report
from stca_jax.evaluation.report.runs import Selection, best_selection, load_run
from stca_jax.experiments.configs import tiny

VALIDATION = {"split": "validation", "min_history": 0, "max_requests": None}
TEST = VALIDATION | {"split": "test"}
LENGTHS = (16, 64, 256)


def auc(step, length):
    return 0.5 + 0.001 * step + 0.0001 * length


def write_run(workdir, *, steps=(20, 40), selection=VALIDATION, seed=0, best=None):
    """A run whose AUC is `auc` of each step and length, at 4 steps a second."""
    (workdir / "evaluation").mkdir(parents=True)
    config = config_lib.apply_overrides(tiny.get_config(), {"seed": str(seed)})
    (workdir / "config.json").write_text(json.dumps(config_lib.to_dict(config)))
    rows = [
        {**selection, "step": s, "length": n, "model": "stca", "auc": auc(s, n)}
        | {"calibration": 1.01, "log_loss": None}
        for s in steps
        for n in LENGTHS
    ]
    rows += [{**selection, "length": n, "model": "counting", "auc": 0.5} for n in LENGTHS]
    write_lines(workdir / "evaluation" / "checkpoints.jsonl", rows)
    lines = [
        {"step": s, "train/token_fill": 0.5, "validation/auc": 0.7, "validation/num_users": 3}
        | ({"speed/steps_per_second": 4.0, "speed/tokens_per_second": 4096.0} if s > 20 else {})
        for s in steps
    ]
    write_lines(workdir / "metrics.jsonl", lines)
    if best is not None:
        mark = {"step": best, "metric": "auc@256", "value": 1.0}
        (workdir / "best.json").write_text(json.dumps(mark))
    return workdir


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


class Page(html.parser.HTMLParser):
    """Tags, ids, addresses and texts of a page; tables as lists of rows."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.addresses, self.tables, self.text = [], [], [], [], []
        self.feed(text)
        assert not self.open, "tags are left open"

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.addresses += [v for n, v in attributes.items() if n in ("src", "href", "xlink:href")]
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        if self.open and self.open[-1] in ("th", "td"):
            self.tables[-1][-1].append(data)


def test_page_loads_nothing_and_holds_the_numbers(tmp_path):
    run = load_run(write_run(tmp_path / "run"), "my <run>")
    written = write_report([run], tmp_path / "out" / "page.html")
    assert written[0] == tmp_path / "out" / "page.html"
    names = sorted(path.name for path in written[1:])
    assert names == [
        "auc_by_cost.png",
        "auc_by_length.png",
        "auc_by_step.png",
        "calibration_by_length.png",
        "throughput.png",
    ]
    page = Page(written[0].read_text())
    assert len(page.ids) == len(set(page.ids))
    assert all(address.startswith("#") for address in page.addresses)
    assert {address[1:] for address in page.addresses} <= set(page.ids)
    assert "my <run>" in page.text
    head, summary = page.tables[0]
    assert head[:3] == ["run", "history", "AUC"]
    # The longest history that was scored, and 40 steps at 4 a second.
    expected = ["my <run>, step 40", "256", "0.5656", "1.0100", "0.5000 (counting)", "40", "0.2"]
    assert summary == expected
    assert page.text.index("Summary") < page.text.index("Numbers")
    assert page.tables[1] == [
        ["length", "16", "64", "256"],
        ["my <run>, step 40", "0.5416", "0.5464", "0.5656"],
        ["counting", "0.5000", "0.5000", "0.5000"],
    ]
    # 40 steps at 4 a second, of half of 8 rows of 256 tokens each.
    assert page.tables[3][1] == ["my <run>", "40", "0.2", "0.0", "4,096", "0.500"]
    config = dict(row for row in page.tables[-1][1:] if len(row) == 2)
    assert config["input.row_length"] == "256"
    assert config["model.sequence.width"] == "16"


def test_charts_are_images_with_something_on_them(tmp_path):
    run = load_run(write_run(tmp_path / "run"), "run")
    for path in write_report([run], tmp_path / "page.html")[1:]:
        image = matplotlib.image.imread(path)
        assert image.shape[1] > 800
        blue = np.array([0x00, 0x72, 0xB2]) / 255  # Okabe and Ito's, of the first line
        assert (np.abs(image[..., :3] - blue).max(axis=-1) < 0.01).sum() > 100
        assert (image[0, :, :3] == 1).all()


def test_marked_checkpoint_is_shown_by_length(tmp_path):
    run = load_run(write_run(tmp_path / "run", best=20), "run")
    line, counting = lines_by_length([run], Selection("validation", 0, None), None, "auc")
    assert line.label == "run, step 20"
    assert line.x == list(LENGTHS)
    assert line.y == [auc(20, n) for n in LENGTHS]
    assert (counting.label, counting.reference, counting.y) == ("counting", "counting", [0.5] * 3)


def test_lines_by_step_and_by_cost(tmp_path):
    runs = [load_run(write_run(tmp_path / n), n) for n in ("a", "b")]
    selection = Selection("validation", 0, None)
    one = lines_by_step(runs[:1], selection, None, "auc", in_minutes=False)
    assert [line.label for line in one] == ["256 events", "64 events", "16 events"]
    assert one[0].x == [20, 40]
    assert one[0].y == [auc(20, 256), auc(40, 256)]
    both = lines_by_step(runs, selection, None, "auc", in_minutes=True)
    assert [line.label for line in both] == ["a, 256 events", "b, 256 events"]
    assert both[1].x == pytest.approx([20 / 4 / 60, 40 / 4 / 60])


def test_seeds_are_one_line_with_bars(tmp_path):
    runs = []
    for seed, best in ((0, 20), (1, 40), (2, 40)):
        workdir = write_run(tmp_path / f"long/seed-{seed}", seed=seed, best=best)
        runs.append(load_run(workdir, f"long/seed-{seed}"))
    runs.append(load_run(tmp_path / "long/seed-0", "again"))
    selection = Selection("validation", 0, None)
    mean, again, _ = lines_by_length(runs, selection, None, "auc")
    values = np.array([[auc(step, n) for n in LENGTHS] for step in (20, 40, 40)])
    assert (mean.label, again.label) == ("long, 3 seeds", "again, step 20")
    np.testing.assert_allclose(mean.y, values.mean(0))
    np.testing.assert_allclose(mean.error, values.std(0, ddof=1))
    assert again.error is None
    by_step = lines_by_step(runs[:3], selection, None, "auc", in_minutes=False)
    assert [line.label for line in by_step] == ["256 events", "64 events", "16 events"]
    write_report(runs, tmp_path / "page.html")
    summary, numbers, *_ = Page((tmp_path / "page.html").read_text()).tables
    assert numbers[1][:2] == ["long, 3 seeds", "0.5349 ± 0.0115"]
    assert summary[1][:3] == ["long, 3 seeds", "256", "0.5589 ± 0.0115"]
    assert summary[2][:3] == ["again, step 20", "256", "0.5456"]


def test_no_validation_point_of_several_runs_is_left_out(tmp_path):
    """Seeds that got to different steps, eight runs, and one that was scored on other requests."""
    own = VALIDATION | {"max_targets": 9}
    runs = [load_run(write_run(tmp_path / "s/0", steps=(20, 40, 60), seed=0), "s/0")]
    runs.append(load_run(write_run(tmp_path / "s/1", steps=(20,), seed=1), "s/1"))
    for k in range(7):
        workdir = write_run(tmp_path / f"o{k}", selection=own if k == 6 else VALIDATION)
        config = json.loads((workdir / "config.json").read_text())
        config["input"]["min_history"] = k + 1
        (workdir / "config.json").write_text(json.dumps(config))
        (workdir / "metrics.jsonl").unlink()
        runs.append(load_run(workdir, f"o{k}"))
    selection = best_selection(runs, None, across_steps=True)
    lines = lines_by_step(runs, selection, None, "auc", in_minutes=False)
    names = ["s, 2 seeds", *(f"o{k}" for k in range(6))]
    assert [line.label for line in lines] == [f"{name}, 256 events" for name in names]
    assert lines[0].x == [20, 40, 60]
    assert lines[0].y == pytest.approx([auc(s, 256) for s in (20, 40, 60)])
    np.testing.assert_equal(lines[0].error, [0, np.nan, np.nan])
    captions = [chart.caption for chart in quality_charts(runs, None)]
    assert all(caption.endswith("Not scored on these: o6.") for caption in captions)


def test_test_split_is_shown_by_length_and_what_has_most_steps_by_step(tmp_path):
    workdir = write_run(tmp_path / "run")
    rows = [{**TEST, "step": 40, "length": n, "model": "stca", "auc": 0.6} for n in LENGTHS]
    write_lines(workdir / "evaluation" / "test-40.jsonl", rows)
    run = load_run(workdir, "run")
    assert best_selection([run], None).split == "test"
    assert best_selection([run], None, across_steps=True).split == "validation"


def test_every_validation_point_is_drawn_beside_one_table_of_many_lengths(tmp_path):
    workdir = write_run(tmp_path / "run")
    (workdir / "evaluation" / "checkpoints.jsonl").unlink()
    rows = [{**TEST, "step": 40, "length": n, "model": "stca", "auc": 0.6} for n in LENGTHS]
    write_lines(workdir / "evaluation" / "test-40.jsonl", rows)
    write_lines(
        workdir / "metrics.jsonl",
        [{"step": s, "train/loss": 1 / s, "validation/auc": 0.7} for s in (20, 40)],
    )
    run = load_run(workdir, "run")
    selection = best_selection([run], None, across_steps=True)
    (line,) = lines_by_step([run], selection, None, "auc", in_minutes=False)
    assert (line.x, line.y) == ([20, 40], [0.7, 0.7])
    (loss,) = training_charts([run])
    assert loss.lines == [Line("run", [20, 40], [1 / 20, 1 / 40])]


def test_training_s_own_validation_stands_in(tmp_path):
    workdir = write_run(tmp_path / "run")
    (workdir / "evaluation" / "checkpoints.jsonl").unlink()
    run = load_run(workdir, "run")
    selection = best_selection([run], None, across_steps=True)
    assert selection == Selection("validation", 0, None, 30_000)
    assert str(selection) == "Up to 30,000 targets of requests of the validation split"
    (line,) = lines_by_step([run], selection, None, "auc", in_minutes=False)
    assert line == Line("256 events", [20, 40], [0.7, 0.7])


def test_several_runs_show_what_differs_first(tmp_path):
    runs = [load_run(write_run(tmp_path / str(k), seed=k), f"run {k}") for k in (3, 4)]
    write_report(runs, tmp_path / "page.html")
    config = Page((tmp_path / "page.html").read_text()).tables[-1]
    assert config[0] == ["value", "run 3", "run 4"]
    assert config[1] == ["seed", "3", "4"]
    assert all(len(row) <= 2 for row in config[2:])


def test_tasks_have_charts_of_their_own(tmp_path):
    workdir = write_run(tmp_path / "run")
    rows = [
        {**VALIDATION, "step": 20, "length": n, "model": "stca", "task": task, "auc": 0.6}
        for task in ("click", "buy")
        for n in LENGTHS
    ]
    write_lines(workdir / "evaluation" / "checkpoints.jsonl", rows)
    write_lines(workdir / "metrics.jsonl", [])
    written = write_report([load_run(workdir, "run")], tmp_path / "page.html")
    names = {path.name for path in written}
    assert {"auc_by_length_click.png", "auc_by_length_buy.png"} <= names
    assert not any("cost" in name or "throughput" in name for name in names)  # nothing was timed


def test_mistakes_are_explained(tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        load_run(tmp_path, "run")
    workdir = write_run(tmp_path / "run")
    run = load_run(workdir, "run")
    with pytest.raises(UserError, match=r"expected \.html"):
        write_report([run], tmp_path / "page.pdf")
    write_lines(workdir / "evaluation" / "checkpoints.jsonl", [])
    write_lines(workdir / "metrics.jsonl", [])
    with pytest.raises(UserError, match="no evaluation of run yet"):
        write_report([load_run(workdir, "run")], tmp_path / "page.html")
