"""The report page: complete, self-contained, and true to the scores."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from support.benchmark_data import make
from support.fake_pipeline import FakePipeline

from deepgen_jax.cli.main import main
from deepgen_jax.evaluation.benchmark_kinds import BENCHMARKS
from deepgen_jax.evaluation.figures import Figure
from deepgen_jax.evaluation.report import collect, published
from deepgen_jax.evaluation.run import RunFolder
from deepgen_jax.evaluation.scoring import Scores, write_scores

VOID = {"meta", "img", "br", "link", "input", "hr"}
#: Elements whose end tag HTML lets out.
OPTIONAL = {"p", "td", "th", "tr", "dt", "dd", "html", "body", "head"}


class Checker(HTMLParser):
    """Collects text and attributes; elements must be closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]
        if tag == "img":
            assert dict(attrs).get("alt")
        if tag not in VOID | OPTIONAL:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in OPTIONAL:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def checked(page: str) -> str:
    """The page's text; it must be well formed and need nothing from elsewhere."""
    checker = Checker()
    checker.feed(page)
    checker.close()
    assert not checker.open
    assert all(re.match(r"(data:image/jpeg;base64,|#)", address) for address in checker.addresses)
    assert "<script" not in page
    assert "url(" not in page
    assert "@import" not in page
    return " ".join(checker.words)


def scored(out: Path, value: float, judge: str = "stand-in <b>") -> None:
    """Made-up scores of a run."""
    items = RunFolder(out).items()
    images = {file: value + 0.1 * i for i, item in enumerate(items) for file in item.files}
    figures = [Figure("overall", value, value - 0.1, value + 0.1, 3, 3), Figure("cultural", 0.5, 0.4, 0.6, 1, 3)]
    missing = {"no answer": 2}
    write_scores(RunFolder(out), Scores(judge, "wise/dg-1", figures, images, 3, 3, missing, {}, ("a note",)))


def test_a_scored_and_an_unscored_run(tmp_path: Path, pipe: FakePipeline, capsys: pytest.CaptureFixture):
    (tmp_path / "w").mkdir()
    (tmp_path / "g").mkdir()
    wise, geneval = make("wise", tmp_path / "w"), make("geneval", tmp_path / "g")
    scored(wise, 0.432)
    page = tmp_path / "pages/report.html"
    assert main(["report", str(wise), str(geneval), "--out", str(page)]) == 0
    assert [Path(line).suffix for line in capsys.readouterr().out.splitlines()[-3:]] == [".html", ".json", ".md"]
    text = checked(page.read_text())
    for word in ("0.432", "0.332 to 0.532", "judge: stand-in <b>, protocol: wise/dg-1", "DeepGen 1.0 (RL)", "a note",
                 "0.72 / 0.73", "2 no answer; none counts as zero", "something 401", "deepgen eval wise", "cultural",
                 "no scores yet", "a photo of a kite"):  # fmt: skip
        assert word in text, word
    # Images of the scored run, and one a prompt of the other.
    assert page.read_text().count("<img") == 3 + 3
    values = json.loads(page.with_suffix(".json").read_text())
    assert [entry["benchmark"] for entry in values["benchmarks"]] == ["wise", "geneval"]
    assert values["benchmarks"][0]["runs"][0]["scores"]["by"] == "judge: stand-in <b>, protocol: wise/dg-1"
    table = page.with_suffix(".md").read_text()
    assert "| overall | 0.432 (0.332 to 0.532) |" in table
    assert "| DeepGen 1.0 (RL) | 3B + 2B | 0.73 | Table 2 |" in table


def test_two_runs_side_by_side(tmp_path: Path, pipe: FakePipeline):
    outs = []
    for name, value in (("a", 0.3), ("b", 0.5)):
        (tmp_path / name).mkdir()
        outs.append(make("wise", tmp_path / name).rename(tmp_path / f"run-{name}"))
        scored(outs[-1], value)
    (section,) = collect(outs)
    assert [run.label for run in section.runs] == ["m (run-a)", "m (run-b)"]
    (difference,) = section.comparisons
    assert (difference.images, difference.better, difference.worse) == (3, 3, 0)
    assert difference.mean == pytest.approx(0.2)
    assert difference.low == pytest.approx(0.2)
    page = tmp_path / "both.html"
    assert main(["report", *map(str, outs), "--out", str(page)]) == 0
    text = checked(page.read_text())
    assert "m (run-b) less m (run-a): image scores differ by" in text
    assert "+0.200" in text
    assert "Lowest scores of m (run-a)" in text
    # Each prompt with the images of both.
    assert page.read_text().count("<img") == 6


def test_edits_are_shown_with_their_sources(tmp_path: Path, pipe: FakePipeline):
    out = make("gedit", tmp_path)
    page = tmp_path / "r.html"
    assert main(["report", str(out), "--out", str(page)]) == 0
    checked(page.read_text())
    assert page.read_text().count("alt='picture to edit'") == 3


def test_published_scores_are_those_of_the_reference():
    """Against the list of published scores of DeepGen, SFT and RL."""
    wanted = {
        "geneval": ("overall", 0.86, 0.87), "dpg": ("overall", 87.05, 87.90), "unigenbench": ("en", 74.18, 75.74),
        "wise": ("overall", 0.72, 0.73), "corebench": ("reasoning", 45.7, 46.5),
        "cvtg": ("word accuracy", 0.6605, 0.7533), "gedit": ("en", 7.12, 7.17), "imgedit": ("overall", 4.09, 4.14),
        "rise": ("accuracy", 13.3, 10.8), "uniredit": ("overall", 77.5, 75.7),
    }  # fmt: skip
    for name, (figure, *values) in wanted.items():
        rows = {row["model"]: row["values"] for row in published(name).rows}
        assert [rows[f"DeepGen 1.0 ({kind})"][figure] for kind in ("SFT", "RL")] == values, name
        assert published(name).protocol
        assert all(row["source"] for row in published(name).rows)
        # Published figures have the names of ours, so that they share a row.
        benchmark = BENCHMARKS.load(name)()
        assert figure == _main_figure(benchmark)


def _main_figure(benchmark) -> str:
    groups = [
        "tag/x", "all", "en/all", "category/cultural", "dimension/R-LR", "dimension/C-MI", "all|found", "type/x",
        "en|O|x", "all|accuracy", "all|score",
    ]  # fmt: skip
    return benchmark.measures(groups)[0].name


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give the folder of a run"),
        (["nowhere"], "nowhere holds no benchmark run"),
        (["x", "--out", "a.pdf"], "use .html"),
    ],
)
def test_bad_words(words: list[str], message: str, capsys: pytest.CaptureFixture):
    assert main(["report", *words]) == 2
    assert message in capsys.readouterr().err


def test_damaged_records_are_named(tmp_path: Path, pipe: FakePipeline, capsys: pytest.CaptureFixture):
    out = make("wise", tmp_path)
    (out / ".deepgen/scores.json").write_text('{"judge": 1}')
    assert main(["report", str(out), "--out", str(tmp_path / "r.html")]) == 2
    assert "scores.json is damaged" in capsys.readouterr().err
    assert main(["report", str(out), str(out)]) == 2
    assert "is given twice" in capsys.readouterr().err
