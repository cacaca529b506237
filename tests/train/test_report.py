"""report.html: everything measured is drawn, nothing comes from elsewhere, and whatever the rows hold stays text."""

import random
import re
from html.parser import HTMLParser
from itertools import groupby

import pytest

from rankwise.lora.report import TrainedUpdate
from rankwise.train.chart import HEIGHT, LEFT, WIDTH, draw, outline
from rankwise.train.loop import Step
from rankwise.train.report import MOST_MATRICES, render_report, spectrum_bars, verdict

SETTINGS = {"model": "m", "data": "d.jsonl", "out": "run", "seed": 0}


def steps(count, every=0):
    draws = random.Random(0)
    return [
        Step(
            n, count, draws.random(), 1e-3 / n, 1.0, 100, 0.5 * n, draws.random() if every and n % every == 0 else None
        )
        for n in range(1, count + 1)
    ]


def update(name, sigma):
    return TrainedUpdate(name, 4096, 4096, len(sigma), 1.0, 8192 * len(sigma), sigma, 1.0, 1.0)


def estimate(value, width=0.01):
    return {"value": value, "lower": value - width, "upper": value + width}


def result(before=2.0, after=1.0, **changes):
    plain = {
        "eval_loss_before": before,
        "eval_loss_after": after,
        "metric_name": "exact_match",
        "metric_before": 0.0,
        "metric_after": None if after is None else 0.25,
        "metrics_before": {"loss": estimate(before or 0)},
        "metrics_after": {"loss": estimate(after)} if after is not None else None,
        "eval_rows": 100,
        "samples": [],
        "adapter_step": 6,
        "interrupted": False,
        "steps": 6,
        "seconds": 3.0,
        "predicted_seconds": 4.0,
        "predicted_peak_memory_bytes": 5_000_000_000,
        "peak_memory_bytes": 6_000_000_000,
        "useful_tokens_per_second": 200.0,
        "trainable_parameters": 10,
        "total_parameters": 1000,
    }
    return {**plain, **changes}


class Page(HTMLParser):
    """Tags with their attributes, text, and whether every tag is closed."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.texts, self.open = [], [], []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def drawn(page):
    """The points of every polyline."""
    lines = [attributes["points"] for tag, attributes in page.tags if tag == "polyline"]
    return [[tuple(map(float, pair.split(","))) for pair in line.split()] for line in lines]


def values_of(line, values):
    """Undo the drawing's scale: what the heights of a line say, given the values that it was drawn with."""
    lowest, highest = min(values), max(values)
    return [highest - (y - 6) / (HEIGHT - 12) * (highest - lowest) for _, y in line]


def test_every_training_and_held_out_loss_is_drawn_at_its_value():
    done = steps(300, every=50)
    page = Page(render_report(SETTINGS, result(adapter_step=300), done))
    training, held_out = drawn(page)[:2]
    losses = [step.loss for step in done]
    held = [2.0, *(step.eval_loss for step in done if step.eval_loss is not None)]
    # What was measured while training, under the same step, is the last evaluation's loss.
    assert values_of(training, losses + held) == pytest.approx(losses, abs=0.001 * 2)
    assert values_of(held_out, losses + held) == pytest.approx(held, abs=0.001 * 2)
    rates, speeds = drawn(page)[2:]
    assert len(rates) == len(speeds) == 300


def test_a_long_run_loses_no_peak_and_no_order():
    draws = random.Random(1)
    points = [(LEFT + WIDTH * n / 99_999, draws.random()) for n in range(100_000)]
    kept = outline(points)
    assert len(kept) <= 2 * (WIDTH + 1)
    assert set(kept) <= set(points)
    assert kept == sorted(kept)
    for column, inside in groupby(points, key=lambda point: int(point[0])):
        heights = [y for _, y in inside]
        assert {min(heights), max(heights)} <= {y for x, y in kept if int(x) == column}


def test_the_page_refers_to_nothing_outside_itself_and_runs_nothing():
    html = render_report(SETTINGS, result(), steps(6, every=2), "data", [update("q", (1.0, 0.5))])
    page = Page(html)
    assert not page.open
    assert "http" not in html
    assert "url(" not in html
    assert "@import" not in html
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "img", "object", "embed", "base")
        assert not {"src", "href", "srcset", "data", "action"} & set(attributes)
        assert not any(name.startswith("on") for name in attributes)


EVIL = "</td></table><script>alert(1)</script><img src=x onerror=alert(1)>\"'&{{ 7*7 }}"


@pytest.mark.parametrize("place", ["prompt", "reference", "before", "after", "settings", "data", "matrix", "metric"])
def test_what_rows_and_settings_hold_stays_text(place):
    sample = {"prompt": "p", "reference": "r", "before": "b", "after": "a"}
    page = Page(
        render_report(
            {**SETTINGS, **({"model": EVIL} if place == "settings" else {})},
            result(
                samples=[{**sample, place: EVIL} if place in sample else sample],
                **({"metric_name": EVIL} if place == "metric" else {}),
            ),
            steps(6),
            EVIL if place == "data" else "",
            [update(EVIL if place == "matrix" else "q", (1.0,))],
        )
    )
    assert not page.open
    assert not {"script", "img"} & {tag for tag, _ in page.tags}
    assert EVIL.replace("_", " ") in "".join(page.texts).replace("_", " ")


def test_samples_of_base_and_adapter_stand_side_by_side_and_matches_are_marked():
    sample = {"prompt": "2 + 2 =", "reference": "four", "before": "fish", "after": " four "}
    html = render_report(SETTINGS, result(samples=[sample]), steps(6))
    row = re.search(r"<tr><td>2 \+ 2 =</td>.*?</tr>", html, re.DOTALL)
    assert row
    assert re.findall(r"<td( class=\"right\")?>([^<]*)</td>", row[0]) == [
        ("", "2 + 2 ="),
        ("", "four"),
        ("", "fish"),
        (' class="right"', " four "),
    ]


def test_the_largest_run_stays_below_a_megabyte():
    long = "&" * 100_000
    sample = {"prompt": long, "reference": long, "before": long, "after": long}
    matrices = [update(f"model.layers.{n}.mlp.experts.gate_proj", (0.123,) * 64) for n in range(50_000)]
    settings = {**SETTINGS, **{f"setting_{n}": long for n in range(40)}}
    html = render_report(settings, result(samples=[sample] * 5), steps(100_000, every=100), "data\n" * 5, matrices)
    assert len(html.encode()) < 1_000_000
    assert f"and {50_000 - MOST_MATRICES:,}".replace(",", "") in html


@pytest.mark.parametrize(
    ("found", "kind", "text"),
    [
        (result(2.0, 1.0), "good", "It learned: held-out loss 2.0000 → 1.0000 (-50.0%) on 100 rows, exact match"),
        (result(2.0, 1.99), "open", "A small gain, or chance"),
        (result(1.0, 1.1), "bad", "It did not learn"),
        (result(None, None), "open", "Nothing was held out"),
        (result(2.0, None, interrupted=True), "open", "Interrupted after 6 steps"),
    ],
)
def test_the_first_sentence_says_whether_it_learned(found, kind, text):
    said = verdict(found, steps(6))
    assert (said.kind, said.text[: len(text)]) == (kind, text)
    html = render_report(SETTINGS, found, steps(6))
    assert html.index(text) < html.index("<svg")


def test_a_run_without_a_step_has_a_page():
    found = result(None, None, interrupted=True, steps=0, seconds=0.0, useful_tokens_per_second=None)
    assert not Page(render_report(SETTINGS, found, [])).open
    assert draw("nothing", []) is None


def test_predicted_and_measured_cost_stand_side_by_side():
    html = render_report(SETTINGS, result(), steps(6))
    assert "<th>training time</th><td>4 s</td><td>3 s</td>" in html
    assert "<th>peak memory</th><td>5.00 GB</td><td>6.00 GB</td>" in html


def test_bars_are_the_singular_values_beside_the_largest():
    path = spectrum_bars((8.0, 4.0, 0.0))
    heights = [float(height) for height in re.findall(r"16v-([\d.]+)", path)]
    assert heights == [16, 8, 0]
    assert spectrum_bars((0.0, 0.0, 0.0)) == spectrum_bars(()) == ""
