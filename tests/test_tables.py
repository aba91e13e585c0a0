"""tables.py, through train_points.py: what other programs export, what is refused, what is said."""
import gzip
import io
import os
import pathlib
import warnings

import numpy as np
import pytest
import scipy.sparse
import torch

import run as run_room
from conftest import here, refuses

N, NAMES = 60, ["a", "b", "c"]
rng = np.random.default_rng(0)
ROWS = rng.normal(size=(N, 3)).round(4)
MIXED = [str(k) for k in rng.permutation(N)]  # row names in no order
KEYS = [f"AAC{k}-1" for k in MIXED]


def door(*options, code=0):
    """Run train_points.py until all is read and checked -> its output and globals.  Python's warnings are errors."""
    seen = {}

    def enough(values):
        seen.update(values)
        raise SystemExit(0)

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("error")
        patch.setattr(run_room, "constants_of", enough)
        return here("train_points.py", "--device", "cpu", *options, code=code)[0], seen


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with X.npy, Y.npy and NEW.npy."""
    monkeypatch.chdir(tmp_path)
    for name, rows in (("X", ROWS), ("Y", ROWS[:50] + 1), ("NEW", ROWS[:7] + 2)):
        np.save(tmp_path / f"{name}.npy", rows)
    return tmp_path


# ------------------------------------------------------------------------------------------------ tables

def table(separator=",", header=NAMES, index=None, decimal=".", quote="", end="\n", rows=ROWS):
    """Text as programs export it.  index: first cells of the rows."""
    lines = [[f"{quote}{name}{quote}" for name in header]] if header is not None else []
    for k, row in enumerate(rows):
        lines.append(([index[k]] if index else []) + [str(v).replace(".", decimal) for v in row])
    return end.join(separator.join(line) for line in lines) + end


COUNTED = [str(k) for k in range(N)]
QUOTED = [f'"{k + 1}"' for k in range(N)]
EXPORTS = {  # what wrote it: text, names of the columns, whether a first column is left out
    "pandas to_csv": (table(header=["", *NAMES], index=COUNTED), NAMES, True),
    "pandas to_csv of an array": (table(header=["", "0", "1", "2"], index=COUNTED), None, True),
    "pandas to_csv of an array, index=False": (table(header=["0", "1", "2"]), None, False),
    "pandas to_csv, header=False": (table(header=None, index=COUNTED), None, True),
    "pandas to_csv, read, shuffled, written again": (table(header=["Unnamed: 0", *NAMES], index=MIXED), NAMES, True),
    "pandas to_csv of a shuffled table": (table(header=["", *NAMES], index=MIXED), NAMES, True),
    "pandas to_csv of cells": (table(header=["", *NAMES], index=KEYS), NAMES, True),
    "pandas reset_index": (table(header=["id", *NAMES], index=[str(400 + k) for k in range(N)]), NAMES, True),
    "barcodes with a name": (table(header=["barcode", *NAMES], index=KEYS), NAMES, True),
    "barcodes without header": (table(header=None, index=KEYS), None, True),
    "R write.csv": (table(header=["", *NAMES], index=QUOTED, quote='"'), NAMES, True),
    "R write.csv, row.names=FALSE": (table(quote='"'), NAMES, False),
    "R write.csv2": (table(";", ["", *NAMES], QUOTED, ",", '"'), NAMES, True),
    "R write.table": (table(" ", NAMES, QUOTED, quote='"'), NAMES, True),
    "Excel, semicolon, decimal comma": ("\ufeffsep=;\r\n" + table(";", decimal=",", end="\r\n") + ";;\r\n",
                                        NAMES, False),
    "Excel, tab, decimal comma, no header": (table("\t", None, decimal=",", end="\r\n"), None, False),
    "quoted decimal commas": ("".join('"' + '","'.join(str(v).replace(".", ",") for v in row) + '"\n' for row in ROWS),
                              None, False),
    "blanks and decimal comma": (table(" ", None, decimal=","), None, False),
    "numpy savetxt": (None, None, False),
    "comma and blank": (table(", "), NAMES, False),
}


@pytest.mark.parametrize("name", EXPORTS)
def test_tables_of_other_programs(name, folder):
    text, names, left_out = EXPORTS[name]
    if text is None:
        file = io.StringIO()
        np.savetxt(file, ROWS, header="a b c")
        text = file.getvalue()
    for ending in (".csv", ".txt.gz"):
        opened = gzip.open if ending.endswith("gz") else open
        with opened(f"T{ending}", "wt", encoding="utf-8", newline="") as file:
            file.write(text)
        output, seen = door(f"T{ending}", "Y.npy", "--map", f"T{ending}")
        assert np.array_equal(seen["X"].numpy(), ROWS) and np.array_equal(seen["new_x"].numpy(), ROWS)
        assert seen["names"] == names and ("header: a, b, c" in output) == bool(names)
        assert ("left out a first" in output) == left_out


@pytest.mark.parametrize("text", ["a\n{0,5}", "{0.5}", "0\n{0.5}", ",0\n{0,0.5}", "a\tb\n{x\t0.5}"])
def test_one_column(text, folder):
    """A decimal comma is no second column where the header has one name; "0" above decimals is a header."""
    np.save("Y.npy", ROWS[:, :1])
    head, row = text[:-1].split("{")
    values = [0.5, 1.25, -3.5] * 20
    rows = {"0,5": "{v}", "0.5": "{v}", "0,0.5": "{k},{v}", "x\t0.5": "x{k}\t{v}"}[row]
    decimal = "," if row == "0,5" else "."
    (folder / "X.tsv").write_text(head + "".join(rows.format(k=k, v=str(v).replace(".", decimal)) + "\n"
                                                 for k, v in enumerate(values)))
    assert np.array_equal(door("X.tsv", "Y.npy")[1]["X"][:, 0], values)


def test_whole_numbers_are_no_header(folder):
    """0, 1 above whole numbers is a row of a lattice, as 2, 7 would be; of three columns it is believed."""
    (folder / "X.csv").write_text("0,1\n" + 30 * "3,5\n2,7\n")
    np.save("Y.npy", ROWS[:, :2])
    assert np.array_equal(door("X.csv", "Y.npy")[1]["X"][:3], [[0, 1], [3, 5], [2, 7]])
    (folder / "X.csv").write_text("0,1,2\n" + 30 * "3,5,1\n2,7,1\n")
    np.save("Y.npy", ROWS)
    assert np.array_equal(door("X.csv", "Y.npy")[1]["X"][:2], [[3, 5, 1], [2, 7, 1]])


def test_columns_are_matched_by_name(folder):
    (folder / "X.csv").write_text(table())
    (folder / "Y.csv").write_text(table(header=["c", "a", "b"], rows=ROWS[:, [2, 0, 1]] + 1))
    (folder / "NEW.csv").write_text(table(rows=ROWS[:1]))
    output, seen = door("X.csv", "Y.csv", "--map", "NEW.csv")
    assert np.allclose(seen["Y"], ROWS + 1) and "Y.csv" in output and "order of X" in output
    assert seen["new_x"].shape == (1, 3)
    assert np.array_equal(door("X.csv", "Y.npy")[1]["Y"], np.load("Y.npy"))  # without names: by position
    for header, word in ((["a", "b", "d"], "c, d"), (["a", "b", "b"], "c")):
        (folder / "Y.csv").write_text(table(header=header))
        refuses(door("X.csv", "Y.csv", code=2)[0], "Y.csv", word)
    (folder / "Y.csv").write_text(table(header=["b", "a", "b"]))
    (folder / "T.csv").write_text(table(header=["a", "b", "b"]))
    refuses(door("T.csv", "Y.csv", code=2)[0], "differ in b")
    (folder / "Y.csv").write_text(table(header=[*NAMES, "label"], rows=np.column_stack([ROWS, KEYS and ROWS[:, 0]])))
    refuses(door("X.csv", "Y.csv", code=2)[0], "Y.csv and X must have the same columns", "4 and 3", "label")


def test_a_counting_column_is_left_out_of_all_files(folder):
    for name, first in (("X", 0), ("Y", 7), ("NEW", 3)):
        rows = np.load(f"{name}.npy")
        np.save(f"{name}.npy", np.column_stack([first + np.arange(len(rows)), rows]))
    output, seen = door("X.npy", "Y.npy", "--map", "NEW.npy")
    assert output.count("left out a first") == 3 and np.array_equal(seen["X"], ROWS) and seen["new_x"].shape == (7, 3)
    np.save("NEW.npy", np.load("NEW.npy")[:, 1:])  # without it
    assert np.array_equal(door("X.npy", "Y.npy", "--map", "NEW.npy")[1]["new_x"], np.load("NEW.npy"))


BAD_TEXT = {  # what is wrong: text, words of the sentence
    "damaged first line": ("0.5,O.5,1\n" + table(header=None), ["line 1", "column 2", "'O.5'", "header"]),
    "a class label": (table(header=[*NAMES, "kind"], rows=np.column_stack([ROWS.astype(str), N * ["setosa"]])),
                      ["line 2", "column 4", "'setosa'"]),
    "a class label first": (table(header=["kind", *NAMES], index=N * ["setosa"]), ["line 2", "column 1", "'setosa'"]),
    "text": (table().replace(str(ROWS[3, 1]), "x1"), ["line 5", "column 2", "'x1'"]),
    "ragged": (table() + "1,2\n", ["line 62", "2 columns", "3"]),  # a file cut short in its last line
    "header too long": (table(header=[*NAMES, "d", "e"]), ["line 2", "3 columns", "5"]),
    "empty cell": (table().replace(str(ROWS[3, 1]), ""), ["missing values", "row 3", "column b"]),
    "NA": (table(header=None).replace(str(ROWS[3, 1]), "NA"), ["missing values", "row 3", "column 1"]),
    "inf": (table().replace(str(ROWS[3, 1]), "-inf"), ["missing values", "row 3", "column b"]),
    "empty": ("", ["empty"]), "only comments": ("# a\n#b\n", ["no plain array"]),
    "only a header": ("a,b,c\n", ["shape"]),
    "not text": ("\xff\x00\x01\n\x00", ["'", "is no number"]), "a long field": ("x" * 200_000, ["X.csv"]),
}


@pytest.mark.parametrize("what", BAD_TEXT)
def test_bad_tables_are_one_sentence(what, folder):
    text, words = BAD_TEXT[what]
    (folder / "X.csv").write_bytes(text.encode("latin-1"))
    refuses(door("X.csv", "Y.npy", code=2)[0], "X.csv", *words)
    if what != "only a header":
        refuses(door("X.npy", "Y.npy", "--map", "X.csv", code=2)[0], "X.csv", *words)


# ------------------------------------------------------------------------------------------------ arrays

ARRAYS = {  # what it is: name, how it is written
    "scanpy's obsm": ("X.npy", lambda p: np.save(p, ROWS)),
    "Fortran order": ("X.npy", lambda p: np.save(p, ROWS.copy("F"))),
    "big endian": ("X.npy", lambda p: np.save(p, ROWS.astype(">f8"))),
    "one array": ("X.npz", lambda p: np.savez_compressed(p, cells=ROWS)),
    "one of two": ("X.npz:cells", lambda p: np.savez(p, other=ROWS[:3], cells=ROWS)),
    "a tensor": ("X.pt", lambda p: torch.save(torch.from_numpy(ROWS), p)),
    "a parameter": ("X.pt", lambda p: torch.save(torch.nn.Parameter(torch.from_numpy(ROWS)), p)),
    "a dict": ("X.pt:cells", lambda p: torch.save({"day": 2, "cells": torch.from_numpy(ROWS)}, p)),
}


@pytest.mark.parametrize("what", ARRAYS)
def test_arrays(what, folder):
    path, write = ARRAYS[what]
    write(path.split(":")[0])
    seen = door(path, "Y.npy", "--map", path)[1]
    assert np.array_equal(seen["X"], ROWS) and np.array_equal(seen["new_x"], ROWS)


def test_narrow_types_are_widened(folder):
    whole = np.arange(150).reshape(50, 3) % 7
    for held in (whole.astype(np.int8), whole.astype(np.float16), torch.tensor(whole).bfloat16(), torch.tensor(whole)):
        path, write = ("X.npy", np.save) if isinstance(held, np.ndarray) else ("X.pt", lambda p, v: torch.save(v, p))
        write(path, held)
        assert np.array_equal(door(path, "Y.npy")[1]["X"], whole)


def sparse_npz(path):  # as scipy.sparse.save_npz
    np.savez(path, indices=np.arange(9), indptr=np.arange(10), format=b"csr", shape=(9, 9), data=np.ones(9))


def huge_npy(path):
    """A header of 10^11 rows in a file of holes."""
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f8", "fortran_order": False, "shape": (10 ** 11, 3)})
        file.truncate(file.tell() + 24 * 10 ** 11)


def saved(held):
    return lambda path: torch.save(held, path) if path.endswith(".pt") else np.save(path, held, allow_pickle=True)


def written_as(text):
    return lambda path: pathlib.Path(path).write_text(text)


BAD = {  # what is wrong: file, how it is written, words
    "holes": ("B.npy", saved(np.where(np.arange(180).reshape(60, 3) % 23 == 22, np.nan, ROWS)), ["7 rows", "row 7"]),
    "flat": ("B.npy", saved(ROWS[:, 0]), ["(60,)"]),
    "none": ("B.npy", saved(ROWS[:0]), []),
    "columns": ("B.npy", saved(ROWS[:, :2]), ["same columns", "2 and 3"]),
    "complex": ("B.npy", saved(ROWS + 1j), ["complex"]),
    "objects": ("B.npy", saved(np.array([{"a": 1}], dtype=object)), ["objects"]),
    "text": ("B.npy", saved(ROWS.astype(str)), []),
    "dates": ("B.npy", saved(np.zeros((60, 3), "M8[s]")), []),
    "no array": ("B.npy", written_as("no"), []),
    "truncated": ("B.npy", lambda path: np.save(path, ROWS) or os.truncate(path, 999), []),
    "absent": ("B.npy", id, ["no file"]),
    "a folder": ("B.npy", os.mkdir, ["no file"]),
    "a pipe": ("B.npy", os.mkfifo, ["no file"]),
    "two arrays": ("B.npz", lambda path: np.savez(path, u=ROWS, v=ROWS), ["u, v", "B.npz:u"]),
    "no such array": ("B.npz:w", lambda path: np.savez("B.npz", u=ROWS, v=ROWS), ["u, v", "B.npz:u"]),
    "sparse .npz": ("B.npz", sparse_npz, ["is sparse"]),
    "no archive": ("B.npz", written_as("no"), []),
    "complex tensor": ("B.pt", saved(torch.zeros(60, 3, dtype=torch.complex64)), []),
    "a list": ("B.pt", saved([1, 2]), []),
    "two tensors": ("B.pt", saved({"u": 1, "v": 2}), ["u, v", "B.pt:u"]),
    "sparse tensor": ("B.pt", saved(torch.eye(60)[:, :3].to_sparse()), ["is sparse"]),
    "a model": ("B.pt", saved(torch.nn.Linear(2, 2)), []),
    "a view": ("B.pt", saved(torch.zeros(1, 3).expand(10 ** 11, 3)), ["GiB of memory"]),
    "file of holes": ("B.npy", huge_npy, ["GiB of memory"]),
    "scanpy's file": ("B.h5ad", written_as("h"), ["not read"]),
    "Matrix Market": ("B.mtx.gz", written_as("h"), ["not read"]),
    "pickle": ("B.pkl", written_as("h"), [".csv"]),
    "no ending": ("B", written_as("h"), ["not read"]),
    "far": ("B.npy", saved(np.where(ROWS > 2, 1e300, ROWS)), ["deviations"]),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_files_are_one_sentence(what, folder):
    path, write, words = BAD[what]
    write(path)
    said = door("X.npy", "Y.npy", "--map", path, code=2)[0]
    refuses(said, path, *words)
    if what not in ("columns", "far"):  # as X these are others' business
        refuses(door(path, "Y.npy", code=2)[0], path, *words)
    if "plain array" in said:  # and two lines of Python that write the array
        lines = said.splitlines()[-2:]
        compile("\n".join(lines), "advice", "exec")
        assert lines[0].startswith("import numpy") and lines[1].startswith("numpy.save('B.npy', ")


@pytest.mark.filterwarnings("ignore")
def test_what_the_advice_writes_is_read(folder):
    """The two lines for sparse files, run."""
    scipy.sparse.save_npz("S.npz", scipy.sparse.csr_matrix(ROWS))
    torch.save(torch.from_numpy(ROWS).to_sparse(), "P.pt")
    for path in ("S.npz", "P.pt"):
        exec("\n".join(door(path, "Y.npy", code=2)[0].splitlines()[-2:]), {})
        assert np.array_equal(door(path[0] + ".npy", "Y.npy")[1]["X"], ROWS)


def test_what_unpacks_beyond_the_memory_is_refused(folder, monkeypatch):
    """On a machine of 90 000 bytes: 10 000 rows of zeros, in kilobytes of .npz, .gz and .pt, of which the first two are
    damaged, so that they could not be unpacked to the end."""
    monkeypatch.setattr(os, "sysconf", lambda name: 300)
    zeros = np.zeros((10_000, 3))
    np.savez_compressed("B.npz", X=zeros)
    np.savetxt("B.csv.gz", zeros, "%.0f", ",")
    torch.save(torch.zeros(1, 3).expand(10_000, 3), "B.pt")
    text = pathlib.Path("B.npz").read_bytes()
    pathlib.Path("B.npz").write_bytes(text[:150] + bytes(50) + text[200:])
    os.truncate("B.csv.gz", os.path.getsize("B.csv.gz") - 30)
    assert "mean cost" in door("X.npy", "Y.npy")[0]
    for path in ("B.npz", "B.csv.gz", "B.pt"):
        assert os.path.getsize(path) < 5000
        refuses(door("X.npy", "Y.npy", "--map", path, code=2)[0], path, "GiB of memory")


# ------------------------------------------------------------------------------------------------ what is said

def test_a_column_or_a_row_that_carries_the_cost_is_named(folder):
    assert "warning" not in door("X.npy", "Y.npy")[0]
    rows = np.random.default_rng(1).standard_t(3, size=(5000, 3))
    np.save("H.npy", rows)  # heavy tails are none
    assert "warning" not in door("H.npy", "Y.npy")[0]
    np.save("L.npy", rows * [3, 1, 1])  # 82 % in one column
    assert "warning" not in door("L.npy", "L.npy")[0]
    rows[[7, 11], [0, 2]] = -9999
    np.save("H.npy", rows)
    said = door("H.npy", "Y.npy")[0]
    assert said.count("warning") == 1 and "2 of 5000 rows of X ([" in said and "7" in said and "11" in said
    (folder / "X.csv").write_text(table(header=["age", "income", "b"], rows=ROWS * [10, 20_000, 1]))
    said = door("X.csv", "X.csv")[0]
    assert said.count("warning") == 1 and "over 95% of the mean cost is in 1 of 3 columns (income)" in said
    np.save("X.npy", ROWS * [10, 20_000, 1])
    assert "1 of 3 columns ([1], from 0)" in door("X.npy", "X.npy")[0]
    np.save("X.npy", ROWS[:, :1])
    assert "warning" not in door("X.npy", "X.npy")[0]  # the only column
    np.save("X.npy", np.random.default_rng(2).normal(size=(N, 501)))
    assert "principal components" in door("X.npy", "X.npy")[0]


def test_an_advised_scaling_silences_the_warning(folder):
    wide = ROWS * [10, 20_000, 1]
    np.save("X.npy", wide / wide.std(0))
    assert "warning" not in door("X.npy", "X.npy")[0]
