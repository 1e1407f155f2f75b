import re
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
NUMBER = re.compile(r"[-+]?\d[\d,]*\.?\d*(?:e[-+]?\d+)?")


def test_the_page_says_what_the_script_measures():
    from benchmarks.differences import __main__ as differences

    rows = {
        cells[1].strip(): cells[-2].strip()
        for line in differences.PAGE.read_text().splitlines()
        if len(cells := line.split("|")) == 7 and not re.match(r"what|---", cells[1].strip())
    }
    assert rows.keys() == differences.EFFECTS.keys() and all(rows.values())
    for row in differences.EFFECTS.keys() - differences.COSTLY:
        measured = differences.EFFECTS[row]()
        assert NUMBER.sub("0", measured) == NUMBER.sub("0", rows[row]), row
        numbers, written = ([float(n.replace(",", "")) for n in NUMBER.findall(t)] for t in (measured, rows[row]))
        # rounded, and other machines round otherwise
        assert numbers == pytest.approx(written, rel=0.05, abs=0.011), (row, measured)


def test_a_row_that_is_missing_is_named():
    from benchmarks.differences import __main__ as differences

    page = "| A | x | y | z | |\n| B | x | y | z | old |\n"
    assert differences.write(page, {"A": "1 -> 2"}) == page.replace("z | |\n", "z | 1 -> 2 |\n", 1)
    with pytest.raises(ValueError, match="0 rows that begin with 'C'"):
        differences.write(page, {"C": "1"})
