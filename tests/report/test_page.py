"""The page of one run: whole, self-contained, safe against texts, and patient with what is missing."""

import html.parser
import json
import re

import jax
import numpy as np
import pytest
from conftest import D_IN, D_SAE, WORDS, decode, write_run

from saejax import report
from saejax.errors import UserError
from saejax.report import corpus, curves, plot
from saejax.sae import SAE, Family, TopK

VOID = {"meta", "link", "input", "br", "img", "hr"}


class Page(html.parser.HTMLParser):
    """Checks that tags nest, and collects texts, ids and all addresses."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.texts, self.links, self.ids, self.tags = [], [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for key, value in attrs if key in ("src", "href", "action", "xlink:href")]
        self.ids += [value for key, value in attrs if key == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.texts.append(data)


def render(run_dir, **kwargs):
    text = report.build(run_dir, **kwargs).read_text(encoding="utf-8")
    return text, Page(text)


@pytest.fixture(scope="module")
def full(tmp_path_factory, sae, store_path):
    """A page with everything on it."""
    run_dir = write_run(tmp_path_factory.mktemp("runs") / "full & <b>bold")
    unembedding = np.random.default_rng(1).normal(size=(D_IN, len(WORDS))).astype(np.float32)
    settings = report.LatentPage(n_latents=8, n_top=3, n_random=2, n_tokens=len(WORDS))
    examples = report.collect(sae, corpus.StoreCorpus(store_path), decode, settings=settings, unembedding=unembedding)
    return render(run_dir, sae=sae, examples=examples)


def test_page_nests_and_has_every_section(full):
    text, page = full
    sections = {"training", "evaluation", "geometry", "latents", "config", "record"}
    assert sections <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert page.tags.count("svg") == 7  # five curves, densities, cosines
    for shown in (
        "Fraction of variance unexplained",
        "Squared error over variance; both summed over the set.",
    ):
        assert shown in "".join(page.texts)
    assert text.count('<article class="latent"') == 8
    assert "saejax evaluate" not in text


def test_page_needs_no_other_file(full):
    text, page = full
    assert all(link.startswith(("#", "data:")) for link in page.links)
    assert not re.search(r"https?://|@import|url\(|fetch\(|XMLHttpRequest|\bimport\(", text)


def test_hostile_text_is_only_text(full):
    text, page = full
    assert page.tags.count("script") == 1 and "<script>alert" not in text
    assert page.tags.count("b") == text.count("<b>") + text.count('<b class="num">')
    assert "full & <b>bold" in "".join(page.texts)  # the run's name
    assert "<script>alert(1)</script>" in "".join(page.texts)  # a token
    assert "<b>mean</b>" in "".join(page.texts)  # a definition


@pytest.mark.parametrize("missing", ["metrics.jsonl", "eval.json", "config.yaml", "run.json", "sae"])
def test_missing_parts_say_which_command_fills_them(missing, tmp_path, sae):
    run_dir = write_run(tmp_path / "run")
    if missing != "sae":
        (run_dir / missing).unlink()
    text, page = render(run_dir, sae=None if missing == "sae" else sae)
    command = {"eval.json": "saejax evaluate run=", "sae": "saejax report run="}.get(missing, "saejax train resume=")
    assert f"{command}run" in "".join(page.texts)
    assert str(tmp_path) not in text  # the page may go to others


def test_a_family_without_single_latents_has_a_page_that_says_so(tmp_path):
    halves = TopK(d_in=D_IN // 2, d_sae=D_SAE, k=3, family=Family.transcoder, sites=(D_IN // 2,) * 2)
    run_dir = write_run(tmp_path / "run")
    text, page = render(run_dir, sae=SAE(halves, halves.init(jax.random.key(0))))
    assert "this run is of family=transcoder" in "".join(page.texts)
    assert '<article class="latent"' not in text and "saejax evaluate" not in text


def test_broken_files_are_named_not_fatal(tmp_path):
    run_dir = write_run(tmp_path / "run")
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 61, "train/lo')
    (run_dir / "eval.json").write_text("{")
    text, page = render(run_dir)
    assert "1 broken line skipped" in text and "eval.json could not be read" in text
    assert page.tags.count("svg") == 5


def test_values_that_are_no_numbers_do_not_break_the_page(tmp_path):
    run_dir = write_run(tmp_path / "run")
    evaluation = json.loads((run_dir / "eval.json").read_text())
    evaluation["metrics"] |= {"delta_ce": None, "kl": float("nan"), "fvu": float("inf")}
    evaluation["arrays"]["gain"] = [None, float("nan"), 1.0]
    (run_dir / "eval.json").write_text(json.dumps(evaluation))
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 61, "tokens": 4000, "train/loss": NaN, "train/fvu": null}\n')
    render(run_dir)


def test_a_directory_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="no run directory"):
        report.build(tmp_path)
    with pytest.raises(UserError, match="no such directory"):
        report.build(tmp_path / "nowhere")


def test_histogram_draws_one_bar_per_filled_bin_with_its_count():
    chart = str(plot.histogram([0, 1, 2, 3], [("latents", [4, 0, 2])], title="t", x_label="x"))
    heights = [float(h) for h in re.findall(r'class="bar".*?height="([\d.]+)"', chart)]
    assert len(heights) == 2 and heights[0] == pytest.approx(2 * heights[1], rel=0.01)
    assert "latents: 4 in 0 to 1" in chart


def test_held_out_values_logged_by_step_alone_find_their_place(tmp_path):
    rows = [{"step": s, "tokens": 64 * s, "train/fvu": 1 / s} for s in range(1, 11)]
    rows += [{"step": 5, "eval/fvu": 0.3}, {"step": 10, "eval/fvu": 0.2}]
    (panel,), _ = curves.panels(rows)
    assert [s.label for s in panel.series] == ["training", "held out"]
    assert panel.series[1].x.tolist() == [320.0, 640.0] and panel.series[1].y.tolist() == [0.3, 0.2]


def test_thinning_keeps_means_and_extremes():
    y = np.random.default_rng(0).normal(size=5000) ** 2
    rows = [{"step": n, "train/loss": v} for n, v in enumerate(y.tolist())]
    (panel,), _ = curves.panels(rows)
    (series,) = panel.series
    assert len(series.x) <= 240
    assert series.low.min() == y.min() and series.high.max() == y.max()
    sizes = [len(g) for g in np.array_split(y, len(series.x))]
    assert np.average(series.y, weights=sizes) == pytest.approx(y.mean())
