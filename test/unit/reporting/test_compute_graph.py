"""--plot-compute-graph: a picture that tells all shapes, in boxes that hold their text."""

import collections
import errno
import itertools
import os
import re
import sys
import xml.etree.ElementTree as ElementTree

import matplotlib
import pytest
from conftest import CRITEO_MODEL, ROOT, SMALL_MODEL, break_package, shell, train
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path
from placements import cut, odd, shared

from model.compression import MixedDimensions, NoCompression, QuotientRemainder
from ranks.placement import place_tables
from reporting import drawing
from reporting.compute_graph import GRAPH_FILE, Network, layout, plot_compute_graph
from reporting.drawing import Line

SVG = "{http://www.w3.org/2000/svg}"
ROWS = (9_980_333, 36_084, 3, 61, 1_333_352, 10, 970, 122)
MANY = tuple(7 ** (k % 9) + k for k in range(100))
FLAG = "--plot-compute-graph"


def network(num_rows, kind, **facts):
    """A network of such tables; `facts` are other fields than the plain ones."""
    tables, ranks = kind.make_tables(num_rows), facts.pop("num_ranks", 1)
    place = facts.pop("place", place_tables)
    plain = {
        "tables": tables,
        "bottom": (13, 512, kind.vector_dim),
        "top": (415, 256, 1),
        "interaction": "dot",
        "itself": False,
        "pooling": "",
        "loss": "bce",
        "loss_weights": (1.0, 1.0),
        "clamp": 0.0,
        "placement": place(tables, ranks),
    }
    return Network(**plain | facts)


def quotient_remainder(operation):
    return QuotientRemainder(64, 200, operation, 4)


MIXED = MixedDimensions(64, 200, 0.3, True)
DEEP = {"bottom": (13, *[512] * 7, 64), "top": (415, *[10**9] * 7, 1)}
NETWORKS = {
    "1 table": network([4], NoCompression(2), bottom=(4, 2), top=(3, 1)),
    "1 table, deep MLPs": network([4], NoCompression(64), **DEEP),
    "3 tables": network([4, 3, 2], NoCompression(2), loss="wbce", clamp=0.01),
    "26 tables": network((ROWS * 4)[:26], NoCompression(64), pooling="learned"),
    "26 tables, 8 ranks": network((ROWS * 4)[:26], NoCompression(64), num_ranks=8),
    "26 tables, 40 ranks": network((ROWS * 4)[:26], NoCompression(64), num_ranks=40),
    "100 tables, shallow MLPs": network(MANY, NoCompression(64), bottom=(13, 64), top=(415, 1)),
    "100 tables, deep MLPs, 3 ranks": network(MANY, NoCompression(64), num_ranks=3, **DEEP),
    "mult": network(ROWS, quotient_remainder("mult")),
    "add": network(ROWS, quotient_remainder("add"), interaction="cat"),
    "concat": network((ROWS * 4)[:26], quotient_remainder("concat"), num_ranks=8),
    "mixed": network((ROWS * 4)[:26], MIXED, num_ranks=3),
    "mixed, 1 rank": network(ROWS, MIXED),
    "26 tables, cut": network((ROWS * 4)[:26], NoCompression(64), num_ranks=8, place=cut),
    "concat, cut": network(ROWS, quotient_remainder("concat"), num_ranks=3, place=cut),
    "mixed, cut": network(ROWS, MIXED, num_ranks=5, place=odd),
    "26 tables, everywhere": network((ROWS * 4)[:26], MIXED, num_ranks=3, place=shared),
}


@pytest.fixture(params=NETWORKS)
def picture(request):
    return layout(NETWORKS[request.param])


def words_of(picture):
    return [line.words for box in picture.all_boxes() for line in box.lines]


def texts_of(path):
    """The texts of an SVG, which has to be well-formed XML."""
    return ["".join(text.itertext()) for text in ElementTree.parse(path).iter(f"{SVG}text")]


# ---------------------------------------------------------------- where things lie


def overlap(one, other):
    return (
        one.x < other.x + other.width
        and other.x < one.x + one.width
        and one.y < other.y + other.height
        and other.y < one.y + one.height
    )


def test_no_two_boxes_overlap_unless_one_holds_the_other(picture):
    groups = [picture.boxes, *(box.inner for box in picture.all_boxes())]
    for group in groups:
        for one, other in itertools.combinations(group, 2):
            assert not overlap(one, other), (one, other)
    assert sum(map(len, groups)) > 5


def test_every_box_lies_below_its_text_in_the_box_that_holds_it(picture):
    for box in picture.all_boxes():
        assert box.x >= 0 and box.x + box.width <= picture.width, box
        assert box.y >= 0 and box.y + box.height <= picture.height, box
        for inner in box.inner:
            assert inner.x > 0 and inner.x + inner.width < box.width, (box, inner)
            assert inner.y >= box.text_top + box.text_height, (box, inner)
            assert inner.y + inner.height < box.height, (box, inner)


def test_no_text_is_larger_than_its_box(picture):
    for box in picture.all_boxes():
        assert box.text_top + box.text_height <= box.height, box
        for line in box.lines:
            assert line.width < box.width, (box, line)
            assert line.size >= 8, line


def test_no_arrow_crosses_a_box(picture):
    """An arrow may run inside a box that holds boxes, as from one layer to the next."""
    leaves = [box for box in picture.all_boxes() if not box.inner]
    for arrow in picture.arrows:
        left, right = sorted((arrow.x, arrow.to_x))
        top, bottom = sorted((arrow.y, arrow.to_y))
        assert left < right or top < bottom
        for box in leaves:
            beside = right <= box.x or left >= box.x + box.width
            assert beside or bottom <= box.y or top >= box.y + box.height, (arrow, box)


@pytest.mark.parametrize(
    ("name", "width", "height"),
    [
        ("3 tables", 600, 700),
        ("26 tables, 8 ranks", 1200, 1000),
        ("26 tables, 40 ranks", 1200, 1100),
        ("100 tables, shallow MLPs", 1300, 900),
    ],
)
def test_pictures_fit_a_screen(name, width, height):
    picture = layout(NETWORKS[name])
    assert picture.width <= width and picture.height <= height


def test_a_line_is_drawn_no_wider_than_the_layout_takes_it_to_be():
    """DejaVu Sans comes with matplotlib, so its widths are the same everywhere."""
    lines = {
        line
        for name in ("26 tables, 8 ranks", "3 tables", "mult", "mixed")
        for box in layout(NETWORKS[name]).all_boxes()
        for line in box.lines
    }
    for line in lines | {Line("0123456789,× Ww Mm @%", 9, bold=True)}:
        font = FontProperties(
            family="DejaVu Sans", size=line.size, weight="bold" if line.bold else 400
        )
        width, _, _ = text_to_path.get_text_width_height_descent(line.words, font, ismath=False)
        assert width <= line.width <= 1.5 * width + 4, line


# ---------------------------------------------------------------- what is told


def test_plain_tables_layers_interaction_and_loss_are_told_with_their_shapes():
    words = words_of(layout(NETWORKS["3 tables"]))
    for k, rows in enumerate((4, 3, 2)):
        at = words.index(f"table {k}")
        assert words[at + 1] == f"{rows} × 2"
    for layer in (
        "bot_l.0: weight 512 × 13, bias 512",
        "bot_l.2: weight 2 × 512, bias 2",
        "top_l.0: weight 256 × 415, bias 256",
        "top_l.2: weight 1 × 256, bias 1",
    ):
        assert layer in words
    assert {"13 → 512, ReLU", "512 → 2, ReLU", "415 → 256, ReLU", "256 → 1, Sigmoid"} < set(words)
    assert "Dot interaction: 415 wide" in words
    assert "the bottom MLP's 2, then 6 products of pairs of 4 vectors" in words
    assert "Loss: Weighted binary cross-entropy (wbce)" in words
    assert "label 0 weighs 1, label 1 weighs 1" in words
    assert "predictions are clamped to [0.01, 0.99]" in words
    assert "18 weights, 72 bytes in float32" in words


@pytest.mark.parametrize("name", NETWORKS)
def test_exchange_and_ranks_are_told_where_there_are_several(name):
    facts = NETWORKS[name]
    words = words_of(layout(facts))
    has_ranks = facts.num_ranks > 1
    parts = facts.placement.parts
    on_one = any(not part.is_shared for part in parts)
    travels = has_ranks and on_one
    assert words.count("All-to-all") == (2 if travels else 0)
    assert ("rank 0" in words) == travels
    every = any(part.is_shared for part in parts)
    assert words.count("all-reduce of gradients") == (2 + every if has_ranks else 0)  # 2 MLPs
    cut_words = " ".join(words).count("all rows, t parts of tables")
    assert cut_words == (travels and any(not part.is_whole for part in parts))


def test_ranks_have_their_tables_and_ranks_without_one_are_counted():
    facts = NETWORKS["26 tables, 8 ranks"]
    ranks = [box for box in layout(facts).all_boxes() if box.style == "rank"]
    told = {
        int(inner.lines[0].words.split()[1]): int(box.lines[0].words.split()[1])
        for box in ranks
        for inner in box.inner
    }
    assert told == {part.matrix.table: part.rank for part in facts.placement.parts}
    assert len(ranks) == 8 and len(told) == 26
    assert "14 of 40 ranks hold no table" in words_of(layout(NETWORKS["26 tables, 40 ranks"]))


def ranks_told(name):
    """The lines of the tables on each rank, with those of the parts drawn in them."""
    ranks = [box for box in layout(NETWORKS[name]).all_boxes() if box.style == "rank"]
    return {
        rank.lines[0].words: [
            [line.words for box in (table, *table.inner) for line in box.lines]
            for table in rank.inner
        ]
        for rank in ranks
    }


def test_ranks_are_told_with_their_rows_of_tables_that_are_cut():
    told = ranks_told("concat, cut")
    assert told["rank 1"][:2] == [
        [
            "table 0", "9,980,333 rows, D 128", "concat: q and r side by side",
            "weight_q: row id // 4", "831,695 × 64", "rows 831,695 to 1,663,389",
            "weight_r: row id % 4", "1 × 64", "rows 2 to 2",
        ],
        [
            "table 1", "36,084 rows, D 128", "concat: q and r side by side",
            "weight_q: row id // 4", "3,007 × 64", "rows 3,007 to 6,013",
            "weight_r: row id % 4", "1 × 64", "rows 2 to 2",
        ],
    ]  # fmt: skip
    assert told["rank 2"][2] == ["table 2", "1 × 128", "rows 2 to 2"]
    assert "rank 0" in told and len(told) == 3


def test_what_every_rank_holds_is_told_once():
    assert list(ranks_told("26 tables, everywhere")) == ["every rank"]
    assert list(ranks_told("mixed, cut"))[0] == "every rank"
    (projection,) = [one for one in ranks_told("mixed")["every rank"] if one[0] == "table 0"]
    assert projection[-2:] == ["proj.weight", "64 × 1"]
    for name in ("26 tables, everywhere", "mixed", "mixed, cut"):
        assert "hold no table" not in " ".join(words_of(layout(NETWORKS[name])))


def parts_told(name, number=0):
    """The lines of a table, and those of the parts drawn in it."""
    tables = [box for box in layout(NETWORKS[name]).all_boxes() if box.style == "table"]
    (table,) = [box for box in tables if box.lines[0].words == f"table {number}"]
    own = [line.words for line in table.lines]
    return own, [[line.words for line in part.lines] for part in table.inner]


@pytest.mark.parametrize(
    ("operation", "join", "dim"),
    [
        ("mult", "mult: q and r are multiplied", 64),
        ("add", "add: q and r are added", 64),
        ("concat", "concat: q and r side by side", 128),
    ],
)
def test_quotient_remainder_tables_are_told_with_both_parts(operation, join, dim):
    own, parts = parts_told(operation)
    assert own == ["table 0", f"9,980,333 rows, D {dim}", join]
    assert parts == [
        ["weight_q: row id // 4", "2,495,084 × 64"],
        ["weight_r: row id % 4", "4 × 64"],
    ]
    assert parts_told(operation, 2) == (["table 2", f"3 × {dim}"], [])


def test_mixed_dimensions_are_told_with_the_projection():
    own, parts = parts_told("mixed, 1 rank")
    assert own == ["table 0", "9,980,333 rows, D 64", "projection: 1 → 64"]
    assert parts == [["embs.weight: row id", "9,980,333 × 1"], ["proj.weight", "64 × 1"]]


def test_interactions_are_told_apart():
    tables = NoCompression(16)
    itself = words_of(layout(network([5, 6], tables, itself=True, top=(22, 1))))
    assert "then 6 products of pairs of 3 vectors and of each with itself" in "\n".join(itself)
    cat = words_of(layout(network([5, 6], tables, interaction="cat", top=(48, 1))))
    assert {"Concatenation: 48 wide", "3 vectors of 16 side by side"} < set(cat)


def test_the_weights_of_a_bags_sum_are_told():
    for pooling, end in (("", ""), ("fixed", "fixed weight"), ("learned", "learned weight")):
        words = words_of(layout(network([5, 6], NoCompression(16), pooling=pooling)))
        (sentence,) = [line for line in words if line.startswith("the vectors of a bag are summed")]
        assert end in sentence and bool(end) == ("weight" in sentence)


# ---------------------------------------------------------------- the file


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_file_holds_the_words_of_the_layout_and_is_the_same_each_time(here):
    facts = NETWORKS["mult"]
    texts = texts_of(plot_compute_graph(facts))
    assert texts == words_of(layout(facts))
    first = GRAPH_FILE.read_bytes()
    with matplotlib.rc_context({"font.size": 30, "path.sketch": (1, 9, 2), "svg.fonttype": "path"}):
        plot_compute_graph(facts)  # a user's own settings for other pictures
    assert GRAPH_FILE.read_bytes() == first and os.listdir() == [GRAPH_FILE.name]


def test_a_run_draws_its_model_and_trains_as_without_the_picture(here):
    drawn = train(*SMALL_MODEL, FLAG)
    assert drawn.status == 0 and drawn.out.startswith(f"compute graph: {GRAPH_FILE}\n")
    assert drawn.losses == train(*SMALL_MODEL).losses != []
    texts = texts_of(GRAPH_FILE)
    for line in ("300 × 16", "13 → 64, ReLU", "top_l.4: weight 1 × 32, bias 1"):
        assert line in texts
    assert "Dot interaction: 26 wide" in texts and "Loss: Binary cross-entropy (bce)" in texts


@pytest.mark.parametrize("flags", [["--inference-only"], ["--dry-run"]])
def test_runs_without_training_draw_too(here, flags):
    assert train(FLAG, *flags).status == 0
    assert {"4 × 2", "Loss: Mean squared error (mse)"} < set(texts_of(GRAPH_FILE))


def be_rank(rank, world_size, monkeypatch):
    """Set what torchrun sets; with --dry-run ranks do not meet, so each can be run alone."""
    there = {"WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in (there | {"RANK": rank, "LOCAL_RANK": rank}).items():
        monkeypatch.setenv(name, value)


def test_only_the_first_of_several_ranks_draws(here, monkeypatch):
    for rank, names in (("1", []), ("0", [GRAPH_FILE.name])):
        be_rank(rank, "2", monkeypatch)
        assert train("--dry-run", FLAG).status == 0
        assert os.listdir() == names
    texts = texts_of(GRAPH_FILE)
    assert {"rank 0", "rank 1"} < set(texts) and texts.count("All-to-all") == 2


def test_the_picture_in_the_docs_is_what_is_drawn_today(here, monkeypatch):
    """docs/compute_graph.md has the command that makes it."""
    texts = texts_of(ROOT / "docs" / "compute_graph.svg")
    rows = collections.Counter()
    for name, shape in itertools.pairwise(texts):
        if re.fullmatch(r"table \d+", name):
            rows[int(name.split()[1])] += int(shape.split()[0].replace(",", ""))
    sizes = "-".join(str(rows[k]) for k in range(26))
    be_rank("0", "8", monkeypatch)
    flags = f"""--dry-run {FLAG} --arch-embedding-size={sizes} --num-indices-per-lookup=1
        --num-indices-per-lookup-fixed=true --arch-sparse-feature-size=64
        --arch-mlp-bot=13-512-256-64 --arch-mlp-top=512-512-256-1
        --loss-function=bce --mini-batch-size=2048"""
    assert train(*flags.split()).status == 0
    assert texts == texts_of(GRAPH_FILE)


# ---------------------------------------------------------------- mistakes


def one_line(result):
    assert result.status == 2 and result.out == ""
    assert result.err.startswith(f"error: {FLAG}: ") and result.err.count("\n") == 1
    return result.err


def test_without_matplotlib_nothing_is_begun(here, monkeypatch):
    monkeypatch.setattr(drawing, "problem_of_import", lambda name, _: f"{name} is not installed: x")
    assert "matplotlib is not installed" in one_line(train(FLAG))
    assert os.listdir() == []


def test_a_matplotlib_that_cannot_be_imported_is_named_before_data_is_prepared(
    here, kaggle_copy, tmp_path_factory, monkeypatch
):
    before = os.listdir(kaggle_copy)
    error = "AttributeError('_ARRAY_API not found')"  # as if made for another numpy
    break_package(tmp_path_factory.mktemp("packages"), monkeypatch, "matplotlib", error)
    message = one_line(train(*CRITEO_MODEL, f"--data_path={kaggle_copy}", FLAG))
    assert "cannot be imported (AttributeError: _ARRAY_API not found): install it anew" in message
    assert os.listdir(kaggle_copy) == before


def test_the_check_imports_all_that_a_drawing_needs(here):
    """What the drawing alone imports could fail after data has been prepared."""
    code = (
        "import sys; from pathlib import Path\n"
        "from reporting import drawing\n"
        "drawing.check_drawable('flag', Path('x.svg'))\n"
        "before = {name for name in sys.modules if name.startswith('matplotlib')}\n"
        "drawing.save_svg('flag', drawing.Picture(9, 9, (), ()), Path('x.svg'))\n"
        "print({name for name in sys.modules if name.startswith('matplotlib')} - before)"
    )
    done = shell(sys.executable, "-c", code, env={"PYTHONPATH": str(ROOT)})
    assert done.stdout == "set()\n", done.stdout + done.stderr


def test_a_folder_of_the_pictures_name_is_named_before_data_is_made(here):
    GRAPH_FILE.mkdir()
    message = f"{here / GRAPH_FILE} is a folder: start in another folder"
    assert message in one_line(train(FLAG))
    assert os.listdir() == [GRAPH_FILE.name]


def test_a_folder_that_cannot_be_written_is_named_before_data_is_made(here, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # as for root it never is
    message = f"{here / GRAPH_FILE}: its folder is not writable: start in another folder"
    assert message in one_line(train(FLAG))
    assert os.listdir() == []


def test_a_full_disk_leaves_the_earlier_picture(here, monkeypatch):
    GRAPH_FILE.write_text("earlier")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)  # some file systems tell it as late as that
    assert "No space left on device" in one_line(train(FLAG))
    assert os.listdir() == [GRAPH_FILE.name] and GRAPH_FILE.read_text() == "earlier"


def test_a_link_stays_a_link_to_the_picture(here):
    (here / "pictures").mkdir()
    GRAPH_FILE.symlink_to("pictures/model.svg")
    assert train(FLAG, "--dry-run").status == 0
    assert GRAPH_FILE.is_symlink() and "table 0" in texts_of("pictures/model.svg")
    assert os.listdir("pictures") == ["model.svg"]
