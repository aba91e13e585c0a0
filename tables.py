"""Tables of numbers as other programs write them: read, checked, refused by a sentence that says how to mend them."""
import csv
import gzip
import itertools
import math
import os
import warnings

import numpy as np
import torch

from run import fail, printable, reason_of

CARRIED = 0.95           # of the mean cost: what one column, or one row in a hundred, may carry unsaid
WIDE = 500               # columns: beyond them a fit takes minutes


def afford(what, size):
    """Refuse, before it is read or made, what would take over a quarter of the memory: later steps copy it."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 2 ** 34  # Windows
    if 4 * size > memory:
        fail(f"{what} would take {size / 2 ** 30:.3g} of {memory / 2 ** 30:.3g} GiB of memory: take fewer rows")


def number_in(cell, comma):
    """The number in a table's cell, whose decimal mark may be a comma; nan where it marks a gap, None if it is text."""
    try:
        return float(cell.replace(",", ".") if comma else cell)
    except ValueError:
        return math.nan if cell.lower() in ("", ".", "-", "?", "na", "n/a", "#n/a", "null", "none") else None


def read_table(path):
    """Text -> rows (n, D), nan where missing; names of the columns or None; whether a first column was left out."""
    def lines(separator):
        opened = gzip.open if path.lower().endswith(".gz") else open
        with opened(path, "rt", encoding="utf-8-sig", errors="replace", newline="") as file:
            reader = csv.reader(map(" ".join, map(str.split, file)) if separator == " " else file, delimiter=separator)
            for cells in reader:
                if any(cells) and not cells[0].startswith(("#", "sep=")):  # Excel's first line may be sep=;
                    yield reader.line_num, [cell.strip() for cell in cells]

    def fit(way):  # csv.Sniffer takes decimal commas for separators, and gives up on a single column
        rows = heads[way[1]]
        numbers = [number_in(cell, way[0]) is not None for row in rows[1:] or rows for cell in row]
        return sum(numbers) / len(numbers), len(rows[0]) == len(rows[-1])

    heads = {separator: [row for _, row in itertools.islice(lines(separator), 50)] for separator in "\t;, "}
    comma, separator = max(itertools.product((False, True), heads), key=fit)
    (first, *below), width, rows = heads[separator], len(heads[separator][-1]), []
    first = [""] * (len(first) == width - 1) + first  # R writes no name above those of the rows
    unnamed = first[0] == "" or first[0].startswith("Unnamed")  # as pandas calls it
    whole = all(cell.lstrip("-").isdigit() for row in below for cell in row)
    counted = first[unnamed:] == [str(k) for k in range(width - unnamed)] and (unnamed or width > 2 or not whole)
    header = counted or all(number_in(cell, comma) is None or not cell for cell in first)
    keys = {row[0] for row in below if number_in(row[0], comma) is None}
    drop = int(width > 1 and (header and unnamed or 0 < len(below) == len(keys)))  # or text, another in every row
    for line, cells in itertools.islice(lines(separator), int(header), None):
        row = [number_in(cell, comma) for cell in cells[drop:]]
        if not len(cells) == len(first) == width:
            fail(f"{path}, line {line}, has {len(cells)} columns where others have {len(first)}: correct it")
        if None in row:
            k = drop + row.index(None)
            fail(f"{path}, line {line}, column {k + 1}: {cells[k]!r} is no number; correct it, or leave out the column "
                 f"(a header is a first line without any number, or 0, 1, 2 ...)")
        rows.append(np.array(row))
        afford(path, 8 * width * len(rows))
    return np.array(rows), first[drop:] if header and not counted else None, drop


def read_rows(path, x=None):
    """A file -> rows (n, D), float64, and names of the columns or None.  x: that of X, whose order is taken."""
    file, _, key = path.rpartition(":") if ":" in path and not os.path.exists(path) else (path, "", "")
    kind, names, drop = os.path.splitext(file.lower().removesuffix(".gz"))[1], None, 0

    def refuse(reason):
        how = {".h5ad": "anndata.read_h5ad({}).obsm['X_pca']", ".mtx": "scipy.io.mmread({}).T.toarray()",
               ".npz": "scipy.sparse.load_npz({}).toarray()", ".pt": "torch.load({}).to_dense().numpy()"}
        array = how.get(kind, "numpy.array(X, float)").format(repr(file))
        module = array.partition("(")[0].rpartition(".")[0]
        fail(f"{path} {reason}; write a plain array of numbers, as by", "import numpy" + f", {module}" * (kind in how),
             f"numpy.save({file.split('.')[0] + '.npy'!r}, {array})")

    if not os.path.isfile(file) or not os.path.getsize(file):
        fail(f"{path} is no file, or empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numpy's and torch's own
            if kind in (".csv", ".tsv", ".txt"):
                rows, names, drop = read_table(file)
            elif kind in (".npy", ".npz"):
                rows = np.load(file, mmap_mode="r")
            elif kind == ".pt":
                rows = torch.load(file, "cpu", weights_only=True, mmap=True)
            else:
                refuse("is of a kind that is not read (.npy, .npz, .pt, .csv, .tsv, .txt, the last three .gz too)")
            if hasattr(rows, "keys") and "format" not in rows:
                key = key or ", ".join(map(str, rows))
                if key not in rows:
                    fail(f"{path} holds {', '.join(map(str, rows))}: name one, as {file}:{next(iter(rows), 'key')}")
                afford(path, rows.zip.getinfo(f"{key}.npy").file_size if kind == ".npz" else 0)
                rows = rows[key]
            if hasattr(rows, "keys") or getattr(rows, "layout", torch.strided) != torch.strided:
                refuse("is sparse")
            afford(path, 8 * math.prod(rows.shape))
            if isinstance(rows, torch.Tensor):
                rows = (rows.detach().double() if rows.is_floating_point() else rows).numpy()
            rows = rows.astype(np.float64, "C", "same_kind" if rows.dtype.kind == "f" else "safe")
    except Exception as error:  # foreign, truncated, a pickle, text, complex: each has its own
        refuse(f"holds no plain array of numbers ({reason_of(error)})")
    if rows.ndim != 2 or not rows.size:
        fail(f"{path} has the shape {rows.shape}: rows are samples, (n, D)")
    if rows.shape[1] > (x[0].shape[1] if x else 1) and (np.diff(rows[:, 0]) == 1).all():
        rows, names, drop = rows[:, 1:], names and names[1:], 1
    other = x and names and x[1] and names != x[1]
    odd = set(names) ^ set(x[1]) or {name for name in names if names.count(name) > 1} if other else ()
    if x and (odd or rows.shape[1] != x[0].shape[1]):
        fail(f"{path} and X must have the same columns, not {rows.shape[1]} and {x[0].shape[1]}"
             f"{'; they differ in ' * bool(odd)}{', '.join(sorted(odd)[:9])}")
    if names or drop:
        shown = f"header: {', '.join(names[:12])}{', ...' * (len(names) > 12)}" if names else "no header"
        print(printable(f"{path}: {shown}" + "; left out a first column that names or counts the rows" * drop +
                        "; put in the order of X" * bool(other)))
    rows, names = (rows[:, [names.index(name) for name in x[1]]], x[1]) if other else (rows, names)
    bad = np.argwhere(~np.isfinite(rows))
    if len(bad):
        fail(f"{path} has missing values (empty, NA, nan, inf) in {len(set(bad[:, 0].tolist()))} rows, as "
             f"row {bad[0, 0]} (from 0), column {names[bad[0, 1]] if names else bad[0, 1]}: leave them out, or fill in")
    return torch.from_numpy(np.ascontiguousarray(rows)), names


def judge(X, Y, names):
    """Say which column, or which few rows of a set, carry the cost alone -> whether any do."""
    carried = False
    of_x, of_y = ((rows - rows.mean(0)).square() for rows in (X, Y))
    for what, part in ("columns", of_x.mean(0) + of_y.mean(0)), ("rows of X", of_x.sum(1)), ("rows of Y", of_y.sum(1)):
        top, at = part.topk(len(part) // 100 + (len(part) > 1))
        count = int((top.cumsum(0) <= CARRIED * part.sum()).sum()) + 1
        if count <= len(top):
            carried = True
            ids = names[at[0]] if names and what == "columns" else f"{at[:min(count, 5)].tolist()}, from 0"
            print(printable(f"warning: over {CARRIED:.0%} of the mean cost is in {count} of {len(part)} {what} ({ids})"
                            ", which the plan follows alone: a small unit, an outlier, a code for missing values?"))
    if X.shape[1] > WIDE:
        print(f"over {WIDE} columns take minutes; 50 principal components of X and Y together, seconds")
    return carried


def read_column(path, rows, what):
    """A value for each row, .npy or text with a line each, below a header or none -> array (n,)."""
    try:
        column = np.load(path) if path.endswith(".npy") else np.array(open(path, encoding="utf-8").read().splitlines())
        column = column.reshape(-1)[len(column) - len(rows):] if len(column) == len(rows) + 1 else column.reshape(-1)
        column = column.astype(np.float64) if what == "weight" else column.astype(str)
    except (OSError, ValueError) as error:
        fail(f"{path} holds no {what} for each row ({reason_of(error)})")
    if len(column) != len(rows):
        fail(f"{path} holds {len(column)} {what}s for {len(rows)} rows")
    return column
