"""The report: files, escaping, and the page as headless Chromium sees it, without a network."""

import html
import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from kvlab.compose import compose
from kvlab.evaluation.verify import EXACT
from kvlab.lab.page import render_page
from kvlab.lab.plots import frontier
from kvlab.lab.record import Unfinished
from kvlab.lab.report import frontier_frame, write_report
from kvlab.lab.results import load, points
from kvlab.lab.styles import colour, styles
from kvlab.lab.tables import print_records
from kvlab.units import readable
from tests.lab.test_results import record, write

NASTY = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"


@pytest.fixture
def results(tmp_path):
    made = [record("mha", seed, 0.99 + seed / 1000, 8000) for seed in range(3)]
    made += [record("mqa", 0, 0.98, 2000), record("swa16", 0, 0.3, 1000), record(NASTY, 0, 0.1, 9000)]
    made += [
        record("mha", 0, 2.5, 8000, "text", "bits_per_byte"),
        record("swa16", 0, 2.6, 1000, "text", "bits_per_byte"),
    ]
    crashed = Unfinished(
        run_id="",
        experiment="made",
        config=record("mamba2").config,
        seed=0,
        status="failed",
        reason=f"RuntimeError: {NASTY}",
        provenance=record().provenance,
    )
    named = [replace(each, run_id=f"run{index}") for index, each in enumerate([*made, crashed])]
    return write(tmp_path / "results", *named)


def test_files_are_written_and_the_csv_is_the_plot(results, tmp_path):
    written = write_report(results, tmp_path / "out")
    assert [path.name for path in written] == ["report.html", "frontier.png", "frontier.pdf", "frontier.csv"]
    frame = pd.read_csv(tmp_path / "out" / "frontier.csv")
    assert len(frame) == 6
    mha = frame[(frame.variant == "mha") & (frame.task == "mqar")].iloc[0]
    assert mha.value == pytest.approx(0.991)
    assert mha.num_seeds == 3
    assert frame[frame.non_dominated & (frame.task == "mqar")].variant.tolist() == ["swa16", "mqa", "mha"]
    assert (tmp_path / "out" / "frontier.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "out" / "frontier.pdf").read_bytes().startswith(b"%PDF")


def test_what_a_lossy_memory_loses_is_shown_where_there_is_one(tmp_path, capsys):
    exact, held = record("mha"), [record("mqa", seed) for seed in (0, 1)]
    lossy = [
        replace(
            made,
            quality=replace(made.quality, value=1 - lost, parallel_value=1.0, verified_by=f"{EXACT} rounded to int8"),
        )
        for made, lost in zip(held, (0.25, 0.75), strict=True)
    ]
    words = ("<button type='button'>lost</button>", "<button type='button'>verified by</button>")
    for name, records, is_shown in (("exact", [exact, *held], False), ("lossy", [exact, *lossy], True)):
        folder = write(tmp_path / name, *records)
        write_report(folder, tmp_path / name)
        page = (tmp_path / name / "report.html").read_text()
        assert [word in page for word in words] == [is_shown] * 2
        print_records(records)
        printed = capsys.readouterr().out
        assert ("lost" in printed, "0.5000" in printed) == (is_shown, is_shown)
    frame = pd.read_csv(tmp_path / "lossy" / "frontier.csv").set_index("variant")
    assert frame.lost.to_dict() == {"mha": 0, "mqa": 0.5}
    assert frame.verified_by.to_dict() == {"mha": EXACT, "mqa": f"{EXACT} rounded to int8"}
    runs = load(tmp_path / "lossy")
    assert sorted(runs["quality.lost"]) == [0, 0.25, 0.75]
    assert set(runs["quality.verified_by"]) == set(frame.verified_by)


def test_the_page_fetches_nothing_and_escapes_everything(results, tmp_path):
    write_report(results, tmp_path)
    page = (tmp_path / "report.html").read_text()
    own = page[: page.index("<script>")] + page[page.index('<script type="application/json"') :]
    assert "http://" not in own
    assert "https://" not in own
    assert NASTY not in page
    assert "<img src=x" not in page


def test_only_failed_runs_still_make_a_page(results, tmp_path):
    for path in (results / "made").iterdir():
        if path.name != "run8":
            shutil.rmtree(path)
    assert [path.name for path in write_report(results, tmp_path)] == ["report.html"]


@pytest.fixture
def browser(tmp_path):
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("needs chromium and chromedriver (Debian: apt-get install chromium chromium-driver)")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    flags = "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
    for flag in [
        *flags.split(),
        "disable-component-update",
        "disable-sync",
        "disable-dev-shm-usage",
        "window-size=1300,1600",
        f"user-data-dir={tmp_path / 'profile'}",
        "host-resolver-rules=MAP * ~NOTFOUND",
    ]:
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    page = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield page
    page.quit()


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # selenium's own sockets
def test_the_page_in_chromium(results, tmp_path, browser):
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import Select

    write_report(results, tmp_path)
    browser.get((tmp_path / "report.html").as_uri())
    deadline = time.monotonic() + 20
    while (
        browser.find_element(By.TAG_NAME, "body").get_attribute("data-ready") != "yes" and time.monotonic() < deadline
    ):
        time.sleep(0.1)
    assert browser.get_log("browser") == []
    assert browser.title == "kvlab: made"

    first, second = (browser.find_element(By.ID, f"frontier-{index}") for index in (0, 1))
    assert len(first.find_elements(By.CSS_SELECTOR, ".scatterlayer .points path.point")) == 4
    assert len(second.find_elements(By.CSS_SELECTOR, ".scatterlayer .points path.point")) == 2
    assert browser.execute_script("return document.getElementById('frontier-0').layout.xaxis.type") == "log"
    assert len(browser.find_elements(By.CSS_SELECTOR, "#points tbody tr")) == 6
    assert len(browser.find_elements(By.CSS_SELECTOR, "#failed tbody tr")) == 1
    assert len(browser.find_elements(By.CSS_SELECTOR, "#provenance tbody tr")) == 9
    assert browser.find_elements(By.CSS_SELECTOR, "#layers .bars path")
    assert browser.find_elements(By.CSS_SELECTOR, "#losses-0 .scatterlayer")

    point = first.find_elements(By.CSS_SELECTOR, ".points path.point")[0]
    ActionChains(browser).move_to_element(point).perform()
    deadline = time.monotonic() + 5
    while not first.find_elements(By.CSS_SELECTOR, ".hovertext") and time.monotonic() < deadline:
        time.sleep(0.1)
    assert "B per sequence" in first.find_element(By.CSS_SELECTOR, ".hovertext").text

    def column(index):
        return [row.find_elements(By.TAG_NAME, "td")[index].get_attribute("data-value")
                for row in browser.find_elements(By.CSS_SELECTOR, "#points tbody tr")]  # fmt: skip

    heads = browser.find_elements(By.CSS_SELECTOR, "#points thead button")
    names = [head.text for head in heads]
    value = names.index("value")
    heads[value].click()
    assert [float(cell) for cell in column(value)] == sorted(float(cell) for cell in column(value))
    heads[value].click()
    assert [float(cell) for cell in column(value)] == sorted((float(cell) for cell in column(value)), reverse=True)
    heads[names.index("variant")].click()
    assert column(names.index("variant")) == sorted(column(names.index("variant")), key=str.casefold)

    Select(browser.find_element(By.ID, "axis")).select_by_value("logical_bytes")
    title = browser.execute_script("return document.getElementById('frontier-0').layout.xaxis.title.text")
    assert title.startswith("logical bytes")
    assert browser.title == "kvlab: made"  # nothing nasty ran
    assert browser.get_log("browser") == []
    browser.save_screenshot(str(tmp_path / "page.png"))


def test_a_point_of_one_seed_is_drawn_without_an_interval():
    found = points([*(record("mha", seed, 0.9 + seed / 100) for seed in (0, 1)), record("mqa")])
    (panel,) = frontier(found, figure=Figure())
    assert {each.get_label(): each.has_yerr for each in panel.containers} == {"mha": True, "mqa": False}


def measured_at(made, context_len, batch_size=2, **config):
    """The record with its memory measured elsewhere, as its configuration says."""
    config = made.config | {"measure": {"context_len": context_len, "batch_size": batch_size}} | config
    memory = replace(made.memory, context_len=context_len, batch_size=batch_size)
    return replace(made, config=config, memory=memory, run_id=f"{made.run_id}{context_len}{batch_size}{len(config)}")


def test_points_share_an_axis_only_where_they_mean_the_same():
    """Contexts, batches and fields of a task that differ have panels of their own, which say so; the frontier is each
    panel's own, in picture, page and CSV."""
    many = {"task": {"type": "mqar", "writes": 2}}
    made = [
        measured_at(record("mha", 0, 0.99, 8000), 256),
        measured_at(record("mqa", 0, 0.98, 2000), 256),
        measured_at(record("mha", 0, 0.90, 9000), 512),
        measured_at(record("mha", 0, 0.80, 9000), 512, 4),
        measured_at(record("mha", 0, 0.70, 9000), 512, 4, **many),
    ]
    found = points(made)
    axes = frontier(found, figure=Figure())
    titles = {axis.get_title().partition(":")[0]: axis for axis in axes}
    shared = "batch 4, writes="
    assert sorted(titles) == sorted(
        [
            "mqar, 256 tokens, batch 2, writes=None",
            "mqar, 512 tokens, batch 2, writes=None",
            f"mqar, 512 tokens, {shared}None",
            f"mqar, 512 tokens, {shared}2",
        ]
    )
    labels = [axis.get_xlabel().splitlines()[-1] for axis in axes]
    assert labels == [f"at {place}" for place in (
        "256 tokens, batch of 2", "512 tokens, batch of 2", "512 tokens, batch of 4", "512 tokens, batch of 4"
    )]  # fmt: skip
    assert [len(axis.containers) for axis in axes] == [2, 1, 1, 1]
    assert {handle.get_label() for axis in axes for handle in axis.containers} == {"mha", "mqa"}
    looks = styles([point.config for point in found])
    assert len({look for look, point in zip(looks, found, strict=True) if point.variant == "mha"}) == 1
    frame = frontier_frame(found)
    assert frame.non_dominated.all(), "each is the best of its panel, or holds less"
    assert set(zip(frame.context_len, frame.batch_size, strict=True)) == {(256, 2), (512, 2), (512, 4)}
    page = render_page("made", made, found, [{}] * len(found))
    assert [html.unescape(name) for name in re.findall("<h2>(mqar[^<:]*):", page)] == list(titles)


def test_a_table_says_every_context_and_batch_that_differ(capsys):
    made = [measured_at(record("mha", 0, 0.9), 256), measured_at(record("mqa", 0, 0.9), 512, 4)]
    print_records(made)
    printed = capsys.readouterr().out
    assert re.search("context +batch", printed)
    for variant, place in (("mha", "256 +2 "), ("mqa", "512 +4 ")):
        assert re.search(f"^ *{variant} .* {place.strip()}$", printed, re.MULTILINE)


def test_one_mixer_is_coloured_by_what_is_swept():
    """Formats and budgets of one mixer: colours and markers by them, no two points alike, and the legend beside."""
    memories = [{"format": name, "page_size": size} for name in ("model", "int8", "int4") for size in (4, 16)]
    found = points([replace(record(memory=memory), run_id=str(n)) for n, memory in enumerate(memories)])
    looks = dict(zip([point.name for point in found], styles([point.config for point in found]), strict=True))
    assert len(set(looks.values())) == 6
    assert len({look.colour for look in looks.values()}) == 3
    assert looks["mha int8 page_size=4"].colour == looks["mha int8 page_size=16"].colour
    assert looks["mha int8 page_size=4"].marker == looks["mha int4 page_size=4"].marker
    figure = Figure()
    (panel,) = frontier(found, figure=figure)
    FigureCanvasAgg(figure).draw()
    assert panel.get_legend().get_window_extent().x0 >= panel.get_window_extent().x1, "it hides no point"
    assert panel.get_legend().get_window_extent().x1 <= figure.bbox.x1, "nor is it cut"


def test_mixers_have_their_colour_and_no_two_share_one():
    names = ["mha", "mqa", *(f"mine{number}" for number in range(30))]
    looks = styles([record(name).config for name in names])
    assert looks[0].colour == colour("mha")
    assert len({look.colour for look in looks}) == len(names)


def test_a_mixer_looks_the_same_beside_the_same_mixers():
    """Whatever fields its layers have besides, and in whatever order the runs came."""
    names = ["mha", "mqa", "hybrid"]
    fields = ({"A": {"num_heads": 4}}, {"A": {"num_heads": 4, "rope_base": 100.0}}, {"M": {"state_dim": 16}})
    one, two = ([record(name, mixer={"name": name, **part}).config for name, part in zip(names, parts, strict=True)]
                for parts in (fields, fields[::-1]))  # fmt: skip
    looks = dict(zip(names, styles(one), strict=True))
    assert dict(zip(reversed(names), styles(two[::-1]), strict=True)) == looks
    assert len({look.marker for look in looks.values()}) == 3, "for eyes that do not tell colours apart"
    own = [{**config, "optimizer": {"learning_rate": 0.01 if config is one[1] else 0.02}} for config in one]
    assert dict(zip(names, styles(own), strict=True)) == looks, "a rate that goes with a mixer says nothing"


def test_drawing_leaves_the_backend_alone(tmp_path):
    code = """
import matplotlib
matplotlib.use("svg")
from pathlib import Path
from kvlab.lab.plots import draw_frontier
import kvlab.lab.report, kvlab.capacity.report
from kvlab.lab.results import points
from tests.lab.test_results import record
draw_frontier(points([record()]), "made", [Path("made.png")])
import sys
assert "matplotlib.pyplot" not in sys.modules
assert matplotlib.get_backend() == "svg", matplotlib.get_backend()
"""
    root = Path(__file__).parents[2]
    env = os.environ | {"PYTHONPATH": str(root)}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, check=True)
    assert (tmp_path / "made.png").read_bytes().startswith(b"\x89PNG")


def trained_twice(folder):
    """Two runs of one training, and one of longer sequences, with validations."""
    first, again, longer = (replace(record("mha", value=0.5), run_id=f"run{n}") for n in range(3))
    again = replace(again, config=again.config | {"memory": {"format": "int8"}})
    longer = replace(longer, config=longer.config | {"task": {"type": "mqar", "seq_len": 256}})
    shared = [
        replace(each.training, training_id=name) for each, name in zip((first, again, longer), "aab", strict=True)
    ]
    made = [replace(each, training=of) for each, of in zip((first, again, longer), shared, strict=True)]
    made = [replace(each, quality=replace(each.quality, slices={"64:4": 0.9, "64:8": 0.1})) for each in made]
    write(folder, *made)
    rows = [{"learning_rate": 0.01, "step": step, "loss": 4.0 / step} for step in (1, 2, 3, 4)]
    rows[1]["validation"], rows[3]["validation"] = 0.25, 0.5
    for name in ("run0", "run1", "run2"):
        (folder / "made" / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def page_data(page):
    return json.loads(re.search('<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


def test_losses_and_validations_stand_by_task_and_length_each_training_once(tmp_path):
    folder = trained_twice(tmp_path / "results")
    write_report(folder, tmp_path)
    page = (tmp_path / "report.html").read_text()
    groups = page_data(page)["groups"]
    assert [group["task"] for group in groups] == ["mqar, seq_len=None", "mqar, seq_len=256"]
    assert [len(group["curves"]) for group in groups] == [1, 1]
    (curve,) = groups[0]["curves"]
    assert (curve["steps"], curve["losses"]) == ([1, 2, 3, 4], [4, 2, pytest.approx(4 / 3), 1])
    assert (curve["validated"], curve["validations"]) == ([2, 4], [0.25, 0.5])
    assert "<h3>mqar, seq_len=256: accuracy on validation</h3>" in page


def test_slices_have_a_chart_and_a_table(tmp_path):
    folder = trained_twice(tmp_path / "results")
    write_report(folder, tmp_path)
    page = (tmp_path / "report.html").read_text()
    second, first = sorted(page_data(page)["tasks"], key=lambda task: len(task["points"]))
    assert (first["slices"], second["slices"]) == (["64:4", "64:8"], ["64:4", "64:8"])
    assert [point["slices"] for point in first["points"]] == [[0.9, 0.1], [0.9, 0.1]]
    assert "<th class=number>64:8</th>" in page
    assert "<td class='number' data-value='0.9'>0.9000</td>" in page


def test_every_point_has_the_command_that_makes_it_again(tmp_path):
    """A variant of no group, here a hostile one, has none."""
    config = compose(["mixer=swa", "debug=tiny"]).as_dict()
    made = [replace(record(NASTY), run_id="x")]
    made += [replace(record(), config=config | {"seed": seed}, seed=seed, run_id=f"r{seed}") for seed in (0, 2)]
    write_report(write(tmp_path / "results", *made), tmp_path)
    page = (tmp_path / "report.html").read_text()
    commands = [html.unescape(said) for said in re.findall("<code>(.*?)</code>", page)]
    assert commands == ["kvlab run -m debug=tiny mixer=swa task=mqar model.dtype=float32 seed=0,2"]
    assert page.count("made in Python") == 1


def test_numbers_are_readable():
    known = {0: "0", 12345: "12,345", 0.0009766: "0.0010", 4.5351: "4.535", 31.447: "31.45", 1234.5: "1,234"}
    assert {number: readable(number) for number in known} == known
    assert readable(2.06e-6) == "2.1e-06"
    assert readable(-0.12344) == "-0.1234"


def shown(browser, page, width):
    """The page at a width, drawn."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(page.as_uri())
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and not browser.execute_script("return document.body.dataset.ready"):
        time.sleep(0.1)


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # selenium's own sockets
def test_byte_axes_have_round_ticks_and_narrow_pages_scroll_tables_alone(results, tmp_path, browser):
    write_report(results, tmp_path)
    page = tmp_path / "report.html"
    ticks = "return [...document.querySelectorAll(arguments[0])].map(each => each.textContent)"
    for width in (1200, 400):
        shown(browser, page, width)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        words = browser.execute_script(ticks, "#frontier-0 .xtick text")
        assert len(words) >= 2
        for word in words:  # 1 to 9 KB here
            assert re.fullmatch(r"(1|2|4|8|16) KiB|(256|512) B", word), words
        assert all(word.endswith("B") for word in browser.execute_script(ticks, "#layers .xtick text"))
        wide = "return [...document.querySelectorAll('table')].every(each => each.parentElement.className === 'wide')"
        assert browser.execute_script(wide)
        inside = """return [...document.querySelectorAll('.chart')].every(each => {
            const legend = each.querySelector('.legend');
            return !legend || legend.getBoundingClientRect().right <= innerWidth + 1;
        })"""
        assert browser.execute_script(inside), "legends are not cut"
    assert browser.get_log("browser") == []
    zoomed = "return Plotly.relayout('frontier-0', {'xaxis.range': [Math.log10(2100), Math.log10(3200)]}).then(() => 1)"
    browser.execute_script(zoomed)
    deadline = time.monotonic() + 5
    while len(words := browser.execute_script(ticks, "#frontier-0 .xtick text")) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert all(re.fullmatch(r"2\.(25|5|75) KiB|3 KiB", word) for word in words), "zoomed, they are multiples still"
