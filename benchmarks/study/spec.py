"""What a study runs: its YAML file, rows, and runs."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import lru_cache
from pathlib import Path

import yaml

from benchmarks import ROOT, records
from benchmarks.records import RESULTS


WORK = ROOT / "outputs/study"
FOLDERS = {"extends", "base", "teacher", "output_dir", "train_language", "baselines", "search_page"}
MAPPINGS = ("losses", "adapter")  # all other mappings are by language
QUERIES = ("target", "translated", "fused", "english")


@dataclass
class Row:
    """A line of the table: what is trained, over the study's settings.

    Args:
        label: Its name in tables.
        recipe: A file of modeling_nrccr/recipes: its own settings come before the row's; the folders of models
            that it names are left to `start_from` and `teacher`.
        teacher, start_from: Rows whose model of the same split and seed teaches, or gives the first weights.
        new_text_side: From `start_from` the visual side alone is taken.
        adapter: Of the model alone this language's adapter is trained (`NrccrModel.add_language`).
        rival: Trained in its place: a function of modeling_nrccr/training/baselines.py.
        english_text_only: English captions stand where the target captions would, in training.
        learns_from: Languages, each with its translators, whose training captions stand where the target language's
            would, as many of each: transfer, or where the target language is one of them, several at once.
        one_to_k: All the captions of a picture come in one batch (CCRK), which then has so many pictures.
        trained_in: The only language that is trained in: in others the model of that run is asked.
        tuned_as: The row whose point of the grid is taken; the row's own settings win over it.
        conditions, seeds, languages: Its own, where they are fewer than the study's.
        listed: False keeps it out of tables: it serves other rows.
    """

    label: str
    settings: dict = field(default_factory=dict)
    recipe: str | None = None
    teacher: str | None = None
    start_from: str | None = None
    new_text_side: bool = False
    adapter: bool = False
    rival: str | None = None
    english_text_only: bool = False
    learns_from: dict[str, str] | None = None
    one_to_k: bool = False
    trained_in: str | None = None
    tuned_as: str | None = None
    conditions: list[str] | None = None
    seeds: list[int] | None = None
    languages: list[str] | None = None
    listed: bool = True


@dataclass(frozen=True)
class Run:
    """What a line of the results is named by."""

    condition: str
    language: str
    split_seed: int
    seed: int
    row: str
    point: int | None = None  # of the grid; None: the chosen one

    @property
    def name(self) -> str:
        parts = [self.condition, self.language, f"split{self.split_seed}", f"seed{self.seed}", self.row]
        return "-".join(part for part in parts if part) + ("" if self.point is None else f"-grid{self.point}")


KEY = tuple(f.name for f in fields(Run))


def runs_of(file: Path) -> dict[Run, dict]:
    """Return what is found in a file of results, by its runs; read once for as long as it stays what it is."""
    if not file.exists():
        return {}
    state = file.stat()
    return _runs_of(file, state.st_ino, state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=32)
def _runs_of(file: Path, *state: int) -> dict[Run, dict]:
    found = (record for record in records.read(file) if "summary" not in record)
    return {Run(*(record[name] for name in KEY)): record for record in found}


class Study:
    """A YAML file of `benchmarks/studies/`. `consistency`: languages whose ranks of the same pictures are compared
    (`mean_rank_variance`).

    Args:
        path: The YAML file.
        results: A folder for what is found and for all else that is written; default: what is committed, and
            outputs/study.
        rows, split_seeds: Only these, and what they need.

    Raises:
        ValueError: A key, a row or a split seed that there is not.
    """

    KEYS = {"config", "conditions", "languages", "split_seeds", "seeds", "settings", "grid", "rows", "comparisons"}
    OPTIONAL = {"consistency"}

    def __init__(
        self,
        path: Path,
        results: Path | None = None,
        rows: Sequence[str] | None = None,
        split_seeds: Sequence[int] | None = None,
    ):
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
        if wrong := (set(loaded) - self.OPTIONAL) ^ self.KEYS:
            raise ValueError(f"{path}: keys missing or unknown: {', '.join(sorted(wrong))}")
        self.name = path.stem
        self.config, self.conditions, self.settings = loaded["config"], loaded["conditions"], loaded["settings"]
        self.languages, self.split_seeds, self.seeds = loaded["languages"], loaded["split_seeds"], loaded["seeds"]
        self.grid, self.comparisons = loaded["grid"], [tuple(pair) for pair in loaded["comparisons"]]
        self.consistency = loaded.get("consistency", [])
        known = {f.name for f in fields(Row)}
        for name, row in loaded["rows"].items():
            if unknown := set(row) - known:
                raise ValueError(f"{path}, row {name}: unknown keys {', '.join(sorted(unknown))}")
        self.rows = {name: Row(**row) for name, row in loaded["rows"].items()}
        for row in self.rows.values():
            if row.recipe:
                own = yaml.safe_load((ROOT / "modeling_nrccr/recipes" / row.recipe).read_text(encoding="utf-8"))
                row.settings = {key: value for key, value in own.items() if key not in FOLDERS} | row.settings
        named = {name for row in self.rows.values() for name in (row.teacher, row.start_from, row.tuned_as)} - {None}
        named |= {side.split(":")[0] for pair in self.comparisons for side in pair}
        self.asked_rows, self.asked_split_seeds = rows or list(self.rows), split_seeds or self.split_seeds
        if unknown := (named | set(self.asked_rows)) - self.rows.keys():
            raise ValueError(f"{path}: rows that there are not: {', '.join(sorted(unknown))}")
        if unknown := set(self.asked_split_seeds) - set(self.split_seeds):
            raise ValueError(f"{path}: split seeds that there are not: {', '.join(map(str, sorted(unknown)))}")
        self.committed = RESULTS / f"{self.name}.jsonl"
        self.file = results / f"{self.name}.jsonl" if results else self.committed
        self.work = results / self.name if results else WORK / self.name

    def grid_runs(self) -> Iterator[Run]:
        """Yield the runs by which hyper-parameters are chosen: once, for each row, at the first condition, language,
        split seed and seed."""
        for name in self.asked_rows:
            if self.rows[name].tuned_as is None or self.rows[name].tuned_as not in self.asked_rows:
                yield from self.grid_runs_of(name)

    def grid_runs_of(self, row: str) -> list[Run]:
        if len(self.grid) == 1:
            return []
        language = self.rows[row].trained_in or self.languages[0]
        first = (next(iter(self.conditions)), language, self.split_seeds[0], self.seeds[0])
        return [Run(*first, self.rows[row].tuned_as or row, point) for point in range(len(self.grid))]

    def runs(self) -> Iterator[Run]:
        for name in self.asked_rows:
            row = self.rows[name]
            seeds = self.seeds if row.seeds is None else row.seeds
            languages = self.languages if row.languages is None else row.languages
            conditions = self.conditions if row.conditions is None else row.conditions
            for place in itertools.product(conditions, languages, self.asked_split_seeds, seeds):
                yield Run(*place, name)

    def find(self, run: Run) -> dict | None:
        """Return what a run found; of a point of the grid what is committed, where it was not run here. None: it was
        not run."""
        found = runs_of(self.file).get(run)
        return runs_of(self.committed).get(run) if found is None and run.point is not None else found

    def load(self, run: Run) -> dict:
        """Return what a run found. Raises LookupError where it was not run."""
        if (found := self.find(run)) is None:
            raise LookupError(f"{self.file} has no {run.name}: run the study first")
        return found

    def summary(self) -> dict:
        """Return the means, intervals and comparisons of all runs."""
        return next(record["summary"] for record in records.read(self.file) if "summary" in record)

    def chosen(self, row: str) -> int:
        """Return the number of the point of the grid with the best SumR on validation; its grid runs must be there."""
        runs = self.grid_runs_of(row)
        return max(range(len(runs)), key=lambda point: self.load(runs[point])["selection"], default=0)

    def run_settings(self, run: Run) -> dict:
        """Return what the run changes in the study's `config`; a value may be a mapping, by language."""
        row = self.rows[run.row]
        point = self.grid[self.chosen(run.row) if run.point is None else run.point]
        adapter = {"train_language": row.trained_in or run.language} if row.adapter else {}
        own = adapter | {"language": run.language, "split_seed": run.split_seed, "seed": run.seed}
        settings = self.settings | point | row.settings | self.conditions[run.condition] | own
        return {
            key: value[run.language] if isinstance(value, dict) and key not in MAPPINGS else value
            for key, value in settings.items()
        }
