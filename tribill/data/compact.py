"""Makes the compact copy of the reference data: `python -m tribill.data.compact SOURCE_DIR [TARGET_DIR]`.

It keeps the columns named below, sorts the rows, and writes gzip without a time stamp, so that the same
source gives the same bytes."""

import csv
import gzip
import sys
from io import TextIOWrapper
from pathlib import Path

MAX_TOTAL_BYTES = 1_500_000
COLUMNS = {
    "practices": (
        *("ods_code", "name", "sub_icb_code", "sub_icb_name", "pcn_code", "pcn_name"),
        *("icb_code", "icb_name", "region_code", "region_name", "as_of"),
    ),
    "list_sizes": ("ods_code", "as_of", "patients"),
    "list_sizes_history": ("ods_code", "as_of", "patients"),
    "practice_systems": ("ods_code", "supplier"),
    "catalogue": (
        *("item_id", "price_id", "supplier_id", "item_name", "item_type", "provisioning"),
        *("unit", "time_unit", "price_gbp", "item_status"),
    ),
    "suppliers": ("supplier_id", "name"),
}


def compact(source: Path, target: Path) -> dict[str, tuple[int, int]]:
    """Write every file of COLUMNS, and return its rows and bytes."""
    written = {}
    for name, columns in COLUMNS.items():
        with (source / f"{name}.csv").open(encoding="utf-8", newline="") as lines:
            rows = sorted(tuple(row[column] for column in columns) for row in csv.DictReader(lines))
        path = target / f"{name}.csv.gz"
        with (
            path.open("wb") as file,
            gzip.GzipFile("", "wb", 9, file, mtime=0) as content,
            TextIOWrapper(content, encoding="utf-8", newline="") as text,
        ):
            csv.writer(text, lineterminator="\n").writerows((columns, *rows))
        written[name] = (len(rows), path.stat().st_size)
    total = sum(size for _, size in written.values())
    if total > MAX_TOTAL_BYTES:
        raise ValueError(f"the copy has {total:,} bytes, more than {MAX_TOTAL_BYTES:,}")
    return written


def main(arguments: list[str]) -> None:
    """Compact SOURCE_DIR into TARGET_DIR, by default the package's own directory."""
    if len(arguments) not in (1, 2):
        sys.exit("usage: python -m tribill.data.compact SOURCE_DIR [TARGET_DIR]")
    target = Path(arguments[1]) if len(arguments) == 2 else Path(__file__).parent
    for name, (rows, size) in compact(Path(arguments[0]), target).items():
        print(f"{name}: {rows:,} rows, {size:,} bytes")


if __name__ == "__main__":
    main(sys.argv[1:])
